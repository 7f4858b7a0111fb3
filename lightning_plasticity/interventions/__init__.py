"""Interventions against loss of plasticity, for a module and its optimizers, without Lightning."""

from lightning_plasticity.interventions.base import (
    Intervention,
    InterventionContext,
    Regularizer,
    Repair,
    StepIntervention,
)
from lightning_plasticity.interventions.churn_regularizer import ChurnRegularizer
from lightning_plasticity.interventions.continual_backprop import ContinualBackprop
from lightning_plasticity.interventions.dash import DASH
from lightning_plasticity.interventions.effective_rank import L2ER, EffectiveRankRegularizer
from lightning_plasticity.interventions.fire import FIRE
from lightning_plasticity.interventions.hare_tortoise import HareTortoise
from lightning_plasticity.interventions.l2_init import L2Init
from lightning_plasticity.interventions.normalize_and_project import NormalizeAndProject
from lightning_plasticity.interventions.parseval import Parseval
from lightning_plasticity.interventions.redo import ReDo, ReGraMa
from lightning_plasticity.interventions.reset import Reset
from lightning_plasticity.interventions.selective_weight_reinit import SelectiveWeightReinit
from lightning_plasticity.interventions.self_normalized_reset import SelfNormalizedReset
from lightning_plasticity.interventions.shrink_perturb import ShrinkPerturb
from lightning_plasticity.interventions.soft_shrink_perturb import SoftShrinkPerturb
from lightning_plasticity.interventions.spectral import SpectralRegularizer
from lightning_plasticity.interventions.units import UnitGroup, Units, describe_units
from lightning_plasticity.interventions.upgd import UPGD
from lightning_plasticity.interventions.wasserstein_init import WassersteinInit
from lightning_plasticity.interventions.weight_clipping import WeightClipping
from lightning_plasticity.interventions.weights.updates import RepairReport, WeightUpdate

__all__ = [
    "DASH",
    "FIRE",
    "L2ER",
    "UPGD",
    "ChurnRegularizer",
    "ContinualBackprop",
    "EffectiveRankRegularizer",
    "HareTortoise",
    "Intervention",
    "InterventionContext",
    "L2Init",
    "NormalizeAndProject",
    "Parseval",
    "ReDo",
    "ReGraMa",
    "Regularizer",
    "Repair",
    "RepairReport",
    "Reset",
    "SelectiveWeightReinit",
    "SelfNormalizedReset",
    "ShrinkPerturb",
    "SoftShrinkPerturb",
    "SpectralRegularizer",
    "StepIntervention",
    "UnitGroup",
    "Units",
    "WassersteinInit",
    "WeightClipping",
    "WeightUpdate",
    "describe_units",
]
