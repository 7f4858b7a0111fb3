"""Accumulate the diagnostics of :mod:`lightning_plasticity.functional` over batches and devices with torchmetrics."""

from lightning_plasticity.metrics.gradients import GradientDormantFraction, OptimizationReadiness
from lightning_plasticity.metrics.monitor import MonitoredLayer, PlasticityMonitor
from lightning_plasticity.metrics.ranks import EffectiveRank, SRank, StableRank
from lightning_plasticity.metrics.units import ClonedFraction, DeadFraction, DormantFraction, FeatureNorm
from lightning_plasticity.metrics.weights import WeightMagnitude

__all__ = [
    "ClonedFraction",
    "DeadFraction",
    "DormantFraction",
    "EffectiveRank",
    "FeatureNorm",
    "GradientDormantFraction",
    "MonitoredLayer",
    "OptimizationReadiness",
    "PlasticityMonitor",
    "SRank",
    "StableRank",
    "WeightMagnitude",
]
