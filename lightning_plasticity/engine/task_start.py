"""Measure a model at the first batch of a task, compare it with its initial weights, and repair it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.diagnostics import Source, diagnostics_of, measure, resolved_value, to_log_dict
from lightning_plasticity.distributed.agreement import (
    all_or_none,
    broadcast_object,
    format_error,
    raise_local_error,
)
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.monitoring import measure_activations
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import Probe, ProbeResult
from lightning_plasticity.reports import TaskReport


class TaskStart:
    """The steps at the start of a task: probe, monitor, verdict, and the start of interventions.

    The first measurement must succeed. After that, an error is a warning and an entry in the report, and training goes
    on.

    Args:
        probe: Measures the curvature.
        collapse: Gives the verdict.
        monitor: Measures hidden activations; ``None`` measures none.
        monitor_is_required: Whether an error of the monitor counts as an error of the measurement.
        runner: Runs the interventions.
        errors: Where errors are recorded.
    """

    def __init__(
        self,
        probe: Probe,
        collapse: Collapse,
        monitor: PlasticityMonitor | None,
        *,
        monitor_is_required: bool,
        runner: InterventionRunner,
        errors: ErrorLog,
    ) -> None:
        self.probe = probe
        self.collapse = collapse
        self.monitor = monitor
        self.initial_weights = InitialWeights()
        self._monitor_is_required = monitor_is_required
        self._runner = runner
        self._errors = errors
        self._probe_is_checked = False
        self._interventions_have_started = False

    def check_metric(self) -> None:
        """Check that the metric of ``collapse`` is measured.

        Raises:
            MisconfigurationError: If neither the probe nor the monitor measures it.
        """
        sources: list[Source] = [*self.probe.sources]
        measures = [] if self.monitor is None else self.monitor.measures
        available = [diagnostic.name for diagnostic in diagnostics_of(sources)] + measures
        if self.collapse.metric not in available:
            raise MisconfigurationError(
                f"Collapse(metric={self.collapse.metric!r}) watches what neither {self.probe} nor the monitor "
                f"measures: choose one of {available}, or another probe"
            )

    def begin_fit(self) -> None:
        """Let the probe be checked and the interventions start at the first batch of a fit."""
        self._probe_is_checked = False
        self._interventions_have_started = False

    def needs_start(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether interventions must be started before the next batch, which these optimizers train on."""
        return not self._interventions_have_started or self._runner.needs_restart(optimizers)

    def measure_and_start(
        self, context: ProbeContext, history: Sequence[TaskReport], report: TaskReport | None
    ) -> ProbeContext | None:
        """Measure the model, if a task starts, and start step interventions and regularizers.

        No weight is changed: an intervention that cannot work raises before.

        Args:
            context: The model and the first batch.
            history: The reports of all earlier tasks.
            report: The report of the new task, to be filled in; ``None`` in the middle of a task.

        Returns:
            The context for the repairs of the task; ``None`` if no task starts, or nothing could be measured and run.
        """
        self._interventions_have_started = not self._runner.interventions
        with contextlib.ExitStack() as stack:
            try:
                context = context.gather(self.probe.samples)
                stack.enter_context(gather_full_parameters(context.model))
            except Exception as error:
                if report is not None:
                    self._errors.warn(self._record_failure(report, history, error))
                elif self._runner.interventions:
                    self._errors.record(
                        "interventions", "interventions could not be started and are off until the next batch", error
                    )
                # The interventions start at the next batch.
                return None
            if report is not None:
                self._measure(report, context, history)
            self._runner.start(context)
        self._interventions_have_started = True
        return None if report is None else context

    def _measure(self, report: TaskReport, context: ProbeContext, history: Sequence[TaskReport]) -> None:
        """Fill in a report on all ranks alike."""
        try:
            with all_or_none():
                is_initial = self.initial_weights.store(context.model)
                with context.preserve_training_state():
                    message = self._probe_and_evaluate(report, context, history, is_initial=is_initial)
                if not _has_probed(history):
                    self._runner.dry_run(context)
        except Exception as error:
            message = self._record_failure(report, history, error)
        finally:
            # Repairs make copies of their own.
            context.discard_copy()
        # Rounding may differ between devices, but decisions must not: all ranks take the report of rank 0.
        state, message = broadcast_object((report.to_dict(), message))
        if message is not None:
            self._errors.warn(message)
        vars(report).update(vars(TaskReport.from_dict(state)))

    def _record_failure(self, report: TaskReport, history: Sequence[TaskReport], error: Exception) -> str:
        """Record in a report that nothing could be measured, and return the text of a warning.

        Raises:
            Exception: The error, if nothing has ever been measured.
        """
        if not _has_probed(history):
            raise_local_error(error)
        vars(report).update(vars(TaskReport(report.task, report.task_id, report.step)))
        report.errors["probe"] = format_error(error)
        return f"task {report.task}: plasticity could not be measured, training goes on: {report.errors['probe']}"

    def _probe_and_evaluate(
        self, report: TaskReport, context: ProbeContext, history: Sequence[TaskReport], *, is_initial: bool
    ) -> str | None:
        """Measure the model and its initial weights, fill in the report, and return the text of a warning, if any."""
        if not self._probe_is_checked:
            warning = self.probe.check(context)
            if warning is not None:
                self._errors.warn(warning)
            self._probe_is_checked = True
        now, features = self._measure_weights(context, "probing curvature")
        values = references = measure(now.spectra, features, now.kernel)
        if not is_initial:
            initial, initial_features = self._measure_weights(
                context.with_weights(self.initial_weights.values),
                "probing curvature of the initial weights",
                monitored=bool(features),
            )
            references = measure(initial.spectra, initial_features, initial.kernel)
        metric = self.collapse.metric
        verdict = self.collapse.evaluate(
            values[metric],
            earlier=[resolved_value(earlier.metrics, metric) for earlier in history],
            initial=references[metric],
        )
        report.matrix = self.probe.matrices[0]
        report.spectrum, report.kernel = now.spectra.get(report.matrix), now.kernel
        by_layer = {name: value for name, value in features.items() if name not in values}
        report.metrics = {**to_log_dict(values, references), "probe_loss": now.loss, **by_layer}
        report.collapsed = verdict.collapsed
        return verdict.message if verdict.collapsed or verdict.inconclusive else None

    def _measure_weights(
        self, context: ProbeContext, description: str, *, monitored: bool = True
    ) -> tuple[ProbeResult, dict[str, float]]:
        """Return the results of the probe and of the monitor on copies of the model."""
        with context.show_progress(description) as progress:
            result = self.probe.measure(context, progress)
        if self.monitor is None or not monitored:
            return result, {}
        return result, self._measure_activations(self.monitor, context)

    def _measure_activations(self, monitor: PlasticityMonitor, context: ProbeContext) -> dict[str, float]:
        metric_is_monitored = self.collapse.metric in monitor.measures
        try:
            features = measure_activations(
                monitor, context.copy_to_measure(), context.samples(self.probe.samples), context.loss_on
            )
            if not features and metric_is_monitored:
                raise MisconfigurationError(
                    f"Collapse(metric={self.collapse.metric!r}) watches hidden layers, and the monitor has seen none: "
                    "name modules in PlasticityMonitor(layers=[...]), or choose another metric"
                )
            return features
        except Exception as error:
            if self._monitor_is_required or metric_is_monitored:
                raise
            reason = f"{format_error(error)}; monitor=False stops trying"
            self._errors.record("monitor", "the activations could not be monitored", reason)
            return {}


def _has_probed(history: Sequence[TaskReport]) -> bool:
    return any(report.metrics for report in history)
