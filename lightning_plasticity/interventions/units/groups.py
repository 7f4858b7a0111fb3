"""Which weights make a unit, on any architecture: the sites where units can be recycled, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module], object]
"""Runs one representative forward pass of the model it is given."""


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """A layer whose units can be recycled: what a unit is drawn from, and who listens to it.

    Entries of tensors are told by their *owner*: an integer tensor that broadcasts to the shape of the parameter or
    buffer, and says of each entry to which unit it belongs; -1 means to none.

    Args:
        layer: Name of the layer that computes the units.
        num_units: How many there are.
        incoming: Owners by name of the tensor: the layer's weight rows and biases, and the entries of norm layers
            (running statistics too), PReLU and depthwise convolutions between the layer and its consumers.
        outgoing: Owners by name of the tensor: the columns of every consumer, several per unit behind a flatten.
        consumers: Owner of each input channel, shape ``(channels,)``, by name of the consumer.
    """

    layer: str
    num_units: int
    incoming: dict[str, Tensor]
    outgoing: dict[str, Tensor]
    consumers: dict[str, Tensor]


def unit_mask(owner: Tensor, units: Tensor, shape: torch.Size) -> Tensor:
    """Which entries of a tensor belong to the given units: a boolean tensor of that shape."""
    return torch.isin(owner, units).expand(shape)


def unit_indices(owner: Tensor, units: Tensor, shape: torch.Size) -> Tensor:
    """The same as positions in the flattened tensor, without a look at all the others."""
    strides = [shape[d + 1 :].numel() for d in range(len(shape))]
    flat = (torch.isin(owner, units).nonzero() * torch.tensor(strides)).sum(1)
    for size, own, stride in zip(shape, owner.shape, strides, strict=True):
        if own == 1:
            flat = (flat[:, None] + stride * torch.arange(size)).flatten()
    return flat


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a model; prints as a table.

    Args:
        groups: What can be recycled, by name of the layer.
        excluded: The reason why not, by name of the layer or parameter.
    """

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("layer", "units", "drawn anew", "set to zero")]
        for layer, site in self.groups.items():
            rows.append((layer or "(model)", str(site.num_units), ", ".join(site.incoming), ", ".join(site.outgoing)))
        rows += [(layer or "(model)", "–", reason, "") for layer, reason in self.excluded.items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        drawn = max([len(row[2]) for row in rows if row[3]])
        return "\n".join(
            f"{layer:<{widths[0]}}  {units:>{widths[1]}}  {first:<{drawn}}  {second}".rstrip()
            for layer, units, first, second in rows
        )


def describe_units(model: nn.Module, forward: Forward) -> Units:
    """Which units of a model can be recycled, what is reset with each, and why the others are left out.

    A unit is an output of a linear layer or a channel of a convolution: a row of the layer's weight and its bias, its
    entries in norm layers, and the columns of *all* layers that read it. Who reads it is taken from the dependency
    graph of torch-pruning, and then put to the test on random weights. A layer is a site only if

    * with the outgoing columns of some units at zero, no change of their incoming weights changes any bit of what
      ``forward`` returns (nobody else listens), and
    * such a change moves the consumers' inputs in the columns of these units and nowhere else (no norm layer mixes
      them, and the columns are the right ones), and
    * with their incoming weights at zero, these columns are the same for every sample (they carry nothing else).

    So recycling units that are dead, those whose columns are zero on all data, leaves the output of the network as it
    is, to the last bit. Left out are therefore the logits; residual streams and gates, whose units are shared by
    several layers; layers read by a LayerNorm or GroupNorm, since their mean over units would change; recurrent and
    attention layers; shared, tied, computed and frozen weights.

    Args:
        model: Any module. It is left as it was: parameters, gradients, buffers, modes, random numbers. (What its
            ``forward`` itself writes to plain attributes is not undone.)
        forward: ``forward(model)`` runs one forward pass, in evaluation mode and with gradients. What it returns, and
            what the model returned in it, is what must stay the same; return the outputs rather than a loss. More than
            one sample is better: it shows what varies.

    Returns:
        The units; ``print`` it.

    Raises:
        ValueError: If no tensor with a graph comes out of ``forward``, or torch-pruning cannot follow the model.

    References:
        The dependency graph: Fang et al. 2023, arXiv 2301.12900.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        >>> print(describe_units(model, forward=lambda model: model(torch.randn(2, 1, 6, 6))))
        layer  units  drawn anew                                                                       set to zero
        0          4  0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean, 1.running_var                4.weight
        4          –  logits: no layer reads it
    """
    from lightning_plasticity.interventions.units.dependency_graph import trace_units  # which needs the classes above

    return trace_units(model, forward)
