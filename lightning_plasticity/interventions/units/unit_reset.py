"""Plan the reset of units: fresh incoming weights from their initial distribution, outgoing weights of zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.units.groups import Units, unit_indices, unit_mask
from lightning_plasticity.interventions.weights.initial_distribution import InitialDistribution, fresh_entries
from lightning_plasticity.interventions.weights.positions import unravel_index
from lightning_plasticity.interventions.weights.updates import SparseUpdate, WeightUpdate
from lightning_plasticity.isolation.weights import named_tensors


def plan_reset(
    model: nn.Module,
    units: Units,
    chosen: Mapping[str, Tensor],
    generator: torch.Generator | None,
    initial: Mapping[str, Tensor] | None = None,
    known: dict[str, InitialDistribution] | None = None,
) -> WeightUpdate:
    """Plan the reset of units: their incoming entries get fresh values, their outgoing entries become zero.

    Where the columns of one unit cross the row of another, the zeros win.

    Args:
        model: The model.
        units: Its units.
        chosen: The units to reset, ``(count,)``, by name of the layer; may be empty tensors.
        generator: A CPU generator; by default one seeded from torch's global one.
        initial: Initial parameters and buffers by name, to draw from; by default each layer's ``reset_parameters``.
        known: As for :func:`fresh_entries`.

    Returns:
        The update to apply to the model.

    Raises:
        ValueError: If the units of a layer cannot be reset, or an index is out of range.
    """
    _check_indices(units, chosen)
    chosen = {layer: indices.cpu() for layer, indices in chosen.items() if len(indices)}
    tensors = named_tensors(model)
    incoming: dict[str, list[tuple[Tensor, Tensor]]] = {}
    outgoing: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer, indices in chosen.items():
        for name, unit_index in units.groups[layer].incoming.items():
            incoming.setdefault(name, []).append((unit_index, indices))
        for name, unit_index in units.groups[layer].outgoing.items():
            outgoing.setdefault(name, []).append((unit_index, indices))
    redrawn: dict[str, Tensor] = {}
    for name, selections in incoming.items():
        shape = tensors[name].shape
        entries = _entries(selections, shape)
        for unit_index, indices in outgoing.get(name, []):
            entries = entries[~unit_mask(unit_index, indices, shape)[unravel_index(entries, shape)]]
        redrawn[name] = entries
    fresh = fresh_entries(model, redrawn, initial, generator, known)
    zeroed = {name: _entries(selections, tensors[name].shape) for name, selections in outgoing.items()}
    none = torch.tensor([], dtype=torch.long)
    parts: dict[Tensor, SparseUpdate] = {}
    for name in {**redrawn, **zeroed}:
        values, zeros = fresh.get(name, torch.zeros(0)), zeroed.get(name, none)
        parts[tensors[name]] = SparseUpdate(
            torch.cat([redrawn.get(name, none), zeros]), torch.cat([values, values.new_zeros(len(zeros))])
        )
    candidates = sum(group.num_units for group in units.groups.values())
    return WeightUpdate({}, units=chosen, parts=parts, candidates=candidates, skipped=units.excluded)


def _check_indices(units: Units, chosen: Mapping[str, Tensor]) -> None:
    for layer, indices in chosen.items():
        if layer not in units.groups:
            reason = units.excluded.get(layer, "the model has no layer of this name with units")
            raise ValueError(f"units of {layer!r} cannot be reset: {reason}")
        size = units.groups[layer].num_units
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(f"units {indices.tolist()} of {layer!r} must be in 0 ... {size - 1}")


def _entries(selections: Iterable[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """Return the flat indices of all entries of the selected units, given as pairs of a unit index and units."""
    none = torch.tensor([], dtype=torch.long)
    return torch.cat([none, *(unit_indices(unit_index, indices, shape) for unit_index, indices in selections)])
