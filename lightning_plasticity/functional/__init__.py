"""Compute the standard diagnostics of plasticity: pure functions of tensors that need torch only.

Every function sums in float64 and returns a float64 tensor without dimensions (``kronecker_ranks`` returns three).
Activations and features have the shape ``(N, d)``, ``(N, T, d)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``; see
:func:`~lightning_plasticity.functional.layouts.channel_dim_of`. Tensors without samples or units, and tensors with NaN
or infinite entries, raise a ``ValueError``.
"""

from lightning_plasticity.functional.gradients import (
    KroneckerRanks,
    gradient_norm,
    kronecker_ranks,
    optimization_readiness,
)
from lightning_plasticity.functional.outputs import churn
from lightning_plasticity.functional.ranks import effective_rank, srank, stable_rank
from lightning_plasticity.functional.units import (
    cloned_fraction,
    dead_fraction,
    dormant_fraction,
    feature_norm,
    gradient_dormant_fraction,
)
from lightning_plasticity.functional.weights import isometry_deviation, weight_magnitude

__all__ = [
    "KroneckerRanks",
    "churn",
    "cloned_fraction",
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
