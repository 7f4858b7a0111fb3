"""The standard diagnostics of the field as pure functions of tensors: torch only, no Lightning.

Every function returns a tensor without dimensions in float64 (``kronecker_ranks`` three), and sums in float64.
Activations and features are ``(N, d)``, ``(N, T, d)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``: see
:func:`~lightning_plasticity.functional.layouts.channel_dim_of`. Tensors without samples or units, or with NaN or
infinite entries, are refused with a ``ValueError``.
"""

from lightning_plasticity.functional.gradients import (
    KroneckerRanks,
    gradient_norm,
    kronecker_ranks,
    optimization_readiness,
)
from lightning_plasticity.functional.ranks import effective_rank, srank, stable_rank
from lightning_plasticity.functional.units import (
    dead_fraction,
    dormant_fraction,
    feature_norm,
    gradient_dormant_fraction,
)
from lightning_plasticity.functional.weights import isometry_deviation, weight_magnitude

__all__ = [
    "KroneckerRanks",
    "dead_fraction",
    "dormant_fraction",
    "effective_rank",
    "feature_norm",
    "gradient_dormant_fraction",
    "gradient_norm",
    "isometry_deviation",
    "kronecker_ranks",
    "optimization_readiness",
    "srank",
    "stable_rank",
    "weight_magnitude",
]
