"""What interventions are, in three kinds: repairs at once, remedies that run along, and terms added to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import as_float, is_int
from lightning_plasticity.interventions.weights.updates import RepairReport, WeightUpdate, apply_update

When = int | str
"""When the callback repairs: ``"collapse"``, ``"task"`` (at the start of every task but the first), or every so many
optimizer steps."""


Loss = Callable[[nn.Module], Tensor]
"""Returns a loss with a graph."""


@dataclass(frozen=True)
class Request:
    """What a repair has to go by; see :meth:`Repair.repair`. ``loss`` is the mean of ``losses``."""

    forward: Callable[[nn.Module], object] | None = None
    loss: Loss | None = None
    generator: torch.Generator | None = None
    losses: Sequence[Loss] = ()


class Intervention:
    """A remedy for lost plasticity: a :class:`Repair`, a :class:`StepIntervention` or a :class:`Regularizer`."""

    @property
    def name(self) -> str:
        """Its name in reports, logs and messages."""
        return type(self).__name__

    def _check_count(self, **argument: int) -> None:
        for name, value in argument.items():
            if not is_int(value) or value < 1:
                raise ValueError(f"{self.name}({name}={value!r}) must be a whole number, at least 1")

    def _check_switch(self, **argument: bool) -> None:
        for name, value in argument.items():
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}({name}={value!r}) must be True or False")

    def start(
        self,
        model: nn.Module,
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Gets ready: remembers initial weights, finds units, attaches hooks.

        Before the first training step, and again after :meth:`stop`, :meth:`load_state_dict` or a change of the model
        or of how it runs, such as another head for the next task: what is remembered already stays.

        Args:
            model: The model. It is not changed.
            forward: Runs one representative forward pass and returns the outputs, for remedies that work by units.
            make_copy: As in :meth:`Repair.repair`.
        """

    def stop(self) -> None:
        """Takes the hooks away, if any. What is remembered stays."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as plain Python and tensors, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


class Repair(Intervention, ABC):
    """An intervention that acts at once. Those to come implement :meth:`changes`.

    Args:
        when: When the callback does it: ``"collapse"``, when it announces one; ``"task"``, at the start of every task
            but the first; or a number ``n``, every ``n`` optimizer steps. Without effect on :meth:`repair`.

    Raises:
        ValueError: If ``when`` is something else, or makes no sense for this repair.
    """

    occasions: ClassVar[tuple[str, ...]] = ("collapse", "task", "steps")
    """The kinds of ``when`` that make sense for it; ``"steps"`` stands for a number."""

    def __init__(self, when: When = "collapse") -> None:
        if is_int(when):
            makes_sense = "steps" in self.occasions and when > 0
        else:
            makes_sense = when in self.occasions and when != "steps"
        if not makes_sense:
            number = "a number of optimizer steps, at least 1"
            choices = [number if occasion == "steps" else repr(occasion) for occasion in self.occasions]
            raise ValueError(f"{self.name}(when={when!r}) must be {' or '.join(choices)}")
        self.when = when

    def repair(
        self,
        model: nn.Module,
        *,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        forward: Callable[[nn.Module], object] | None = None,
        loss: Loss | Sequence[Loss] | None = None,
        generator: torch.Generator | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> RepairReport:
        """Changes the model in place, all of it or nothing, and clears what the optimizers remember of the old weights.

        To be called between an optimizer step and the next backward pass: gradients are left as they are.

        Args:
            model: The model to repair. Its parameters stay the same objects.
            optimizers: The optimizers that hold its parameters.
            forward: Runs one representative forward pass and returns the outputs, for remedies that need activations.
            loss: Returns a loss with a graph, for remedies that need gradients; or several, one for each mini-batch,
                for those that look at mini-batches one by one. Others take the mean.
            generator: Source of the random numbers (a CPU generator); by default one seeded from torch's global one.
            make_copy: Makes a copy of the model to run ``forward`` and ``loss`` on, where running the model itself
                would leave traces, such as counters or logged values. By default the model is run.
        """
        stage = model if make_copy is None else make_copy()
        losses = [loss] if callable(loss) else list(loss or ())
        changes = self.changes(stage, Request(forward, _mean(losses), generator, losses))
        return apply_update(self.name, changes if stage is model else changes.on(model, stage), optimizers)

    @abstractmethod
    def changes(self, model: nn.Module, request: Request) -> WeightUpdate:
        """Says what to change, and changes nothing."""


def _mean(losses: Sequence[Loss]) -> Loss | None:
    if len(losses) < 2:
        return losses[0] if losses else None
    return lambda model: torch.stack([loss(model) for loss in losses]).mean()


class StepIntervention(Intervention, ABC):
    """An intervention that acts after every optimizer step. Those to come implement :meth:`after_step`.

    In a plain loop::

        remedy.start(model, forward=lambda model: model(inputs))
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            remedy.after_step(model, optimizers=[optimizer], forward=lambda model: model(inputs))
        remedy.stop()
    """

    @abstractmethod
    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> RepairReport | None:
        """Acts, after an optimizer step that was really taken.

        Args:
            model: The model that was trained.
            optimizers: The optimizers that hold its parameters.
            forward: Runs the model on the batch of the step, for remedies that need more of it than hooks see.
            make_copy: As in :meth:`Repair.repair`.

        Returns:
            What was re-initialised; ``None`` if nothing was.

        Raises:
            RuntimeError: If something has to be remembered of the model, and :meth:`start` was not called.
        """

    def _require_start(self, needed: Iterable[str], remembered: Container[str]) -> None:
        missing = [name for name in needed if name not in remembered]
        if missing:
            raise RuntimeError(
                f"{self.name} remembers nothing of {missing}: call start(model) before the first training step, and "
                "again when the model has changed"
            )


class Regularizer(Intervention, ABC):
    """A term that is added to the loss. Those to come implement :meth:`penalty`.

    In a plain loop::

        regularizer.start(model)
        for inputs, targets in batches:
            (loss_fn(model(inputs), targets) + regularizer.penalty(model)).backward()

    Args:
        coefficient: Factor of the term.

    Raises:
        ValueError: If ``coefficient`` is negative or not finite.
    """

    def __init__(self, coefficient: float) -> None:
        if not 0 <= as_float(coefficient) < float("inf"):
            raise ValueError(f"{self.name}(coefficient={coefficient!r}) must be a finite number, at least 0")
        self.coefficient = coefficient

    @abstractmethod
    def penalty(self, model: nn.Module) -> Tensor:
        """The term, coefficient included: a scalar with a graph."""
