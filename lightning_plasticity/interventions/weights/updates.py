"""Describe a change of a model's weights, and apply it completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.distributed.agreement import sync_errors
from lightning_plasticity.interventions.weights.optimizer_state import reset_state, rollback_on_error
from lightning_plasticity.interventions.weights.positions import unravel_index
from lightning_plasticity.isolation.weights import named_tensors

_Value = TypeVar("_Value")


@dataclass(eq=False)
class RepairReport:
    """The result of one repair.

    Args:
        name: Name of the intervention.
        units: The units that were re-initialised, by layer name; empty for interventions that do not work by units.
        num_parameters_changed: Number of entries of parameters with a new value.
        step: Optimizer steps taken before it, over all fits; ``None`` outside of the callback.
        undone: Whether it was undone, since the numbers of the task were worse after it.
        candidates: Number of units that could have been re-initialised; ``None`` for interventions that do not work by
            units.
        skipped: Why layers were left out, by name of the layer.

    Example:
        >>> print(RepairReport("ReDo", {"0": torch.tensor([3])}, 12, candidates=8, skipped={"2": "logits"}))
        ReDo: 1 of 8 units in '0' (1), 12 parameters changed; 1 layer left out
    """

    name: str
    units: dict[str, Tensor] = field(default_factory=dict)
    num_parameters_changed: int = 0
    step: int | None = None
    undone: bool = False
    candidates: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @override
    def __str__(self) -> str:
        """Return a line for the log."""
        counts = {layer: len(units) for layer, units in self.units.items()}
        parts = [] if self.candidates is None else [f"{sum(counts.values())} of {self.candidates} units"]
        if counts:
            parts[-1:] = [" ".join([*parts, "in", ", ".join(f"{layer!r} ({n})" for layer, n in counts.items())])]
        parts.append(f"{self.num_parameters_changed} parameters changed")
        left_out = f"; {len(self.skipped)} layer{'s' * (len(self.skipped) > 1)} left out" if self.skipped else ""
        return f"{self.name}: {', '.join(parts)}{left_out}"

    def numbers(self) -> dict[str, float]:
        """Return what is logged of it: ``<name>/units``, or ``<name>/parameters`` where it does not work by units."""
        if self.candidates is None and not self.units:
            return {f"{self.name}/parameters": float(self.num_parameters_changed)}
        return {f"{self.name}/units": float(sum(map(len, self.units.values())))}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python and tensors, for checkpoints."""
        return {**vars(self), "units": dict(self.units), "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> RepairReport:
        """Build a report from what :meth:`to_dict` returned."""
        return cls(**state)


@dataclass(frozen=True, eq=False)
class SparseUpdate:
    """New values of some entries of a tensor.

    Args:
        positions: Indices of the entries in the flattened tensor.
        values: The new values, one for each position.
        reset_state_mask: The positions whose optimizer state is reset, as a boolean mask; by default all.
    """

    positions: Tensor
    values: Tensor
    reset_state_mask: Tensor | None = None


@dataclass(frozen=True)
class WeightUpdate:
    """New values of a model's parameters and buffers.

    Args:
        values: New value of each parameter and buffer, same shape, by the old tensor.
        reset_state_mask: The entries of a parameter whose optimizer state is reset, as a boolean mask. A parameter that
            is not here is reset as a whole, if any of its entries changes.
        units: The units that are re-initialised, by layer name, for the report.
        parts: New values of few entries of a tensor that is not in ``values``; the work is in proportion to their
            number.
        candidates: Number of units that could be re-initialised; ``None`` for updates that do not work by units.
        skipped: Why layers were left out, by name of the layer, for the report.
    """

    values: dict[Tensor, Tensor]
    reset_state_mask: dict[Tensor, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[Tensor, SparseUpdate] = field(default_factory=dict)
    candidates: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def has_no_target(self) -> bool:
        """Whether there was nothing in the model that the update could have changed."""
        return not (self.values or self.parts) if self.candidates is None else not self.candidates

    def transfer(self, *, source: nn.Module, target: nn.Module) -> WeightUpdate:
        """Return the same update for another model, where this one was computed on a copy of it."""
        targets = dict(zip(named_tensors(source).values(), named_tensors(target).values(), strict=True))

        def rekey(by_tensor: Mapping[Tensor, _Value]) -> dict[Tensor, _Value]:
            return {targets[tensor]: value for tensor, value in by_tensor.items()}

        return replace(
            self,
            values=rekey(self.values),
            reset_state_mask=rekey(self.reset_state_mask),
            parts=rekey(self.parts),
        )

    def followed_by(self, follower: nn.Module, leader: nn.Module) -> WeightUpdate:
        """Return this update, and one of a module to the parameters and buffers that another has after it.

        An update without values is returned as it is.

        Args:
            follower: The module that is copied to.
            leader: The module that is copied.

        Raises:
            ValueError: If the parameters and buffers of both have not the same names and shapes.
        """
        if not self.values and not self.parts:
            return self
        copies, originals = named_tensors(follower), named_tensors(leader)
        if {n: t.shape for n, t in copies.items()} != {n: t.shape for n, t in originals.items()}:
            raise ValueError(
                f"a {type(follower).__name__} cannot follow a {type(leader).__name__}: their parameters and buffers "
                "differ in name or shape"
            )
        values = {copies[name]: self._value_of(original) for name, original in originals.items()}
        return replace(self, values={**self.values, **values})

    def _value_of(self, tensor: Tensor) -> Tensor:
        """Return the value of a tensor after the update."""
        if tensor in self.values:
            return self.values[tensor]
        value = tensor.detach()
        if tensor not in self.parts:
            return value
        part = self.parts[tensor]
        return value.flatten().index_copy(0, part.positions.to(value.device), part.values.to(value)).view(value.shape)


def keep_optimizer_state(values: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Return a :attr:`WeightUpdate.reset_state_mask` that keeps all optimizer state of these parameters."""
    return {tensor: torch.zeros(tensor.shape, dtype=torch.bool) for tensor in values}


def apply_update(name: str, update: WeightUpdate, optimizers: Sequence[torch.optim.Optimizer]) -> RepairReport:
    """Write new values into parameters and buffers in place, and reset the optimizer state of re-initialised entries.

    An error restores all weights and all optimizer state; inside
    :func:`~lightning_plasticity.distributed.agreement.all_or_none` an error on another rank does, too.

    Args:
        name: Name of the intervention, for the report.
        update: The new values.
        optimizers: The optimizers that may hold state for the parameters.

    Raises:
        ValueError: If new values have another shape than the old ones.
    """
    for old, new in update.values.items():
        if new.shape != old.shape:
            raise ValueError(f"{name}: new values have shape {tuple(new.shape)}, expected {tuple(old.shape)}")
    new_values = {old: new.to(old) for old, new in update.values.items()}
    counts = {old: int((new != old).count_nonzero()) for old, new in new_values.items()}
    changed_values = {old: new for old, new in new_values.items() if counts[old]}
    indices = {old: unravel_index(part.positions.to(old.device), old.shape) for old, part in update.parts.items()}
    for old, part in update.parts.items():
        counts[old] = int((old.detach()[indices[old]] != part.values.to(old)).count_nonzero())
    entries_to_reset = _entries_to_reset(update, changed_values)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restore_on_error({**dict.fromkeys(changed_values), **indices}))
        for optimizer in optimizers:
            stack.enter_context(rollback_on_error(optimizer, entries_to_reset))
        with torch.no_grad():
            for old, new in changed_values.items():
                old.copy_(new)
            for old, part in update.parts.items():
                old[indices[old]] = part.values.to(old)
        for optimizer in optimizers:
            reset_state(optimizer, entries_to_reset)
        sync_errors()
    count = sum(number for old, number in counts.items() if isinstance(old, nn.Parameter))
    return RepairReport(name, update.units, count, candidates=update.candidates, skipped=update.skipped)


def _entries_to_reset(
    update: WeightUpdate, changed_values: Mapping[Tensor, Tensor]
) -> dict[nn.Parameter, Tensor | None]:
    """Return what to reset of each parameter's optimizer state: a mask, flat positions, or ``None`` for all of it."""
    entries: dict[nn.Parameter, Tensor | None] = {}
    for old in update.values:
        mask = update.reset_state_mask.get(old)
        if isinstance(old, nn.Parameter) and (bool(mask.any()) if mask is not None else old in changed_values):
            entries[old] = None if mask is None else mask.to(old.device)
    for old, part in update.parts.items():
        if isinstance(old, nn.Parameter):
            positions = part.positions if part.reset_state_mask is None else part.positions[part.reset_state_mask]
            entries[old] = positions.to(old.device)
    return entries


@contextlib.contextmanager
def _restore_on_error(indices: Mapping[Tensor, tuple[Tensor, ...] | None]) -> Iterator[None]:
    """Restore the values of tensors on an error: at the given indices, or all of them for ``None``."""
    values = [tensor.detach().clone() if index is None else tensor.detach()[index] for tensor, index in indices.items()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for (tensor, index), value in zip(indices.items(), values, strict=True):
                if index is None:
                    tensor.copy_(value)
                else:
                    tensor[index] = value
        raise
