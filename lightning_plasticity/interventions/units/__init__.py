"""Find, rate and reset the hidden units of a network."""

from lightning_plasticity.interventions.units.groups import Site, Units, describe_units

__all__ = ["Site", "Units", "describe_units"]
