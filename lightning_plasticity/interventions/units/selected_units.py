"""Leave out the units of layers that an intervention does not act on."""

from __future__ import annotations

from torch import nn

from lightning_plasticity.interventions.base import Intervention, InterventionContext
from lightning_plasticity.interventions.units.groups import Units


def select_units(intervention: Intervention, units: Units, model: nn.Module, context: InterventionContext) -> Units:
    """Return the units of the layers that are trained, and that ``include`` and ``exclude`` of an intervention leave.

    Args:
        intervention: The intervention.
        units: The units of the model.
        model: The model, or a copy of it.
        context: What is known about the training.

    Raises:
        ValueError: If a pattern of ``include`` or ``exclude`` matches nothing.
    """
    selected = set(intervention.selected_parameters(model, context).values())
    left_out = {
        layer: "it is excluded, or no optimizer trains it"
        for layer in units.groups
        if not selected.issuperset(model.get_submodule(layer).parameters(recurse=False))
    }
    groups = {layer: group for layer, group in units.groups.items() if layer not in left_out}
    return Units(groups, {**units.excluded, **left_out})
