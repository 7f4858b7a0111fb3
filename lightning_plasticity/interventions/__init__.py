"""What is done about lost plasticity: remedies for a module and its optimizers, without Lightning."""

from lightning_plasticity.interventions.base import Intervention, RepairReport
from lightning_plasticity.interventions.redo import ReDo, ReGraMa
from lightning_plasticity.interventions.reset import Reset
from lightning_plasticity.interventions.shrink_perturb import ShrinkPerturb
from lightning_plasticity.interventions.units import Site, Units, describe_units

__all__ = [
    "Intervention",
    "ReDo",
    "ReGraMa",
    "RepairReport",
    "Reset",
    "ShrinkPerturb",
    "Site",
    "Units",
    "describe_units",
]
