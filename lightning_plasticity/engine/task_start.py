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

from lightning_plasticity.collapse import MIN_SAMPLES, Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import Estimate
from lightning_plasticity.diagnostics import (
    DIAGNOSTICS,
    resolved_value,
    to_log_dict,
)
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
from lightning_plasticity.engine.explanation import explain
from lightning_plasticity.engine.gathering import Gathering
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.measurements import (
    Measurement,
    Measurements,
    best_rank,
    compared,
    metrics_of_parts,
    plan_of,
)
from lightning_plasticity.engine.shadow_run import ShadowRun
from lightning_plasticity.fit_curve import FitCurve
from lightning_plasticity.fit_test import MIN_BATCHES, FitTest
from lightning_plasticity.isolation.batches import to_device
from lightning_plasticity.messages import MisconfigurationError, SkippedBatchError, rank_zero_info
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import Probe
from lightning_plasticity.reports import TaskReport

_RANK = "ntk_effective_rank_vs_initial"

_FEW_SAMPLES = 16
"""Number of samples below which a warning says that they are few."""

_ADVICE_ON_SAMPLES = "take larger batches, or pass SpectralCollapseCallback(probe_batch=...)"


class TaskStart:
    """The steps at the start of a task: probe, monitor, verdict, and the start of interventions.

    Where the first batch of a task holds fewer samples than the probe takes, those of the next batches are gathered,
    too, and then measured on the weights that the task began with.

    A live fit test gives its verdict later, too: a fresh network trains beside the network on the first batches of the
    task, and :meth:`compare` fills in the result. The first task begins with a fresh network, and needs no other.

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
        self.collapse = collapse
        self.measurements = Measurements(
            probe,
            fit_test,
            monitor,
            collapse,
            monitor_is_required=monitor_is_required,
            runner=runner,
            errors=errors,
        )
        self.initial_weights = InitialWeights()
        self.gathering: Gathering | None = None
        """The samples of the last task, as long as they are too few to be measured."""
        self.shadow: ShadowRun | None = None
        """The fresh network that trains beside the network, as long as they have not been compared."""
        self._runner = runner
        self._errors = errors
        self._warned_of_few_samples = False
        self._logged_remarks: set[str] = set()
        self._trial: Measurement | None = None
        # The initial weights on the samples of the last task, for the comparison with a repaired model.
        self._initial: Measurement | None = None
        self._best_rank = 1.0
        self._interventions_have_started = False

    @property
    def is_waiting(self) -> bool:
        """Whether the report of the last task waits for samples or for the comparison with a fresh network."""
        return self.gathering is not None or self.shadow is not None

    def begin_fit(self) -> None:
        """Let the probe be checked and the interventions start at the first batch of a fit."""
        # A copy that an interrupted fit has left belongs to its Trainer.
        self.restore_shadow(None if self.shadow is None else self.shadow.state_dict())
        self.measurements.begin_fit()
        self._interventions_have_started = False

    def restore_shadow(self, state: Mapping[str, Any] | None) -> None:
        """Restore the fresh network from its ``state_dict()``; ``None`` if there is none."""
        self.shadow = None
        if self.measurements.fit_test is not None and state is not None:
            self.shadow = ShadowRun(self.measurements.fit_test, {})
            self.shadow.load_state_dict(state)

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
                :meth:`measure_gathered` and :meth:`compare`; ``None`` in the middle of a task.
            probe_batch: Returns a batch of so many samples to measure on, instead of those of the task.
            window: As in :meth:`train_shadow`.
            ends_window: As in :meth:`train_shadow`.

        Returns:
            The context for the repairs of the task; ``None`` if no task starts, if it is measured later, or if nothing
            could be measured and run.

        Raises:
            SkippedBatchError: If the loss is not defined on this batch: the task can be measured at the next one.
        """
        self._interventions_have_started = not self._runner.interventions
        gathering = None
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
                self._begin_shadow(context, window=window, ends_window=ends_window)
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

    def _begin_shadow(self, context: ProbeContext, *, window: int, ends_window: bool) -> None:
        """Let a fresh network train on the first batch of a task, unless the network is fresh itself."""
        self.shadow = None
        if self.measurements.fit_test is not None and self.measurements.fit_test.live and self.initial_weights.values:
            self.initial_weights.store(context.model)
            self.shadow = ShadowRun(self.measurements.fit_test, self.initial_weights.values)
            self.train_shadow(context, window=window, ends_window=ends_window)

    def train_shadow(self, context: ProbeContext, *, window: int = 1, ends_window: bool = True) -> None:
        """Let the fresh network train on a batch, unless it has seen enough. An error ends the comparison only.

        Args:
            context: The network and the batch, before the network is trained on it.
            window: Number of batches over which gradients are accumulated.
            ends_window: Whether the optimizers step after this batch.
        """
        assert self.shadow is not None
        if self.shadow.is_complete:
            return
        try:
            self.shadow.train(context, regularizers=self._runner.regularizers, window=window, ends_window=ends_window)
        except SkippedBatchError:
            # The network is not trained on this batch either.
            return
        except Exception as error:
            self.shadow = None
            self._errors.record("fit_test", "a fresh network could not be trained beside this one: no verdict", error)

    def compare(self, report: TaskReport, history: Sequence[TaskReport]) -> None:
        """Compare the network with the fresh one on the batches so far, and enter the verdict in the report.

        Args:
            report: The report of the task, which holds all other numbers.
            history: The reports of all earlier tasks.
        """
        assert self.measurements.fit_test is not None
        report.remarks = [remark for remark in report.remarks if remark != _waiting(self.measurements.fit_test)]
        if self.shadow is None:
            return
        shadow, self.shadow = self.shadow, None
        shadow.stop()
        batches = len(shadow.losses)
        if not shadow.is_complete:
            self._remark(
                report,
                f"the task ended after {batches} of the {self.measurements.fit_test.num_steps} batches of the fit test",
            )
        if batches < MIN_BATCHES:
            self._remark(report, f"there is no verdict on fewer than {MIN_BATCHES} batches")
            return
        report.fit_curve, report.fresh_fit_curve = tuple(shadow.losses), tuple(shadow.fresh_losses)
        values, references = shadow.compare()
        known = {name: report.metrics[name] for name in DIAGNOSTICS if name in report.metrics}
        ratios = {name: report.metrics.get(f"{name}_vs_initial", 0.0) for name in known}
        known_references = {name: value / ratios[name] for name, value in known.items() if ratios[name]}
        report.metrics = {**to_log_dict(values, references), **report.metrics}
        # A number that is not defined, such as the ratio of two zeros, gives no verdict.
        values = {**known, self.collapse.metric: math.nan, **values}
        message = self._judge(report, values, {**known_references, **references}, history, None)
        if message is not None:
            self._errors.warn(message)

    def _dry_run(self, context: ProbeContext) -> None:
        """Run on copies, before any weight has changed, what is to run later."""
        self._runner.dry_run(context)
        if self.measurements.is_live and self.measurements.fit_test is not None:
            shadow = ShadowRun(self.measurements.fit_test, self.initial_weights.values)
            try:
                shadow.train(context, regularizers=self._runner.regularizers)
            finally:
                shadow.stop()

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

    def measure_repaired(self, context: ProbeContext, report: TaskReport, repairs: Sequence[str]) -> bool:
        """Measure a repaired model on the samples of its task, and enter the numbers in the report.

        Args:
            context: The context that :meth:`measure_and_start` or :meth:`measure_gathered` returned.
            report: The report of the task.
            repairs: The names of the repairs.

        Returns:
            Whether the number that the verdict depends on is worse than before.
        """
        initial, samples = self._initial, report.metrics.get("probe_samples")
        # After a live fit test, the samples of the start of the task are gone.
        if initial is None or not report.metrics or self.measurements.is_live:
            return False
        same = replace(context, max_samples=None if samples is None else int(samples), whole_batch=report.coupled)
        try:
            with gather_full_parameters(context.model), all_or_none(), context.preserve_training_state():
                measured = self.measurements.measure(same, "probing the repaired network", plan_of(same, report))
            report.after = to_log_dict(compared(measured, initial, self._best_rank), {})
        except Exception as error:
            self._errors.record("probe", "the repaired network could not be measured", error)
            return False
        finally:
            context.discard_copy()
        report.after = broadcast_object(report.after)
        metric = self.collapse.metric
        before, noise = report.metrics.get(metric, math.nan), report.after.get(f"{metric}_standard_error", 0.0)
        after = Estimate(report.after.get(metric, math.nan), standard_error=noise)
        is_worse = self.collapse.is_worse(after, before)
        message = f"task {report.task}: after {' and '.join(repairs)}, {_changes(report, metric)}"
        message += ": worse than before" if is_worse else ""
        # A repair of a healthy network, as at every task, costs something.
        (self._errors.warn if is_worse and report.collapsed else rank_zero_info)(message)
        return is_worse

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
                    self._dry_run(context)
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
                    self._dry_run(context)
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
            measured = self.measurements.measure(context, "probing curvature", plan)
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
            )
        self._initial = initial
        report.outputs, report.trained_parameters = now.outputs, _fingerprint(context.trained_parameters)
        report.metrics = {} if now.samples is None else {"probe_samples": float(now.samples)}
        self._best_rank = best_rank(report, history)
        values, references = compared(measured, initial, self._best_rank), initial.values
        if measured.curve is not None and initial.curve is not None:
            report.fit_curve, report.fresh_fit_curve = measured.curve.losses, initial.curve.losses
        if self.measurements.fit_test is not None and self.measurements.is_live and is_initial:
            values = {**dict.fromkeys(self.measurements.fit_test.measures, 0.0), "handicap": 1.0, **values}
            del values["fit_loss"]
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
        self._remark(report, *([] if self.gathering is None else self.gathering.remarks), *now.remarks)
        if now.kernel is not None and context.learning_rate is not None and plan is None:
            self._remark(report, "numbers of the fast directions are left out: the length of the task is not known")
        if self.measurements.fit_test is not None and self.measurements.is_live:
            if is_initial:
                return self._judge(report, values, references, history, None)
            if self.shadow is not None:
                self._remark(report, _waiting(self.measurements.fit_test))
            return None
        return self._judge(report, values, references, history, now.samples)

    def _judge(
        self,
        report: TaskReport,
        values: Mapping[str, float],
        references: Mapping[str, float],
        history: Sequence[TaskReport],
        samples: int | None,
    ) -> str | None:
        """Enter the verdict in a report that holds all numbers, and return the text of a warning, if any."""
        metric = self.collapse.metric
        measured = [earlier for earlier in history if earlier.metrics]
        # A fit test may run and yet define no number, as where both copies diverge.
        if metric not in values and not measured and DIAGNOSTICS[metric].source != "fit":
            raise MisconfigurationError(
                f"Collapse(metric={metric!r}) watches what could not be measured ({'; '.join(report.remarks)}): choose "
                f"one of {[name for name in values if name != metric]}"
            )
        compared = measured if self.collapse.compares_tasks else []
        differences = [report.differences(earlier) for earlier in compared]
        verdict = self.collapse.evaluate(
            values.get(metric, math.nan),
            earlier=[
                None if report.differences(earlier) else resolved_value(earlier.metrics, metric) for earlier in history
            ],
            initial=references.get(metric, math.nan),
            samples=samples,
            differences=" and ".join(differences[-1]) if differences and all(differences) else "",
            explanation=explain(values, references, history),
        )
        report.collapsed = verdict.collapsed
        is_first_of_few = samples is not None and samples < _FEW_SAMPLES and not self._warned_of_few_samples
        self._warned_of_few_samples |= is_first_of_few
        if verdict.inconclusive or (differences and all(differences)):
            self._remark(report, verdict.message)
        if samples is not None and samples < MIN_SAMPLES:
            return f"{verdict.message}: {_ADVICE_ON_SAMPLES}" if is_first_of_few else None
        messages = [verdict.message] if verdict.collapsed or verdict.inconclusive else []
        if is_first_of_few:
            messages.append(
                f"task {report.task} was measured on {samples} samples: below {_FEW_SAMPLES}, the numbers depend on "
                f"which samples were drawn, and an alarm may be false: {_ADVICE_ON_SAMPLES}"
            )
        return "; ".join(messages) or None

    def _remark(self, report: TaskReport, *remarks: str) -> None:
        """Add remarks to the report, and to the log on rank 0 if they are new."""
        for remark in remarks:
            report.remarks.append(remark)
            if remark not in self._logged_remarks:
                self._logged_remarks.add(remark)
                rank_zero_info(remark if remark.startswith("task ") else f"task {report.task}: {remark}")


def _changes(report: TaskReport, metric: str) -> str:
    """Return how the numbers of a task have changed by its repairs."""
    names = dict.fromkeys(name for name in (metric, "fit_loss") if name in report.after and name in report.metrics)
    changes = [f"{DIAGNOSTICS[n].title} {report.metrics[n]:.3g} → {report.after[n]:.3g}" for n in names]
    if report.fresh_fit_curve:
        changes.append(f"fit loss of a fresh network {FitCurve(report.fresh_fit_curve).mean:.3g}")
    return ", ".join(changes)


def _waiting(fit_test: FitTest) -> str:
    return (
        f"there is no verdict yet: a fresh network trains beside this one on the first {fit_test.num_steps} batches of "
        "the task"
    )


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
