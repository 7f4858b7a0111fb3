"""What every intervention is: something that changes the weights of a model, all of it or nothing, and reports it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.optimizer_state import clear, remembered


@dataclass(eq=False)
class RepairReport:
    """What one repair did.

    Args:
        name: Name of the intervention.
        units: The units that were re-initialised, by layer name; empty for interventions that do not work by units.
        num_parameters_changed: Number of entries of parameters with a new value.
    """

    name: str
    units: dict[str, Tensor] = field(default_factory=dict)
    num_parameters_changed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python and tensors, for checkpoints."""
        return {"name": self.name, "units": dict(self.units), "num_parameters_changed": self.num_parameters_changed}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> RepairReport:
        """The inverse of :meth:`to_dict`."""
        return cls(**state)


@dataclass(frozen=True)
class Request:
    """What an intervention has to go by; see :meth:`Intervention.repair`."""

    forward: Callable[[nn.Module], object] | None
    loss: Callable[[nn.Module], Tensor] | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Changes:
    """What an intervention wants to do to a model.

    Args:
        values: New value of each parameter and buffer, same shape, by the old tensor.
        renewed: Which entries of a parameter are new, and nothing should be remembered of; a parameter that is not
            here is new as a whole, if any of its entries differs.
        units: For the report.
    """

    values: dict[Tensor, Tensor]
    renewed: dict[Tensor, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)


class Intervention(ABC):
    """A remedy for lost plasticity. Those to come implement :meth:`changes`."""

    def repair(
        self,
        model: nn.Module,
        *,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        forward: Callable[[nn.Module], object] | None = None,
        loss: Callable[[nn.Module], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> RepairReport:
        """Changes the model in place, all of it or nothing, and clears what the optimizers remember of the old weights.

        To be called between an optimizer step and the next backward pass: gradients are left as they are.

        Args:
            model: The model to repair. Its parameters stay the same objects.
            optimizers: The optimizers that hold its parameters.
            forward: Runs one representative forward pass and returns the outputs, for remedies that need activations.
            loss: Returns a loss with a graph, for remedies that need gradients.
            generator: Source of the random numbers (a CPU generator); by default one seeded from torch's global one.
        """
        changes = self.changes(model, Request(forward, loss, generator))
        return apply(type(self).__name__, changes, optimizers)

    @abstractmethod
    def changes(self, model: nn.Module, request: Request) -> Changes:
        """Says what to change, and changes nothing."""


def apply(name: str, changes: Changes, optimizers: Sequence[torch.optim.Optimizer]) -> RepairReport:
    """Gives parameters and buffers new values in place, and clears the optimizers' state for what is new.

    If anything fails on the way, everything is put back as it was.

    Args:
        name: Name of the intervention, for the report.
        changes: What to do.
        optimizers: The optimizers that may hold state for the parameters.
    """
    new_values = {old: new.to(old) for old, new in changes.values.items()}
    different = {old: new for old, new in new_values.items() if not torch.equal(new, old)}
    renewed: dict[nn.Parameter, Tensor | None] = {
        old: mask.to(old.device) if (mask := changes.renewed.get(old)) is not None else None
        for old in new_values
        if isinstance(old, nn.Parameter) and (old in different or old in changes.renewed)
    }
    count = sum(int((new != old).sum()) for old, new in different.items() if isinstance(old, nn.Parameter))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored_on_error(list(different)))
        for optimizer in optimizers:
            stack.enter_context(remembered(optimizer, renewed))
        with torch.no_grad():
            for old, new in different.items():
                old.copy_(new)
        for optimizer in optimizers:
            clear(optimizer, renewed)
    return RepairReport(name, changes.units, count)


@contextlib.contextmanager
def _restored_on_error(tensors: Sequence[Tensor]) -> Iterator[None]:
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        raise
