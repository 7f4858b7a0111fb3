"""Test the quantities that are derived from a spectrum."""

import math

import pytest
import torch

from lightning_plasticity.curvature import Estimate, Quadrature, Spectrum


def test_estimates_are_floats_with_errors_and_brackets() -> None:
    nodes, weights = torch.tensor([0.0, 2.0]).double(), torch.tensor([0.25, 0.75]).double()
    quadrature = Quadrature(nodes, weights, torch.tensor([0.1, 0.2], dtype=torch.float64))
    spectrum = Spectrum.from_quadratures([quadrature, quadrature], 8)
    assert (spectrum.trace, spectrum.trace.standard_error) == (12.0, 0.0)
    assert (spectrum.lambda_max.lo, spectrum.lambda_max.hi) == (1.8, 2.2)
    assert repr(Estimate(1.5, standard_error=0.25)) == "1.5 ± 0.25"
    again = Spectrum.from_dict(spectrum.to_dict())
    assert again.epsilon_rank(1).hi == spectrum.epsilon_rank(1).hi
    assert again.distance(spectrum) == 0
    grid = torch.linspace(-5, 7, 2001, dtype=torch.float64)
    assert torch.trapezoid(spectrum.density(grid, 0.3), grid).item() == pytest.approx(1, abs=1e-6)


def test_fast_rank_counts_contracting_directions() -> None:
    spectrum = Spectrum(torch.tensor([1.0, 0.1, 0.01]).double(), torch.full((3,), 1 / 3).double(), 3, exact=True)
    for lr, steps in ((0.1, 30), (0.1, 300), (1.0, 1000)):
        contracted = sum(math.exp(-lr * steps * value) < 0.1 for value in (1.0, 0.1, 0.01))
        assert spectrum.fast_rank(lr, steps) == contracted
    with pytest.raises(ValueError, match="contraction in"):
        spectrum.fast_rank(0.1, 10, contraction=1)
    with pytest.raises(ValueError, match=r"^lr=0.1, steps=0.5, .*: lr must be positive, steps at least 1"):
        spectrum.fast_rank(0.1, 0.5)  # type: ignore[arg-type]


def test_invalid_threshold_is_named_in_the_error() -> None:
    spectrum = Spectrum(torch.tensor([0.46]).double(), torch.ones(1).double(), 1, exact=True)
    for value in (-1, math.inf):
        with pytest.raises(ValueError, match=f"^relative_epsilon={value} must be a finite number, zero or larger"):
            spectrum.relative_epsilon_rank(value)
    with pytest.raises(ValueError, match=r"use ggn_spectrum\(method='gram'\)"):
        spectrum.learnable_fraction()


def test_epsilon_rank_does_not_use_the_smoothed_density() -> None:
    """Public code integrates a smoothed density over a grid, which would count most of the bulk here."""
    values = torch.tensor([1.0, 0.5, *[0.0099] * 98], dtype=torch.float64)
    spectrum = Spectrum(values, torch.full((100,), 0.01, dtype=torch.float64), 100, exact=True)
    grid = torch.linspace(0.01, 2, 4001, dtype=torch.float64)
    smeared = 100 * torch.trapezoid(spectrum.density(grid, 0.01), grid).item()
    assert spectrum.epsilon_rank(0.01) == 2
    assert smeared > 40
