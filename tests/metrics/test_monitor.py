"""PlasticityMonitor: what it sees, what it calls it, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity import functional as P
from lightning_plasticity.functional.ranks import leading_count, singular_values_of_moments
from lightning_plasticity.metrics import EffectiveRank
from tests.helpers.modules import Classifier, loader, trainer
from tests.helpers.numpy_diagnostics import numpy_dead, numpy_dormant, numpy_effective_rank, numpy_srank


class Functional(nn.Module):
    """Whatever is given, on hidden features, before the output layer."""

    def __init__(self, activation: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, width)
        self.out = nn.LazyLinear(3)
        self.activation = activation
        self.out(activation(self.hidden(torch.zeros(1, 4))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.hidden(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.outer(F.relu(self.inner(x))))


def mlp(*widths: int, last: nn.Module | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((4, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3), *([last] if last else []))


def seen(model: nn.Module, *inputs: Any, **options: Any) -> list[str]:
    monitor = PlasticityMonitor(model, **options)
    with monitor:
        model(*inputs)
    return list(monitor.layers)


def hooks(model: nn.Module) -> int:
    """Of all modules, and the global ones."""
    own = [
        value for m in model.modules() for key, value in vars(m).items() if "hooks" in key and isinstance(value, dict)
    ]
    everywhere = [value for key, value in vars(torch.nn.modules.module).items() if key.startswith("_global_")]
    return sum(len(value) for value in [*own, *everywhere] if isinstance(value, dict))


def modes() -> int:
    return torch._C._len_torch_function_stack()


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


# What it sees


def test_values_are_those_of_the_hidden_activations() -> None:
    model = mlp(8, 6)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    first = torch.relu(model[0](X))
    second = torch.relu(model[2](first))
    values = monitor.compute()
    dead = []
    for name, h in (("0", first), ("2", second)):
        f = h.detach().double().numpy()
        assert values[f"dormant_fraction/{name}"].item() == numpy_dormant(f)
        assert values[f"dead_fraction/{name}"].item() == numpy_dead(f)
        assert values[f"effective_rank/{name}"].item() == pytest.approx(numpy_effective_rank(f), rel=1e-6)
        assert values[f"srank/{name}"].item() == numpy_srank(f)
        dead.append(numpy_dead(f))
    assert values["dead_fraction"].item() == pytest.approx((8 * dead[0] + 6 * dead[1]) / 14)
    assert len(values) == 6 * 3


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (Tensor.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.clone().relu_(), "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: F.relu(input=x), "relu"),
        (F.gelu, "gelu"),
        (F.silu, "silu"),
        (F.leaky_relu, "leaky_relu"),
        (torch.tanh, "tanh"),
        (Tensor.sigmoid, "sigmoid"),
        (F.glu, "glu"),
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: torch.clamp(x, 0, 6), "clamp"),
        (lambda x: x.clone().clamp_min_(0.0), "clamp"),
        (lambda x: torch.clip(input=x, min=0), "clamp"),
        (lambda x: torch.maximum(x, torch.zeros(())), "maximum"),
        (lambda x: torch.max(torch.zeros_like(x), x), "max"),
        (lambda x: torch.where(x > 0, x, 0.1 * x), "where"),
        (lambda x: torch.where(x.le(0), x.new_zeros(()), x), "where"),
        (lambda x: x.masked_fill(x < 0, 0.0), "masked_fill"),
        (lambda x: x * (x > 0), "mul"),
        (lambda x: F.dropout(F.relu(x), 0.5), "relu"),
        (lambda x: F.layer_norm(F.elu(x), (8,)), "elu"),
    ],
)
def test_activation_functions_are_seen_in_every_form(activation: Callable[[Tensor], Tensor], name: str) -> None:
    assert seen(Functional(activation), X) == ["hidden"]
    without_owner = Functional(activation)
    without_owner.hidden = Step(lambda x: F.linear(x, torch.ones(8, 4)))
    assert seen(without_owner, X) == [name]


def test_a_mask_from_elsewhere_is_no_activation_function() -> None:
    for function in (
        lambda x: x * (torch.rand(8) > 0.5),
        lambda x: x.masked_fill(torch.rand(8) > 0.5, 0.0),
        lambda x: torch.where(torch.rand(8) > 0.5, x, 0.0),
        lambda x: torch.maximum(x, torch.ones(())),
        lambda x: torch.where(x.isfinite(), x, 0.0),
    ):
        assert seen(nn.Sequential(nn.Linear(4, 8), Step(function), *mlp(8)[1:]), X) == ["0"]
        with pytest.warns(UserWarning, match="has seen no hidden layer"):
            assert seen(Functional(function), X) == []


def test_a_clamp_is_an_activation_only_at_zero_and_after_a_layer() -> None:
    model = mlp(8)
    model.append(Step(lambda x: x.norm(dim=1, keepdim=True).clamp(min=1e-6)))
    model.append(nn.Linear(1, 1))
    assert seen(model, X) == ["0"]
    assert seen(nn.Sequential(Step(lambda x: x.clamp(0, 1)), *mlp(8)), X) == ["1"]  # images, say


@pytest.mark.parametrize(
    "unrecognised",
    [
        lambda x: torch.maximum(x, 0 * x),
        lambda x: x * (x > 0).float(),
        lambda x: (x + x.abs()) / 2,
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ],
)
def test_a_network_in_which_nothing_is_recognised_says_so(unrecognised: Callable[[Tensor], Tensor]) -> None:
    model = Functional(unrecognised)
    monitor = PlasticityMonitor(model)
    monitor.attach()
    model(X)
    with pytest.warns(UserWarning, match=r"no hidden layer, .*name the modules that return them, .*layers=\[...\]"):
        monitor.detach()
    assert monitor.layers == {}
    with PlasticityMonitor(nn.Linear(4, 2)) as monitor:  # it has none
        monitor._network[0](X)
    model = nn.Sequential(nn.Linear(4, 8), Step(unrecognised), nn.Linear(8, 2))
    assert seen(model, X, layers=["1"]) == ["1"]


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.gate = gate

    def hidden(self, x: Tensor) -> Tensor:
        return self.gate(self.a(x), self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


@pytest.mark.parametrize(
    ("gate", "name"),
    [
        (lambda a, b: a * torch.sigmoid(a), "a"),
        (lambda a, b: F.silu(a) * b, "a"),
        (lambda a, b: b.mul_(F.silu(a)), "a"),
        (lambda a, b: a * F.silu(b), "b"),
        (lambda a, b: nn.SiLU()(a) * b, "a"),
        (lambda a, b: a * torch.sigmoid(a) * b, "a"),
        (lambda a, b: F.relu(a) * torch.tanh(b), "a"),
        (lambda a, b: (h := F.relu(a)) * h, "a"),
        (lambda a, b: F.dropout(F.gelu(a) * b, 0.0), "a"),
    ],
)
def test_of_gates_the_product_counts(gate: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    model = Gated(gate)
    nn.init.zeros_(model.b.weight[:3])
    nn.init.zeros_(model.b.bias[:3])
    with PlasticityMonitor(model) as monitor:
        model(X)
    f = model.hidden(X).detach().double().numpy()
    assert list(monitor.layers) == [name]
    values = monitor.compute()
    assert values[f"dead_fraction/{name}"].item() == numpy_dead(f)
    assert values[f"effective_rank/{name}"].item() == pytest.approx(numpy_effective_rank(f), rel=1e-6)


def test_what_is_multiplied_by_something_else_is_no_gate() -> None:
    mask = torch.zeros(8)
    for scale in (
        lambda a: F.relu(a) * mask,
        lambda a: F.relu(a) * 0.0,
        lambda a: F.relu(a) * mask.expand(32, 8),
        lambda a: (h := F.relu(a)) * (torch.rand_like(h) > 2),  # dropout by hand
        lambda a: (h := F.relu(a)) * torch.full_like(h, 0.0).bernoulli(),
        lambda a: (h := F.relu(a)) * h.new_zeros(h.shape),
    ):
        model = Gated(lambda a, b, scale=scale: scale(a))
        with PlasticityMonitor(model) as monitor:
            model(X)
        f = F.relu(model.a(X)).detach().double().numpy()
        assert monitor.compute()["dead_fraction/a"].item() == numpy_dead(f) < 1


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(), nn.RReLU(), nn.GELU(), nn.Tanh()])
def test_activation_modules_are_seen_once_and_by_their_path(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3))
    assert seen(model, X) == ["0"]


def test_an_activation_changed_in_place_later_is_seen_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Threshold(2.0, 0.0, inplace=True), nn.Linear(8, 3))
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    assert monitor.compute()["dead_fraction/0"].item() == 0
    assert monitor.compute()["dead_fraction/0-2"].item() == 1


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Sequential(nn.Tanh(), nn.Flatten())])
def test_the_output_layer_does_not_count_whatever_its_activation(last: nn.Module) -> None:
    assert seen(mlp(8, last=last), X) == ["0"]


def test_activations_one_after_the_other_before_the_output_are_no_hidden_layers() -> None:
    assert seen(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh()), X) == []
    assert seen(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 2)), X) == ["0", "0-2"]


def test_several_monitors_do_not_see_each_other() -> None:
    model = mlp(8, last=nn.Sigmoid())
    outer, inner = PlasticityMonitor(model), PlasticityMonitor(model)
    with outer, inner:
        model(X)
    assert list(outer.layers) == list(inner.layers) == ["0"]
    assert outer.compute() == inner.compute()


def test_an_activation_on_the_way_to_the_loss_is_no_hidden_layer() -> None:
    class Heads(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            h = F.relu(self.body(batch))
            first = torch.sigmoid(self.one(h))  # a layer is called after it, but not on it
            second = self.two(h)
            return F.mse_loss(first, torch.ones_like(first)) + F.softplus(second).mean()

    model = Heads()
    monitor = PlasticityMonitor(model)
    with monitor:
        model.training_step(X, 0).backward()
    assert list(monitor.layers) == ["body"]


@pytest.mark.parametrize(
    "head",
    [
        lambda z, t: z * t,  # a learned temperature
        lambda z, t: F.normalize(z) @ F.normalize(z).T / t,  # similarities of embeddings
        lambda z, t: torch.einsum("nd,md->nm", z, z - t),
        lambda z, t: F.layer_norm(z, z.shape[1:], t.expand(z.shape[1:]), None),
        lambda z, t: torch.cat([t.expand(1, z.shape[1]), z]),
        lambda z, t: torch.distributions.Normal(z, t).log_prob(z + 1),  # a learned spread
        lambda z, t: torch.distributions.Normal(z, t.expand_as(z)).sample(),
        lambda z, t: torch.einsum("nc,nc->n", z, torch.ones(z.shape)),  # the overlap with targets
        lambda z, t: F.linear(torch.zeros_like(z), t.expand(2, 3)),  # of its shape
    ],
)
def test_a_parameter_in_the_output_makes_no_hidden_layer_of_what_is_before_it(
    head: Callable[[Tensor, Tensor], Tensor],
) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.t = mlp(8), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return head(torch.tanh(self.body(x)), self.t)

    assert seen(Embedding(), X) == ["body.0"]


def test_a_product_with_weights_makes_a_hidden_layer_of_what_is_before_it_in_every_form() -> None:
    weight = nn.Parameter(torch.randn(3, 8))
    for head in (
        lambda z: z @ weight.t(),
        lambda z: z @ (weight * 2).T,  # masked weights, or those of functional_call
        lambda z: torch.addmm(torch.zeros(3), z, weight.T),
        lambda z: torch.einsum("nd,kd->nk", z, weight),
        lambda z: torch.cdist(z, weight),
        lambda z: z.pow(2) @ torch.randn(8, 3),
    ):
        assert seen(chained(nn.Linear(4, 8), nn.Tanh(), head), X) == ["0"]


def test_the_variance_of_a_variational_autoencoder_counts_as_the_decoder_reads_it() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.variance, self.decoder = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 4)
            self.reads = True

        def forward(self, x: Tensor) -> Tensor:
            mean, variance = self.mean(x), F.softplus(self.variance(x))
            return self.decoder(mean + variance * torch.randn(3)) if self.reads else (mean / variance).square().sum()

    model = Autoencoder()
    assert seen(model, X) == ["variance"]
    model.reads = False  # on the way to the loss alone
    with pytest.warns(UserWarning, match="has seen no hidden layer"):
        assert seen(model, X) == []


def test_activations_written_into_a_tensor_are_followed() -> None:
    def scattered(h: Tensor) -> Tensor:
        padded = torch.zeros(40, 8)
        padded[torch.arange(32) + 3] = h
        return padded

    def by_time(h: Tensor) -> Tensor:
        sequence = torch.zeros(32, 2, 8)
        sequence[:, 0], sequence[:, 1] = h, 2 * h
        return sequence

    for write in (scattered, by_time):
        model = chained(nn.Linear(4, 8), nn.ReLU(), write, nn.Linear(8, 2))
        with PlasticityMonitor(model) as monitor:
            model(X)
        assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {"0": (8, 32)}


def test_activations_of_parameters_are_no_layer() -> None:
    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.softplus(self.weight))

    assert seen(Positive(), X) == []


def test_a_handwritten_activation_module_is_seen_by_its_result() -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    model = nn.Sequential(nn.Linear(4, 8), Swish(), nn.Linear(8, 3))
    monitor = PlasticityMonitor(model, measures=["feature_norm"])
    with monitor:
        model(X)
    h = F.silu(model[0](X)).detach().double().numpy()
    assert monitor.compute()["feature_norm/0"].item() == pytest.approx(np.linalg.norm(h, axis=1).mean(), rel=1e-6)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_seen_by_their_result(kind: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.out = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.recurrent(x)[0][:, -1])

    model = Recurrent()
    monitor = PlasticityMonitor(model)
    with monitor:
        model(torch.randn(5, 7, 4))
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {"recurrent": (6, 35)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu])
def test_transformers_are_seen_in_training_and_evaluation(training: bool, activation: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2)).train(training)
    monitor = PlasticityMonitor(model)
    with monitor, torch.set_grad_enabled(training):
        model(torch.randn(3, 5, 8))
    assert list(monitor.layers) == ["0.layers.0.linear1", "0.layers.1.linear1"]
    assert [layer.samples for layer in monitor.layers.values()] == [15, 15]


@pytest.mark.parametrize(
    ("layer", "shape", "units", "samples"),
    [
        (nn.Conv1d(3, 7, 3, padding=1), (5, 3, 11), 7, 55),
        (nn.Sequential(nn.Conv1d(3, 7, 3, padding=1), nn.BatchNorm1d(7), nn.Dropout(0.1)), (5, 3, 11), 7, 55),
        (nn.ConvTranspose1d(3, 7, 1), (5, 3, 11), 7, 55),
        (nn.Conv2d(3, 7, 3, padding=1), (5, 3, 4, 6), 7, 120),
        (nn.Conv2d(3, 7, 3, padding=1), (3, 4, 6), 7, 24),
        (nn.Conv3d(3, 7, 1), (2, 3, 4, 2, 3), 7, 48),
        (nn.Linear(3, 7), (5, 3), 7, 5),
        (nn.Linear(3, 7), (3,), 7, 1),
        (nn.Linear(3, 7), (5, 11, 3), 7, 55),
        (nn.Linear(3, 7), (5, 4, 6, 3), 7, 120),
    ],
)
def test_units_are_those_of_the_layer_that_made_them(
    layer: nn.Module, shape: tuple[int, ...], units: int, samples: int
) -> None:
    class Similarity(nn.Module):  # tells nothing about dimensions
        def __init__(self) -> None:
            super().__init__()
            self.prototype = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.cosine_similarity(x, self.prototype, dim=-1)

    model = nn.Sequential(layer, nn.ReLU(), Similarity())
    monitor = PlasticityMonitor(model)
    with monitor:
        model(torch.randn(shape))
    (layer_seen,) = monitor.layers.values()
    assert (layer_seen.units, layer_seen.samples) == (units, samples)


class Around(nn.Module):
    """An activation, and what comes before and after it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.before(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.hidden(x))


def chained(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """One after the other; modules become part of the network."""
    chain = nn.Sequential()
    for step in steps:
        chain.append(step if isinstance(step, nn.Module) else Step(step))
    return chain


class Step(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def same(x: Tensor) -> Tensor:
    return x


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def shuffled(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 3, -1).transpose(1, 2).reshape(x.shape)


def read_in_channels() -> nn.Module:
    return nn.Conv1d(6, 2, 1)


def read_in_last() -> nn.Module:
    return nn.Linear(6, 2)


@pytest.mark.parametrize(
    ("before", "after", "dim"),
    [
        # told by what came before
        (nn.Conv1d(6, 6, 1), same, 1),
        (chained(nn.Conv1d(6, 6, 1), turned), same, 2),
        (chained(nn.Linear(6, 6), turned), same, 1),
        (chained(nn.Linear(6, 6), lambda x: x.permute(0, 2, 1).contiguous()), same, 1),
        (chained(nn.Linear(6, 6), lambda x: x.mT), same, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x.chunk(2, 1)[1]), same, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x[:, 3:9]), same, 1),
        (chained(nn.Conv1d(6, 12, 1), lambda x: x.narrow(1, 2, 6)), same, 1),
        (chained(nn.Conv1d(6, 12, 1), nn.GLU(dim=1)), same, 1),
        (chained(nn.Conv1d(6, 3, 1), lambda x: torch.cat([x, -x], 1)), same, 1),
        (chained(nn.Conv1d(6, 6, 1), shuffled), same, 1),
        (chained(nn.Conv1d(6, 6, 1), lambda x: x.roll(1, 2) * torch.arange(5.0)[:, None, None]), same, 1),
        (chained(nn.Conv1d(6, 6, 1), nn.MaxPool1d(1), nn.Dropout(0.0)), same, 1),
        (
            chained(lambda x: x[:, None], nn.Conv2d(1, 6, (1, 6)), lambda x: x[..., 0], lambda x: F.pad(x, (0, 0))),
            same,
            1,
        ),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, (6, 1)), lambda x: x.squeeze(2)), same, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, (6, 1)), lambda x: x.mean(2)), same, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, 1), lambda x: x.flatten(2)), same, 1),
        (chained(lambda x: x[:, None], nn.Conv2d(1, 6, 1), lambda x: x.flatten(2).transpose(1, 2)), same, 2),
        (nn.BatchNorm1d(6), same, 1),
        (nn.LayerNorm(6), same, 2),
        (chained(nn.LayerNorm(6), turned), same, 1),
        (chained(nn.Linear(6, 6), nn.BatchNorm1d(6)), same, 2),  # a norm over tokens
        (chained(nn.Conv1d(6, 6, 1), nn.LayerNorm(6)), same, 1),  # and one over positions
        # told by what comes after
        (same, read_in_channels(), 1),
        (same, read_in_last(), 2),
        (lambda x: torch.eye(6) @ x, read_in_channels(), 1),
        (chained(nn.Linear(6, 6), lambda x: torch.eye(6) @ x), same, 2),
        (same, chained(turned, read_in_channels()), 2),
        (same, chained(turned, read_in_last()), 1),
        (same, chained(nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(36, 2)), 1),
        (same, chained(nn.MaxPool1d(2), nn.Flatten(), nn.Linear(18, 2)), 1),
        (same, chained(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 2)), 1),
        (same, chained(lambda x: x.mean(-1), nn.Linear(6, 2)), 1),
        (same, chained(lambda x: x.mean(1), nn.Linear(6, 2)), 2),
        (same, chained(lambda x: x[:, -1], nn.Linear(6, 2)), 2),
        (same, chained(lambda x: x[:, :, -1], nn.Linear(6, 2)), 1),
        (same, chained(shuffled, read_in_channels()), 1),
        (same, chained(lambda x: torch.cat([x, x], 1).chunk(2, 1)[0], read_in_channels()), 1),
        (same, chained(nn.GLU(dim=2), lambda x: x + x.roll(1, 0), read_in_channels()), 1),
        (chained(nn.Linear(6, 36), lambda x: x[:, 0].view(-1, 6, 6)), read_in_channels(), 1),
        (chained(nn.Linear(6, 36), lambda x: x[:, 0].unflatten(1, (6, 6))), read_in_last(), 2),
    ],
)
def test_units_of_three_dimensions_are_told_by_the_layers_before_and_behind(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], dim: int
) -> None:
    torch.manual_seed(0)
    prototype = nn.Parameter(torch.ones(1, 1, 1))
    if after is same:  # a layer that tells nothing
        after = Step(lambda x: F.cosine_similarity(x, prototype))
    model, x = Around(before, after), torch.randn(5, 6, 6)
    with PlasticityMonitor(model, dormant_threshold=0.9) as monitor:
        model(x)
    f = model.hidden(x).detach().movedim(dim, -1).double().numpy()
    f = f.reshape(-1, f.shape[-1])
    name = "relu" if "relu" in monitor.layers else [*monitor.layers][-1]
    layer = monitor.layers[name]
    assert layer.units == f.shape[-1]
    assert not layer.units_are_assumed
    values = monitor.compute()
    assert values[f"effective_rank/{name}"].item() == pytest.approx(numpy_effective_rank(f), rel=1e-6)
    assert values[f"dormant_fraction/{name}"].item() == pytest.approx(numpy_dormant(f, 0.9))


def test_where_nothing_tells_which_dimension_counts_units_it_is_said_once() -> None:
    class Untold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Functional(torch.relu), nn.Linear(30, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(x).flatten(1))

    model, x = Untold(), torch.randn(4, 5, 6)
    monitor = PlasticityMonitor(model, measures=["feature_norm"])
    monitor.attach()
    model(x)
    assert monitor.layers["tanh"].units_are_assumed  # known before it is detached
    with pytest.warns(UserWarning, match="no layer before or behind tanh tells which dimension counts units"):
        monitor.detach()
    expected = torch.tanh(x).norm(dim=2).mean().item()
    assert monitor.compute()["feature_norm/tanh"].item() == pytest.approx(expected, rel=1e-6)
    with monitor:  # said once
        model(x)
    assert monitor.layers["tanh"].samples == 2 * 4 * 5
    with PlasticityMonitor(model, channel_dim=1, measures=["feature_norm"]) as told:
        model(x)
    assert (told.layers["tanh"].units, told.layers["tanh"].units_are_assumed) == (5, False)
    assert told.compute()["feature_norm/tanh"].item() == pytest.approx(torch.tanh(x).norm(dim=1).mean().item())


def test_functions_that_make_other_dimensions_tell_nothing() -> None:
    fold = chained(nn.Conv1d(6, 24, 1), lambda x: F.fold(x, (4, 6), 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with PlasticityMonitor(fold) as monitor:
        fold(torch.randn(5, 6, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * 24)
    real = chained(nn.Linear(6, 4), lambda x: torch.view_as_real(torch.fft.fft(x, dim=1)), nn.ReLU(), nn.Linear(2, 2))
    with PlasticityMonitor(real) as monitor:
        real(torch.randn(5, 3, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (2, 5 * 3 * 4)


def test_units_of_four_dimensions_may_be_told_to_be_in_any_of_them() -> None:
    model = chained(nn.ReLU(), lambda x: x[:, None] - 0.3, nn.ReLU(), lambda x: x.squeeze(1), nn.Conv1d(6, 2, 1))
    with PlasticityMonitor(model, measures=["feature_norm"]) as monitor:
        model(x := torch.randn(5, 6, 7))
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {
        "0": (6, 35),
        "2": (6, 35),
    }
    expected = F.relu(F.relu(x) - 0.3).norm(dim=1).mean().item()
    assert monitor.compute()["feature_norm/2"].item() == pytest.approx(expected, rel=1e-6)


def test_scores_between_changing_numbers_of_nodes_do_not_end_a_forward_pass() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.w(x)
            return self.out(F.leaky_relu(self.a(h) + self.b(h).T).softmax(1) @ h)

    model = Attention()
    monitor = PlasticityMonitor(model).attach()
    for nodes in (5, 8):
        model(X[:nodes])
    with pytest.warns(UserWarning, match="left out: layer 'b' had 5 units and has 8 now: "):
        monitor.detach()
    assert monitor.layers["b"].samples == 5


def test_channels_last_images_are_told_by_the_layer_behind() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(6, 2))
    with PlasticityMonitor(model) as monitor:
        model(torch.randn(2, 3, 4, 6))
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 24)


@pytest.mark.parametrize("told", [True, False])
def test_sequences_of_changing_length_do_not_end_a_forward_pass(told: bool) -> None:
    reader = nn.Conv1d(6, 2, 1) if told else nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(nn.ReLU(), reader)
    monitor = PlasticityMonitor(model, measures=["dead_fraction"])
    monitor.attach()
    lengths = (6, 9, 4)
    for length in lengths:
        model(torch.randn(5, 6, length))
    if told:
        monitor.detach()
        assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * sum(lengths))
    else:
        with (
            pytest.warns(UserWarning, match="no layer before or behind 0 tells"),
            pytest.warns(UserWarning, match="left out: layer '0' had 6 units and has 4 now: "),
        ):
            monitor.detach()
        assert monitor.layers["0"].samples == 5 * 6, "what does not fit is left out"


def test_matrix_products_and_einsum_with_weights_tell_their_dimension() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7, 2))
            self.product = self.einsum

        def einsum(self, x: Tensor) -> Tensor:
            return torch.einsum("nct,cd->ndt", F.relu(torch.einsum("nct,cd->ndt", x, self.one)), self.two)

        def before(self, x: Tensor) -> Tensor:
            return self.two.T @ F.relu(self.one.t() @ x)

        def behind(self, x: Tensor) -> Tensor:
            return F.relu(x.mT @ self.one) @ self.two

        def only_read(self, x: Tensor) -> Tensor:
            return torch.einsum("nct,cd->ndt", F.relu(x), self.one)

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x)

    model, x = Products(), torch.randn(4, 6, 5)
    for product, units, name in (
        ("einsum", 7, "one"),
        ("before", 7, "one"),
        ("behind", 7, "one"),
        ("only_read", 6, "relu"),
    ):
        model.product = getattr(model, product)
        with PlasticityMonitor(model) as monitor:
            model(x)
        assert (monitor.layers[name].units, monitor.layers[name].samples) == (units, 20), product


def test_units_are_followed_through_a_transposition() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(3, 7, 1), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.conv(x).transpose(1, 2)))

    model = Transposed()
    nn.init.constant_(model.conv.bias[:2], -100.0)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(torch.randn(5, 3, 7))  # as many positions as channels
    assert monitor.compute()["dead_fraction/conv"].item() == 2 / 7


def test_checkpointed_layers_are_seen_once() -> None:
    for reentrant in (True, False):

        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block, self.out = Block(4), nn.Linear(4, 2)

            def forward(self, x: Tensor, reentrant: bool = reentrant) -> Tensor:
                return self.out(checkpoint(self.block, x, use_reentrant=reentrant))

        model = Checkpointed()
        for layers in (["*"], ["block"]):
            monitor = PlasticityMonitor(model, layers)
            with monitor:
                model(X.clone().requires_grad_()).sum().backward()
            samples = {name: layer.samples for name, layer in monitor.layers.items()}
            assert samples == dict.fromkeys(layers if layers == ["block"] else ["block.inner", "block.outer"], len(X))


# What it calls it


def test_functions_are_named_by_the_module_that_calls_them_and_numbered() -> None:
    model = nn.Sequential(Block(4), nn.ModuleDict({"inner": Block(4)})["inner"], nn.Linear(4, 2))
    assert seen(model, X) == ["0.inner", "0.outer", "1.inner", "1.outer"]


def test_shared_activation_modules_are_one_layer_for_each_place() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.act(self.two(self.act(self.one(x)))))

    model = Shared()
    monitor = PlasticityMonitor(model)
    for _ in range(2):
        with monitor:
            model(X)
            model(X)
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {
        "one": (8, 4 * len(X)),
        "two": (5, 4 * len(X)),
    }


def test_one_activation_module_registered_in_several_places_has_the_name_of_each() -> None:
    act = nn.GELU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), act), nn.Sequential(nn.Linear(8, 5), act), nn.Sequential(nn.Linear(5, 3))
    )
    assert seen(model, X) == ["0.0", "1.0"]
    assert seen(model, X, layers=["0.1", "1.1"]) == ["0.1", "1.1"]


def test_a_block_that_runs_twice_is_one_layer_with_twice_the_samples() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Block(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.block(self.block(x)))

    model = Twice()
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {
        "block.inner": 2 * len(X),
        "block.outer": 2 * len(X),
    }


def test_layers_are_chosen_by_pattern_or_by_the_path_of_any_module() -> None:
    model = nn.Sequential(Block(4), Block(4), nn.Linear(4, 2))
    assert seen(model, X, layers=["1.*"]) == ["1.inner", "1.outer"]
    assert seen(model, X, layers=["*.outer"]) == ["0.outer", "1.outer"]
    assert seen(model, X, layers=["0", "1.inner"]) == ["0", "1.inner"]
    assert seen(mlp(8), X, layers=["1"]) == ["1"]
    assert seen(mlp(8, last=nn.Sigmoid()), X, layers=["3"]) == ["3"]  # asked for, even if it is the output


def test_a_pattern_that_matches_nothing_says_what_there_is() -> None:
    monitor, model = PlasticityMonitor(layers=["*.fc"]), mlp(8, 6)
    with monitor.attach(model):
        pass  # nothing was seen: nothing can be said
    monitor.attach(model)
    model(X)
    with pytest.warns(UserWarning, match=r"layers=\['\*.fc'\] match none of the activations seen: \['0', '2'\]"):
        monitor.detach()


@pytest.mark.parametrize("name", ["1", "net.5", "body.*", "net.1.relu-", "net.nonsense", "relu.1"])
def test_a_name_that_can_match_nothing_is_refused_at_once(name: str) -> None:
    model = LightningModule()
    model.net = mlp(8)
    monitor = PlasticityMonitor(model.net, layers=["net.1", name])
    with pytest.raises(ValueError, match=r"can match nothing in LightningModule, which is made of \['net'\]: names"):
        monitor.attach(model)
    assert hooks(model) == modes() == 0
    assert not monitor.attached


def test_names_of_functions_of_numbered_layers_and_of_the_network_itself_are_not_refused() -> None:
    model = nn.Sequential(Block(4), nn.ModuleDict({"act": nn.ReLU()}), nn.Linear(4, 2))
    functions = ("0.relu", "0.relu-2", "re*", "relu", "*", "0.re?u-[12]", "1.act", "1.a*", "0.act", "", "2")
    for name in (*functions, "0.inner", "0.inner-[23]", "0.outer-2"):
        PlasticityMonitor(layers=[name]).attach(model).detach()


# Over time


def test_layers_may_appear_later_and_vanish() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)])

        def forward(self, x: Tensor) -> Tensor:
            for part in list(self.parts)[:-1]:
                x = F.relu(part(x))
            return self.parts[-1](x)

    model = Changing()
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    model.parts.insert(1, nn.Linear(8, 8))
    with monitor:
        model(X)
        model.parts.insert(1, nn.Linear(8, 8))  # while it is attached
        model(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {
        "parts.0": 3 * len(X),
        "parts.1": 2 * len(X),
        "relu": len(X),
    }
    monitor.reset()
    assert monitor.layers == {}
    del model.parts[1:3]
    with monitor:
        model(X)
    assert list(monitor.layers) == ["parts.0"]
    assert not any("parts.1" in name for name in monitor.compute())


def test_a_layer_may_change_its_width_after_a_reset_and_not_before() -> None:
    monitor = PlasticityMonitor(max_samples=16)
    monitor.update({"a": torch.ones(9, 4)})
    with pytest.raises(ValueError, match=r"layer 'a' had 4 units and has 20 now: reset\(\) the monitor"):
        monitor.update({"a": torch.ones(9, 20)})
    for width in (20, 5):  # beyond max_samples and back
        monitor.reset()
        monitor.update({"a": torch.randn(9, width)})
        assert monitor.layers["a"].units == width
        assert monitor.compute()["effective_rank/a"] > 1


def test_batches_add_up_and_modes_stay_as_they_are() -> None:
    model = mlp(8).eval()
    model[0].train()
    monitor = PlasticityMonitor(model)
    with monitor:
        for part in X.split(5):
            model(part)
    assert [module.training for module in model] == [True, False, False]
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(
        numpy_effective_rank(torch.relu(model[0](X)).detach().double().numpy()), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision(dtype: torch.dtype) -> None:
    model, inputs = mlp(8).to(dtype), X.to(dtype)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(inputs)
    h = torch.relu(model[0](inputs)).detach().double().numpy()
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(numpy_effective_rank(h), rel=1e-6)


def test_autocast_does_not_reach_the_statistics() -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with monitor, torch.autocast("cpu", torch.bfloat16):
        model(X)
        h = torch.relu(model[0](X))
    assert h.dtype == torch.bfloat16
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(
        numpy_effective_rank(h.double().detach().numpy()), rel=1e-6
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_and_in_inference_mode(mode: Callable[[], Any]) -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with mode(), monitor:
        model(X)
    with monitor:
        model(X)
    assert monitor.layers["0"].samples == 2 * len(X)
    assert monitor.clone().compute() == monitor.compute()


def test_nan_is_reported_for_the_layer_and_over_all() -> None:
    model = mlp(8, 6)
    monitor = PlasticityMonitor(model)
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with monitor:
        model(X)
    values = monitor.compute()
    for measure in monitor.measures:
        assert values[f"{measure}/0"].isfinite()
        assert values[f"{measure}/2"].isnan()
        assert values[measure].isnan()


def test_a_network_that_is_dead_is_dormant_and_never_nan() -> None:
    model = mlp(8)
    nn.init.constant_(model[0].bias, -100.0)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    values = {name: value.item() for name, value in monitor.compute().items() if "/" not in name}
    assert values == {
        "dormant_fraction": 1,
        "dead_fraction": 1,
        "effective_rank": 0,
        "stable_rank": 0,
        "srank": 0,
        "feature_norm": 0,
    }


def test_nothing_seen_is_no_number() -> None:
    monitor = PlasticityMonitor(nn.Linear(4, 2))
    with monitor:
        monitor._network[0](X)
    with pytest.warns(UserWarning, match="was called before"):
        values = monitor.compute()
    assert list(values) == monitor.measures
    assert all(value.isnan() for value in values.values())


# Bounded memory


def activations(samples: int, units: int, rank: int) -> Tensor:
    return torch.randn(samples, rank) @ torch.randn(rank, units)


def test_wide_layers_are_exact_up_to_the_cap_on_samples() -> None:
    h = activations(60, 100, 40)
    monitor = PlasticityMonitor(max_samples=64, measures=["effective_rank", "dead_fraction"])
    monitor.update({"wide": h[:25]})
    monitor.update({"wide": h[25:]})
    assert monitor.layers["wide"].ranked_samples == 60
    assert not monitor.layers["wide"].ranks_are_estimates
    assert monitor.compute()["effective_rank/wide"].item() == pytest.approx(
        numpy_effective_rank(h.double().numpy()), rel=1e-6
    )


def test_beyond_the_cap_they_are_marked_as_estimates_and_memory_is_bounded() -> None:
    monitor = PlasticityMonitor(max_samples=64, measures=["effective_rank", "dead_fraction"])
    h = torch.randn(1000, 100)
    h[:, 0] = 0
    h[999, 0] = 1  # beyond the cap: only ranks are estimates
    for part in h.split(100):
        monitor.update({"wide": part, "narrow": part[:, :10]})
    layer = monitor.layers["wide"]
    assert (layer.samples, layer.ranked_samples, layer.ranks_are_estimates) == (1000, 64, True)
    assert not monitor.layers["narrow"].ranks_are_estimates
    with pytest.warns(UserWarning, match="the ranks of wide are estimates, from 64 samples of at most 4096 units"):
        values = monitor.compute()
    assert values["dead_fraction/wide"] == 0
    stored = sum(row.numel() for row in getattr(monitor, "wide|rows"))
    assert stored == 64 * 100
    kept = torch.cat(getattr(monitor, "wide|rows")).numpy()
    among_them = (kept[:, None] == h[None].double().numpy()).all(2)
    assert among_them.any(1).all(), "they are samples as they were"
    assert among_them.any(0).sum() == 64, "none of them twice"
    assert values["effective_rank/wide"].item() == pytest.approx(numpy_effective_rank(kept), rel=1e-6)


@pytest.mark.parametrize("rank", [3, 30])
def test_random_sums_of_units_keep_the_ranks_of_very_wide_layers(rank: int) -> None:
    h = activations(64, 20_000, rank)
    monitor = PlasticityMonitor(max_units=4096, measures=["effective_rank"])
    monitor.update({"wide": h})
    assert monitor.layers["wide"].ranks_are_estimates
    assert getattr(monitor, "wide|rows")[0].shape == (64, 4096)
    with pytest.warns(UserWarning, match="are estimates"):
        value = monitor.compute()["effective_rank/wide"].item()
    assert value == pytest.approx(numpy_effective_rank(h.double().numpy()), rel=0.02)


# It leaves nothing behind


@pytest.mark.parametrize("layers", [None, ["*"], ["0"]])
def test_detached_there_is_no_hook_in_any_module_and_no_mode(layers: list[str] | None) -> None:
    model = nn.Sequential(Block(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    before = hooks(model), modes(), {k: set(vars(m)) for k, m in model.named_modules()}
    monitor = PlasticityMonitor(model, layers)
    assert (hooks(model), modes()) == before[:2]
    with monitor:
        assert hooks(model) > before[0]
        model(X).sum().backward()
    assert (hooks(model), modes(), {k: set(vars(m)) for k, m in model.named_modules()}) == before


def test_it_is_detached_after_an_error_in_the_network_too() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken")

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Broken())
    monitor = PlasticityMonitor(model)
    with pytest.raises(ArithmeticError, match="broken"), monitor:
        model(X)
    assert hooks(model) == modes() == 0
    with monitor:  # an error that somebody handles does not shift the names
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                model(X)
        model[2] = nn.Linear(8, 2)
        model(X)
    assert list(monitor.layers) == ["0"]


def test_an_error_that_somebody_handles_does_not_shift_the_names() -> None:
    class Handling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.out = nn.ModuleDict({"inner": Block(4)}), nn.Linear(4, 2)

        def training_step(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                self.part["inner"](x[:, :3])
            return self.out(F.relu(x))

    model = Handling()
    monitor = PlasticityMonitor(model)
    with monitor:
        model.training_step(X)
    assert list(monitor.layers) == ["relu"]


def test_training_under_it_is_bit_identical() -> None:
    def train(monitored: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), Head())
        optimizer = torch.optim.Adam(model.parameters())
        monitor = PlasticityMonitor(model)
        for _ in range(5):
            if monitored:
                monitor.attach()
            optimizer.zero_grad()
            model(X[:, None]).square().mean().backward()
            optimizer.step()
            monitor.detach()
        assert list(monitor.layers) == (["0", "5.one"] if monitored else [])
        return [*(p.detach() for p in model.parameters()), *model.buffers(), torch.rand(3)]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    assert all(torch.equal(with_it, without) for with_it, without in zip(train(True), train(False), strict=True))


def test_other_function_modes_and_hooks_still_work() -> None:
    calls: list[str] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model = mlp(8)
    model[1].register_forward_hook(lambda module, args, output: output * 0)
    monitor = PlasticityMonitor(model)
    with Log(), monitor:
        model(X)
    assert "relu" in calls
    with monitor, Log():
        model(X)
    assert monitor.layers["0"].samples == 2 * len(X)


# A good citizen of PyTorch and Lightning


def test_the_network_is_no_part_of_the_metric() -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    assert list(monitor.modules()) == [monitor]
    assert monitor.state_dict() == {}
    with monitor:
        model(X)
        assert monitor.state_dict() == {}
        attached_copy = copy.deepcopy(monitor)
        again = pickle.loads(pickle.dumps(monitor))
    for other in (attached_copy, again):
        assert other.layers.keys() == monitor.layers.keys()
    assert len(pickle.dumps(PlasticityMonitor(mlp(1000)))) < 10_000
    with pytest.raises(RuntimeError, match=r"no network to watch: PlasticityMonitor\(module\), or attach\(module\)"):
        again.attach()
    with attached_copy:  # a clone watches the same network
        model(X)
    assert attached_copy.layers["0"].samples == 2 * len(X)
    assert hooks(model) == 0


def test_a_module_may_own_a_monitor_of_itself_and_be_copied_with_it() -> None:
    model = mlp(8)
    model.monitor = PlasticityMonitor(model)
    keys = set(mlp(8).state_dict())
    assert set(model.state_dict()) == keys
    other = copy.deepcopy(model)
    assert other.monitor._network[0] is other
    other.monitor._network[0].__class__.forward = nn.Sequential.forward
    del other._modules["monitor"], model._modules["monitor"]


def test_networks_within_metrics_are_not_part_of_the_network() -> None:
    class Inception(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5)

        def update(self, x: Tensor) -> None:
            self.net(x)

        def compute(self) -> Tensor:
            return torch.zeros(())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.metric = mlp(8), Inception()

        def forward(self, x: Tensor) -> Tensor:
            self.metric.update(x)
            return self.net(x)

    model = Model()
    assert seen(model, X) == ["net.0"]
    model.net = nn.Linear(4, 2)  # what is in the metric is not missed either
    assert seen(model, X) == []


def test_arguments_and_misuse_are_told() -> None:
    with pytest.raises(TypeError, match=r"layers='encoder.\*' must be a list of names: \['encoder.\*'\]"):
        PlasticityMonitor(layers="encoder.*")
    for misused in (lambda: PlasticityMonitor("x"), lambda: PlasticityMonitor().attach("x")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"module=.x. must be a torch\.nn\.Module"):
            misused()
    with pytest.raises(TypeError, match="prefix=3 must be a string"):
        PlasticityMonitor(prefix=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measures=\['rank'\] must be some of \['dormant_fraction'"):
        PlasticityMonitor(measures=["rank"])
    with pytest.raises(ValueError, match="compiled='no' must be 'raise' or 'eager'"):
        PlasticityMonitor(compiled="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_samples=0 must be a whole number, at least 1"):
        PlasticityMonitor(max_samples=0)
    with pytest.raises(ValueError, match=r"threshold=-1 must be in \[0, 1\]"):
        PlasticityMonitor(dormant_threshold=-1)
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with monitor, pytest.raises(RuntimeError, match=r"attached already: detach\(\) it first"):
        monitor.attach()
    monitor.detach()  # without effect


def test_what_was_seen_can_be_saved_and_loaded_by_a_fresh_monitor() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(8, 20)
            self.monitor = PlasticityMonitor(self.net, max_samples=16)
            self.monitor.persistent(True)  # before anything was seen

    old, new = Owner(), Owner()
    with old.monitor:
        old.net(X)
    saved = old.state_dict()
    with new.monitor:  # is replaced
        new.net[:-1](X)
        nn.Sequential(nn.Tanh(), nn.Linear(4, 1))(X)
    for _ in range(2):
        assert new.load_state_dict(saved) == ([], [])
        assert new.monitor.layers == old.monitor.layers
        with pytest.warns(UserWarning, match="are estimates"):
            assert new.monitor.compute() == old.monitor.compute()
        with new.monitor:  # goes on
            new.net(X)
        assert new.monitor.layers["0"].samples == 2 * len(X)
    other = PlasticityMonitor(measures=["dormant_fraction"])
    mine = {name.removeprefix("monitor."): state for name, state in saved.items() if name.startswith("monitor")}
    with pytest.raises(RuntimeError, match="Unexpected key"):  # it measures something else
        other.load_state_dict(mine)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\|norm_sum"):
        PlasticityMonitor(max_samples=16).load_state_dict({k: v for k, v in mine.items() if "norm_sum" not in k})


def test_copies_of_a_network_made_while_it_is_watched_are_not_watched() -> None:
    model = mlp(8)
    with PlasticityMonitor(model) as monitor:
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model(X)
    seen_so_far = monitor.compute()
    for other in copies:
        assert torch.equal(other(X), model(X))
        hooks_left = [*other[0]._forward_hooks.values(), *other[0]._forward_pre_hooks.values()]
        assert not any(vars(hook) for hook in hooks_left), "they know of no monitor"
        assert seen(other, X) == ["0"]
    assert monitor.compute() == seen_so_far
    assert len(pickle.dumps(copies[0])) < 2 * len(pickle.dumps(model))


@pytest.mark.parametrize("compiled", ["raise", "eager"])
def test_monitors_may_be_detached_in_any_order(compiled: Any) -> None:
    model, stance = mlp(8), torch._dynamo.eval_frame._stance.stance
    first, second, third = (PlasticityMonitor(model, compiled=compiled) for _ in range(3))
    for monitor in (first, second, third):
        monitor.attach()
    model(X)
    first.detach()
    model(X)
    third.detach()
    model(X)
    with torch.device("cpu"):  # a mode of somebody else's
        second.detach()
        model(X)
        assert modes() == 1
    samples = [monitor.layers["0"].samples for monitor in (first, second, third)]
    assert samples == [len(X), 3 * len(X), 2 * len(X)]
    assert hooks(model) == modes() == 0
    assert torch._dynamo.eval_frame._stance.stance == stance == "default"


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: nn.ModuleList([m]).half(),
    ],
)
def test_sums_stay_in_double_precision_whatever_the_metric_is_converted_to(
    convert: Callable[[PlasticityMonitor], nn.Module],
) -> None:
    model = mlp(8)
    with PlasticityMonitor(model) as monitor:
        model(X)
    before = monitor.compute()
    convert(monitor)
    monitor._computed = None
    assert monitor.compute() == before
    with monitor:
        model(X)
    assert all(getattr(monitor, state).dtype == torch.float64 for state in monitor._defaults)
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(before["effective_rank/0"].item(), rel=1e-9)


def test_the_meta_device_is_refused() -> None:
    model = mlp(8).to("meta")
    with pytest.raises(RuntimeError, match="the network is on the meta device, where there are no numbers"):
        PlasticityMonitor(model).attach()
    with pytest.raises(ValueError, match=r"a tensor of shape \(32, 4\) on the meta device holds no numbers to measure"):
        PlasticityMonitor().update({"a": X.to("meta")})
    with pytest.raises(ValueError, match="on the meta device"):
        EffectiveRank().update(X.to("meta"))


@pytest.mark.parametrize("max_samples", [512, 16])
def test_rounding_is_no_rank(max_samples: int) -> None:
    basis = torch.randn(3, 100, dtype=torch.float64)
    monitor = PlasticityMonitor(max_samples=max_samples)
    total = []
    for _ in range(20):
        h = torch.randn(300, 3, dtype=torch.float64) @ basis
        monitor.update({"a": h})
        total.append(h)
    moments = monitor._moments("a")
    assert (torch.linalg.eigvalsh(moments).abs() > 0).sum() > 3, "there is rounding"
    sigma = singular_values_of_moments(moments)
    assert (sigma > 0).sum() == leading_count(sigma, 0.0) == 3
    assert P.srank(torch.cat(total), 0.0) == 3
    if max_samples == 512:
        exact = np.linalg.svd(torch.cat(total).numpy(), compute_uv=False)[:3]
        share = exact / exact.sum()
        expected = np.exp(-(share * np.log(share)).sum())
        assert monitor.compute()["effective_rank"].item() == pytest.approx(expected, rel=1e-9)


def test_ddp_wrappers_are_looked_through() -> None:
    model = mlp(8)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)  # without a process group: only the shape of the thing matters here
    wrapper.module = model
    monitor = PlasticityMonitor(wrapper)
    with monitor:
        model(X)
    assert list(monitor.layers) == ["0"]


def compiled_network() -> nn.Module:
    return torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), backend="eager")  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.compile(backend="eager")
    return model


def compiled_method() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


class WithForward(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def unwrapped_by_trainer() -> nn.Module:
    module = WithForward()
    trainer(max_epochs=0).fit(torch.compile(module, backend="eager"), loader())
    return module


def compiled_part() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.compile(Block(4), backend="eager"), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("make", "where", "layers"),
    [
        (compiled_network, "the network itself", ["0"]),
        (compiled_in_place, "the network itself", ["0"]),
        (compiled_method, "the network itself", ["0"]),
        (unwrapped_by_trainer, "the network itself", ["net.0"]),
        (compiled_part, "'1'", ["1.inner", "1.outer"]),
    ],
)
def test_compiled_modules_are_refused_or_run_uncompiled(
    make: Callable[[], nn.Module], where: str, layers: list[str]
) -> None:
    model = make()
    with torch.no_grad():  # a compiler that is given the middle of a graph warns
        model(X)
    with pytest.raises(RuntimeError, match=rf"cannot look into compiled modules \({where}\).*compiled='eager'"):
        PlasticityMonitor(model).attach()
    assert hooks(model) == modes() == 0
    assert seen(model, X, compiled="eager") == layers
    assert hooks(model) == modes() == 0
    assert torch.compiler.is_compiling() is False
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_functions_within_a_network_are_told_of() -> None:
    function = torch.compile(lambda x: F.relu(x) * 2, backend="aot_eager")
    model = Functional(torch.relu)
    model.activation = function
    monitor = PlasticityMonitor(model)
    monitor.attach()
    with torch.no_grad():  # as above
        model(X)
    with pytest.warns(UserWarning, match="code compiled by torch.compile has run while PlasticityMonitor was attached"):
        monitor.detach()
    assert monitor.layers == {}
    assert seen(model, X, compiled="eager") == ["hidden"]


def test_scripted_networks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot look into TorchScript"):
        PlasticityMonitor(torch.jit.trace(mlp(8), X)).attach()


class Logging(LightningModule):
    """Logs a monitor of itself, and one scalar metric, in the ordinary way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8)
        self.monitor = PlasticityMonitor(self, prefix="plasticity/")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.monitor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log_dict(self.monitor.compute())
        self.monitor.reset()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_it_ends_up_in_tensorboard_as_one_group(tmp_path: Path) -> None:
    model = Logging()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(logger=logger)
    run.fit(model, loader())
    assert hooks(model) == modes() == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")]
    assert {tag.partition("/")[0] for tag in tags} == {"plasticity"}
    assert set(tags) == {f"plasticity/{m}{layer}" for m in model.monitor.measures for layer in ("", "/net.0")}
    assert len(events.Scalars("plasticity/dormant_fraction")) == 3
    assert "plasticity/effective_rank" in run.callback_metrics


def test_samples_kept_of_wide_layers_are_not_all_the_same_token() -> None:
    x = torch.randn(512, 8, 600).relu()
    x[:, 0] = x[0, 0]  # a token that begins every sequence
    monitor = PlasticityMonitor(max_samples=512)
    monitor.update({"a": x})
    with pytest.warns(UserWarning, match="are estimates"):
        ranks = monitor.compute()
    rows = x.flatten(0, 1).double()[torch.randperm(4096)[:512]]
    values = torch.linalg.svdvals(rows)
    share = values / values.sum()
    expected = torch.exp(-torch.xlogy(share, share).sum()).item()
    assert ranks["effective_rank"].item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_whose_last_state_is_used_are_seen(kind: type[nn.RNNBase]) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.body(x)
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])

    model = Classifier()
    with PlasticityMonitor(model) as monitor:
        model(torch.randn(4, 5, 8))
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {"body": (6, 20)}


def test_functional_transforms_go_on_while_a_network_is_watched() -> None:
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(4, 8)
    expected = torch.func.jacrev(net)(x[0]), torch.func.jvp(net, (x,), (x,))[1]
    with PlasticityMonitor(net) as monitor:
        assert torch.equal(torch.func.jacrev(net)(x[0]), expected[0])
        assert torch.equal(torch.func.jvp(net, (x,), (x,))[1], expected[1])
        net(x)
    assert monitor.layers["0"].samples == 4


def test_nested_and_sparse_tensors_do_not_end_a_forward_pass() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.two(torch.relu(adjacency).t() @ torch.tanh(self.one(x)))

    model = Graph()
    with PlasticityMonitor(model) as monitor:
        model(X, torch.eye(len(X)).to_sparse())
    assert {name: layer.units for name, layer in monitor.layers.items()} == {"one": 6}
    sequences = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    monitor = PlasticityMonitor(mlp(8)).attach()
    monitor._network[0](sequences)
    with pytest.warns(UserWarning, match="has seen no hidden layer"):
        monitor.detach()


def test_functional_transforms_and_checkpoints_follow_dimensions_too() -> None:
    model = chained(nn.Linear(4, 6), lambda x: x.unflatten(-1, (2, 3)).mT.flatten(-2), nn.ReLU(), nn.Linear(6, 2))
    expected = torch.func.vmap(model)(X), torch.func.jacrev(model)(X[0])
    with PlasticityMonitor(model) as monitor:
        assert torch.equal(torch.func.vmap(model)(X), expected[0])
        assert torch.equal(torch.func.jacrev(model)(X[0]), expected[1])
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, len(X))


def test_a_module_named_by_its_path_is_told_its_dimension_by_what_reads_it() -> None:
    model = nn.Sequential(Step(lambda x: torch.fft.fft(x).real), nn.Conv1d(6, 2, 1))
    x = torch.randn(5, 6, 7)
    with PlasticityMonitor(model, layers=["0"], measures=["feature_norm"]) as monitor:
        model(x)
    assert monitor.layers["0"].units == 6
    expected = torch.fft.fft(x).real.norm(dim=1).mean().item()
    assert monitor.compute()["feature_norm/0"].item() == pytest.approx(expected, rel=1e-6)


def test_memory_is_bounded_while_losses_are_added_up() -> None:
    model = mlp(8, last=nn.Sigmoid())
    total = torch.zeros(())
    with PlasticityMonitor(model) as monitor:
        for _ in range(5):
            total = total + model(X).mean().detach()
        assert monitor._tracker is not None
        assert not monitor._tracker._origins
    assert list(monitor.layers) == ["0"]


def test_memory_is_bounded_while_nothing_tells_which_dimension_counts_units() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(30, 2))
    monitor = PlasticityMonitor(model).attach()
    for _ in range(5):
        model(torch.randn(4, 5, 6))
        assert monitor._tracker is not None
        assert len(monitor._tracker._undecided) == 1
        assert not monitor._tracker._origins
    with pytest.warns(UserWarning, match="no layer before or behind 0 tells"):
        monitor.detach()
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * 20)


def test_a_monitor_of_a_part_does_not_count_what_is_around_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.part = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7))
            self.after = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.relu(self.part(F.relu(self.before(x)))))

    model, x = Around(), torch.randn(8, 4)
    monitor = PlasticityMonitor(model.part, measures=["dead_fraction"])
    with monitor:
        model(x)
    assert list(monitor.layers) == ["0"]
    hidden = model.part[:2](F.relu(model.before(x)))
    assert monitor.compute()["dead_fraction"] == (hidden <= 0).all(0).double().mean()
