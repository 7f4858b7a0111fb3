"""Recycling: units drawn anew from their layer's own initialisation, unheard until they have learned something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    """What it takes to recycle units, with incoming values drawn now: see :func:`recycled`.

    Args:
        model: The model.
        units: Its units.
        chosen: The units to recycle, ``(count,)``, by name of the layer; layers without any may be there.
        generator: A CPU generator; by default one seeded from torch's global one.
        initial: Initial parameters and buffers by name, to draw from; by default each layer's ``reset_parameters``.

    Raises:
        ValueError: If a layer has no site, or a unit is not there.
    """
    layers = [layer for layer, some in chosen.items() if layer in units.sites and len(some)]
    return recycled(model, units, chosen, fresh_incoming(model, units, layers, generator, initial))


def fresh_incoming(
    model: nn.Module,
    units: Units,
    layers: Iterable[str],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Draws what units are made of, by name of the tensor: whole tensors, for all units of some layers."""
    tensors = tensors_of(model)
    names = dict.fromkeys(name for layer in layers for name in units.sites[layer].incoming)
    if not names:
        return {}
    if initial is not None:
        drawn = resampled_values({name: tensors[name] for name in names}, initial, generator)
    else:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        drawn = fresh_values(model, {name: model.get_submodule(name) for name in modules}, generator)
    return {name: drawn[tensors[name]] for name in names}


def recycled(model: nn.Module, units: Units, chosen: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Changes:
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
    values: dict[Tensor, Tensor] = {}
    renewed: dict[Tensor, Tensor] = {}
    for kind in (incoming, outgoing):
        for name, owner, some in kind:
            old = tensors[name]
            mask = entries(owner, some, old.shape)
            renewed[old] = mask | renewed[old] if old in renewed else mask
            now = values.setdefault(old, old.detach().clone())
            new = fresh[name] if kind is incoming else None
            _set(now, owner, some, mask, new)
    return Changes(values, renewed, chosen)


def _set(tensor: Tensor, owner: Tensor, units: Tensor, mask: Tensor, new: Tensor | None) -> None:
    """Gives the entries of some units the values they have in a new tensor, by default zero."""
    if owner.numel() == 1 or owner.numel() not in owner.shape:  # one unit that owns all, or a grouped convolution
        tensor.copy_(torch.where(mask.to(tensor.device), 0.0 if new is None else new.to(tensor), tensor))
        return
    dim = owner.shape.index(owner.numel())
    rows = torch.isin(owner.flatten(), units).nonzero().flatten()
    if new is None:
        tensor.index_fill_(dim, rows.to(tensor.device), 0)
    else:
        tensor.index_copy_(dim, rows.to(tensor.device), new.index_select(dim, rows).to(tensor))
