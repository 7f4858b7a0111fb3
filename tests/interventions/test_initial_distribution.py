"""Check draws from initial weights: what they keep, and which parameters they reach."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_plasticity.interventions import ReDo, Repair, Reset, ShrinkPerturb, SoftShrinkPerturb
from lightning_plasticity.interventions.weights.initial_distribution import InitialDistribution


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Conv1D(nn.Module):
    """A linear layer with a transposed weight and without ``reset_parameters``, as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class RMSNorm(nn.Module):
    """As in Llama and T5."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


class Transformer(nn.Module):
    """Has tokens, positions and layer scales that no layer initialises, and embeddings and a head that are tied."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, size, padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.embedding.weight[0])
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, size))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 9, size))
        self.norm, self.scale = RMSNorm(size), nn.Parameter(torch.full((size,), 1e-6))
        self.gate, self.up, self.down = Conv1D(size, 64), nn.Linear(size, 64), nn.Linear(64, size)
        nn.init.orthogonal_(self.up.weight, gain=2**0.5)
        nn.init.zeros_(self.up.bias)
        self.memory = nn.LSTM(size, size)
        with torch.no_grad():
            self.memory.bias_ih_l0[size : 2 * size] = 1
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.head = nn.Linear(size, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), self.embedding(tokens)], dim=1) + self.positions
        y = self.norm(x)
        x = x + self.scale * self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        output: Tensor = self.head(self.memory(x)[0]) / self.temperature
        return output


class Convolutions(nn.Module):
    """A residual network with weights that are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, bias=False)
        nn.init.kaiming_normal_(self.stem.weight, mode="fan_out")
        self.norm = nn.BatchNorm2d(16)
        self.normed = parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
        self.pruned = prune.random_unstructured(nn.Conv2d(16, 16, 3), "weight", amount=0.5)
        self.old_normed = old_weight_norm(nn.Linear(16, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pruned(self.normed(self.norm(self.stem(x)).relu()).relu()).mean((2, 3))
        output: Tensor = self.spectral(self.old_normed(x))
        return output


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: nn.Module = nn.utils.weight_norm(layer)
    return result


NETWORKS: dict[str, Callable[[], nn.Module]] = {"transformer": Transformer, "convolutions": Convolutions}


def stds(model: nn.Module) -> dict[str, float]:
    return {name: p.detach().double().std(correction=0).item() for name, p in model.named_parameters()}


def train(model: nn.Module) -> None:
    """Stand in for a training that multiplies all scales."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter))


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_tiny_perturbation_changes_no_scale(make: Callable[[], nn.Module]) -> None:
    model = make()
    initial = copy.deepcopy(model.state_dict())
    train(model)
    before = stds(model)
    ShrinkPerturb(s=1e-9).repair(model, initial=initial)
    assert stds(model) == pytest.approx(before, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("repair", [ShrinkPerturb(s=1), Reset()], ids=lambda repair: repair.name)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_full_replacement_has_the_initial_scale(make: Callable[[], nn.Module], repair: Repair) -> None:
    model = make()
    initial, before = copy.deepcopy(model.state_dict()), stds(model)
    train(model)
    norms = {name: value for name, value in stds(model).items() if name.startswith("norm.")}
    kept = norms if isinstance(repair, ShrinkPerturb) else {}
    repair.repair(model, initial=initial)
    assert stds(model) == pytest.approx({**before, **kept}, rel=1e-6, abs=1e-9)
    old = dict(model.named_parameters())
    drawn = {name for name in old if before[name] > 0 and not name.startswith("norm.")}
    assert not {name for name in drawn if torch.equal(old[name], initial[name])}


def test_draw_is_a_permutation_of_the_entries() -> None:
    initial = torch.randn(30, 20, generator=generator())
    drawn = InitialDistribution(initial).permuted(initial.shape, generator(1))
    assert torch.equal(drawn.flatten().sort().values, initial.flatten().sort().values)
    assert (drawn == initial).double().mean() < 0.05
    assert torch.equal(drawn, InitialDistribution(initial).permuted(initial.shape, generator(1)))


def test_every_entry_goes_everywhere() -> None:
    counts, initial = torch.zeros(6, 6), torch.arange(6.0).view(2, 3)
    for seed in range(600):
        drawn = InitialDistribution(initial).permuted(initial.shape, generator(seed)).flatten().long()
        counts[torch.arange(6), drawn] += 1
    assert (counts / 100 - 1).abs().max() < 0.5, "each about 100 times, 5 standard deviations are 0.46"


@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (32, 4, 3, 3)])
def test_orthogonal_matrices_stay_orthogonal(shape: tuple[int, ...]) -> None:
    initial = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), gain=1.7)
    drawn = InitialDistribution(initial).permuted(initial.shape, generator())
    assert not torch.equal(drawn, initial)
    singular_values = torch.linalg.svdvals(drawn.flatten(1))
    torch.testing.assert_close(singular_values, torch.full_like(singular_values, 1.7))


CONSTANTS = {
    "identity": nn.init.eye_(torch.empty(50, 50)),
    "dirac": nn.init.dirac_(torch.empty(8, 8, 3, 3)),
    "zeros": torch.zeros(7),
    "ones": torch.ones(1, 5, 1),
    "one entry": torch.tensor([0.3]),
    "scalar": torch.tensor(0.07),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("initial", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_stay_constants(initial: Tensor) -> None:
    assert torch.equal(InitialDistribution(initial).permuted(initial.shape, generator()), initial)


def test_constants_keep_their_places() -> None:
    embedding, gates = nn.Embedding(9, 50, padding_idx=4).weight.detach(), torch.randn(40)
    gates[10:20] = 1
    for initial, fixed in ((embedding, embedding == 0), (gates, gates == 1)):
        drawn = InitialDistribution(initial).permuted(initial.shape, generator())
        assert torch.equal(drawn == initial, fixed)


def test_half_precision_is_permuted_too() -> None:
    """In bfloat16 many entries are equal by chance."""
    initial = nn.Linear(100, 100).weight.detach().bfloat16()
    drawn = InitialDistribution(initial).permuted(initial.shape, generator())
    assert (drawn != initial).double().mean() > 0.9
    assert torch.equal(drawn.flatten().sort().values, initial.flatten().sort().values)


@pytest.mark.parametrize("repair", [Reset(), ShrinkPerturb(s=1)], ids=lambda repair: repair.name)
def test_start_remembers_the_initial_weights(repair: Repair) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10))
    nn.init.normal_(model[0].weight, std=7)
    std = model[0].weight.std().item()
    repair.start(model)
    train(model)
    # A second start keeps what is known.
    repair.start(model)
    repair.duplicate().repair(model)
    assert model[0].weight.std().item() == pytest.approx(std, rel=1e-6)


def test_constructor_comes_before_the_callback() -> None:
    model = nn.Linear(3, 3)
    initial = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    Reset(initial=initial).repair(model, initial=model.state_dict())
    assert bool((model.weight == 2).all())


def test_norm_layers_and_statistics_get_their_own_values_back() -> None:
    model = nn.BatchNorm1d(9)
    with torch.no_grad():
        for tensor in (model.weight, model.bias, model.running_mean, model.running_var):
            tensor.copy_(torch.rand(9))
    initial = copy.deepcopy(model.state_dict())
    train(model)
    model(torch.randn(5, 9))
    Reset().repair(model, initial=initial)
    torch.testing.assert_close(model.state_dict(), initial, rtol=0, atol=0)


def test_pruning_masks_are_kept() -> None:
    model = nn.Sequential(prune.random_unstructured(nn.Linear(30, 20), "weight", amount=0.5))
    mask = model[0].weight_mask.clone()
    initial = copy.deepcopy(model.state_dict())
    train(model)
    Reset().repair(model, initial=initial)
    model(torch.ones(1, 30))
    assert torch.equal(model[0].weight_mask, mask)
    assert torch.equal(model[0].weight == 0, mask == 0)


def test_weights_pruned_later_have_their_initial_values() -> None:
    model = nn.Linear(30, 20)
    initial = copy.deepcopy(model.state_dict())
    train(model)
    prune.random_unstructured(model, "weight", amount=0.5)
    ShrinkPerturb(s=1).repair(model, initial=initial)
    assert torch.equal(model.weight_orig.flatten().sort().values, initial["weight"].flatten().sort().values)


def test_computed_weights_without_initial_ones_are_refused_by_name() -> None:
    for model, name in (
        (prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5), "weight_orig"),
        (parametrizations.spectral_norm(nn.Linear(4, 4)), "original"),
        (old_weight_norm(nn.Linear(4, 4)), "weight_g"),
    ):
        with pytest.raises(ValueError, match=rf"the parameter '{name}', which no reset_parameters\(\) initialises"):
            ShrinkPerturb().repair(model)


def test_redo_draws_units_from_the_initial_entries() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2))
    nn.init.normal_(model[0].weight, std=0.02)
    nn.init.zeros_(model[0].bias)
    initial = copy.deepcopy(model.state_dict())
    train(model)
    with torch.no_grad():
        model[0].bias[:20] = -1e4
    ReDo(threshold=0).repair(model, forward=lambda model: model(torch.ones(1, 40)), initial=initial)
    assert torch.isin(model[0].weight[:20], initial["0.weight"]).all()
    assert bool((model[0].bias[:20] == 0).all())


def test_soft_shrink_perturb_pulls_scales_to_their_start() -> None:
    model = Transformer()
    intervention = SoftShrinkPerturb(shrink=0.5, noise=0)
    intervention.start(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.scale.add_(1)
    for _ in range(60):
        intervention.after_step(model)
    torch.testing.assert_close(model.scale.detach(), before["scale"])
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert model.positions.abs().max() < 1e-9
