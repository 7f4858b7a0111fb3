"""Represent the hidden units of a model: the entries of its parameters and buffers that belong to each unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module], object]
"""Runs one representative forward pass of the model it is given."""


class NotResettableError(Exception):
    """The units of a layer cannot be reset one by one; the message is the reason in :attr:`Units.excluded`."""


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """The resettable units of one layer.

    A *unit index* is an integer tensor that broadcasts to the shape of a parameter or buffer and maps each entry to the
    unit that it belongs to, -1 for entries of no unit.

    Args:
        layer: Name of the layer that computes the units.
        num_units: Number of units.
        incoming: Unit index of each tensor that computes the units, by name: the layer's weight rows and biases, and
            the entries of norm layers (running statistics too), PReLU and depthwise convolutions between the layer and
            its consumers.
        outgoing: Unit index of the weight of each consumer, by name: a unit has one column, behind a flatten several.
        consumers: Unit index of the input channels, ``(channels,)``, of each layer that reads the units, by name.
    """

    layer: str
    num_units: int
    incoming: dict[str, Tensor]
    outgoing: dict[str, Tensor]
    consumers: dict[str, Tensor]


def unit_mask(unit_index: Tensor, units: Tensor, shape: torch.Size) -> Tensor:
    """Return the entries of a tensor that belong to the given units, as a boolean tensor of the given shape."""
    return torch.isin(unit_index, units).expand(shape)


def unit_indices(unit_index: Tensor, units: Tensor, shape: torch.Size) -> Tensor:
    """Return the entries of a tensor that belong to the given units, as indices into the flattened tensor.

    The cost is proportional to the size of ``unit_index`` and to the number of entries, not to the size of the tensor.
    """
    strides = [shape[dim + 1 :].numel() for dim in range(len(shape))]
    flat = (torch.isin(unit_index, units).nonzero() * torch.tensor(strides)).sum(1)
    for size, index_size, stride in zip(shape, unit_index.shape, strides, strict=True):
        if index_size == 1:
            flat = (flat[:, None] + stride * torch.arange(size)).flatten()
    return flat


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a model; ``print`` shows them as a table.

    Args:
        groups: The resettable units of each layer, by name of the layer.
        excluded: The reason why units cannot be reset, by name of the layer or parameter.
    """

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "units", "drawn anew", "set to zero")]
        for layer, group in self.groups.items():
            incoming, outgoing = ", ".join(group.incoming), ", ".join(group.outgoing)
            rows.append((layer or "(model)", str(group.num_units), incoming, outgoing))
        rows += [(layer or "(model)", "–", reason, "") for layer, reason in self.excluded.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        # Reasons have the rest of the line to themselves and do not widen the third column.
        incoming_width = max(len(row[2]) for row in rows if row[3])
        return "\n".join(
            f"{layer:<{widths[0]}}  {units:>{widths[1]}}  {incoming:<{incoming_width}}  {outgoing}".rstrip()
            for layer, units, incoming, outgoing in rows
        )
