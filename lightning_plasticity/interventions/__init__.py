"""What is done about lost plasticity: remedies for a module and its optimizers, without Lightning."""

from lightning_plasticity.interventions.base import Intervention, RepairReport
from lightning_plasticity.interventions.reset import Reset
from lightning_plasticity.interventions.shrink_perturb import ShrinkPerturb

__all__ = ["Intervention", "RepairReport", "Reset", "ShrinkPerturb"]
