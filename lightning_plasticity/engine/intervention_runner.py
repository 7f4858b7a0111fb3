"""What is done about it, and when? Each intervention at its time: at a collapse, at a task, or while training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_plasticity._compat import gradient_scale, weight_averages
from lightning_plasticity.collapse import PlasticityWarning
from lightning_plasticity.distributed.agreement import (
    all_or_none,
    broadcast_object,
    is_distributed,
    raise_local_error,
    sync_errors,
)
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters, sharded_like
from lightning_plasticity.engine.step_counter import StepCounter, any_grad
from lightning_plasticity.interventions import (
    HareTortoise,
    Intervention,
    Regularizer,
    Repair,
    RepairReport,
    StepIntervention,
)
from lightning_plasticity.isolation.state import isolated_rng
from lightning_plasticity.reporting.errors import ErrorLog
from lightning_plasticity.training.sandbox import ProbeContext, preserve_schedulers

_SAMPLES = 256
"""How many samples repairs between tasks see at most, of all processes together."""

_Trained = tuple[int, torch.Size]
"""A parameter that is trained, by its place among those of the optimizers: the same in all processes."""


class InterventionRunner:
    """Conducts interventions in the training loop.

    One that cannot work on the module is an error before any weight has changed. From then on one that fails changes
    nothing, is warned of, and training goes on. Processes that train together do each thing all together or not at all.

    Args:
        interventions: What to do, in this order.
        errors: Where those that fail are told of.

    Raises:
        TypeError: If it is no list of interventions.
    """

    def __init__(self, interventions: Sequence[Intervention], errors: ErrorLog) -> None:
        if isinstance(interventions, Intervention):
            raise TypeError(f"interventions={interventions!r} must be a list of interventions: write [...] around it")
        if not isinstance(interventions, Iterable):
            raise TypeError(f"interventions={interventions!r} must be a list of interventions")
        interventions = list(interventions)  # of what can be gone through only once, too
        for intervention in interventions:
            if not isinstance(intervention, Repair | StepIntervention | Regularizer):
                raise TypeError(
                    f"interventions=[{intervention!r}] must hold instances of Repair, StepIntervention or Regularizer, "
                    "such as ShrinkPerturb()"
                )
        self._repairs = [i for i in interventions if isinstance(i, Repair)]
        self._running = [i for i in interventions if isinstance(i, StepIntervention)]
        self._regularizers = [i for i in interventions if isinstance(i, Regularizer)]
        self._all = interventions
        self._ready: list[Intervention] = []
        self._ready_for: set[_Trained] = set()
        self._errors = errors
        self._counts = StepCounter()
        self._said_left_out = False
        self._have_worked = False

    @property
    def interventions(self) -> list[Intervention]:
        """All of them, in their order."""
        return list(self._all)

    def begin_fit(self, trainer: Trainer) -> None:
        """A fit begins.

        Warns:
            PlasticityWarning: If an average over training steps will keep what is replaced.
        """
        self.end_fit()
        repairs, running = ([self._name(i) for i in interventions] for interventions in (self._repairs, self._running))
        averages = dict.fromkeys(weight_averages(trainer), repairs + running)
        averages |= {remedy.name: repairs for remedy in self._running if isinstance(remedy, HareTortoise)}
        for average, replacing in averages.items():
            if replacing:
                rank_zero_warn(
                    f"{average} averages weights over training steps, and {' and '.join(replacing)} changes weights "
                    "between two of them: what is replaced while it averages keeps a share in the average, which the "
                    "module is given later. Leave out one of the two",
                    category=PlasticityWarning,
                )
        self._ready = []
        self._ready_for.clear()
        self._said_left_out = False
        by_hand = not trainer.lightning_module.automatic_optimization
        needs_steps = bool(self._running)
        listens = needs_steps or (bool(self._regularizers) and by_hand)
        self._counts.begin(trainer.optimizers, listens=listens, needs_steps=needs_steps)

    def end_fit(self) -> None:
        """Leaves nothing in the module and the optimizers."""
        self._counts.track([])
        for intervention in self._all:
            try:
                intervention.stop()
            except Exception as error:  # another error, or the end of the run, is not to be hidden by it
                self._fail(intervention, "could not be stopped", error)

    def track(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """A batch begins, to be trained on by these optimizers: there may be new ones since the last."""
        self._counts.track(optimizers)

    def dry_run(self, at: ProbeContext) -> None:
        """Tries the repairs on copies: one that cannot work is an error now, not at a collapse."""
        with preserve_schedulers(at.trainer):
            for repair in self._repairs:
                generator = torch.Generator().manual_seed(0)
                _report_of(repair, repair.repair(at.copy(), forward=at.loss, loss=at.loss, generator=generator))

    def needs_restart(self, trainer: Trainer) -> bool:
        """Whether something is trained that was not there, or frozen, when they started the last time."""
        return bool(self._running or self._regularizers) and not _trained(trainer) <= self._ready_for

    def start(self, at: ProbeContext) -> None:
        """Gets what runs along ready: before the first batch of every fit and task, and where :meth:`outgrown`."""
        self._ready = []
        self._ready_for = _trained(at.trainer)
        for intervention in self._all:
            if isinstance(intervention, Repair):
                continue
            try:
                with all_or_none(), preserve_schedulers(at.trainer):
                    intervention.start(at.module, forward=at.loss, make_copy=at.copy)
                self._ready.append(intervention)
            except Exception as error:
                if not self._have_worked:
                    raise_local_error(error)
                self._fail(intervention, "could not get ready for this task and rests", error)
                _sync_state([intervention])
        self._have_worked = self._have_worked or self._rehearse_regularizers(at)

    def at_task(self, at: ProbeContext, task: int, step: int, *, collapsed: bool) -> list[RepairReport]:
        """The repairs that are due at the start of a task."""
        due = [
            number
            for number, repair in enumerate(self._repairs)
            if (repair.when == "collapse" and collapsed) or (repair.when == "task" and task > 0)
        ]
        return self._repair(at, due, step, seed=1000 * task)

    def before_backward(self) -> None:
        """Gradients are about to be added to. Passes whose gradients were dropped, without a step, do not count."""
        if self._regularizers:
            self._counts.before_backward()

    def after_backward(self) -> None:
        """Gradients were added to."""
        self._counts.after_backward()

    def add_gradients(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> dict[str, Tensor]:
        """Adds the regularizers' gradients to those of one optimizer's parameters, before its step.

        As if the terms stood in ``training_step``: of a window of gradient accumulation of which only some batches had
        a loss, they get that share; they are clipped with the rest, where the Trainer clips.

        Returns:
            The value of each term.
        """
        passes = self._counts.before_step(optimizer)
        if not self._regularizers:
            return {}
        regularizers = [ready for ready in self._ready if isinstance(ready, Regularizer)]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not module.automatic_optimization and not self._counts.backward_passes:
            passes = 1  # by loss.backward() rather than manual_backward: nobody is told of those
        # No loss at all, an epoch that only updates batch norms, all frozen, or no optimizer at all.
        if not (regularizers and passes and any_grad(parameters)):
            return {}
        share = passes / trainer.accumulate_grad_batches if module.automatic_optimization else 1.0
        terms: dict[str, Tensor] = {}
        totals: list[Tensor | None] = [None] * len(parameters)
        failed: list[tuple[Regularizer, Exception]] = []
        try:
            with gather_full_parameters(module) as wholes:
                of_wholes = [wholes.get(parameter, parameter) for parameter in parameters]
                for regularizer in regularizers:
                    try:
                        with all_or_none():
                            term, gradients = _term_and_gradients(regularizer, module, of_wholes)
                    except Exception as error:
                        failed.append((regularizer, error))
                        continue
                    terms[f"{self._name(regularizer)}/penalty"] = term.detach()
                    totals = [_sum(total, gradient) for total, gradient in zip(totals, gradients, strict=True)]
        except Exception as error:  # no weights to take a term of
            failed = [(regularizer, error) for regularizer in regularizers]
        for regularizer, reason in failed:
            if not self._have_worked:
                raise_local_error(reason)
            self._fail(regularizer, "failed and was left out of this step", reason)
        _sync_state([regularizer for regularizer, _ in failed])
        self._have_worked = True
        factor = share * gradient_scale(trainer, optimizer)
        for parameter, gradient in zip(parameters, totals, strict=True):
            if gradient is None:
                continue
            share_of_gradient = sharded_like(parameter, gradient.detach())
            if parameter.grad is None:
                parameter.grad = (factor * share_of_gradient).to(parameter.dtype)
            elif parameter.grad.is_sparse:  # of nn.Embedding(sparse=True): nothing dense can be added in place
                parameter.grad = (factor * share_of_gradient + parameter.grad).to(parameter.dtype)
            else:
                parameter.grad.add_(share_of_gradient, alpha=factor)
        return terms

    def after_batch(self, at: ProbeContext, step_before: int, step: int) -> tuple[list[RepairReport], dict[str, float]]:
        """What is due after the optimizer steps of a batch.

        Args:
            at: The batch.
            step_before: The number of optimizer steps, over all fits, before the batch.
            step: The number after it.

        Returns:
            The repairs that were done, and numbers to log of what runs along.
        """
        numbers: dict[str, float] = {}
        steps, by_hand = self._counts.pop_steps()
        if by_hand is not None:
            self._say_left_out(by_hand)
        if steps:
            for remedy in (ready for ready in self._ready if isinstance(ready, StepIntervention)):
                act = partial(remedy.after_step, at.module, at.trainer.optimizers)
                report = self._survived(remedy, at, act, weights=list(at.module.parameters()))
                if report is not None and report.units:
                    numbers[f"{self._name(remedy)}/units"] = float(sum(len(units) for units in report.units.values()))
        due = [
            number
            for number, repair in enumerate(self._repairs)
            if isinstance(repair.when, int) and step // repair.when > step_before // repair.when
        ]
        if due:
            at = at.joined(_SAMPLES)
        return self._repair(at, due, step, seed=2**32 + 1000 * step), numbers

    def state_dict(self) -> list[dict[str, Any]]:
        """What a checkpoint must hold."""
        return [{"name": intervention.name, "state": intervention.state_dict()} for intervention in self._all]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """The inverse of :meth:`state_dict`."""
        before, now = [state["name"] for state in states], [intervention.name for intervention in self._all]
        if before != now:
            if any(state["state"] for state in states):
                message = f"the checkpoint was written with interventions {before}, now they are {now}: they begin anew"
                rank_zero_warn(message, category=PlasticityWarning)
            return
        self._have_worked = True
        for intervention, state in zip(self._all, states, strict=True):
            intervention.load_state_dict(state["state"])

    def _rehearse_regularizers(self, at: ProbeContext) -> bool:
        """Tries copies of the regularizers on a copy: returns whether it could be done, raises if they cannot work."""
        if not self._regularizers:
            return True
        try:
            with all_or_none():
                regularizers = copy.deepcopy(self._regularizers)
        except Exception:  # it would remember the trial; the first step will tell
            return False
        try:
            with all_or_none(), isolated_rng():
                module = at.copy()
                parameters = [p for p in module.parameters() if p.requires_grad]
                for regularizer in regularizers:
                    _term_and_gradients(regularizer, module, parameters)
        except Exception as error:
            raise_local_error(error)
        return True

    def _repair(self, at: ProbeContext, due: Sequence[int], step: int, seed: int) -> list[RepairReport]:
        reports = []
        for number in due:
            repair, generator = self._repairs[number], torch.Generator().manual_seed(seed + number)
            act = partial(repair.repair, at.module, optimizers=at.trainer.optimizers, loss=at.loss, generator=generator)
            report = self._survived(repair, at, act)
            if report is not None:
                reports.append(dataclasses.replace(report, name=self._name(repair), step=step))
        return reports

    def _name(self, intervention: Intervention) -> str:
        """Its name in logs and reports: numbered from the second of a name on."""
        alike = [other for other in self._all if other.name == intervention.name]
        number = next(number for number, other in enumerate(alike, start=1) if other is intervention)
        return intervention.name if number == 1 else f"{intervention.name}_{number}"

    def _fail(self, intervention: Intervention, what: str, error: Exception | str) -> None:
        name = self._name(intervention)
        self._errors.record(name, f"{name} {what}", error)

    def _say_left_out(self, optimizer: torch.optim.Optimizer) -> None:
        if self._said_left_out:
            return
        self._said_left_out = True
        reason = (
            f"{type(optimizer).__name__} was stepped without Lightning, as with use_pl_optimizer=False: step what "
            "self.optimizers() returns"
        )
        for regularizer in self._regularizers:
            self._fail(regularizer, "is left out of steps", reason)

    def _survived(
        self,
        intervention: Intervention,
        at: ProbeContext,
        act: Callable[..., object],
        weights: Sequence[Tensor] = (),
    ) -> RepairReport | None:
        try:
            with all_or_none(), preserve_schedulers(at.trainer):
                return _report_of(intervention, act(forward=at.loss, make_copy=at.copy))
        except Exception as error:
            self._fail(intervention, "failed and changed nothing", error)
            _sync_state([intervention], weights)
            return None


def _trained(trainer: Trainer) -> set[_Trained]:
    parameters = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    return {(place, p.shape) for place, p in enumerate(parameters) if p.requires_grad}


def _report_of(intervention: Intervention, returned: object) -> RepairReport | None:
    """What an intervention has returned, if it is what it has to return: others' code is not checked before it runs."""
    if isinstance(returned, RepairReport):
        return returned
    if isinstance(intervention, Repair):
        raise TypeError(f"{intervention.name}.repair must return a RepairReport, not {type(returned).__name__}")
    if returned is not None:
        kind = type(returned).__name__
        raise TypeError(f"{intervention.name}.after_step must return a RepairReport or None, not {kind}")
    return None


def _sync_state(interventions: Sequence[Intervention], weights: Sequence[Tensor] = ()) -> None:
    """After a failure, which one process may have had alone: all have what the first remembers, and its weights.

    One that is half way may have changed its state, or, if it works in place, weights. What differs would grow apart.
    """
    if not is_distributed() or not interventions:
        return
    with all_or_none():
        for intervention in interventions:
            state = apply_to_collection(intervention.state_dict(), Tensor, Tensor.cpu)  # as in a checkpoint
            intervention.load_state_dict(broadcast_object(state))
        sync_errors()
        for tensor in weights:
            torch.distributed.broadcast(tensor.detach(), 0)


def _term_and_gradients(
    regularizer: Regularizer, module: LightningModule, parameters: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    with torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
        term: object = regularizer.penalty(module)
        if not isinstance(term, Tensor) or term.numel() != 1:
            kind = f"one of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise TypeError(f"{regularizer.name}.penalty must return a scalar tensor, not {kind}")
        if not term.requires_grad:  # all that it is about is frozen
            return term, [None] * len(parameters)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(term, parameters, allow_unused=True)
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError("a gradient is not finite")
    return term, gradients


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other
