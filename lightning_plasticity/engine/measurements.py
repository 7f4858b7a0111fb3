"""Measure copies of a model: curvature, the fit test, and hidden activations."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import UnsupportedModelError
from lightning_plasticity.diagnostics import (
    DIAGNOSTICS,
    Plan,
    Source,
    diagnostics_of,
    measure,
    of_part,
    to_log_dict,
)
from lightning_plasticity.distributed.agreement import format_error
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.monitoring import measure_activations
from lightning_plasticity.fit_curve import FitCurve, compare_fits
from lightning_plasticity.fit_test import FitTest
from lightning_plasticity.isolation.weights import untrained_copies
from lightning_plasticity.messages import MisconfigurationError, SkippedBatchError
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import GGNProbe, Probe, ProbeResult
from lightning_plasticity.reports import TaskReport

_RANK = "ntk_effective_rank_vs_initial"

_LEAST_RANK = 0.5
"""Share of the rank of the initial weights below which a network has lost rank, whatever it had at earlier tasks."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured of a model, or of its initial weights.

    Args:
        probe: The result of the probe.
        curve: The losses of the fit test, if there is one.
        features: What the monitor has measured, by name.
        plan: The training to come, if it is known.
        fitted_samples: Number of samples that the fit test could take, if it is known.
        features_remark: Which features are estimates, if any.
    """

    probe: ProbeResult
    curve: FitCurve | None
    features: dict[str, float]
    plan: Plan | None = None
    fitted_samples: int | None = None
    features_remark: str = ""

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """The diagnostics by name, without those that compare a network with its initial weights."""
        fit = {} if self.curve is None else {"fit_loss": self.curve.mean, "churn": self.curve.churn}
        fit = {name: value for name, value in fit.items() if not math.isnan(value)}
        return fit | measure(self.probe.spectra, self.features, self.probe.kernel, self.plan, self.probe.readiness)


class Measurements:
    """What is measured at the start of a task, on copies of the model.

    Args:
        probe: Measures the curvature; ``None`` measures none.
        fit_test: Trains copies of the model and of its initial weights; ``None`` trains none.
        monitor: Measures hidden activations; ``None`` measures none.
        collapse: Gives the verdict, and so decides which measurement must succeed.
        monitor_is_required: Whether an error of the monitor counts as an error of the measurement.
        runner: Holds the regularizers, which are a part of the loss.
        errors: Where errors are recorded.
    """

    def __init__(
        self,
        probe: Probe | None,
        fit_test: FitTest | None,
        monitor: PlasticityMonitor | None,
        collapse: Collapse,
        *,
        monitor_is_required: bool,
        runner: InterventionRunner,
        errors: ErrorLog,
    ) -> None:
        self.probe = probe
        self.fit_test = fit_test
        self.monitor = monitor
        self.collapse = collapse
        self._monitor_is_required = monitor_is_required
        self._runner = runner
        self._errors = errors
        self._probe_is_checked = False

    @property
    def samples(self) -> int:
        """Number of samples to measure on."""
        return GGNProbe.samples if self.probe is None else self.probe.samples

    @property
    def is_live(self) -> bool:
        """Whether the fit test compares networks on the batches of the task."""
        return self.fit_test is not None and self.fit_test.live

    def begin_fit(self) -> None:
        """Let the probe be checked at the next measurement."""
        self._probe_is_checked = False

    def check_metric(self) -> None:
        """Check that the metric of ``collapse`` is measured.

        Raises:
            MisconfigurationError: If neither the probe nor the fit test nor the monitor measures it, or a live fit test
                gives another verdict.
        """
        sources: list[Source] = [] if self.probe is None else [*self.probe.sources]
        fits = [] if self.fit_test is None else self.fit_test.measures
        if self.is_live and self.collapse.metric not in fits:
            raise MisconfigurationError(
                f"Collapse(metric={self.collapse.metric!r}) is decided at the start of a task, and FitTest(live=True) "
                f"later in it: choose one of {fits}, or leave out live=True"
            )
        measures = [] if self.monitor is None else self.monitor.measures
        available = [*fits, *(diagnostic.name for diagnostic in diagnostics_of(sources)), *measures]
        if self.collapse.metric in available:
            return
        metric = f"Collapse(metric={self.collapse.metric!r})"
        watches_fit = DIAGNOSTICS[self.collapse.metric].source == "fit"
        if self.probe is None or watches_fit:
            falling = [name for name in available if DIAGNOSTICS[name].higher_is_better]
            raise MisconfigurationError(
                f"{metric} watches what {'fit_test' if watches_fit else 'probe'}=None leaves out, and the monitor does "
                f"not measure: write collapse=Collapse(metric) with one of {falling}"
            )
        raise MisconfigurationError(
            f"{metric} watches what neither {self.probe} nor the monitor measures: choose one of {available}, or "
            "another probe"
        )

    def check_probe(self, context: ProbeContext) -> None:
        """Check once in a fit that the probe works on the model."""
        if self._probe_is_checked or self.probe is None:
            return
        warning = self.probe.check(context)
        if warning is not None:
            self._errors.warn(warning)
        self._probe_is_checked = True

    def measure(
        self,
        context: ProbeContext,
        description: str,
        plan: Plan | None = None,
        *,
        monitored: bool = True,
        fitted: bool = True,
        may_lack_fit: bool = False,
    ) -> Measurement:
        """Return what the probe, the fit test and the monitor measure on copies of the model.

        Args:
            context: The model and the batch.
            description: What the progress bar says.
            plan: The training to come, if it is known.
            monitored: Whether the monitor measures, if there is one.
            fitted: Whether copies are fitted, if there is a fit test.
            may_lack_fit: Whether an error of the fit test is recorded, so that the other numbers survive.
        """
        if self.probe is None:
            size = context.batch_size
            result = ProbeResult({}, math.nan, None if size is None else min(size, self.samples))
        else:
            result = self._measure_curvature(self.probe, context, description)
        curve = None
        features: dict[str, float] = {}
        features_remark = ""
        # The spectra may be too costly for all samples.
        samples = None if result.samples is None else min(context.batch_size or 0, self.samples)
        if self.fit_test is not None and not self.is_live and fitted:
            try:
                curve = self.fit(self.fit_test, replace(context, whole_batch=result.coupled), samples)
            except Exception as error:
                if not may_lack_fit or isinstance(error, SkippedBatchError):
                    raise
                self._errors.record("fit_test", "the fit test failed and is left out of this task", error)
        if self.monitor is not None and monitored:
            monitored_samples = result.samples or self.samples
            features, features_remark = self._measure_activations(self.monitor, context, monitored_samples)
        return Measurement(result, curve, features, plan, samples, features_remark)

    def fit(self, fit_test: FitTest, context: ProbeContext, samples: int | None) -> FitCurve:
        """Return the losses of copies of the model that are fitted to samples, with the regularizers of the run."""
        with context.show_progress("fitting a copy") as progress:
            return fit_test.fit(context, samples, regularizers=self._runner.regularizers, progress=progress)

    def _measure_curvature(self, probe: Probe, context: ProbeContext, description: str) -> ProbeResult:
        """Return the result of the probe, empty where the model is not supported and the fit test suffices."""
        try:
            with self._advise_no_probe(), context.show_progress(description) as progress:
                return probe.measure(context, progress)
        except UnsupportedModelError as error:
            if self.fit_test is None or DIAGNOSTICS[self.collapse.metric].source != "fit":
                raise
            size = context.batch_size
            samples = None if size is None else min(size, self.samples)
            return ProbeResult({}, math.nan, samples, remarks=(f"the curvature is left out: {format_error(error)}",))

    @contextlib.contextmanager
    def _advise_no_probe(self) -> Iterator[None]:
        """Name the way out where the curvature cannot be measured and is not needed."""
        try:
            yield
        except (UnsupportedModelError, MisconfigurationError) as error:
            metric = self.collapse.metric
            if self.monitor is None or metric not in self.monitor.measures:
                raise
            raise type(error)(f"{error}. {metric!r} needs no curvature: probe=None leaves it out") from error

    def _measure_activations(
        self, monitor: PlasticityMonitor, context: ProbeContext, samples: int
    ) -> tuple[dict[str, float], str]:
        metric_is_monitored = self.collapse.metric in monitor.measures
        try:
            features, remark = measure_activations(
                monitor,
                context.copy_to_measure(),
                context.samples(samples),
                context.loss_on,
                untrained_copies(context.model, context.trained_parameters),
            )
            if not features and metric_is_monitored:
                raise MisconfigurationError(
                    f"Collapse(metric={self.collapse.metric!r}) watches hidden layers, and the monitor has seen none: "
                    "name modules in PlasticityMonitor(layers=[...]), or choose another metric"
                )
            return features, remark
        except Exception as error:
            if self._monitor_is_required or metric_is_monitored:
                raise
            reason = f"{format_error(error)}; monitor=False stops trying"
            self._errors.record("monitor", "the activations could not be monitored", reason)
            return {}, ""


def compared(measured: Measurement, initial: Measurement, best: float) -> dict[str, float]:
    """Return the diagnostics of a network, with those that compare it with its initial weights.

    Args:
        measured: The measurement of the network.
        initial: That of its initial weights on the same samples.
        best: The result of :func:`best_rank`.
    """
    values, references = measured.values, initial.values
    if measured.curve is None or initial.curve is None:
        return values
    rank = to_log_dict(values, references).get(_RANK, 0.0)
    share = min(rank / best, 1.0) if rank > 0 else 1.0
    return compare_fits(measured.curve, initial.curve, share) | values


def best_rank(report: TaskReport, history: Sequence[TaskReport]) -> float:
    """Return the largest rank of the tangent kernel of comparable tasks, relative to the initial weights, at least 0.5.

    The first task does not count: its network is the initial one, and training changes the rank of any network.
    """
    ranks = [earlier.metrics.get(_RANK, 0.0) for earlier in history[1:] if not report.differences(earlier)]
    return max([_LEAST_RANK, *ranks])


def plan_of(context: ProbeContext, report: TaskReport) -> Plan | None:
    """Return the training to come in a task; ``None`` if nothing is trained or the number of steps is not known."""
    lr, steps = context.learning_rate, report.expected_steps
    # The number counts the steps of all optimizers, of which each trains its own parameters.
    return None if lr is None or steps is None else Plan(lr, max(steps // max(len(context.optimizers), 1), 1))


def metrics_of_parts(now: ProbeResult, initial: ProbeResult, plan: Plan | None) -> dict[str, float]:
    """Return the numbers of the parts of a network for its report."""
    result: dict[str, float] = {}
    for name, part in now.parts.items():
        reference = initial.parts.get(name)
        references = {} if reference is None else measure(reference.spectra, {}, reference.kernel, plan)
        result |= of_part(to_log_dict(measure(part.spectra, {}, part.kernel, plan), references), name)
    return result
