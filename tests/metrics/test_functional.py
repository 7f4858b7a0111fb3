"""Compare every diagnostic with NumPy, and check the properties that its definition implies."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_plasticity import functional as P
from lightning_plasticity.functional.ranks import (
    entropy_rank,
    leading_count,
    second_moments,
    singular_values,
    singular_values_of_moments,
    squared_ratio,
)
from tests.helpers.numpy_diagnostics import (
    Array,
    features,
    numpy_cloned,
    numpy_dead,
    numpy_dormant,
    numpy_effective_rank,
    numpy_feature_norm,
    numpy_srank,
    numpy_stable_rank,
    to_matrix,
)

LAYOUTS = {
    "(N, d)": ((40, 7), None, 1),
    "(N, T, d)": ((10, 6, 7), None, 2),
    "(N, C, L)": ((10, 7, 6), 1, 1),
    "(N, C, H, W)": ((6, 7, 4, 5), None, 1),
    "(N, H, W, C)": ((6, 4, 5, 7), -1, 3),
    "(N, C, D, H, W)": ((4, 7, 2, 3, 3), None, 1),
}


FEATURE_DIAGNOSTICS: dict[str, tuple[Callable[..., Tensor], Callable[[Array], float]]] = {
    "dormant_fraction": (P.dormant_fraction, numpy_dormant),
    "dead_fraction": (P.dead_fraction, numpy_dead),
    "cloned_fraction": (P.cloned_fraction, numpy_cloned),
    "effective_rank": (P.effective_rank, numpy_effective_rank),
    "stable_rank": (P.stable_rank, numpy_stable_rank),
    "srank": (P.srank, numpy_srank),
    "feature_norm": (P.feature_norm, numpy_feature_norm),
}
RANKS = ["effective_rank", "stable_rank", "srank"]


@pytest.mark.parametrize("name", FEATURE_DIAGNOSTICS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_numpy(name: str, layout: str) -> None:
    shape, channel_dim, axis = LAYOUTS[layout]
    diagnostic, reference = FEATURE_DIAGNOSTICS[name]
    h = features(shape, axis)
    expected = reference(to_matrix(h.numpy(), axis))
    assert diagnostic(h, channel_dim=channel_dim).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", FEATURE_DIAGNOSTICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_precisions_match_numpy_in_float64(name: str, dtype: torch.dtype) -> None:
    diagnostic, reference = FEATURE_DIAGNOSTICS[name]
    h = features((40, 7), 1).to(dtype)
    value = diagnostic(h)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(h.double().numpy()), rel=1e-6)


def test_half_precision_sums_do_not_overflow() -> None:
    h = torch.full((2, 4, 64, 64), 60000.0, dtype=torch.float16)
    assert P.dormant_fraction(h).item() == 0
    assert P.feature_norm(h).item() == pytest.approx(2 * 60000.0, rel=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 1.0])
def test_dormant_fraction_thresholds(threshold: float) -> None:
    h = features((50, 7), 1)
    assert P.dormant_fraction(h, threshold).item() == numpy_dormant(h.numpy(), threshold)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.97, 0.99])
def test_cloned_fraction_thresholds(threshold: float) -> None:
    h = features((50, 7), 1)
    assert P.cloned_fraction(h, threshold).item() == numpy_cloned(h.double().numpy(), threshold)


def test_clones_are_equal_up_to_scale_and_offset() -> None:
    """Of three units in proportion two are clones; the opposite of a unit and a saturated unit are none."""
    unit, other = torch.randn(2, 30).relu()
    saturated = 1 + 1e-7 * torch.randn(30)
    h = torch.stack([unit, 3 * unit, other, 1e-3 * unit + 5, -unit, saturated, saturated], 1)
    assert P.cloned_fraction(h).item() == pytest.approx(2 / 7)


def test_units_of_positive_activations_are_no_clones() -> None:
    assert P.cloned_fraction(torch.randn(40, 9).sigmoid()).item() == 0


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.1, 0.5])
def test_srank_deltas(delta: float) -> None:
    h = torch.randn(30, 12, dtype=torch.float64) * torch.logspace(0, -4, 12, dtype=torch.float64)
    assert P.srank(h, delta).item() == numpy_srank(h.numpy(), delta)


def test_srank_of_equal_singular_values_is_an_exact_tie() -> None:
    """99 of 100 equal singular values make up exactly 1 - 0.01 of their sum, whatever the rounding."""
    rotation = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0]
    assert P.srank(torch.eye(100)).item() == P.srank(rotation).item() == 99


def test_gradient_dormancy_averages_incoming_weights() -> None:
    gradient = torch.randn(9, 5, 3, 3) * torch.tensor([1, 0, 1e-4, 1, 1, 0.011, 1, 1, 1e-3]).reshape(-1, 1, 1, 1)
    per_unit = np.array([np.abs(g).mean() for g in gradient.double().numpy()])
    expected = np.mean(per_unit / per_unit.mean() <= 0.01)
    assert P.gradient_dormant_fraction(gradient).item() == expected
    assert P.gradient_dormant_fraction(gradient.transpose(0, 1), channel_dim=1).item() == expected
    assert 0 < expected < 1


def test_weight_magnitude_averages_entries_not_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 2))
    entries = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])
    assert P.weight_magnitude(model).item() == pytest.approx(np.abs(entries).mean(), rel=1e-12)
    assert P.weight_magnitude(model[0].weight).item() == pytest.approx(
        np.abs(model[0].weight.detach().double().numpy()).mean(), rel=1e-12
    )


def test_weight_magnitude_counts_shared_weights_once() -> None:
    layer = nn.Linear(4, 4)
    assert P.weight_magnitude(nn.Sequential(layer, layer)) == P.weight_magnitude(layer)


def test_gradient_norm_covers_all_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    model(torch.randn(5, 3)).sum().backward()
    entries = np.concatenate([p.grad.double().numpy().ravel() for p in model.parameters() if p.grad is not None])
    assert P.gradient_norm(model).item() == pytest.approx(math.sqrt((entries**2).sum()), rel=1e-12)
    assert P.gradient_norm(p.grad for p in model.parameters() if p.grad is not None) == P.gradient_norm(model)


def test_optimization_readiness_matches_numpy() -> None:
    minibatches = torch.randn(6, 11) + 0.3
    g = minibatches.double().numpy()
    expected = np.linalg.norm(g.mean(0)) ** 4 / (1.7 * np.mean([np.linalg.norm(row) ** 2 for row in g]))
    assert P.optimization_readiness(1.7, minibatches).item() == pytest.approx(expected, rel=1e-12)
    assert P.optimization_readiness(torch.tensor(1.7).double(), list(minibatches)).item() == pytest.approx(expected)


def test_optimization_readiness_bounds_the_gain_of_one_step() -> None:
    """For L = β/2 ‖θ‖² with noisy gradients, the best step size attains the bound R/2β with equality."""
    beta, theta = 3.0, torch.randn(8, dtype=torch.float64)
    noise = torch.randn(5, 8, dtype=torch.float64)
    gradients = beta * theta + (noise - noise.mean(0))
    loss = beta / 2 * theta.square().sum()

    def expected_loss(step: float) -> float:
        return (beta / 2 * (theta - step * gradients).square().sum(1)).mean().item()

    best = min(expected_loss(step) for step in np.linspace(0, 2 / beta, 20001))
    bound = P.optimization_readiness(loss, gradients).item() / (2 * beta)
    assert 1 - best / loss.item() == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8), (6, 4, 3, 3), (4, 6, 2)])
def test_isometry_deviation_matches_numpy(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    taps = np.moveaxis(w.double().numpy().reshape(*shape[:2], -1), -1, 0)
    expected = sum(np.linalg.norm(tap.T @ tap - np.eye(shape[1]), "fro") ** 2 for tap in taps)
    assert P.isometry_deviation(w).item() == pytest.approx(expected, rel=1e-12)


def test_isometry_deviation_of_isometry_is_zero() -> None:
    q = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0]
    assert P.isometry_deviation(q).item() < 1e-28
    # 20 columns in 6 dimensions cannot be orthonormal.
    assert P.isometry_deviation(q.T).item() == pytest.approx(14)


def test_kronecker_ranks_match_dense_product() -> None:
    h, delta = torch.randn(30, 4), torch.randn(30, 3) * torch.tensor([1.0, 0.1, 0.0])
    a, g = (x.double().numpy().T @ x.double().numpy() / 30 for x in (h, delta))

    def rank(m: Array) -> float:
        p = np.abs(np.linalg.eigvalsh(m)) / np.abs(np.linalg.eigvalsh(m)).sum()
        return math.exp(-sum(x * math.log(x) for x in p if x > 0))

    ranks = P.kronecker_ranks(h, delta)
    assert ranks.inputs.item() == pytest.approx(rank(a), rel=1e-6)
    assert ranks.gradients.item() == pytest.approx(rank(g), rel=1e-6)
    assert ranks.product.item() == pytest.approx(rank(np.kron(a, g)), rel=1e-6)


# Degenerate and invalid inputs


def test_zero_layer_is_dormant_with_rank_zero() -> None:
    h = torch.zeros(8, 5)
    assert P.dormant_fraction(h).item() == P.dormant_fraction(h, 0.0).item() == P.dead_fraction(h).item() == 1
    assert P.gradient_dormant_fraction(h).item() == 1
    assert P.effective_rank(h).item() == P.stable_rank(h).item() == P.srank(h).item() == 0
    assert P.feature_norm(h).item() == 0
    assert P.optimization_readiness(1.0, h).item() == P.optimization_readiness(0.0, torch.ones(2, 3)).item() == 0
    assert [rank.item() for rank in P.kronecker_ranks(h, torch.ones(8, 2))] == [0, pytest.approx(1), 0]


def test_one_sample_has_rank_one() -> None:
    h = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    assert P.effective_rank(h).item() == pytest.approx(1)
    assert P.stable_rank(h).item() == pytest.approx(1)
    assert P.srank(h).item() == 1
    assert P.dead_fraction(h).item() == 0.5
    assert P.feature_norm(h).item() == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*FEATURE_DIAGNOSTICS, "gradient_dormant_fraction"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_non_finite_features_raise(name: str, bad: float, shape: tuple[int, ...]) -> None:
    h = torch.ones(shape)
    h.view(-1)[5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        getattr(P, name)(h)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_and_gradients_raise(bad: float) -> None:
    w = torch.tensor([[1.0, bad]])
    for function in (P.weight_magnitude, P.isometry_deviation, P.gradient_norm):
        with pytest.raises(ValueError, match="NaN or infinite"):
            function(w)
    with pytest.raises(ValueError, match="gradients hold NaN"):
        P.optimization_readiness(1.0, w)
    with pytest.raises(ValueError, match="losses hold NaN"):
        P.optimization_readiness(bad, torch.ones(2, 2))


@pytest.mark.parametrize("name", [*FEATURE_DIAGNOSTICS, "gradient_dormant_fraction"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0, 4)])
def test_empty_tensors_raise(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="holds no samples or no units"):
        getattr(P, name)(torch.zeros(shape))


def test_error_messages() -> None:
    with pytest.raises(ValueError, match=r"write tensor\[None\] for one sample"):
        P.effective_rank(torch.ones(3))
    with pytest.raises(TypeError, match=r"floating-point numbers.*torch.int64"):
        P.dead_fraction(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        P.dead_fraction([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channel_dim=2 is not a dimension of a tensor of shape \(3, 3\)"):
        P.srank(torch.ones(3, 3), channel_dim=2)
    with pytest.raises(ValueError, match=r"channel_dim='x' is not a dimension of a tensor of shape \(3, 3\)"):
        P.srank(torch.ones(3, 3), channel_dim="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"threshold=2 must be in \[0, 1\]"):
        P.dormant_fraction(torch.ones(3, 3), 2)
    with pytest.raises(ValueError, match=r"delta=1 must be in \[0, 1\)"):
        P.srank(torch.ones(3, 3), 1)
    with pytest.raises(ValueError, match="is no matrix"):
        P.isometry_deviation(torch.ones(3))
    with pytest.raises(ValueError, match="weights hold no numbers"):
        P.weight_magnitude(nn.ReLU())
    with pytest.raises(ValueError, match=r"no parameter of Linear has a gradient: call backward\(\)"):
        P.gradient_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="gradients hold no numbers"):
        P.gradient_norm([])
    with pytest.raises(ValueError, match="minibatch_gradients holds none"):
        P.optimization_readiness(1.0, [])
    with pytest.raises(ValueError, match="loss=-1 is negative"):
        P.optimization_readiness(-1.0, torch.ones(2, 2))


# Properties


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-20, 20), name=st.sampled_from(list(FEATURE_DIAGNOSTICS)))
def test_scaling_features_changes_only_their_norm(seed: int, exponent: int, name: str) -> None:
    # Scaling by a power of two is exact.
    h, factor = features((30, 7), 1, seed).double(), 2.0**exponent
    expected = P.feature_norm(h).item() * factor if name == "feature_norm" else getattr(P, name)(h).item()
    assert getattr(P, name)(-factor * h).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(FEATURE_DIAGNOSTICS)))
def test_order_of_samples_and_units_is_irrelevant(seed: int, name: str) -> None:
    h = features((30, 7), 1, seed).double()
    generator = torch.Generator().manual_seed(seed)
    shuffled = h[torch.randperm(30, generator=generator)][:, torch.randperm(7, generator=generator)]
    assert getattr(P, name)(shuffled).item() == pytest.approx(getattr(P, name)(h).item(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_ranks_lie_between_one_and_smaller_dimension(seed: int, rows: int, columns: int) -> None:
    f = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    for name in RANKS:
        assert 1 - 1e-9 <= getattr(P, name)(f).item() <= min(rows, columns) * (1 + 1e-9)
        assert getattr(P, name)(f.T).item() == pytest.approx(getattr(P, name)(f).item(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-20, 20))
def test_readiness_scales_with_loss_but_gradient_dormancy_not(seed: int, exponent: int) -> None:
    g, factor = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)).double(), 2.0**exponent
    readiness = P.optimization_readiness(1.0, g).item()
    assert P.optimization_readiness(factor, factor * g).item() == pytest.approx(factor * readiness, rel=1e-9)
    assert P.gradient_dormant_fraction(factor * g) == P.gradient_dormant_fraction(g)


def test_feature_maps_summed_in_pieces_are_exact() -> None:
    h = torch.randn(20, 6, 64, 64) * torch.tensor([1.0, 0.0, 2.0, 0.01, 1.0, 1.0]).reshape(1, 6, 1, 1)
    assert h.numel() > 2**18
    f = to_matrix(h.numpy(), 1)
    for name, (diagnostic, reference) in FEATURE_DIAGNOSTICS.items():
        if name in RANKS:
            # The ranks are computed from the feature matrix as a whole; their second moments are compared below.
            continue
        assert diagnostic(h).item() == pytest.approx(reference(f), rel=1e-6)
    assert np.allclose(second_moments(h).numpy(), f.T @ f, rtol=1e-12)
    flipped = h.permute(1, 0, 2, 3)
    assert np.allclose(second_moments(flipped, 0).numpy(), f.T @ f, rtol=1e-12)
    assert P.dormant_fraction(flipped, channel_dim=0).item() == P.dormant_fraction(h).item()


# Singular values from second moments


def conditioned(units: int, condition: float, kind: str) -> Tensor:
    samples = 3 * units
    left = torch.linalg.qr(torch.randn(samples, units, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(units, units, dtype=torch.float64))[0]
    low = -math.log10(condition)
    sigma = {
        "geometric": torch.logspace(0, low, units, dtype=torch.float64),
        "two levels": torch.cat([torch.ones(units // 2), torch.full((units - units // 2,), 1 / condition)]).double(),
        "one large": torch.cat([torch.ones(1), torch.full((units - 1,), 1 / condition)]).double(),
    }[kind]
    return (left * sigma) @ right.T


@pytest.mark.parametrize("kind", ["geometric", "two levels", "one large"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("units", [8, 64, 256])
def test_ranks_of_second_moments_match_svd(units: int, condition: float, kind: str) -> None:
    f = conditioned(units, condition, kind)
    sigma = singular_values_of_moments(second_moments(f))
    reference = np.linalg.svd(f.numpy(), compute_uv=False)
    p = reference / reference.sum()
    assert entropy_rank(sigma).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert leading_count(sigma, 0.01).item() == numpy_srank(f.numpy())
    assert squared_ratio(sigma).item() == pytest.approx((reference**2).sum() / reference[0] ** 2, rel=1e-12)


def test_singular_values_below_rounding_are_zero() -> None:
    f = conditioned(64, 1e9, "one large")
    # The 63 other singular values are 1e-9 of the first.
    assert P.effective_rank(f).item() > 1 + 1e-6
    assert (singular_values_of_moments(second_moments(f)) > 0).sum() == 1


@pytest.mark.parametrize("units", [64, 512])
def test_rounding_adds_no_rank_to_low_rank_matrices(units: int) -> None:
    for f in (torch.randn(units // 4, units), torch.randn(4 * units, units // 4) @ torch.randn(units // 4, units)):
        f = f.double()
        sigma = singular_values_of_moments(second_moments(f))
        assert (sigma > 0).sum() == units // 4
        assert torch.allclose(sigma[: units // 4], singular_values(f)[: units // 4], rtol=1e-9)


# Mistakes found in other implementations


def test_zero_sample_does_not_change_dormant_fraction() -> None:
    h = torch.rand(256, 12)
    # A mean over samples of ratios divides by zero here.
    h[17] = 0
    assert P.dormant_fraction(h).item() == numpy_dormant(h.numpy()) == 0
    images = torch.rand(8, 5, 4, 4)
    images[:, :, 0, 0] = 0
    assert P.dormant_fraction(images).item() == 0


def test_dormancy_score_is_ratio_of_means() -> None:
    h = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    mean_of_ratios = (h / h.mean(1, keepdim=True)).mean(0) / 2
    assert (mean_of_ratios == 0.5).all()
    # The magnitude of the second unit is 1/50.5 of the mean.
    assert P.dormant_fraction(h, 0.02).item() == 0.5


def test_stable_rank_srank_and_participation_ratio_differ() -> None:
    f = torch.randn(200, 50, dtype=torch.float64) * torch.logspace(0, -2, 50, dtype=torch.float64)
    sigma2 = np.linalg.svd(f.numpy(), compute_uv=False) ** 2
    participation = sigma2.sum() ** 2 / (sigma2**2).sum()
    values = [P.stable_rank(f).item(), float(P.srank(f).item()), participation]
    assert P.stable_rank(f).item() == pytest.approx(sigma2.sum() / sigma2[0])
    assert all(abs(a - b) > 0.5 for a, b in itertools.combinations(values, 2))


def test_effective_rank_neither_centres_nor_squares() -> None:
    f = torch.rand(100, 20, dtype=torch.float64) + 1
    sigma = np.linalg.svd(f.numpy(), compute_uv=False)
    assert P.effective_rank(f).item() == pytest.approx(numpy_effective_rank(f.numpy()))
    assert P.effective_rank(f).item() < 0.7 * P.effective_rank(f - f.mean(0)).item()
    squared = sigma**2 / (sigma**2).sum()
    assert abs(P.effective_rank(f).item() - math.exp(-(squared * np.log(squared)).sum())) > 1


def test_tokens_are_samples_and_channels_are_units() -> None:
    tokens = torch.rand(4, 50, 32)
    tokens[..., :8] = 0
    assert P.dead_fraction(tokens).item() == 8 / 32
    images = torch.rand(64, 16, 8, 8)
    # A blank image makes no unit dead.
    images[3] = 0
    images[:, :4] = 0
    assert P.dead_fraction(images).item() == 4 / 16


def test_negative_activations_are_not_dormant() -> None:
    gelu = -0.1 * torch.rand(20, 6)
    # Saturated units are not dormant by this definition.
    tanh = -torch.ones(20, 6)
    for h in (gelu, tanh):
        assert P.dormant_fraction(h).item() == P.dead_fraction(h).item() == 0


def test_svd_does_not_hide_nan() -> None:
    f = torch.randn(6, 6)
    f[2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        P.effective_rank(f)
    assert singular_values_of_moments(second_moments(f)).isnan().all()


def test_no_warnings_and_inputs_unchanged() -> None:
    h = torch.randn(5, 7, requires_grad=True)
    before = h.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in FEATURE_DIAGNOSTICS:
            getattr(P, name)(h)
    assert torch.equal(h.detach(), before)
    assert h.grad is None


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e25, 1e30])
def test_feature_norm_with_squares_beyond_float32(scale: float) -> None:
    features = torch.randn(64, 10) * scale
    expected = np.linalg.norm(features.double().numpy(), axis=1).mean()
    assert P.feature_norm(features).item() == pytest.approx(expected, rel=1e-6)


def test_churn_matches_numpy() -> None:
    before, after, batch_before, batch_after = torch.randn(4, 9, 5)
    moved, on_batch = (after - before).double().numpy(), (batch_after - batch_before).double().numpy()
    expected = np.sqrt((moved**2).sum(1).mean() / (on_batch**2).sum(1).mean())
    assert P.churn(before, after, batch_before, batch_after).item() == pytest.approx(expected, rel=1e-6)


def test_masked_outputs_do_not_move() -> None:
    before = torch.tensor([[0.0, -math.inf]])
    moved, still = before + 1, torch.zeros(1, 2)
    assert P.churn(before, moved, before, moved).item() == 1
    assert P.churn(before, moved, still, still).isnan()
    with pytest.raises(ValueError, match="the movements of the outputs hold NaN or infinite numbers"):
        P.churn(before, torch.zeros(1, 2), still, still + 1)
    with pytest.raises(ValueError, match="the outputs are empty"):
        P.churn(torch.zeros(0, 2), torch.zeros(0, 2), still, still + 1)
