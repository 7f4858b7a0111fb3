"""Recycling: units drawn anew from their layer's own initialisation, unheard until they have learned something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.groups import Units, unit_indices, unit_mask
from lightning_plasticity.interventions.weights.initialization import fresh_values, resampled_values
from lightning_plasticity.interventions.weights.updates import SparseUpdate, WeightUpdate, tensors_of


def plan_reset(
    model: nn.Module,
    units: Units,
    chosen: Mapping[str, Tensor],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None = None,
) -> WeightUpdate:
    """What it takes to recycle units, with incoming values drawn now: see :func:`plan_reset_from`.

    Args:
        model: The model.
        units: Its units.
        chosen: The units to recycle, ``(count,)``, by name of the layer; layers without any may be there.
        generator: A CPU generator; by default one seeded from torch's global one.
        initial: Initial parameters and buffers by name, to draw from; by default each layer's ``reset_parameters``.

    Raises:
        ValueError: If a layer has no site, or a unit is not there.
    """
    layers = [layer for layer, some in chosen.items() if layer in units.groups and len(some)]
    return plan_reset_from(model, units, chosen, fresh_incoming(model, units, layers, generator, initial))


def fresh_incoming(
    model: nn.Module,
    units: Units,
    layers: Iterable[str],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draws what units are made of, by name of the tensor: whole tensors, for all units of some layers."""
    tensors = tensors_of(model)
    names = dict.fromkeys(name for layer in layers for name in units.groups[layer].incoming)
    if not names:
        return {}
    if initial is not None:
        drawn = resampled_values({name: tensors[name] for name in names}, initial, generator)
    else:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        drawn = fresh_values(model, {name: model.get_submodule(name) for name in modules}, generator)
    return {name: drawn[tensors[name]] for name in names}


def plan_reset_from(
    model: nn.Module, units: Units, chosen: Mapping[str, Tensor], fresh: Mapping[str, Tensor]
) -> WeightUpdate:
    """What it takes to recycle units: first all incoming entries become new, then all outgoing ones become zero.

    In that order, so that the zeros win where the columns of one unit cross the row of another.

    Args:
        model: The model.
        units: Its units.
        chosen: The units to recycle, ``(count,)``, by name of the layer; layers without any may be there.
        fresh: Values of the incoming tensors to take the new entries from, by name.

    Raises:
        ValueError: If a layer has no site, or a unit is not there.
    """
    for layer, some in chosen.items():
        if layer not in units.groups:
            reason = units.excluded.get(layer, "it is no layer of the model with units")
            raise ValueError(f"units of {layer!r} cannot be recycled: {reason}")
        size = units.groups[layer].num_units
        if len(some) and not 0 <= int(some.min()) <= int(some.max()) < size:
            raise ValueError(f"units {some.tolist()} of {layer!r} must be in 0 ... {size - 1}")
    chosen = {layer: some.cpu() for layer, some in chosen.items() if len(some)}
    tensors = tensors_of(model)
    incoming: dict[str, list[tuple[Tensor, Tensor]]] = {}
    outgoing: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer, some in chosen.items():
        for name, owner in units.groups[layer].incoming.items():
            incoming.setdefault(name, []).append((owner, some))
        for name, owner in units.groups[layer].outgoing.items():
            outgoing.setdefault(name, []).append((owner, some))
    parts: dict[Tensor, SparseUpdate] = {}
    for name in {**incoming, **outgoing}:
        shape = tensors[name].shape
        drawn, zeroed = (
            torch.cat(
                [torch.tensor([], dtype=torch.long), *(unit_indices(owner, some, shape) for owner, some in pairs)]
            )
            for pairs in (incoming.get(name, []), outgoing.get(name, []))
        )
        for owner, some in outgoing.get(name, []):
            drawn = drawn[~unit_mask(owner, some, shape)[torch.unravel_index(drawn, shape)]]
        new = fresh[name][torch.unravel_index(drawn, shape)] if len(drawn) else torch.zeros(0)
        parts[tensors[name]] = SparseUpdate(torch.cat([drawn, zeroed]), torch.cat([new, new.new_zeros(len(zeroed))]))
    return WeightUpdate({}, units=chosen, parts=parts)
