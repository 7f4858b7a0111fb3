"""The list of diagnostics: what each is called, what it means and how it follows from a spectrum.

Logging, plots, documentation and the choices of :class:`~lightning_plasticity.collapse.Collapse` are derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_plasticity.curvature import Estimate, Spectrum

EPSILON = 1e-2
"""Threshold of the ε-rank, in units of the eigenvalues (arXiv 2509.22335 plots this one)."""

RELATIVE_EPSILON = 1e-3
"""Threshold of the relative ε-rank, as a share of the largest eigenvalue."""

Matrix = Literal["ggn", "hessian"]

Source = Literal["ggn", "hessian", "features"]
"""What a diagnostic is derived from: the spectrum of a matrix, or the activations of the hidden layers."""

MATRIX_TITLES: dict[Matrix, str] = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian"}

_ERROR = ("standard_error",)
_ERROR_AND_BRACKET = ("standard_error", "resolved")


@dataclass(frozen=True)
class Diagnostic:
    """One number that says something about plasticity.

    Args:
        name: The name it is logged under.
        title: The name in a sentence.
        meaning: What it is, in one line.
        of: Computes it from the spectrum of the matrix; ``None`` for what
            :class:`~lightning_plasticity.PlasticityMonitor` measures.
        source: What it is derived from.
        is_fraction: Whether it lies in [0, 1].
        can_be_negative: Whether a share of it may mean nothing.
        higher_is_better: Whether a fall of it is a collapse, rather than a rise.
        uncertainty: What is logged beside it: attributes of the :class:`~lightning_plasticity.curvature.Estimate`.
    """

    name: str
    title: str
    meaning: str
    of: Callable[[Spectrum], float] | None
    source: Source = "ggn"
    is_fraction: bool = False
    can_be_negative: bool = False
    higher_is_better: bool = True
    uncertainty: tuple[str, ...] = ()


def _kernel_rank(spectrum: Spectrum) -> float:
    return math.nan if spectrum.kernel is None else spectrum.kernel.effective_rank


DIAGNOSTICS: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        Diagnostic(
            "learnable_fraction",
            "learnable fraction",
            "share of the task's residual that 100 gradient steps at rate 1/λmax can remove, kernel frozen",
            lambda spectrum: spectrum.learnable_fraction(),
            is_fraction=True,
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
            is_fraction=True,
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
        Diagnostic(
            "hessian_epsilon_rank",
            "ε-rank of the Hessian",
            f"number of Hessian eigenvalues whose size is above {EPSILON:g}",
            lambda spectrum: spectrum.epsilon_rank(EPSILON),
            source="hessian",
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_epsilon_fraction",
            "ε-rank of the Hessian as a share of the parameters",
            f"share of all Hessian eigenvalues whose size is above {EPSILON:g}",
            lambda spectrum: spectrum.epsilon_fraction(EPSILON),
            source="hessian",
            is_fraction=True,
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_relative_epsilon_rank",
            "relative ε-rank of the Hessian",
            f"number of Hessian eigenvalues whose size is above {RELATIVE_EPSILON:g} of the largest",
            lambda spectrum: spectrum.relative_epsilon_rank(RELATIVE_EPSILON),
            source="hessian",
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_effective_rank",
            "effective rank of the Hessian",
            "exp of the entropy of the normalised sizes of the Hessian's eigenvalues",
            lambda spectrum: spectrum.effective_rank,
            source="hessian",
            uncertainty=_ERROR,
        ),
        Diagnostic(
            "hessian_trace",
            "trace of the Hessian",
            "sum of the Hessian's eigenvalues",
            lambda spectrum: spectrum.trace,
            source="hessian",
            can_be_negative=True,
            uncertainty=_ERROR,
        ),
        Diagnostic(
            "hessian_lambda_max",
            "sharpness by the Hessian",
            "largest eigenvalue of the Hessian",
            lambda spectrum: spectrum.lambda_max,
            source="hessian",
            can_be_negative=True,
        ),
        Diagnostic(
            "hessian_lambda_min",
            "smallest eigenvalue of the Hessian",
            "smallest eigenvalue of the Hessian: the most negative curvature",
            lambda spectrum: spectrum.lambda_min,
            source="hessian",
            can_be_negative=True,
        ),
        Diagnostic(
            "hessian_negative_mass",
            "negative share of the Hessian's curvature",
            "sum of the sizes of the negative eigenvalues of the Hessian over the sum of all sizes",
            lambda spectrum: spectrum.negative_mass,
            source="hessian",
            is_fraction=True,
            uncertainty=_ERROR,
        ),
        Diagnostic(
            "dormant_fraction",
            "dormant fraction",
            "share of the hidden units that are active far less than their layer (0.025 of its mean)",
            None,
            source="features",
            is_fraction=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "dead_fraction",
            "dead fraction",
            "share of the hidden units that are zero on every sample",
            None,
            source="features",
            is_fraction=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "effective_rank",
            "effective rank of the features",
            "exp of the entropy of the normalised singular values of the features, mean over hidden layers",
            None,
            source="features",
        ),
        Diagnostic(
            "stable_rank",
            "stable rank of the features",
            "squared Frobenius norm over squared spectral norm of the features, mean over hidden layers",
            None,
            source="features",
        ),
        Diagnostic(
            "srank",
            "srank of the features",
            "number of singular values of the features that make up 99 % of their sum, mean over hidden layers",
            None,
            source="features",
        ),
        Diagnostic(
            "feature_norm",
            "feature norm",
            "mean length of the feature vectors, mean over hidden layers",
            None,
            source="features",
        ),
    )
}


def diagnostics_of(sources: Collection[Source]) -> list[Diagnostic]:
    """The diagnostics that follow from these sources."""
    return [diagnostic for diagnostic in DIAGNOSTICS.values() if diagnostic.source in sources]


def measure(spectra: Mapping[Matrix, Spectrum], features: Mapping[str, float]) -> dict[str, float]:
    """Every diagnostic, by name; what is estimated is an ``Estimate``.

    Args:
        spectra: The spectrum of each matrix that was measured.
        features: What a monitor has measured.
    """
    values: dict[str, float] = {}
    for matrix, spectrum in spectra.items():
        values |= {d.name: d.of(spectrum) for d in diagnostics_of([matrix]) if d.of is not None}
    return values | {d.name: features[d.name] for d in diagnostics_of(["features"]) if d.name in features}


def is_resolved(name: str, value: float) -> bool:
    """Whether a diagnostic can be told from what an estimate knows: of ranks, whether the bracket is narrow."""
    return "resolved" not in DIAGNOSTICS[name].uncertainty or not isinstance(value, Estimate) or value.resolved


def to_log_dict(values: Mapping[str, float], references: Mapping[str, float]) -> dict[str, float]:
    """What is kept and logged of the diagnostics of a network, as plain floats.

    Args:
        values: The diagnostics of the network.
        references: The same of its initial weights.

    Returns:
        Each value; ``<name>_vs_initial``, its ratio to that of the initial weights, where both are known; what the
        estimates say of their uncertainty, ``<name>_standard_error`` and ``<name>_resolved``, where it is finite.
    """
    result = {name: float(value) for name, value in values.items()}
    for name, value in values.items():
        reference = references.get(name, 0.0)
        if reference and is_resolved(name, value) and is_resolved(name, reference):
            result[f"{name}_vs_initial"] = value / reference
    for name, value in values.items():
        for attribute in DIAGNOSTICS[name].uncertainty:
            result[f"{name}_{attribute}"] = float(getattr(value, attribute))
    return {name: number for name, number in result.items() if name in values or math.isfinite(number)}


def resolved_value(metrics: Mapping[str, float], name: str) -> float | None:
    """A diagnostic among what was kept of a task; ``None`` if it is not there or was not resolved."""
    return metrics.get(name) if metrics.get(f"{name}_resolved", 1.0) else None
