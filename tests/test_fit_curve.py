"""Compare the numbers of a fit test with their formulas, computed by numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lightning_plasticity.curvature import Estimate
from lightning_plasticity.fit_curve import FitCurve, compare_fits


@pytest.mark.parametrize(
    ("losses", "fresh"),
    [
        ([4.0, 3.0, 2.5, 2.0], [4.5, 2.0, 1.0, 0.5]),
        ([1.0, 0.5, 0.2, 0.1], [2.0, 1.5, 1.0, 0.5]),
        ([-1.0, -1.5, -1.75, -2.0], [0.5, -2.0, -3.0, -4.0]),
        ([0.5, -0.5, -1.0, -1.5], [1.0, 0.5, 0.25, 0.125]),
        ([0.0, -0.5, -1.0, -1.5], [-1.0, -1.5, -2.0, -4.0]),
    ],
)
def test_numbers_follow_their_formulas(losses: Sequence[float], fresh: Sequence[float]) -> None:
    mean, mean_fresh = np.mean(losses[:-1]), np.mean(fresh[:-1])
    gap = (mean - mean_fresh) / (fresh[0] - mean_fresh)
    handicap = min(mean / mean_fresh, 1 + max(gap, 0)) if mean > 0 and mean_fresh > 0 else 1 + gap
    assert compare_fits(FitCurve(tuple(losses)), FitCurve(tuple(fresh))) == pytest.approx(
        {"handicap": handicap, "fit_gap": gap}, rel=1e-12
    )


def curve_of(batches: Any) -> FitCurve:
    return FitCurve.of([FitCurve(tuple(losses)) for losses in batches.tolist()])


def test_batches_are_compared_one_by_one() -> None:
    batches = np.array([[4.0, 3.0, 2.0], [1.0, 0.5, 0.1], [3.0, 3.0, 1.0]])
    fresh = np.array([[4.0, 2.0, 1.0], [2.0, 1.0, 0.5], [2.0, 1.0, 0.2]])
    values = compare_fits(curve_of(batches), curve_of(fresh))
    logarithms = np.log(batches[:, :-1].mean(1) / fresh[:, :-1].mean(1))
    handicap, means = np.exp(logarithms.mean()), [each[:, :-1].mean() for each in (batches, fresh)]
    assert values["handicap"] == pytest.approx(handicap, rel=1e-12)
    assert isinstance(values["handicap"], Estimate)
    assert values["handicap"].standard_error == pytest.approx(handicap * logarithms.std(ddof=1) / np.sqrt(3), rel=1e-12)
    assert values["fit_gap"] == pytest.approx((means[0] - means[1]) / (fresh[:, 0].mean() - means[1]), rel=1e-12)


def test_negative_losses_have_standard_error() -> None:
    batches = np.array([[0.0, -1.0, -2.0], [1.0, -0.5, -1.0], [0.5, 0.0, -1.0]])
    fresh = np.array([[1.0, -2.0, -3.0], [2.0, -1.0, -2.0], [1.5, -1.0, -2.0]])
    handicap = compare_fits(curve_of(batches), curve_of(fresh))["handicap"]
    means, fresh_means = batches[:, :-1].mean(1), fresh[:, :-1].mean(1)
    gaps = (means - fresh_means) / (fresh[:, 0] - fresh_means).mean()
    assert handicap == pytest.approx(1 + gaps.mean(), rel=1e-12)
    assert isinstance(handicap, Estimate)
    assert handicap.standard_error == pytest.approx(gaps.std(ddof=1) / np.sqrt(3), rel=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_share_of_the_rank_raises_the_handicap(share: float) -> None:
    curve, fresh = FitCurve((2.0, 1.5, 1.0)), FitCurve((2.0, 1.0, 0.5))
    values = compare_fits(curve, fresh, share)
    gap = (1.75 - 1.5) / (2.0 - 1.5)
    assert values["handicap"] == pytest.approx(min((1.75 / 1.5) * np.power(share, -0.3), 1 + gap), rel=1e-12)
    assert values["fit_gap"] == pytest.approx(0.5)


DEAD = FitCurve((2.0,) * 4, has_gradient=False)
FRESH = FitCurve((2.0, 1.0, 0.5, 0.25))


def test_network_that_no_gradient_reaches_is_infinitely_worse() -> None:
    assert compare_fits(DEAD, FRESH)["handicap"] == math.inf
    assert compare_fits(DEAD, DEAD) == {"handicap": math.inf, "fit_gap": 0.0}
    negative = FitCurve((-2.0,) * 4, has_gradient=False)
    assert compare_fits(negative, negative)["handicap"] == math.inf


def test_constant_loss_alone_is_no_collapse() -> None:
    """Steps may be too small to change the loss, and a hinge loss of zero has no gradient."""
    constant = FitCurve((2.0,) * 4)
    assert compare_fits(constant, constant) == {"handicap": 1.0, "fit_gap": 0.0}
    perfect = FitCurve((0.0,) * 4, has_gradient=False)
    assert compare_fits(perfect, FRESH)["handicap"] < 1
    assert compare_fits(perfect, perfect) == {"handicap": 1.0, "fit_gap": 0.0}
    better = FitCurve((0.5,) * 4, has_gradient=False)
    assert compare_fits(better, FRESH)["handicap"] < 1


def test_divergence_is_infinitely_worse() -> None:
    diverged, fresh = FitCurve((2.0, math.inf, math.inf)), FitCurve((2.0, 1.0, 0.5))
    assert compare_fits(diverged, fresh) == {"handicap": math.inf, "fit_gap": math.inf}
    assert compare_fits(fresh, diverged) == {"handicap": 0.0}
    assert compare_fits(diverged, diverged) == {}


def test_fresh_network_that_gains_nothing_defines_no_gap() -> None:
    rising = FitCurve((1.0, 2.0, 3.0))
    assert compare_fits(FitCurve((1.0, 0.5, 0.2)), rising) == {"handicap": 0.5}
