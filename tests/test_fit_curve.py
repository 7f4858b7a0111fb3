"""Compare the numbers of a fit test with their formulas, computed by numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.curvature import TangentKernel, tangent_kernel
from lightning_plasticity.fit_curve import FitCurve, compare_fits


def kernel(scale: float) -> TangentKernel:
    """Return the tangent kernel of a small network whose first layer is scaled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    batch = (torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,)))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return tangent_kernel(model.double(), batch, loss_fn)


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
    handicap = mean / mean_fresh if mean_fresh > 0 and min(losses) > 0 else 1 + gap
    assert compare_fits(FitCurve(tuple(losses)), FitCurve(tuple(fresh))) == pytest.approx(
        {"handicap": handicap, "fit_gap": gap}, rel=1e-12
    )


def test_learnable_fractions_scale_the_handicap() -> None:
    curve, fresh = FitCurve((2.0, 1.5, 1.0)), FitCurve((2.0, 1.0, 0.5))
    kernels = kernel(1e-2), kernel(1.0)
    fractions = []
    for each in kernels:
        rates = np.asarray(each.eigenvalues) / float(max(each.eigenvalues))
        shares = np.asarray(each.residual_shares)
        fractions.append(float((shares * (1 - (1 - np.clip(rates, 0, 1)) ** 2000)).sum()))
    assert fractions[0] < 0.9 * fractions[1]
    expected = (1.75 / 1.5) * math.sqrt(fractions[1] / fractions[0])
    values = compare_fits(curve, fresh, *kernels)
    assert values["handicap"] == pytest.approx(expected, rel=1e-9)
    assert values["fit_gap"] == pytest.approx(0.5)


DEAD = FitCurve((2.0,) * 4, has_gradient=False)
FRESH = FitCurve((2.0, 1.0, 0.5, 0.25))


def test_network_that_no_gradient_reaches_is_infinitely_worse() -> None:
    assert compare_fits(DEAD, FRESH)["handicap"] == math.inf
    assert compare_fits(DEAD, DEAD) == {"handicap": math.inf}
    negative = FitCurve((-2.0,) * 4, has_gradient=False)
    assert compare_fits(negative, negative) == {"handicap": math.inf}


def test_constant_loss_alone_is_no_collapse() -> None:
    """Steps may be too small to change the loss, and a hinge loss of zero has no gradient."""
    constant = FitCurve((2.0,) * 4)
    assert compare_fits(constant, constant) == {"handicap": 1.0}
    perfect = FitCurve((0.0,) * 4, has_gradient=False)
    assert compare_fits(perfect, FRESH)["handicap"] < 1
    assert math.inf not in compare_fits(perfect, perfect).values()
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
