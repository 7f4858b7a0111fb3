"""Activation functions and hidden layers that the monitor recognizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_plasticity import PlasticityMonitor
from tests.helpers.monitored import Block, Functional, Step, X, chained, measured_layers, mlp
from tests.metrics.test_functional import numpy_cloned, numpy_dead, numpy_dormant, numpy_effective_rank, numpy_srank


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.gate = gate

    def hidden(self, x: Tensor) -> Tensor:
        return self.gate(self.a(x), self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x))


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
        assert values[f"cloned_fraction/{name}"].item() == numpy_cloned(f)
        assert values[f"effective_rank/{name}"].item() == pytest.approx(numpy_effective_rank(f), rel=1e-6)
        assert values[f"srank/{name}"].item() == numpy_srank(f)
        dead.append(numpy_dead(f))
    assert values["dead_fraction"].item() == pytest.approx((8 * dead[0] + 6 * dead[1]) / 14)
    assert len(values) == 7 * 3


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
    assert measured_layers(Functional(activation), X) == ["hidden"]
    without_owner = Functional(activation)
    without_owner.hidden = Step(lambda x: F.linear(x, torch.ones(8, 4)))
    assert measured_layers(without_owner, X) == [name]


def test_mask_from_elsewhere_is_no_activation_function() -> None:
    for function in (
        lambda x: x * (torch.rand(8) > 0.5),
        lambda x: x.masked_fill(torch.rand(8) > 0.5, 0.0),
        lambda x: torch.where(torch.rand(8) > 0.5, x, 0.0),
        lambda x: torch.maximum(x, torch.ones(())),
        lambda x: torch.where(x.isfinite(), x, 0.0),
    ):
        assert measured_layers(nn.Sequential(nn.Linear(4, 8), Step(function), *mlp(8)[1:]), X) == ["0"]
        with pytest.warns(UserWarning, match="found no hidden layer"):
            assert measured_layers(Functional(function), X) == []


def test_clamp_is_an_activation_only_at_zero_after_a_layer() -> None:
    model = mlp(8)
    model.append(Step(lambda x: x.norm(dim=1, keepdim=True).clamp(min=1e-6)))
    model.append(nn.Linear(1, 1))
    assert measured_layers(model, X) == ["0"]
    # Images are clamped before the first layer.
    assert measured_layers(nn.Sequential(Step(lambda x: x.clamp(0, 1)), *mlp(8)), X) == ["1"]


@pytest.mark.parametrize(
    "unrecognized",
    [
        lambda x: torch.maximum(x, 0 * x),
        lambda x: x * (x > 0).float(),
        lambda x: (x + x.abs()) / 2,
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ],
)
def test_unrecognized_network_warns(unrecognized: Callable[[Tensor], Tensor]) -> None:
    model = Functional(unrecognized)
    monitor = PlasticityMonitor(model)
    monitor.attach()
    model(X)
    with pytest.warns(UserWarning, match=r"no hidden layer, .*name the modules that return them, .*layers=\[...\]"):
        monitor.detach()
    assert monitor.layers == {}
    # A network with a single layer has no hidden layers to miss.
    with PlasticityMonitor(nn.Linear(4, 2)) as monitor:
        monitor._network[0](X)
    model = nn.Sequential(nn.Linear(4, 8), Step(unrecognized), nn.Linear(8, 2))
    assert measured_layers(model, X, layers=["1"]) == ["1"]


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
def test_product_of_a_gate_counts(gate: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
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


def test_other_products_are_no_gates() -> None:
    mask = torch.zeros(8)
    for scale in (
        lambda a: F.relu(a) * mask,
        lambda a: F.relu(a) * 0.0,
        lambda a: F.relu(a) * mask.expand(32, 8),
        lambda a: (h := F.relu(a)) * (torch.rand_like(h) > 2),
        lambda a: (h := F.relu(a)) * torch.full_like(h, 0.0).bernoulli(),
        lambda a: (h := F.relu(a)) * h.new_zeros(h.shape),
    ):
        model = Gated(lambda a, b, scale=scale: scale(a))
        with PlasticityMonitor(model) as monitor:
            model(X)
        f = F.relu(model.a(X)).detach().double().numpy()
        assert monitor.compute()["dead_fraction/a"].item() == numpy_dead(f) < 1


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.PReLU(), nn.RReLU(), nn.GELU(), nn.Tanh()])
def test_activation_modules_are_seen_once(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 3))
    assert measured_layers(model, X) == ["0"]


def test_activations_are_seen_before_later_inplace_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Threshold(2.0, 0.0, inplace=True), nn.Linear(8, 3))
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    assert monitor.compute()["dead_fraction/0"].item() == 0
    assert monitor.compute()["dead_fraction/0-2"].item() == 1


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sigmoid(), nn.Tanh(), nn.Sequential(nn.Tanh(), nn.Flatten())])
def test_output_layer_does_not_count(last: nn.Module) -> None:
    assert measured_layers(mlp(8, last=last), X) == ["0"]


def test_successive_activations_before_the_output_do_not_count() -> None:
    assert measured_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh()), X) == []
    assert measured_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 2)), X) == ["0", "0-2"]


def test_activations_on_the_way_to_the_loss_do_not_count() -> None:
    class Heads(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            h = F.relu(self.body(batch))
            # A layer is called after it, but does not read it.
            first = torch.sigmoid(self.one(h))
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
        # A learned temperature.
        lambda z, t: z * t,
        # Similarities of embeddings.
        lambda z, t: F.normalize(z) @ F.normalize(z).T / t,
        lambda z, t: torch.einsum("nd,md->nm", z, z - t),
        lambda z, t: F.layer_norm(z, z.shape[1:], t.expand(z.shape[1:]), None),
        lambda z, t: torch.cat([t.expand(1, z.shape[1]), z]),
        # A learned standard deviation.
        lambda z, t: torch.distributions.Normal(z, t).log_prob(z + 1),
        lambda z, t: torch.distributions.Normal(z, t.expand_as(z)).sample(),
        # The overlap with targets.
        lambda z, t: torch.einsum("nc,nc->n", z, torch.ones(z.shape)),
        # A function of the shape.
        lambda z, t: F.linear(torch.zeros_like(z), t.expand(2, 3)),
    ],
)
def test_parameter_in_the_output_is_no_layer(
    head: Callable[[Tensor, Tensor], Tensor],
) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.t = mlp(8), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return head(torch.tanh(self.body(x)), self.t)

    assert measured_layers(Embedding(), X) == ["body.0"]


def test_products_with_weights_are_layers_in_every_form() -> None:
    weight = nn.Parameter(torch.randn(3, 8))
    for head in (
        lambda z: z @ weight.t(),
        # Masked weights, and those of functional_call, are no parameters.
        lambda z: z @ (weight * 2).T,
        lambda z: torch.addmm(torch.zeros(3), z, weight.T),
        lambda z: torch.einsum("nd,kd->nk", z, weight),
        lambda z: torch.cdist(z, weight),
        lambda z: z.pow(2) @ torch.randn(8, 3),
    ):
        assert measured_layers(chained(nn.Linear(4, 8), nn.Tanh(), head), X) == ["0"]


def test_variance_counts_if_the_decoder_reads_it() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.variance, self.decoder = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 4)
            self.reads = True

        def forward(self, x: Tensor) -> Tensor:
            mean, variance = self.mean(x), F.softplus(self.variance(x))
            return self.decoder(mean + variance * torch.randn(3)) if self.reads else (mean / variance).square().sum()

    model = Autoencoder()
    assert measured_layers(model, X) == ["variance"]
    # The variance goes to the loss alone.
    model.reads = False
    with pytest.warns(UserWarning, match="found no hidden layer"):
        assert measured_layers(model, X) == []


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

    assert measured_layers(Positive(), X) == []


def test_handwritten_activation_module_is_seen_by_its_output() -> None:
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
def test_recurrent_layers_are_seen_by_their_output(kind: type[nn.RNNBase]) -> None:
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


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_read_at_their_last_state_are_seen(kind: type[nn.RNNBase]) -> None:
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


def test_monitor_of_a_part_does_not_count_the_rest() -> None:
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
