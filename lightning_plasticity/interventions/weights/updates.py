"""What an intervention wants to do to a model, and how it is done: all of it, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import sync_errors
from lightning_plasticity.interventions.weights.optimizer_state import reset_state, rollback_on_error

_Value = TypeVar("_Value")


@dataclass(eq=False)
class RepairReport:
    """What one repair did.

    Args:
        name: Name of the intervention.
        units: The units that were re-initialised, by layer name; empty for interventions that do not work by units.
        num_parameters_changed: Number of entries of parameters with a new value.
        step: Optimizer steps taken before it, over all fits; ``None`` outside of the callback.
    """

    name: str
    units: dict[str, Tensor] = field(default_factory=dict)
    num_parameters_changed: int = 0
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python and tensors, for checkpoints."""
        return {**vars(self), "units": dict(self.units)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> RepairReport:
        """The inverse of :meth:`to_dict`."""
        return cls(**state)


@dataclass(frozen=True, eq=False)
class SparseUpdate:
    """New values of some entries of a tensor.

    Args:
        positions: Where they are in the flattened tensor.
        values: The new values, one for each position.
        reset_state_mask: Whether nothing should be remembered of the old ones; by default all.
    """

    positions: Tensor
    values: Tensor
    reset_state_mask: Tensor | None = None


@dataclass(frozen=True)
class WeightUpdate:
    """What an intervention wants to do to a model.

    Args:
        values: New value of each parameter and buffer, same shape, by the old tensor.
        reset_state_mask: Which entries of a parameter are new, and nothing should be remembered of; a parameter that
            is not here is new as a whole, if any of its entries differs. Where no entry is, everything is remembered.
        units: For the report.
        parts: New values of few entries of a tensor that is not in ``values``; the work is in proportion to their
            number.
    """

    values: dict[Tensor, Tensor]
    reset_state_mask: dict[Tensor, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[Tensor, SparseUpdate] = field(default_factory=dict)

    def on(self, model: nn.Module, copy: nn.Module) -> WeightUpdate:
        """The same for a model, of changes that were worked out on a copy of it."""
        twins = dict(zip(tensors_of(copy).values(), tensors_of(model).values(), strict=True))

        def moved(by_tensor: Mapping[Tensor, _Value]) -> dict[Tensor, _Value]:
            return {twins[tensor]: value for tensor, value in by_tensor.items()}

        return WeightUpdate(moved(self.values), moved(self.reset_state_mask), self.units, moved(self.parts))


def keep_optimizer_state(values: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """For :attr:`Changes.reset_state_mask`: the optimizers go on remembering what they know of these parameters."""
    return {tensor: torch.zeros(tensor.shape, dtype=torch.bool) for tensor in values}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def apply_update(name: str, changes: WeightUpdate, optimizers: Sequence[torch.optim.Optimizer]) -> RepairReport:
    """Gives parameters and buffers new values in place, and clears the optimizers' state for what is new.

    If anything fails on the way, everything is put back as it was; inside of
    :func:`~lightning_plasticity.distributed.agreement.all_or_none` also if it fails in another process.

    Args:
        name: Name of the intervention, for the report.
        changes: What to do.
        optimizers: The optimizers that may hold state for the parameters.

    Raises:
        ValueError: If new values have another shape than the old ones.
    """
    for old, new in changes.values.items():
        if new.shape != old.shape:
            raise ValueError(
                f"{name}: a tensor of shape {tuple(old.shape)} was to get values of shape {tuple(new.shape)}"
            )
    new_values = {old: new.to(old) for old, new in changes.values.items()}
    counts = {old: int((new != old).count_nonzero()) for old, new in new_values.items()}
    different = {old: new for old, new in new_values.items() if counts[old]}
    where = {old: torch.unravel_index(part.positions.to(old.device), old.shape) for old, part in changes.parts.items()}
    for old, part in changes.parts.items():
        counts[old] = int((old.detach()[where[old]] != part.values.to(old)).count_nonzero())
    reset_state_mask: dict[nn.Parameter, Tensor | None] = {}
    for old in new_values:
        mask = changes.reset_state_mask.get(old)
        if isinstance(old, nn.Parameter) and (bool(mask.any()) if mask is not None else old in different):
            reset_state_mask[old] = None if mask is None else mask.to(old.device)
    for old, part in changes.parts.items():
        if isinstance(old, nn.Parameter):
            new_positions = part.positions if part.reset_state_mask is None else part.positions[part.reset_state_mask]
            reset_state_mask[old] = new_positions.to(old.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_rollback_on_error({**dict.fromkeys(different), **where}))
        for optimizer in optimizers:
            stack.enter_context(rollback_on_error(optimizer, reset_state_mask))
        with torch.no_grad():
            for old, new in different.items():
                old.copy_(new)
            for old, part in changes.parts.items():
                old[where[old]] = part.values.to(old)
        for optimizer in optimizers:
            reset_state(optimizer, reset_state_mask)
        sync_errors()
    count = sum(number for old, number in counts.items() if isinstance(old, nn.Parameter))
    return RepairReport(name, changes.units, count)


@contextlib.contextmanager
def _rollback_on_error(where: Mapping[Tensor, tuple[Tensor, ...] | None]) -> Iterator[None]:
    """Puts tensors back as they were, as a whole or at the given indices."""
    values = [tensor.detach().clone() if index is None else tensor.detach()[index] for tensor, index in where.items()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for (tensor, index), value in zip(where.items(), values, strict=True):
                if index is None:
                    tensor.copy_(value)
                else:
                    tensor[index] = value
        raise
