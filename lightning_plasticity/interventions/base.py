"""What every intervention is: something that changes the weights of a model, all of it or nothing, and reports it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.optimizer_state import plan_clearing


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


class Intervention(ABC):
    """A remedy for lost plasticity."""

    @abstractmethod
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

        Args:
            model: The model to repair. Its parameters stay the same objects.
            optimizers: The optimizers that hold its parameters.
            forward: Runs one representative forward pass, for remedies that need activations.
            loss: Returns a loss with a graph, for remedies that need gradients.
            generator: Source of the random numbers (a CPU generator); by default one seeded from torch's global one.
        """


def replace_tensors(
    name: str,
    new_values: Mapping[Tensor, Tensor] | Mapping[nn.Parameter, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> RepairReport:
    """Gives parameters and buffers new values in place, and clears the optimizers' state for those that changed.

    Everything that can fail is done before the first value is written.

    Args:
        name: Name of the intervention, for the report.
        new_values: New value of each tensor, same shape.
        optimizers: The optimizers that may hold state for them.
    """
    changed = {old: new.to(old) for old, new in new_values.items() if not torch.equal(new.to(old), old)}
    parameters = [tensor for tensor in changed if isinstance(tensor, nn.Parameter)]
    clear = [action for optimizer in optimizers for action in plan_clearing(optimizer, parameters)]
    count = sum(int((new != old).sum()) for old, new in changed.items() if isinstance(old, nn.Parameter))
    with torch.no_grad():
        for old, new in changed.items():
            old.copy_(new)
    for action in clear:
        action()
    return RepairReport(name, num_parameters_changed=count)
