"""Define the diagnostics: their names, their meanings, and how each is computed from a spectrum.

Logging, plots, the measures of :class:`~lightning_plasticity.PlasticityMonitor` and the choices of
:class:`~lightning_plasticity.Collapse` are derived from this list. A test compares it with the table in
``docs/numbers.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_plasticity.curvature import Estimate, Spectrum, TangentKernel

EPSILON = 1e-2
"""Threshold of the ε-rank, in units of the eigenvalues, as in the plots of arXiv 2509.22335."""

RELATIVE_EPSILON = 1e-3
"""Threshold of the relative ε-rank, as a share of the largest eigenvalue."""

Matrix = Literal["ggn", "hessian"]

Source = Literal["fit", "kernel", "gradients", "ggn", "hessian", "features"]
"""The source of a diagnostic: the fit test, the tangent kernel, the gradients of single samples, the spectrum of a
matrix, or the hidden activations."""

MATRIX_TITLES: dict[Matrix, str] = {"ggn": "Gauss-Newton matrix", "hessian": "Hessian"}

_BRACKET = ("lo", "hi", "resolved")
_ERROR = ("standard_error",)
_ERROR_AND_BRACKET = ("standard_error", "resolved")


@dataclass(frozen=True)
class Plan:
    r"""The training to come in a task.

    Args:
        lr: Step size :math:`\eta`.
        steps: Number of optimizer steps :math:`K`.
    """

    lr: float
    steps: int


@dataclass(frozen=True)
class Diagnostic:
    """A scalar measure of plasticity.

    Args:
        name: The name it is logged under.
        title: The name in a sentence.
        meaning: Its definition in one line, for the table in docs/numbers.md.
        compute: Computes it from its source; ``None`` if :class:`~lightning_plasticity.PlasticityMonitor` or
            :class:`~lightning_plasticity.FitTest` measures it.
        needs_plan: Whether ``compute`` takes a :class:`Plan` as well.
        source: What it is computed from.
        is_fraction: Whether it lies in [0, 1].
        can_be_negative: Whether it can be negative, so that a share of it cannot be a threshold.
        higher_is_better: Whether it falls, rather than rises, when a network collapses.
        uncertainty: The attributes of its :class:`~lightning_plasticity.curvature.Estimate` that are logged, too.
    """

    name: str
    title: str
    meaning: str
    compute: Callable[..., float] | None
    needs_plan: bool = field(default=False, kw_only=True)
    source: Source = "ggn"
    is_fraction: bool = False
    can_be_negative: bool = False
    higher_is_better: bool = True
    uncertainty: tuple[str, ...] = ()


DIAGNOSTICS: dict[str, Diagnostic] = {
    diagnostic.name: diagnostic
    for diagnostic in (
        Diagnostic(
            "handicap",
            "handicap",
            "how many times worse than a fresh network this one fits the task: the smaller of two numbers, the fit "
            "loss over that of the initial weights, divided by the power 0.3 of the share that is left of the tangent "
            "kernel's rank (relative to the initial weights, of the best task after the first, or of 0.5), and 1 plus "
            "the fit gap, at least 1; clearly above 1, a fresh network is better off",
            None,
            source="fit",
            uncertainty=_ERROR,
            higher_is_better=False,
        ),
        Diagnostic(
            "fit_loss",
            "fit loss",
            "mean loss of copies of the network over 12 training steps, each on 16 of the first samples of the task",
            None,
            source="fit",
            can_be_negative=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "fit_gap",
            "fit gap",
            "fit loss minus that of the initial weights, as a share of what the initial weights gain: 0 if both fit "
            "equally well, 1 if the network is where a fresh one begins",
            None,
            source="fit",
            can_be_negative=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "churn",
            "churn",
            "how far a training step on 16 samples moves the outputs on the next 16, relative to those on the first: "
            "root mean square over the arguments of torch's loss functions, or the loss where there are none",
            None,
            source="fit",
            higher_is_better=False,
        ),
        Diagnostic(
            "live_metric_gap",
            "live metric gap",
            "with `FitTest(live=True, metric=...)`: how much better the metric of a fresh network is on the same "
            "batches, in the mean over their later half; positive if the fresh network is better",
            None,
            source="fit",
            uncertainty=_ERROR,
            can_be_negative=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "learnable_fraction",
            "learnable fraction",
            "share of the task's squared residual that 100 gradient steps at rate 1/λmax would remove if the tangent "
            "kernel stayed as it is; independent of the kernel's scale and of the optimizer",
            lambda kernel: kernel.learnable_fraction(),
            source="kernel",
            is_fraction=True,
            uncertainty=_BRACKET,
        ),
        Diagnostic(
            "learnable_fraction_1000",
            "learnable fraction in 1000 steps",
            "the same after 1000 gradient steps: it sees slower directions, too",
            lambda kernel: kernel.learnable_fraction(steps=1000),
            source="kernel",
            is_fraction=True,
            uncertainty=_BRACKET,
        ),
        Diagnostic(
            "remaining_residual",
            "remaining residual",
            "what those 100 steps would leave of the squared residual: (1 − learnable fraction) times the mean over "
            "samples of the squared gradient of a sample's loss with respect to its outputs",
            lambda kernel: kernel.remaining_residual(),
            source="kernel",
            higher_is_better=False,
            uncertainty=_BRACKET,
        ),
        Diagnostic(
            "ntk_effective_rank",
            "effective rank of the tangent kernel",
            "effective rank of the tangent kernel: exp of the entropy of its normalized eigenvalues",
            lambda kernel: kernel.effective_rank,
            source="kernel",
        ),
        Diagnostic(
            "fast_residual_share",
            "share of the residual in the fast directions",
            "share of the squared residual along eigenvectors of the tangent kernel with an eigenvalue above "
            "ln 10 / (ηK): those along which K gradient steps of size η shrink it tenfold; η is the learning rate, and "
            "K the expected number of steps of the task",
            lambda kernel, plan: kernel.fast_residual_share(plan.lr, plan.steps),
            needs_plan=True,
            source="kernel",
            is_fraction=True,
            uncertainty=_BRACKET,
        ),
        Diagnostic(
            "optimization_readiness",
            "optimization readiness",
            "‖g‖⁴ / (L · mean of ‖gᵢ‖²) with the gradients gᵢ of single samples, their mean g and the loss L: large "
            "for strong gradients that agree; only with exact spectra, of a loss ≥ 0, and where each sample has "
            "outputs of its own",
            lambda readiness: readiness,
            source="gradients",
        ),
        Diagnostic(
            "fast_rank",
            "fast rank",
            "number of Gauss-Newton eigenvalues above ln 10 / (ηK): the ε-rank of the paper, with ε from step size and "
            "budget",
            lambda spectrum, plan: spectrum.fast_rank(plan.lr, plan.steps),
            needs_plan=True,
        ),
        Diagnostic(
            "epsilon_rank",
            "ε-rank",
            f"number of Gauss-Newton eigenvalues above {EPSILON:g}; at most samples × outputs, with cross-entropy "
            "samples × (classes − 1)",
            lambda spectrum: spectrum.epsilon_rank(EPSILON),
        ),
        Diagnostic(
            "epsilon_fraction",
            "ε-rank as a share of the parameters",
            "the same as a share of all parameters: small by construction where parameters are many",
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
            "effective rank of the Gauss-Newton matrix: exp of the entropy of its normalized eigenvalues",
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
            "largest Gauss-Newton eigenvalue λmax: the sharpness",
            lambda spectrum: spectrum.lambda_max,
        ),
        Diagnostic(
            "hessian_epsilon_rank",
            "ε-rank of the Hessian",
            f"number of Hessian eigenvalues whose absolute value is above {EPSILON:g}",
            lambda spectrum: spectrum.epsilon_rank(EPSILON),
            source="hessian",
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_epsilon_fraction",
            "ε-rank of the Hessian as a share of the parameters",
            "the same as a share of all parameters",
            lambda spectrum: spectrum.epsilon_fraction(EPSILON),
            source="hessian",
            is_fraction=True,
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_relative_epsilon_rank",
            "relative ε-rank of the Hessian",
            f"number of Hessian eigenvalues whose absolute value is above {RELATIVE_EPSILON:g} of the largest",
            lambda spectrum: spectrum.relative_epsilon_rank(RELATIVE_EPSILON),
            source="hessian",
            uncertainty=_ERROR_AND_BRACKET,
        ),
        Diagnostic(
            "hessian_effective_rank",
            "effective rank of the Hessian",
            "effective rank of the Hessian: exp of the entropy of the normalized absolute values of its eigenvalues",
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
            "smallest eigenvalue of the Hessian: negative at a saddle",
            lambda spectrum: spectrum.lambda_min,
            source="hessian",
            can_be_negative=True,
        ),
        Diagnostic(
            "hessian_negative_mass",
            "negative share of the Hessian's curvature",
            "share of the negative eigenvalues in the sum of the absolute values of all eigenvalues of the Hessian",
            lambda spectrum: spectrum.negative_mass,
            source="hessian",
            is_fraction=True,
            uncertainty=_ERROR,
        ),
        Diagnostic(
            "dormant_fraction",
            "dormant fraction",
            "share of the hidden units whose mean absolute activation is at most 0.025 times their layer's mean",
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
            "cloned_fraction",
            "cloned fraction",
            "share of the hidden units whose activations correlate by more than 0.95 with those of a later unit of "
            "their layer",
            None,
            source="features",
            is_fraction=True,
            higher_is_better=False,
        ),
        Diagnostic(
            "effective_rank",
            "effective rank of the features",
            "exp of the entropy of the normalized singular values of the features, mean over hidden layers; at most "
            "the number of samples",
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
    """Return the diagnostics with these sources, in the order of the list."""
    return [diagnostic for diagnostic in DIAGNOSTICS.values() if diagnostic.source in sources]


def measure(
    spectra: Mapping[Matrix, Spectrum],
    features: Mapping[str, float],
    kernel: TangentKernel | None = None,
    plan: Plan | None = None,
    readiness: float = math.nan,
) -> dict[str, float]:
    """Compute every diagnostic that the measurements determine.

    Args:
        spectra: The spectrum of each matrix that was measured.
        features: The values that a monitor has measured, by name.
        kernel: The tangent kernel, if it was measured.
        plan: The training to come, if it is known.
        readiness: The optimization readiness; ``nan`` if it was not measured.

    Returns:
        The diagnostics by name. Values from an estimated spectrum are an
        :class:`~lightning_plasticity.curvature.Estimate`. What a kernel without a matrix does not
        determine is left out.
    """
    values: dict[str, float] = {}
    if kernel is not None:
        values = _compute("kernel", kernel, plan)
    values |= _compute("gradients", readiness, plan)
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    for matrix, spectrum in spectra.items():
        values |= _compute(matrix, spectrum, plan)
    return values | {d.name: features[d.name] for d in diagnostics_of(["features"]) if d.name in features}


def _compute(source: Source, measured: TangentKernel | Spectrum | float, plan: Plan | None) -> dict[str, float]:
    """Compute the diagnostics that have a source, without those that need a plan if there is none."""
    return {
        diagnostic.name: diagnostic.compute(*((measured, plan) if diagnostic.needs_plan else (measured,)))
        for diagnostic in diagnostics_of([source])
        if diagnostic.compute is not None and not (diagnostic.needs_plan and plan is None)
    }


def of_part(values: Mapping[str, float], part: str) -> dict[str, float]:
    """Return values under the names that they have for a part of the network: ``<name>/<part>``.

    Example:
        >>> of_part({"learnable_fraction": 0.5}, "actor")
        {'learnable_fraction/actor': 0.5}
    """
    return {f"{name}/{part}": value for name, value in values.items()}


def is_resolved(name: str, value: float) -> bool:
    """Return whether a value is exact or its estimate is resolved: the bracket of a rank is narrow."""
    return "resolved" not in DIAGNOSTICS[name].uncertainty or not isinstance(value, Estimate) or value.resolved


def to_log_dict(values: Mapping[str, float], references: Mapping[str, float]) -> dict[str, float]:
    """Return the diagnostics of a network as plain floats, with ratios and uncertainties, for reports and loggers.

    Args:
        values: The diagnostics of the network.
        references: The diagnostics of its initial weights on the same batch.

    Returns:
        Each value; ``<name>_vs_initial``, its ratio to the value of the initial weights, where both are known; and the
        uncertainty of estimates, ``<name>_standard_error``, ``<name>_lo``, ``<name>_hi`` and ``<name>_resolved``, where
        it is finite.
    """
    result = {name: float(value) for name, value in values.items()}
    for name, value in values.items():
        reference = references.get(name, 0.0)
        if reference and is_resolved(name, value) and is_resolved(name, reference):
            result[f"{name}_vs_initial"] = value / reference
    for name, value in values.items():
        if not isinstance(value, Estimate) or (DIAGNOSTICS[name].uncertainty == _BRACKET and value.lo == value.hi):
            continue
        for attribute in DIAGNOSTICS[name].uncertainty:
            result[f"{name}_{attribute}"] = float(getattr(value, attribute))
    return {name: value for name, value in result.items() if name in values or math.isfinite(value)}


def resolved_value(metrics: Mapping[str, float], name: str) -> float | None:
    """Return a diagnostic from a task's report, for comparison with later ones.

    Of a bracket that is not resolved it is the lower end, so that no alarm rests on a number that was lower. It is
    ``None`` if the diagnostic is missing, or was not resolved and has no bracket in the report.
    """
    return metrics.get(name if metrics.get(f"{name}_resolved", 1.0) else f"{name}_lo")
