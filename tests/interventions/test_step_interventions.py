"""Check step interventions on weights against their rules in NumPy, and repairs on weights."""

import copy
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    HareTortoise,
    NormalizeAndProject,
    Repair,
    Reset,
    SoftShrinkPerturb,
    StepIntervention,
    WeightClipping,
)
from tests.helpers.interventions import select
from tests.helpers.unit_models import MODELS, Encoder, Functional, Gru, Model, ResNet

ON_WEIGHTS = [
    row for row in select(StepIntervention, on_units=False) if row.needs.isdisjoint({"forward", "optimizers"})
]
STEP_INTERVENTIONS: dict[str, Callable[[], StepIntervention]] = {
    **{row.name: row.make for row in ON_WEIGHTS},
    "SoftShrinkPerturb, every 2": lambda: SoftShrinkPerturb(0.9, 0.3, every_n_steps=2),
}
WITH_STATE = [row.name for row in ON_WEIGHTS if "start" in row.needs] + ["SoftShrinkPerturb, every 2"]


def mlp(sizes: Sequence[int], seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]
    return nn.Sequential(*layers).double()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def moves(model: nn.Module, steps: int, seed: int, size: float = 0.5) -> list[dict[str, np.ndarray]]:
    """Draw random weight changes, in place of an optimizer."""
    rng = np.random.default_rng(seed)
    return [{name: size * rng.standard_normal(p.shape) for name, p in model.named_parameters()} for _ in range(steps)]


def move(model: nn.Module, by: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.from_numpy(np.asarray(by[name])).to(parameter))


def run(model: nn.Module, intervention: StepIntervention, steps: int, seed: int = 0) -> None:
    for by in moves(model, steps, seed):
        move(model, by)
        intervention.after_step(model)


def changed(model: nn.Module, before: dict[str, Any]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=4)


# Each rule against numpy


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, steps=st.integers(1, 4), kappa=st.floats(0.1, 5), seed=st.integers(0, 2**31))
def test_weight_clipping_equals_its_rule_in_numpy(sizes: list[int], steps: int, kappa: float, seed: int) -> None:
    model = mlp(sizes, seed)
    theta, intervention = arrays(model), WeightClipping(kappa)
    for by in moves(model, steps, seed, size=2):
        move(model, by)
        assert intervention.after_step(model) is None
        for name in theta:
            bound = kappa / np.sqrt(sizes[int(name.split(".")[0])])
            theta[name] = np.clip(theta[name] + by[name], -bound, bound)
    for name, value in arrays(model).items():
        np.testing.assert_array_equal(value, theta[name])


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, steps=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_normalize_and_project_equals_its_rule_in_numpy(sizes: list[int], steps: int, seed: int) -> None:
    model, intervention = mlp(sizes, seed), NormalizeAndProject()
    intervention.start(model)
    first, theta = arrays(model), arrays(model)
    for by in moves(model, steps, seed):
        move(model, by)
        assert intervention.after_step(model) is None
        for name in theta:
            theta[name] = theta[name] + by[name]
            if name.endswith("weight"):
                theta[name] *= np.sqrt((first[name] ** 2).sum() / (theta[name] ** 2).sum())
    for name, value in arrays(model).items():
        np.testing.assert_allclose(value, theta[name], rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    sizes=SIZES, steps=st.integers(1, 9), every=st.integers(1, 4), decay=st.floats(0, 0.999), seed=st.integers(0, 2**31)
)
def test_hare_tortoise_equals_its_rule_in_numpy(
    sizes: list[int], steps: int, every: int, decay: float, seed: int
) -> None:
    model, intervention = mlp(sizes, seed), HareTortoise(decay, every)
    intervention.start(model)
    hare, tortoise = arrays(model), arrays(model)
    for step, by in enumerate(moves(model, steps, seed), 1):
        move(model, by)
        report = intervention.after_step(model)
        for name in hare:
            hare[name] = hare[name] + by[name]
            tortoise[name] = decay * tortoise[name] + (1 - decay) * hare[name]
        if step % every:
            assert report is None
        else:
            assert report is not None
            assert report.name == "HareTortoise"
            hare = {name: value.copy() for name, value in tortoise.items()}
    for name, value in arrays(model).items():
        np.testing.assert_allclose(value, hare[name], rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(
    sizes=SIZES,
    steps=st.integers(1, 5),
    every=st.integers(1, 3),
    shrink=st.floats(0, 1),
    noise=st.floats(0, 2),
    seed=st.integers(0, 2**31),
)
def test_soft_shrink_perturb_equals_its_rule_in_numpy(
    sizes: list[int], steps: int, every: int, shrink: float, noise: float, seed: int
) -> None:
    model, intervention = mlp(sizes, seed), SoftShrinkPerturb(shrink, noise, every, seed=seed)
    intervention.start(model)
    theta = arrays(model)
    xi = torch.Generator().manual_seed(seed)
    for step, by in enumerate(moves(model, steps, seed), 1):
        move(model, by)
        assert intervention.after_step(model) is None
        for name in theta:
            theta[name] = theta[name] + by[name]
            if step % every == 0:
                # The noise of each step shrinks until the last.
                variance = sum(noise**2 * shrink ** (2 * i) for i in range(every))
                theta[name] = shrink**every * theta[name]
                if noise:
                    draw = torch.randn(theta[name].shape, generator=xi, dtype=torch.float64).numpy()
                    theta[name] = theta[name] + np.sqrt(variance) * intervention.scales[name].item() * draw
    for name, value in arrays(model).items():
        np.testing.assert_allclose(value, theta[name], rtol=1e-10, atol=1e-10)


# Errors of public code


def test_the_hare_gets_a_copy_of_the_tortoise() -> None:
    model, intervention = mlp([3, 4, 2]), HareTortoise(0.5, every_n_steps=1)
    intervention.start(model)
    run(model, intervention, 2)
    slow = {name: value.clone() for name, value in intervention.tortoise.items()}
    # Move the hare alone.
    move(model, moves(model, 1, seed=9)[0])
    for name, value in intervention.tortoise.items():
        assert value.data_ptr() != dict(model.named_parameters())[name].data_ptr()
        assert torch.equal(value, slow[name]), "the tortoise does not run with the hare"


def test_noise_has_the_scale_of_each_initialisation() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(100, 300), nn.Conv2d(30, 40, 3), nn.Embedding(200, 100))
    fresh = {name: p.std().item() for name, p in model.named_parameters() if "weight" in name}
    intervention = SoftShrinkPerturb(shrink=1, noise=1)
    intervention.start(model)
    # Stand in for a long training.
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    intervention.after_step(model)
    for name, std in fresh.items():
        assert dict(model.named_parameters())[name].std().item() == pytest.approx(std, rel=0.02), name


def test_stationary_standard_deviation_is_as_documented() -> None:
    model = nn.Linear(100, 200)
    std = model.weight.std().item()
    intervention = SoftShrinkPerturb(shrink=0.9, noise=math.sqrt(1 - 0.9**2))
    intervention.start(model)
    torch.nn.init.zeros_(model.weight)
    for _ in range(60):
        intervention.after_step(model)
    assert model.weight.std().item() == pytest.approx(std, rel=0.02)


def test_soft_shrink_perturb_keeps_norm_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(4))
    intervention, before = SoftShrinkPerturb(0.5, 1), copy.deepcopy(model.state_dict())
    intervention.start(model)
    intervention.after_step(model)
    assert changed(model, before) == {"0.weight", "0.bias"}


def test_constant_initial_values_get_no_noise() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Embedding(5, 3, padding_idx=2))
    intervention = SoftShrinkPerturb(1, 1)
    intervention.start(model)
    intervention.after_step(model)
    assert torch.equal(model[0].in_proj_bias, torch.zeros(24))
    assert torch.equal(model[1].weight[2], torch.zeros(3)), "the vector of the padding"
    assert bool((model[1].weight[[0, 1, 3, 4]] != 0).all())


def test_weight_clipping_keeps_norm_layers_and_embeddings() -> None:
    model = nn.Sequential(nn.Linear(400, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Embedding(3, 100))
    before = copy.deepcopy(model.state_dict())
    WeightClipping(1e-3).after_step(model)
    assert changed(model, before) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_optimizer_state_is_unchanged(make: Callable[[], StepIntervention]) -> None:
    model, intervention = mlp([4, 3, 2]), make()
    optimizer = torch.optim.Adam(model.parameters())
    intervention.start(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        intervention.after_step(model, [optimizer])
        torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


# Parameters and bounds


@pytest.mark.parametrize(
    ("layer", "fans"),
    [
        (nn.Linear(9, 4), {"weight": 9, "bias": 9}),
        (nn.Conv2d(6, 4, (3, 2), groups=2), {"weight": 18, "bias": 18}),
        (nn.ConvTranspose1d(6, 4, 3), {"weight": 12, "bias": 12}),
        (
            nn.MultiheadAttention(6, 2),
            {"in_proj_weight": 6, "in_proj_bias": 6, "out_proj.weight": 6, "out_proj.bias": 6},
        ),
        (
            nn.MultiheadAttention(6, 2, kdim=3, vdim=5, add_bias_kv=True),
            {
                "q_proj_weight": 6,
                "k_proj_weight": 3,
                "v_proj_weight": 5,
                "in_proj_bias": 6,
                "out_proj.weight": 6,
                "out_proj.bias": 6,
            },
        ),
        (nn.LSTMCell(3, 5), {"weight_ih": 3, "weight_hh": 5, "bias_ih": 3, "bias_hh": 5}),
        (
            nn.LSTM(3, 5, proj_size=2, bidirectional=True),
            {
                f"{key}_l0{end}": fan
                for end in ("", "_reverse")
                for key, fan in {"weight_ih": 3, "weight_hh": 2, "bias_ih": 3, "bias_hh": 2, "weight_hr": 5}.items()
            },
        ),
    ],
    ids=lambda case: type(case).__name__,
)
def test_weight_clipping_bound_follows_the_fan_in(layer: nn.Module, fans: dict[str, int]) -> None:
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 7)
    WeightClipping(1.5).after_step(layer)
    for name, parameter in layer.named_parameters():
        expected = 1.5 / math.sqrt(fans[name]) if name in fans else 7
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected))


@pytest.mark.parametrize("make", [lambda: nn.Linear(50, 400), lambda: nn.Conv2d(10, 400, 3)], ids=["linear", "conv"])
def test_bound_at_kappa_1_is_the_initial_one_of_torch(make: Callable[[], nn.Module]) -> None:
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    # torch rounds the bound.
    WeightClipping(1 + 1e-6).after_step(layer)
    assert changed(layer, before) == set()
    WeightClipping(0.98).after_step(layer)
    assert changed(layer, before) == {"weight", "bias"}


def test_biases_of_shared_and_frozen_weights_are_clipped() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 3))
    model[1].weight, model[3].weight = model[0].weight, model[2].weight
    model[4].weight.requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7)
    before = copy.deepcopy(model.state_dict())
    WeightClipping(2).after_step(model)
    assert changed(model, before) == {f"{i}.bias" for i in (0, 1, 3, 4)} | {"0.weight", "1.weight"}
    assert model[1].bias.max().item() == model[4].bias.max().item() == 1


def test_normalize_and_project_keeps_exactly_weight_norms() -> None:
    for model in (ResNet(), Encoder(), Gru()):
        intervention, other_model = NormalizeAndProject(), copy.deepcopy(model)
        first = {name: p.norm().item() for name, p in model.named_parameters()}
        intervention.start(model)
        by = moves(model, 1, seed=0)[0]
        move(model, by)
        move(other_model, by)
        intervention.after_step(model)
        for (name, parameter), other in zip(model.named_parameters(), other_model.parameters(), strict=True):
            if parameter.ndim > 1 and "embed" not in name:
                assert parameter.norm().item() == pytest.approx(first[name], rel=1e-5), name
            else:
                assert torch.equal(parameter, other), name


def test_zero_and_non_finite_weights_are_not_projected() -> None:
    model, intervention = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)),
        NormalizeAndProject(),
    )
    torch.nn.init.zeros_(model[0].weight)
    intervention.start(model)
    with torch.no_grad():
        model[0].weight.fill_(3)
        model[1].weight.zero_()
        model[2].weight.copy_(torch.tensor([[torch.nan, 1.0], [2.0, 3.0]]))
        model[3].weight.copy_(torch.tensor([[torch.inf, 1.0], [2.0, 3.0]]))
    before = copy.deepcopy(model.state_dict())
    intervention.after_step(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_non_finite_initial_weights_raise() -> None:
    model = nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, torch.inf)
    with pytest.raises(ValueError, match="NormalizeAndProject: 'weight' starts with values that are not finite"):
        NormalizeAndProject().start(model)


def test_weight_clipping_of_values_that_are_not_finite() -> None:
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]]))
    WeightClipping(2).after_step(model)
    torch.testing.assert_close(model.weight.data, torch.tensor([[1.0, -1.0, torch.nan, 0.0]]), equal_nan=True)


def test_hare_tortoise_averages_no_counters_and_masks() -> None:
    model, intervention = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), HareTortoise(0.5, every_n_steps=1)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    intervention.start(model)
    for buffer in (model[1].running_mean, model[1].running_var):
        buffer.add_(4)
    model[1].num_batches_tracked.fill_(8)
    intervention.after_step(model)
    assert torch.equal(model[1].running_mean, torch.full((3,), 2.0))
    assert torch.equal(model[1].running_var, torch.full((3,), 3.0))
    assert model[1].num_batches_tracked.item() == 8
    assert torch.equal(model.mask, torch.tensor([0.0, -torch.inf]))


def test_the_tortoise_of_half_precision_weights_is_precise() -> None:
    model, intervention = nn.Linear(1, 1, bias=False).to(torch.bfloat16), HareTortoise(0.999, every_n_steps=2000)
    torch.nn.init.zeros_(model.weight)
    intervention.start(model)
    torch.nn.init.ones_(model.weight)
    for _ in range(1999):
        intervention.after_step(model)
    assert intervention.tortoise["weight"].item() == pytest.approx(1 - 0.999**1999, rel=1e-4)
    intervention.after_step(model)
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == pytest.approx(1 - 0.999**2000, rel=2**-8)


# Common properties


# Of a norm alone, most leave all parameters out.
@pytest.mark.filterwarnings("ignore:.* rests, since")
@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_step_interventions_work_on_every_model(make: Callable[[], StepIntervention], case: Model) -> None:
    model, intervention = case.build(), make()
    parameters, frozen = list(model.parameters()), [p.clone() for p in model.parameters() if not p.requires_grad]
    # A graph that is left behind must not record the changes.
    model(torch.randn(case.shape))
    intervention.start(model)
    for _ in range(3):
        intervention.after_step(model)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert all(p.is_leaf and torch.isfinite(p).all() for p in parameters)
    assert all(torch.equal(*pair) for pair in zip(frozen, (p for p in parameters if not p.requires_grad), strict=True))
    model(torch.randn(case.shape))


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_frozen_parameters_and_statistics_of_frozen_norms_stay(make: Callable[[], StepIntervention]) -> None:
    model, intervention = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)), make()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    intervention.start(model)
    before = {}
    for _ in range(3):
        move(model, moves(model, 1, seed=1, size=3)[0])
        model[1].running_mean.add_(1)
        before = copy.deepcopy(model.state_dict())
        intervention.after_step(model)
    assert (
        {"2.weight", "3.weight"} & changed(model, before) if not isinstance(intervention, SoftShrinkPerturb) else True
    )
    assert changed(model, before) <= {"2.weight", "3.weight", "3.bias"}


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_shared_weights_are_treated_once(make: Callable[[], StepIntervention]) -> None:
    shared, single = mlp([4, 4, 4]), mlp([4, 4])
    shared[1].weight, shared[1].bias = shared[0].weight, shared[0].bias
    single.load_state_dict({name: shared.state_dict()[name] for name in ("0.weight", "0.bias")})
    for model in (shared, single):
        intervention = make()
        if isinstance(intervention, SoftShrinkPerturb):
            # With two layers, fresh weights differ.
            intervention.noise = 0
        intervention.start(model)
        run(model, intervention, 3)
    assert shared[1].weight is shared[0].weight
    torch.testing.assert_close(shared[0].state_dict(), single[0].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_half_precision_follows_single_precision(make: Callable[[], StepIntervention], dtype: torch.dtype) -> None:
    half, single = mlp([6, 5, 4]).to(dtype), mlp([6, 5, 4]).to(dtype).float()
    scales = None
    for model in (half, single):
        intervention = make()
        intervention.start(model)
        # Fresh weights, and so their scales, differ between precisions.
        if isinstance(intervention, SoftShrinkPerturb):
            scales = intervention.scales = scales or intervention.scales
        run(model, intervention, 3)
    assert all(parameter.dtype == dtype for parameter in half.parameters())
    size = max(parameter.abs().max().item() for parameter in single.parameters())
    for name, value in half.state_dict().items():
        torch.testing.assert_close(
            value.float(), single.state_dict()[name], rtol=0, atol=8 * size * torch.finfo(dtype).eps
        )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_complex_and_empty_parameters_do_no_harm(make: Callable[[], StepIntervention]) -> None:
    model, intervention = nn.Sequential(nn.Linear(3, 2, dtype=torch.cfloat), nn.Linear(2, 2)), make()
    model.append(nn.Linear(0, 3))
    intervention.start(model)
    for _ in range(3):
        intervention.after_step(model)
    assert model[0].weight.dtype == torch.cfloat
    assert all(torch.isfinite(torch.view_as_real(p)).all() for p in model[0].parameters())


@pytest.mark.filterwarnings("ignore:.* leaves out")
@pytest.mark.parametrize("name", ["WeightClipping", "NormalizeAndProject", "HareTortoise"])
def test_weights_of_parametrized_layers_are_not_computed(name: str) -> None:
    """Spectral normalisation takes a power iteration whenever its weight is computed."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    # The stored vectors do not fit these weights yet.
    torch.nn.init.normal_(model[0].parametrizations.weight.original)
    intervention, before = STEP_INTERVENTIONS[name](), copy.deepcopy(model.state_dict())
    intervention.start(model)
    intervention.after_step(model)
    assert not {key for key in changed(model, before) if "parametrizations" in key}


@pytest.mark.parametrize("name", WITH_STATE)
def test_step_before_start_raises(name: str) -> None:
    intervention, model = STEP_INTERVENTIONS[name](), mlp([3, 2])
    before = copy.deepcopy(model.state_dict())
    message = r"has no stored state of \['0.weight'.*\]: call start\(model\) before the first training step"
    with pytest.raises(RuntimeError, match=f"{intervention.name} {message}"):
        intervention.after_step(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_model_that_has_grown_needs_another_start(name: str) -> None:
    intervention, model = STEP_INTERVENTIONS[name](), mlp([3, 2])
    intervention.start(model)
    model.append(nn.Linear(2, 2).double())
    with pytest.raises(RuntimeError, match=r"no stored state of \['1.weight'.*\]: call start"):
        intervention.after_step(model)
    intervention.start(model)
    intervention.after_step(model)


def test_grown_head_gets_a_new_norm() -> None:
    intervention, model = NormalizeAndProject(), mlp([3, 2])
    intervention.start(model)
    model[0] = nn.Linear(3, 50).double()
    with pytest.raises(RuntimeError, match=r"no stored state of \['0.weight'\]: call start"):
        intervention.after_step(model)
    before = model[0].weight.norm()
    intervention.start(model)
    again = NormalizeAndProject()
    again.load_state_dict(intervention.state_dict())
    with torch.no_grad():
        model[0].weight *= 3
    again.after_step(model)
    torch.testing.assert_close(model[0].weight.norm(), before)


def test_grown_embedding_gets_a_new_scale() -> None:
    intervention = SoftShrinkPerturb(noise=0.1)
    for size in (3, 5):
        model = nn.Sequential(nn.Embedding(size, 4, padding_idx=0))
        intervention.start(model)
        before = model[0].weight.detach().clone()
        intervention.after_step(model)
        assert (model[0].weight[0] == 0).all()
        assert ((model[0].weight - before)[1:].abs() > 1e-4).any(1).all()


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_starting_and_stopping_again_makes_no_difference(make: Callable[[], StepIntervention]) -> None:
    once, often = mlp([4, 3, 2]), mlp([4, 3, 2])
    for model in (once, often):
        intervention = make()
        intervention.start(model)
        for by in moves(model, 5, seed=0):
            move(model, by)
            intervention.after_step(model)
            if model is often:
                intervention.stop()
                intervention.start(model)
    torch.testing.assert_close(once.state_dict(), often.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
@pytest.mark.parametrize("restart", [False, True])
def test_training_resumes_bit_for_bit(make: Callable[[], StepIntervention], restart: bool) -> None:
    model, intervention = nn.Sequential(*mlp([4, 3, 2]), nn.BatchNorm1d(2).double()), make()
    intervention.start(model)
    run(model, intervention, 2, seed=1)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "intervention": intervention.state_dict()}, file)
    taken = copy.deepcopy(intervention.state_dict())
    saved = intervention.state_dict()
    run(model, intervention, 5, seed=2)
    # The saved state shares no memory with the intervention.
    torch.testing.assert_close(saved, taken, rtol=0, atol=0)

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again, resumed = nn.Sequential(*mlp([4, 3, 2], seed=8), nn.BatchNorm1d(2).double()), make()
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["intervention"])
    if restart:
        resumed.start(again)
    run(again, resumed, 5, seed=2)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), intervention.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_step_interventions_ignore_the_global_generator(make: Callable[[], StepIntervention]) -> None:
    models = [mlp([4, 3, 2]), mlp([4, 3, 2])]
    state = torch.get_rng_state()
    for model in models:
        intervention = make()
        intervention.start(model)
        run(model, intervention, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_seeds_give_different_noise() -> None:
    models = [mlp([4, 3]), mlp([4, 3])]
    for seed, model in enumerate(models):
        intervention = SoftShrinkPerturb(1, 1, seed=seed)
        intervention.start(model)
        intervention.after_step(model)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("make", STEP_INTERVENTIONS.values(), ids=STEP_INTERVENTIONS)
def test_step_interventions_run_beside_an_optimizer(make: Callable[[], StepIntervention]) -> None:
    model, intervention, x = mlp([4, 8, 2]), make(), torch.randn(16, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    intervention.start(model, forward=lambda model: model(x))
    for _ in range(4):
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.ones(16, 2, dtype=torch.float64)).backward()
        optimizer.step()
        intervention.after_step(model, optimizers=[optimizer], forward=lambda model: model(x))
    intervention.stop()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


BAD_ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    (lambda: WeightClipping(0), "WeightClipping(kappa=0) must be a finite number, greater than 0"),
    (lambda: WeightClipping(math.nan), "WeightClipping(kappa=nan) must be a finite number, greater than 0"),
    (lambda: HareTortoise(decay=1), "HareTortoise(decay=1) must be in [0, 1)"),
    (lambda: HareTortoise(decay=-0.1), "HareTortoise(decay=-0.1) must be in [0, 1)"),
    (lambda: HareTortoise(every_n_steps=0), "HareTortoise(every_n_steps=0) must be a whole number, at least 1"),
    (lambda: HareTortoise(every_n_steps=2.5), "HareTortoise(every_n_steps=2.5) must be a whole number"),  # type: ignore[arg-type]
    (lambda: SoftShrinkPerturb(shrink=1.1), "SoftShrinkPerturb(shrink=1.1) must be in [0, 1]"),
    (lambda: SoftShrinkPerturb(noise=-1), "SoftShrinkPerturb(noise=-1) must be a finite number, at least 0"),
    (lambda: SoftShrinkPerturb(every_n_steps=True), "SoftShrinkPerturb(every_n_steps=True) must be a whole number"),
    (lambda: FIRE(0), "FIRE(iterations=0) must be a whole number, at least 1"),
    (lambda: FIRE(2.0), "FIRE(iterations=2.0) must be a whole number, at least 1"),  # type: ignore[arg-type]
    (lambda: FIRE(when=100), "FIRE(when=100) must be 'collapse' or 'task'"),
    (lambda: DASH(alpha=0), "DASH(alpha=0) must be in (0, 1]"),
    (lambda: DASH(shrinkage=1.5), "DASH(shrinkage=1.5) must be in [0, 1]"),
    (lambda: DASH(when=100), "DASH(when=100) must be 'collapse' or 'task'"),
    (lambda: Reset(last=0), "Reset(last=0) must be a number of layers, at least 1, or None"),
    (lambda: Reset(last=True), "Reset(last=True) must be a number of layers, at least 1, or None"),
    (lambda: Reset(layers=["0"], last=1), "Reset(layers=['0'], last=1): give one of them, not both"),
]


@pytest.mark.parametrize(
    ("make", "message"), BAD_ARGUMENTS, ids=[message.split(" ")[0] for _, message in BAD_ARGUMENTS]
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()


# Repairs


REPAIRS: dict[str, Callable[[], Repair]] = {
    **{row.name: row.make for row in select(Repair, on_units=False)},
    "Reset, all": Reset,
}


def loss(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 12, dtype=next(model.parameters()).dtype).view(3, 4)
    return model(x).square().sum()


@pytest.mark.parametrize("make", REPAIRS.values(), ids=REPAIRS)
def test_repairs_are_in_place_and_ignore_the_global_generator(make: Callable[[], Repair]) -> None:
    models = [mlp([4, 4, 3]), mlp([4, 4, 3])]
    for model in models:
        model[0].requires_grad_(False)
    parameters, before = list(models[0].parameters()), copy.deepcopy(models[0].state_dict())
    state = torch.get_rng_state()
    for model in models:
        make().repair(model, loss=loss, forward=loss, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert all(old is new for old, new in zip(parameters, models[0].parameters(), strict=True))
    assert {"1.weight"} <= changed(models[0], before) <= {"1.weight", "1.bias"}


@pytest.mark.parametrize("make", REPAIRS.values(), ids=REPAIRS)
def test_repairs_planned_on_a_copy_are_the_same(make: Callable[[], Repair]) -> None:
    models = [mlp([4, 4, 3]), mlp([4, 4, 3])]
    for model, make_copy in zip(models, (None, lambda: copy.deepcopy(models[1])), strict=True):
        make().repair(model, loss=loss, forward=loss, generator=torch.Generator().manual_seed(1), make_copy=make_copy)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


class Failing(torch.optim.Adam):
    """An optimizer whose state cannot be reset."""

    @property
    def state(self) -> Any:
        if getattr(self, "armed", False):
            raise RuntimeError("no")
        return self.kept

    @state.setter
    def state(self, value: Any) -> None:
        self.kept = value


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "DASH"])
def test_repairs_are_all_or_nothing(name: str) -> None:
    model = mlp([4, 4, 3])
    optimizers = [torch.optim.Adam(model[0].parameters()), Failing(model[1].parameters())]
    loss(model).backward()
    for optimizer in optimizers:
        optimizer.step()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers[0].state_dict())
    optimizers[1].armed = True
    with pytest.raises(RuntimeError, match="no"):
        REPAIRS[name]().repair(model, optimizers=optimizers, loss=loss, forward=loss)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizers[0].state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("make", [FIRE, DASH])
def test_repairs_name_non_finite_weights(make: Callable[[], Repair]) -> None:
    model = mlp([4, 4, 3])
    torch.nn.init.constant_(model[1].weight, torch.nan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"FIRE: '1.weight' holds values|DASH: the gradient of '0.weight' is not finite"
    ):
        make().repair(model, loss=loss)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


# The last layers


def reset_last(model: nn.Module, last: int, x: Tensor) -> set[str]:
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7)
    before = copy.deepcopy(model.state_dict())
    Reset(last=last).repair(model, forward=lambda model: model(x))
    return {name.rpartition(".")[0] for name in changed(model, before)}


def test_last_layers_are_in_call_order() -> None:
    assert reset_last(Functional(), 1, torch.ones(1, 4)) == {"head"}
    assert reset_last(Functional(), 2, torch.ones(1, 4)) == {"second", "head"}


def test_norms_and_prelus_are_reset_with_the_layer_before() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Linear(4, 2)
    )
    assert reset_last(model, 1, torch.ones(1, 4)) == {"5"}
    assert reset_last(model, 2, torch.ones(1, 4)) == {"2", "3", "4", "5"}
    assert reset_last(model, 3, torch.ones(1, 4)) == {"0", "1", "2", "3", "4", "5"}


def test_attention_is_one_layer() -> None:
    model = Encoder()
    last = {"encoder.layers.1.linear2", "encoder.layers.1.norm2", "head"}
    assert reset_last(model, 2, torch.rand(3, 5)) == last
    last |= {"encoder.layers.1.linear1", "encoder.layers.1.norm1"}
    last |= {"encoder.layers.1.self_attn", "encoder.layers.1.self_attn.out_proj"}
    assert reset_last(model, 4, torch.rand(3, 5)) == last


def test_layer_called_twice_counts_at_its_last_call() -> None:
    again = nn.Linear(4, 4)
    assert reset_last(nn.Sequential(nn.Linear(4, 4), again, nn.Linear(4, 4), again), 1, torch.ones(1, 4)) == {"1", "3"}


def test_more_last_layers_than_the_model_has_raise() -> None:
    with pytest.raises(ValueError, match=r"Reset\(last=4\) must be at most 3, the number of layers with parameters"):
        reset_last(Functional(), 4, torch.ones(1, 4))


def test_last_layers_need_forward() -> None:
    with pytest.raises(ValueError, match=r"Reset\(last=...\) needs a forward pass of the model: repair\(model, forw"):
        Reset(last=1).repair(nn.Linear(2, 2))
