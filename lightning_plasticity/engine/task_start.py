"""Measure a model at the first batch of a task, compare it with its initial weights, and repair it."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.diagnostics import DIAGNOSTICS, is_resolved, to_log_dict
from lightning_plasticity.distributed.agreement import (
    all_or_none,
    broadcast_object,
    format_error,
    is_distributed,
    local_error,
    raise_local_error,
)
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.gathering import Gathering
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.live_comparison import LiveComparison
from lightning_plasticity.engine.measurements import (
    Measurement,
    Measurements,
    best_rank,
    compared,
    metrics_of_parts,
    plan_of,
)
from lightning_plasticity.engine.repair_check import Fresh, RepairCheck
from lightning_plasticity.engine.verdicts import Verdicts
from lightning_plasticity.fit_test import FitTest
from lightning_plasticity.isolation.batches import to_device
from lightning_plasticity.messages import SkippedBatchError
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import Probe
from lightning_plasticity.reports import TaskReport


class TaskStart:
    """The steps at the start of a task: probe, monitor, verdict, and the start of interventions.

    Where the first batch of a task holds fewer samples than the probe takes, those of the next batches are gathered,
    too, and then measured on the weights that the task began with.

    A live fit test gives its verdict later, too: see :class:`LiveComparison`.

    The first measurement must succeed. After that, an error is a warning and an entry in the report, and training goes
    on.

    Args:
        probe: Measures the curvature; ``None`` measures none.
        collapse: Gives the verdict.
        fit_test: Trains copies of the model and of its initial weights; ``None`` trains none.
        monitor: Measures hidden activations; ``None`` measures none.
        monitor_is_required: Whether an error of the monitor counts as an error of the measurement.
        runner: Runs the interventions.
        errors: Where errors are recorded.
    """

    def __init__(
        self,
        probe: Probe | None,
        collapse: Collapse,
        fit_test: FitTest | None,
        monitor: PlasticityMonitor | None,
        *,
        monitor_is_required: bool,
        runner: InterventionRunner,
        errors: ErrorLog,
    ) -> None:
        self.verdicts = Verdicts(collapse)
        self.measurements = Measurements(
            probe,
            fit_test,
            monitor,
            collapse,
            monitor_is_required=monitor_is_required,
            runner=runner,
            errors=errors,
        )
        self.initial_weights = runner.initial_weights
        self.live = LiveComparison(fit_test, self.initial_weights, runner=runner, verdicts=self.verdicts, errors=errors)
        self.repair_check = RepairCheck(self.measurements, self.initial_weights, verdicts=self.verdicts, errors=errors)
        self.gathering: Gathering | None = None
        """The samples of the last task, as long as they are too few to be measured."""
        self._runner = runner
        self._errors = errors
        self._trial: Measurement | None = None
        self._interventions_have_started = False

    @property
    def is_waiting(self) -> bool:
        """Whether the report of the last task waits for samples or for the comparison with a fresh network."""
        return self.gathering is not None or self.live.is_running

    def begin_fit(self) -> None:
        """Let the probe be checked and the interventions start at the first batch of a fit."""
        self.live.begin_fit()
        self.measurements.begin_fit()
        self._interventions_have_started = False

    def needs_start(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether interventions must be started before the next batch, which these optimizers train on."""
        return not self._interventions_have_started or self._runner.needs_restart(optimizers)

    def measure_and_start(
        self,
        context: ProbeContext,
        history: Sequence[TaskReport],
        report: TaskReport | None,
        probe_batch: Callable[[int], Any] | None = None,
        *,
        window: int = 1,
        ends_window: bool = True,
    ) -> ProbeContext | None:
        """Measure the model, if a task starts, and start step interventions and regularizers.

        No weight is changed: an intervention that cannot work raises before.

        Args:
            context: The model and the first batch.
            history: The reports of all earlier tasks.
            report: The report of the new task, to be filled in now or, if :attr:`is_waiting`, by
                :meth:`measure_gathered` and :attr:`live`; ``None`` in the middle of a task.
            probe_batch: Returns a batch of so many samples to measure on, instead of those of the task.
            window: As in :meth:`LiveComparison.train`.
            ends_window: As in :meth:`LiveComparison.train`.

        Returns:
            The context for the repairs of the task; ``None`` if no task starts, if it is measured later, or if nothing
            could be measured and run.

        Raises:
            SkippedBatchError: If the loss is not defined on this batch: the task can be measured at the next one.
        """
        self._interventions_have_started = not self._runner.interventions
        gathering, of_rank = None, context
        with contextlib.ExitStack() as stack:
            try:
                context = context.gather(self.measurements.samples)
                fixed = None if probe_batch is None or report is None else self._fixed(context, probe_batch)
                full_parameters = stack.enter_context(gather_full_parameters(context.model))
                context = context.with_full_parameters(full_parameters)
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
                self._trial = None
                self.live.begin(report, of_rank, window=window, ends_window=ends_window)
                size = context.batch_size
                is_small = fixed is None and size is not None and size < self._wanted(history)
                if is_small and not _was_coupled(history):
                    gathering = self._begin_gathering(report, context, history)
                if gathering is None and not report.errors:
                    measured = context if fixed is None else fixed.with_full_parameters(full_parameters)
                    self._measure(report, measured, history)
                    self._trial = None
            self._runner.start(context)
        self._interventions_have_started = True
        if report is not None:
            report.remarks += self._runner.resting()
        if report is None:
            return None
        self.gathering = gathering
        return context if gathering is None else None

    def gather(self, context: ProbeContext, history: Sequence[TaskReport]) -> bool:
        """Add the samples of another batch to those of the task.

        Args:
            context: The model and the batch.
            history: The reports of all earlier tasks.

        Returns:
            Whether they can be measured: there are enough, or there will be no more.
        """
        assert self.gathering is not None
        wanted = self._wanted(history)
        missing = wanted - self.gathering.samples
        # A checkpoint may have been saved while they were measured.
        if self.gathering.is_complete or missing <= 0:
            return True
        try:
            batch = context.gather(missing).samples(missing)
            with all_or_none():
                self.gathering.add(batch)
        except Exception as error:
            self.gathering.fall_back(f"batches could not be joined: {local_error(error)}")
            return True
        return self.gathering.samples >= wanted

    def _wanted(self, history: Sequence[TaskReport]) -> int:
        """Return the number of samples to gather: those that earlier measurements could afford."""
        affordable = _affordable_samples(history)
        return self.measurements.samples if affordable is None else min(affordable, self.measurements.samples)

    def measure_gathered(
        self, context: ProbeContext, history: Sequence[TaskReport], report: TaskReport
    ) -> ProbeContext | None:
        """Measure the samples of a task on the weights that it began with. Errors do not end training.

        Args:
            context: The model, with any batch.
            history: The reports of all earlier tasks.
            report: The report of the task, to be filled in.

        Returns:
            The context for the repairs of the task; ``None`` if nothing could be measured.
        """
        gathering = self.gathering
        assert gathering is not None
        try:
            with gather_full_parameters(context.model) as full_parameters:
                with all_or_none():
                    measured = gathering.context(context.with_full_parameters(full_parameters))
                measured = self._measure(report, measured, history)
        except Exception as error:
            self._errors.warn(self._record_failure(report, history, error))
            self.gathering = self._trial = None
            return None
        self.gathering = self._trial = None
        return replace(measured, weights=None)

    def _fixed(self, context: ProbeContext, probe_batch: Callable[[int], Any]) -> ProbeContext:
        """Return a context on the batch that the user gives, the one of rank 0."""
        with all_or_none():
            batch = probe_batch(self.measurements.samples)
            if is_distributed():
                batch = to_device(broadcast_object(batch), like=context.batch)
        return context.with_batch(batch)

    def _begin_gathering(
        self, report: TaskReport, context: ProbeContext, history: Sequence[TaskReport]
    ) -> Gathering | None:
        """Keep the weights and the samples of the first batch; ``None`` if that fails, or if it is measured alone.

        Before the first task, the probe and the repairs are tried on that batch: a misconfiguration must be an error
        before any weight has changed. This may show that batches must not be joined, or that more samples would take
        too long.
        """
        try:
            with all_or_none():
                is_initial = self.initial_weights.store(context.model)
                if not history:
                    with context.preserve_training_state():
                        self.measurements.check_probe(context)
                        self._trial = self.measurements.measure(context, "trying the probe")
                    if self._trial.probe.coupled or self._trial.probe.limited:
                        return None
                    self._runner.dry_run(context)
                    if self.measurements.is_live:
                        self.live.is_dead(context)
                gathering = Gathering.begin(context.model, self.initial_weights.values if is_initial else None)
                gathering.add(context.samples(self.measurements.samples))
                return gathering
        except SkippedBatchError:
            raise
        except Exception as error:
            self._errors.warn(self._record_failure(report, history, error))
            return None
        finally:
            context.discard_copy()

    def _measure(self, report: TaskReport, context: ProbeContext, history: Sequence[TaskReport]) -> ProbeContext:
        """Fill in a report on all ranks alike, and return the context that was measured."""
        gathering = self.gathering
        try:
            with all_or_none():
                # The weights of a trial are stored.
                is_initial = self.initial_weights.store(context.model) or self._trial is not None
                if gathering is not None:
                    is_initial = gathering.is_initial
                with context.preserve_training_state():
                    message = self._probe_and_evaluate(report, context, history, is_initial=is_initial)
                if not self._is_known_to_work(history):
                    self._runner.dry_run(context)
        except Exception as error:
            if gathering is None and isinstance(error, SkippedBatchError):
                raise
            if gathering is not None and gathering.is_joined:
                gathering.fall_back(f"the samples of several batches could not be measured together: {error}")
                return self._measure(report, gathering.context(context), history)
            message = self._record_failure(report, history, error)
        finally:
            # Repairs make copies of their own.
            context.discard_copy()
        # Rounding may differ between devices, but decisions must not: all ranks take the report of rank 0.
        state, message = broadcast_object((report.to_dict(), message))
        if message is not None:
            self._errors.warn(message)
        vars(report).update(vars(TaskReport.from_dict(state)))
        return context

    def _is_known_to_work(self, history: Sequence[TaskReport]) -> bool:
        """Return whether the probe has been measured or tried before: the first error of all is raised."""
        return bool(history) or self.gathering is not None

    def _record_failure(self, report: TaskReport, history: Sequence[TaskReport], error: Exception) -> str:
        """Record in a report that nothing could be measured, and return the text of a warning.

        Raises:
            Exception: The error, if nothing has ever been measured.
        """
        if not self._is_known_to_work(history):
            raise_local_error(error)
        empty = TaskReport(
            report.task,
            report.task_id,
            report.step,
            repairs=report.repairs,
            errors=report.errors,
            expected_steps=report.expected_steps,
        )
        vars(report).update(vars(empty))
        report.errors["probe"] = format_error(error)
        return f"task {report.task}: plasticity could not be measured, training goes on: {report.errors['probe']}"

    def _probe_and_evaluate(
        self, report: TaskReport, context: ProbeContext, history: Sequence[TaskReport], *, is_initial: bool
    ) -> str | None:
        """Measure the model and its initial weights, fill in the report, and return the text of a warning, if any."""
        self.measurements.check_probe(context)
        # What earlier measurements have shown need not be found out again.
        context = replace(context, max_samples=_affordable_samples(history), whole_batch=_was_coupled(history))
        plan = plan_of(context, report)
        gathering = self.gathering
        if self._trial is not None and (gathering is None or not gathering.is_joined):
            # The first batch alone, on the weights that the task began with, has been measured.
            measured = replace(self._trial, plan=plan)
        else:
            may_lack_fit = self._is_known_to_work(history)
            measured = self.measurements.measure(context, "probing curvature", plan, may_lack_fit=may_lack_fit)
        now = measured.probe
        if now.coupled and gathering is not None and gathering.is_joined:
            raise ValueError("the loss of a sample depends on the other samples of its batch")
        initial = measured
        if not is_initial:
            same_samples = replace(context, max_samples=now.samples, whole_batch=now.coupled)
            initial = self.measurements.measure(
                same_samples.with_weights(self.initial_weights.values),
                "probing curvature of the initial weights",
                plan,
                monitored=bool(measured.features),
                fitted=measured.curve is not None,
                may_lack_fit=True,
            )
        report.outputs, report.trained_parameters = now.outputs, _fingerprint(context.trained_parameters)
        report.metrics = {} if now.samples is None else {"probe_samples": float(now.samples)}
        fresh = self.repair_check.fresh = Fresh(initial, best_rank(report, history))
        values, references = compared(measured, initial, fresh.best_rank), initial.values
        if measured.curve is not None and initial.curve is not None:
            report.fit_curve, report.fresh_fit_curve = measured.curve.losses, initial.curve.losses
        if self.measurements.fit_test is not None and self.measurements.is_live and is_initial:
            is_dead = self.live.is_dead(context)
            gaps = dict.fromkeys(self.measurements.fit_test.measures, math.inf if is_dead else 0.0)
            values = {**gaps, "handicap": math.inf if is_dead else 1.0, **values, "fit_gap": 0.0}
            del values["fit_loss"]
        report.fresh = {
            name: float(value) for name, value in references.items() if name in values and is_resolved(name, value)
        }
        if self.measurements.probe is not None:
            report.matrix = self.measurements.probe.matrices[0]
            report.spectrum, report.kernel = now.spectra.get(report.matrix), now.kernel
        report.limited, report.coupled = now.limited, now.coupled
        by_layer = {name: value for name, value in measured.features.items() if name not in values}
        about_batch = {} if self.measurements.probe is None else {"probe_loss": now.loss}
        report.metrics |= {
            **to_log_dict(values, references),
            **metrics_of_parts(now, initial.probe, plan),
            **about_batch,
            **by_layer,
        }
        self.verdicts.remark(report, *([] if self.gathering is None else self.gathering.remarks), *now.remarks)
        if measured.curve is not None and measured.curve.remark:
            self.verdicts.remark(report, measured.curve.remark)
        if measured.features_remark:
            self.verdicts.remark(report, measured.features_remark)
        if now.kernel is not None and context.learning_rate is not None and plan is None:
            self.verdicts.remark(
                report, "numbers of the fast directions are left out: the length of the task is not known"
            )
        if self.measurements.fit_test is not None and self.measurements.is_live:
            if is_initial:
                return self.verdicts.enter(report, values, references, history, None)
            self.live.announce(report)
            return None
        rests_on_fit = DIAGNOSTICS[self.verdicts.collapse.metric].source == "fit"
        samples = measured.fitted_samples if rests_on_fit else now.samples
        return self.verdicts.enter(report, values, references, history, samples)


def _last_measured(history: Sequence[TaskReport]) -> TaskReport | None:
    return next((report for report in reversed(history) if report.metrics), None)


def _was_coupled(history: Sequence[TaskReport]) -> bool:
    """Return whether the last measurement has shown that the loss of a sample depends on others of its batch."""
    last = _last_measured(history)
    return last is not None and last.coupled


def _affordable_samples(history: Sequence[TaskReport]) -> int | None:
    """Return the number of samples of the last measurement that could not afford more, if there is one."""
    counts = (report.metrics.get("probe_samples") for report in reversed(history) if report.limited)
    samples = next(counts, None)
    return None if samples is None else int(samples)


def _fingerprint(parameters: Mapping[str, nn.Parameter]) -> str:
    """Return a hash of the names and shapes of parameters."""
    names = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items())
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
