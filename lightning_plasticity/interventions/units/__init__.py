"""Find, rate and reset the hidden units of a network."""

from lightning_plasticity.interventions.units.discovery import describe_units
from lightning_plasticity.interventions.units.groups import UnitGroup, Units

__all__ = ["UnitGroup", "Units", "describe_units"]
