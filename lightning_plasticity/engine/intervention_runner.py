"""Run interventions: repairs at a collapse, at tasks and after steps, step interventions and regularizers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.distributed.agreement import (
    all_or_none,
    broadcast_object,
    is_distributed,
    raise_local_error,
    sync_errors,
)
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.regularizer_gradients import penalty_gradients
from lightning_plasticity.engine.step_counter import StepCounter, any_grad
from lightning_plasticity.interventions import Intervention, Regularizer, Repair, RepairReport, StepIntervention
from lightning_plasticity.interventions.decoupled_steps import DecoupledSteps
from lightning_plasticity.interventions.penalty_gradients import accumulate, differentiate_penalty, sum_terms
from lightning_plasticity.isolation.state import isolated_rng
from lightning_plasticity.messages import rank_zero_info, rank_zero_warn

_MAX_SAMPLES = 256
"""Number of samples, of all ranks together, that repairs between tasks run the model on."""

_ParameterKey = tuple[int, torch.Size]
"""A trained parameter, by its place among those of the optimizers and its shape: the same on all ranks."""


class InterventionRunner:
    """Runs interventions on a model in training.

    An intervention that cannot work on the model raises before any weight has changed. After that, a failing one
    changes nothing, its error is recorded with a warning, and training goes on. Each intervention runs on all ranks or
    on none.

    Args:
        interventions: The interventions, in the order in which they run.
        errors: Where errors are recorded.

    Raises:
        TypeError: If an item is no intervention.
    """

    def __init__(self, interventions: Sequence[Intervention], errors: ErrorLog) -> None:
        if isinstance(interventions, Intervention):
            raise TypeError(f"interventions={interventions!r} must be a list of interventions: write [...] around it")
        if not isinstance(interventions, Iterable):
            raise TypeError(f"interventions={interventions!r} must be a list of interventions")
        # Iterators are accepted, too.
        interventions = tuple(interventions)
        for intervention in interventions:
            if not isinstance(intervention, Repair | StepIntervention | Regularizer):
                raise TypeError(
                    f"interventions=[{intervention!r}] must hold instances of Repair, StepIntervention or Regularizer, "
                    "such as ShrinkPerturb()"
                )
        self.interventions = interventions
        self.repairs = [i for i in interventions if isinstance(i, Repair)]
        self.step_interventions = [i for i in interventions if isinstance(i, StepIntervention)]
        self.regularizers = [i for i in interventions if isinstance(i, Regularizer)]
        self.initial_weights = InitialWeights()
        """The weights that fresh values are drawn from."""
        self._errors = errors
        self._counter = StepCounter()
        self._decoupled_steps = DecoupledSteps()
        # The step interventions and regularizers that were started for this task.
        self._started: list[Intervention] = []
        # The parameters that were trained at that time.
        self._started_for: set[_ParameterKey] = set()
        self._warned_of_untracked_step = False
        # Errors are raised until an intervention has worked once.
        self._has_worked = False

    def begin_fit(self, optimizers: Sequence[torch.optim.Optimizer], *, manual_backward: bool) -> None:
        """Discard the state of the last fit and track the optimizers of this one.

        Args:
            optimizers: The optimizers.
            manual_backward: Whether the training step calls ``backward`` and steps the optimizers itself.

        Raises:
            MisconfigurationError: If the steps of an optimizer cannot be counted and an intervention needs them.
        """
        self.end_fit()
        self._started = []
        self._started_for = set()
        self._warned_of_untracked_step = False
        needs_steps = bool(self.step_interventions) or any(r.decoupled for r in self.regularizers)
        uses_hooks = needs_steps or (bool(self.regularizers) and manual_backward)
        self._counter.begin(optimizers, uses_hooks=uses_hooks, needs_steps=needs_steps)

    def end_fit(self) -> None:
        """Remove all hooks from the model and the optimizers."""
        self._counter.track([])
        self._decoupled_steps.stop()
        for intervention in self.interventions:
            try:
                intervention.stop()
            except Exception as error:
                # Another exception may be ending the run: this one must not mask it.
                self._record(intervention, "could not be stopped", error)

    def track(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Count the steps of these optimizers from now on; a training step may have created new ones."""
        if self.interventions:
            self._counter.track(optimizers)

    def dry_run(self, context: ProbeContext) -> None:
        """Run every repair on a copy, so that a repair that cannot work raises before training, not at a collapse."""
        with context.preserve_training_state():
            for repair in self.repairs:
                generator = torch.Generator().manual_seed(0)
                report = repair.repair(
                    _copy_for_rehearsal(context),
                    forward=context.loss,
                    loss=context.loss,
                    generator=generator,
                    initial=self._initial(context),
                )
                _check_report(repair, report)

    def needs_restart(self, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether a parameter is trained that did not exist, or was frozen, at the last :meth:`start`."""
        is_needed = bool(self.step_interventions or self.regularizers)
        return is_needed and not _trained_parameters(optimizers) <= self._started_for

    def start(self, context: ProbeContext) -> None:
        """Start step interventions and regularizers: at the start of every fit and task, and if they need a restart."""
        self._started = []
        self._started_for = _trained_parameters(context.optimizers)
        for intervention in self.interventions:
            if isinstance(intervention, Repair):
                continue
            try:
                with all_or_none(), context.preserve_training_state():
                    intervention.start(
                        context.model,
                        forward=context.loss,
                        make_copy=context.copy,
                        optimizers=context.optimizers,
                        initial=self._initial(context),
                    )
                self._started.append(intervention)
            except Exception as error:
                if not self._has_worked:
                    raise_local_error(error)
                self._record(intervention, "could not be started and is off for this task", error)
                _sync_state([intervention])
        self._has_worked = self._has_worked or self._dry_run_regularizers(context)

    def resting(self) -> list[str]:
        """Return why interventions have nothing to act on, a sentence for each of those that have not."""
        return [i.rests_because for i in self.interventions if i.rests_because is not None]

    def at_task_start(self, context: ProbeContext, task: int, step: int, *, collapsed: bool) -> list[RepairReport]:
        """Run the repairs that are due at the start of a task and return their reports."""
        due = self.due_at_task_start(task, collapsed=collapsed)
        return self._repair(context, due, step, seed=1000 * task)

    def due_at_task_start(self, task: int, *, collapsed: bool) -> list[int]:
        """Return the indices of the repairs that are due at the start of a task."""
        return [
            number
            for number, repair in enumerate(self.repairs)
            if (repair.when == "collapse" and collapsed) or (repair.when == "task" and task > 0)
        ]

    def before_backward(self) -> None:
        """Record the start of a backward pass."""
        if self.regularizers:
            self._counter.before_backward()

    def after_backward(self) -> None:
        """Record the end of a backward pass."""
        self._counter.after_backward()

    def before_step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int | None,
        scale: float,
        with_values: bool,
    ) -> dict[str, Tensor]:
        """Add the gradients of the regularizers to those of an optimizer's parameters, before its step.

        The result is the same as with the penalties in the training step: if gradients are accumulated and only some
        batches had a loss, the gradients of the penalties are scaled by that share, and they are clipped with the rest.
        With several optimizers, those of the second are taken after the step of the first. Those of decoupled
        regularizers are subtracted after the step instead, times the learning rate.

        Args:
            model: The model.
            optimizer: The optimizer.
            accumulation: Number of batches that an automatic optimization accumulates gradients over; ``None`` with
                manual optimization.
            scale: Factor by which the gradients of the loss are still scaled.
            with_values: Whether the values of all penalties are needed, such as for a log.

        Returns:
            The value of each penalty as ``<name>/penalty``, as far as it is known.
        """
        passes = self._counter.before_step(optimizer)
        regularizers = [started for started in self._started if isinstance(started, Regularizer)]
        if not regularizers:
            return {}
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if accumulation is None and not self._counter.backward_passes:
            # With loss.backward() instead of manual_backward, the hooks of callbacks are not called.
            passes = 1
        # Without a backward pass there is no loss to add to, as in an epoch that only updates batch norms.
        if not (passes and any_grad(parameters)):
            return {}
        result = penalty_gradients(model, parameters, regularizers, with_values=with_values)
        for regularizer, error in result.errors:
            if not self._has_worked:
                raise_local_error(error)
            self._record(regularizer, "failed and was left out of this step", error)
        _sync_state([regularizer for regularizer, _ in result.errors])
        self._has_worked = True
        self._decoupled_steps.schedule(optimizer, parameters, sum_terms(result.decoupled, len(parameters)))
        accumulate(parameters, result.terms, scale * (1.0 if accumulation is None else passes / accumulation))
        return {f"{self.name_of(regularizer)}/penalty": penalty for regularizer, penalty in result.penalties}

    def after_batch(
        self, context: ProbeContext, step_before: int, step: int
    ) -> tuple[list[RepairReport], dict[str, float]]:
        """Run step interventions and the repairs that are due after the optimizer steps of a batch.

        Args:
            context: The model and the batch.
            step_before: The number of optimizer steps, over all fits, before the batch.
            step: The number after the batch.

        Returns:
            The reports of the repairs, and numbers of all of them to be logged.
        """
        numbers: dict[str, float] = {}
        steps, untracked = self._counter.pop_steps()
        if untracked is not None:
            self._warn_untracked_step(untracked)
        if steps:
            for intervention in (started for started in self._started if isinstance(started, StepIntervention)):
                act = partial(intervention.after_step, context.model, context.optimizers)
                report = self._run_guarded(intervention, context, act, weights=list(context.model.parameters()))
                if report is not None:
                    numbers |= dataclasses.replace(report, name=self.name_of(intervention)).numbers()
        due = [
            number
            for number, repair in enumerate(self.repairs)
            if isinstance(repair.when, int) and step // repair.when > step_before // repair.when
        ]
        if due:
            context = context.gather(_MAX_SAMPLES)
        repairs = self._repair(context, due, step, seed=2**32 + 1000 * step)
        return repairs, {**numbers, **{name: number for report in repairs for name, number in report.numbers().items()}}

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of all interventions, for checkpoints."""
        return [{"name": intervention.name, "state": intervention.state_dict()} for intervention in self.interventions]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore the state that :meth:`state_dict` returned, if it is of the same interventions.

        Warns:
            PlasticityWarning: If it is of other interventions, and lost.
        """
        before, now = [state["name"] for state in states], [intervention.name for intervention in self.interventions]
        if before != now:
            if any(state["state"] for state in states):
                rank_zero_warn(
                    f"the checkpoint was written with interventions {before}, now they are {now}: they begin anew"
                )
            return
        self._has_worked = True
        for intervention, state in zip(self.interventions, states, strict=True):
            intervention.load_state_dict(state["state"])

    def name_of(self, intervention: Intervention) -> str:
        """Return the name of an intervention in logs and reports: the second one of a class ends in ``_2``."""
        namesakes = [other for other in self.interventions if other.name == intervention.name]
        number = next(number for number, other in enumerate(namesakes, start=1) if other is intervention)
        return intervention.name if number == 1 else f"{intervention.name}_{number}"

    def _dry_run_regularizers(self, context: ProbeContext) -> bool:
        """Differentiate copies of the regularizers on a copy of the model; return whether that was possible.

        Raises:
            Exception: If a regularizer cannot work on the model.
        """
        if not self.regularizers:
            return True
        try:
            with all_or_none():
                regularizers = copy.deepcopy(self.regularizers)
        except Exception:
            # A trial of the regularizer itself would change its state. The first step will show whether it works.
            return False
        try:
            with all_or_none(), isolated_rng():
                model = context.copy()
                parameters = [p for p in model.parameters() if p.requires_grad]
                for regularizer, original in zip(regularizers, self.regularizers, strict=True):
                    differentiate_penalty(regularizer, model, parameters)
                    # Warned of already.
                    original.rests_because = regularizer.rests_because
        except Exception as error:
            raise_local_error(error)
        return True

    def _initial(self, context: ProbeContext) -> Mapping[str, Tensor] | None:
        """Return the initial weights, those of parameters that are new since the last task included."""
        if not self.initial_weights.values:
            return None
        self.initial_weights.store(context.model)
        return self.initial_weights.values

    def _repair(self, context: ProbeContext, due: Sequence[int], step: int, seed: int) -> list[RepairReport]:
        reports = []
        for number in due:
            repair, generator = self.repairs[number], torch.Generator().manual_seed(seed + number)
            act = partial(
                repair.repair,
                context.model,
                optimizers=context.optimizers,
                loss=context.loss,
                generator=generator,
                initial=self._initial(context),
            )
            report = self._run_guarded(repair, context, act)
            if report is not None:
                reports.append(dataclasses.replace(report, name=self.name_of(repair), step=step))
                rank_zero_info(f"step {step}: {reports[-1]}")
        return reports

    def _run_guarded(
        self,
        intervention: Intervention,
        context: ProbeContext,
        act: Callable[..., object],
        weights: Sequence[Tensor] = (),
    ) -> RepairReport | None:
        """Run an intervention on all ranks or on none, and record its error, if any."""
        try:
            runs_model = not isinstance(intervention, StepIntervention) or intervention.runs_model
            with all_or_none(), context.preserve_training_state() if runs_model else contextlib.nullcontext():
                return _check_report(intervention, act(forward=context.loss, make_copy=context.copy))
        except Exception as error:
            self._record(intervention, "failed and changed nothing", error)
            _sync_state([intervention], weights)
            return None

    def _record(self, intervention: Intervention, consequence: str, error: Exception | str) -> None:
        name = self.name_of(intervention)
        self._errors.record(name, f"{name} {consequence}", error)

    def _warn_untracked_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._warned_of_untracked_step:
            return
        self._warned_of_untracked_step = True
        reason = (
            f"{type(optimizer).__name__} was stepped without Lightning, as with use_pl_optimizer=False: step what "
            "self.optimizers() returns"
        )
        for regularizer in self.regularizers:
            self._record(regularizer, "is left out of steps", reason)


def _copy_for_rehearsal(context: ProbeContext) -> nn.Module:
    """Return a copy of the model in which the parameters that no optimizer holds are frozen."""
    model, trained = context.copy(), context.trained_parameters
    context.check_copy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _trained_parameters(optimizers: Sequence[torch.optim.Optimizer]) -> set[_ParameterKey]:
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return {(place, p.shape) for place, p in enumerate(parameters) if p.requires_grad}


def _check_report(intervention: Intervention, returned: object) -> RepairReport | None:
    """Return the report that an intervention has returned.

    Raises:
        TypeError: If the returned object is of the wrong type, since interventions may be written by users.
    """
    if isinstance(returned, RepairReport):
        return returned
    if isinstance(intervention, Repair):
        raise TypeError(f"{intervention.name}.repair must return a RepairReport, not {type(returned).__name__}")
    if returned is not None:
        received = type(returned).__name__
        raise TypeError(f"{intervention.name}.after_step must return a RepairReport or None, not {received}")
    return None


def _sync_state(interventions: Sequence[Intervention], weights: Sequence[Tensor] = ()) -> None:
    """Broadcast the state of interventions, and weights, from rank 0.

    An intervention that failed on one rank may have changed its state, or weights in place, before the failure. Without
    this, the ranks would diverge.
    """
    if not is_distributed() or not interventions:
        return
    with all_or_none():
        for intervention in interventions:
            # On the CPU, as in a checkpoint.
            state = apply_to_collection(intervention.state_dict(), Tensor, Tensor.cpu)
            intervention.load_state_dict(broadcast_object(state))
        sync_errors()
        for tensor in weights:
            torch.distributed.broadcast(tensor.detach(), 0)
