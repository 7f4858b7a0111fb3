"""Recycling: units drawn anew from their layer's own initialisation, unheard until they have learned something."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.changes import Changes, tensors_of
from lightning_plasticity.interventions.initialization import fresh_values, resampled_values
from lightning_plasticity.interventions.units import Units, entries


def recycling(
    model: nn.Module,
    units: Units,
    chosen: Mapping[str, Tensor],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None = None,
) -> Changes:
    """What it takes to recycle units: first all incoming entries are drawn anew, then all outgoing ones become zero.

    In that order, so that the zeros win where the columns of one unit cross the row of another.

    Args:
        model: The model.
        units: Its units.
        chosen: The units to recycle, ``(count,)``, by name of the layer; layers without any may be there.
        generator: A CPU generator; by default one seeded from torch's global one.
        initial: Initial parameters and buffers by name, to draw from; by default each layer's ``reset_parameters``.

    Raises:
        ValueError: If a layer has no site, or a unit is not there.
    """
    for layer, some in chosen.items():
        if layer not in units.sites:
            reason = units.left_out.get(layer, "it is no layer of the model with units")
            raise ValueError(f"units of {layer!r} cannot be recycled: {reason}")
        size = units.sites[layer].num_units
        if len(some) and not 0 <= int(some.min()) <= int(some.max()) < size:
            raise ValueError(f"units {some.tolist()} of {layer!r} must be in 0 ... {size - 1}")
    chosen = {layer: some.cpu() for layer, some in chosen.items() if len(some)}
    tensors = tensors_of(model)
    chosen_sites = [(units.sites[layer], some) for layer, some in chosen.items()]
    incoming = [(name, owner, some) for site, some in chosen_sites for name, owner in site.incoming.items()]
    outgoing = [(name, owner, some) for site, some in chosen_sites for name, owner in site.outgoing.items()]
    fresh = _drawn(model, {name: tensors[name] for name, _, _ in incoming}, generator, initial)
    values: dict[Tensor, Tensor] = {}
    renewed: dict[Tensor, Tensor] = {}
    for kind in (incoming, outgoing):
        for name, owner, some in kind:
            old = tensors[name]
            mask = entries(owner, some, old.shape)
            now = values.get(old, old.detach())
            new = fresh[old].to(now) if kind is incoming else torch.zeros_like(now)
            values[old] = torch.where(mask.to(now.device), new, now)
            renewed[old] = mask | renewed[old] if old in renewed else mask
    return Changes(values, renewed, chosen)


def _drawn(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None,
) -> dict[Tensor, Tensor]:
    if not tensors:
        return {}
    if initial is not None:
        return resampled_values(tensors, initial, generator)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return fresh_values(model, {name: model.get_submodule(name) for name in names}, generator)
