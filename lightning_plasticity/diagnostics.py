"""The list of diagnostics: what each is called, what it means and how it follows from a spectrum.

Logging, plots, documentation and the choices of :class:`~lightning_plasticity.collapse.Collapse` are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_plasticity.curvature import Spectrum

EPSILON = 1e-2
"""Threshold of the ε-rank, in units of the eigenvalues (arXiv 2509.22335 plots this one)."""

RELATIVE_EPSILON = 1e-3
"""Threshold of the relative ε-rank, as a share of the largest eigenvalue."""


@dataclass(frozen=True)
class Diagnostic:
    """One number that says something about plasticity.

    Args:
        name: The name it is logged under.
        title: The name in a sentence.
        meaning: What it is, in one line.
        of: Computes it from the spectrum of the Gauss-Newton matrix.
        is_share: Whether it lies in [0, 1].
    """

    name: str
    title: str
    meaning: str
    of: Callable[[Spectrum], float]
    is_share: bool = False


def _kernel_rank(spectrum: Spectrum) -> float:
    return float("nan") if spectrum.kernel is None else spectrum.kernel.effective_rank


DIAGNOSTICS: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        Diagnostic(
            "learnable_fraction",
            "learnable fraction",
            "share of the task's residual that 100 gradient steps at rate 1/λmax can remove, kernel frozen",
            lambda spectrum: spectrum.learnable_fraction(),
            is_share=True,
        ),
        Diagnostic(
            "ntk_effective_rank",
            "effective rank of the tangent kernel",
            "exp of the entropy of the normalised eigenvalues of the tangent kernel",
            _kernel_rank,
        ),
        Diagnostic(
            "epsilon_rank",
            "ε-rank",
            f"number of Gauss-Newton eigenvalues above {EPSILON:g}",
            lambda spectrum: spectrum.epsilon_rank(EPSILON),
        ),
        Diagnostic(
            "epsilon_fraction",
            "ε-rank as a share of the parameters",
            f"share of all Gauss-Newton eigenvalues above {EPSILON:g}",
            lambda spectrum: spectrum.epsilon_fraction(EPSILON),
            is_share=True,
        ),
        Diagnostic(
            "relative_epsilon_rank",
            "relative ε-rank",
            f"number of Gauss-Newton eigenvalues above {RELATIVE_EPSILON:g} λmax",
            lambda spectrum: spectrum.relative_epsilon_rank(RELATIVE_EPSILON),
        ),
        Diagnostic(
            "ggn_effective_rank",
            "effective rank of the Gauss-Newton matrix",
            "exp of the entropy of the normalised eigenvalues of the Gauss-Newton matrix",
            lambda spectrum: spectrum.effective_rank,
        ),
        Diagnostic(
            "ggn_trace",
            "trace of the Gauss-Newton matrix",
            "sum of the Gauss-Newton eigenvalues",
            lambda spectrum: spectrum.trace,
        ),
        Diagnostic(
            "ggn_lambda_max",
            "sharpness",
            "largest Gauss-Newton eigenvalue, λmax",
            lambda spectrum: spectrum.lambda_max,
        ),
    )
}


def measure(spectrum: Spectrum) -> dict[str, float]:
    """Every diagnostic of a spectrum, by name."""
    return {name: float(diagnostic.of(spectrum)) for name, diagnostic in DIAGNOSTICS.items()}
