"""Check that FIRE turns weight matrices into multiples of their polar factors, and changes nothing else."""

import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import FIRE
from tests.helpers.unit_models import Encoder


def polar_factor(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt


def polynomial(s: np.ndarray, iterations: int) -> np.ndarray:
    """Apply the iteration to singular values."""
    for _ in range(iterations):
        s = 1.5 * s - 0.5 * s**3
    return s


def with_singular_values(shape: tuple[int, int], values: np.ndarray, seed: int) -> np.ndarray:
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), full_matrices=False)
    return (u * values) @ vt


def linear(weight: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    return layer


@settings(max_examples=40, deadline=None)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_well_conditioned_weights_become_their_polar_factor(outputs: int, inputs: int, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(0.7, 1.3, min(outputs, inputs)) * 10.0 ** (seed % 13 - 6)
    weight = with_singular_values((outputs, inputs), values, seed)
    layer = linear(weight)
    FIRE().repair(layer)
    expected = polar_factor(weight) * np.sqrt(outputs / inputs)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=0, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(outputs=st.integers(1, 9), inputs=st.integers(1, 9), iterations=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_each_singular_value_goes_through_the_polynomial(outputs: int, inputs: int, iterations: int, seed: int) -> None:
    values = np.sort(np.random.default_rng(seed).exponential(size=min(outputs, inputs)) ** 4)[::-1]
    weight = with_singular_values((outputs, inputs), values, seed)
    layer = linear(weight)
    FIRE(iterations).repair(layer)
    made = polynomial(values / np.linalg.norm(values), iterations)
    singular_values = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False) / np.sqrt(outputs / inputs)
    np.testing.assert_allclose(singular_values, made, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), [(0.1, 1.0), (0.03, 0.97), (0.01, 0.53), (0.001, 0.06)])
def test_ten_iterations_are_as_accurate_as_documented(before: float, after: float) -> None:
    layer = linear(np.diag([np.sqrt(1 - before**2), before]))
    FIRE().repair(layer)
    assert layer.weight[1, 1].item() == pytest.approx(after, abs=0.005)


def test_large_square_matrices_converge_as_documented() -> None:
    layer = nn.Linear(1000, 1000)
    FIRE().repair(layer)
    assert (torch.linalg.svdvals(layer.weight) > 0.9).double().mean().item() == pytest.approx(0.55, abs=0.02)


def test_a_matrix_of_lower_rank_keeps_its_rank() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    layer = linear(weight)
    FIRE(40).repair(layer)
    u, _, vt = np.linalg.svd(weight)
    expected = u[:, :2] @ vt[:2] * np.sqrt(6 / 5)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=0, atol=1e-9)


def test_a_zero_matrix_stays_zero() -> None:
    layer = linear(np.zeros((3, 4)))
    assert FIRE().repair(layer).num_parameters_changed == 0
    assert torch.equal(layer.weight, torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_weights(size: float) -> None:
    layer = nn.Linear(3, 3)
    unit = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(size)
    FIRE().repair(layer)
    FIRE().repair(unit)
    torch.testing.assert_close(layer.weight, unit.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_resolution(dtype: torch.dtype) -> None:
    layer = nn.Linear(32, 8).to(dtype)
    expected = polar_factor(layer.weight.detach().double().numpy()) / 2
    FIRE().repair(layer)
    assert layer.weight.dtype == dtype
    np.testing.assert_allclose(
        layer.weight.detach().double().numpy(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("make", "taps"), [(nn.Conv1d, (3,)), (nn.Conv2d, (3, 2)), (nn.Conv2d, (1, 1)), (nn.Conv3d, (1, 2, 2))]
)
def test_convolutions_are_treated_tap_by_tap_and_group_by_group(
    make: type[nn.Conv2d], taps: tuple[int, ...], groups: int
) -> None:
    conv = make(4, 6, taps, groups=groups, dtype=torch.float64)  # type: ignore[arg-type]
    old = conv.weight.detach().numpy().copy()
    FIRE(60).repair(conv)
    new = conv.weight.detach().numpy()
    for tap in np.ndindex(*taps):
        for rows in np.split(np.arange(6), groups):
            matrix = old[(rows, slice(None), *tap)]
            expected = polar_factor(matrix) * np.sqrt(matrix.shape[0] / matrix.shape[1]) / np.prod(taps)
            np.testing.assert_allclose(new[(rows, slice(None), *tap)], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("separate", [False, True])
def test_attention_changes_in_queries_and_keys_only(separate: bool) -> None:
    sizes = {"kdim": 6, "vdim": 4} if separate else {}
    attention = nn.MultiheadAttention(8, 2, **sizes).double()
    old = {name: value.numpy().copy() for name, value in attention.state_dict().items()}
    FIRE(60).repair(attention)
    new = {name: value.numpy() for name, value in attention.state_dict().items()}
    if separate:
        for name in ("q_proj_weight", "k_proj_weight"):
            expected = polar_factor(old[name]) * np.sqrt(8 / old[name].shape[1])
            np.testing.assert_allclose(new.pop(name), expected, rtol=0, atol=1e-9)
    else:
        projections = new.pop("in_proj_weight")
        queries, keys, values = np.split(old["in_proj_weight"], 3)
        expected = np.concatenate([polar_factor(queries), polar_factor(keys), values])
        np.testing.assert_allclose(projections, expected, rtol=0, atol=1e-9)
    for name, value in new.items():
        np.testing.assert_array_equal(value, old[name])


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_layers_documented_as_unchanged_stay() -> None:
    model = nn.Sequential(
        *(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.GRU(4, 4), nn.LSTMCell(4, 4)),
        *(nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 3)),
    )
    model[8].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    FIRE().repair(model)
    assert changed(model, before) == {"1.weight"}


def test_weights_shared_with_an_embedding_stay() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7), nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    before = copy.deepcopy(model.state_dict())
    once = polar_factor(model[2].weight.detach().numpy())
    FIRE(60).repair(model)
    assert changed(model, before) == {"2.weight", "3.weight"}
    np.testing.assert_allclose(model[3].weight.detach().numpy(), once, atol=1e-9)


def test_in_a_transformer_feed_forward_layers_change_too() -> None:
    model = Encoder()
    before = copy.deepcopy(model.state_dict())
    FIRE().repair(model)
    layers = {f"encoder.layers.{i}.{part}.weight" for i in (0, 1) for part in ("linear1", "linear2")} | {
        f"encoder.layers.{i}.self_attn.in_proj_weight" for i in (0, 1)
    }
    assert changed(model, before) == {"head.weight", *layers}


def test_optimizer_state_of_changed_weights_is_reset() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    FIRE().repair(model, optimizers=[optimizer])
    assert list(optimizer.state) == [model.bias]
