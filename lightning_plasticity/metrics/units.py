"""Accumulate diagnostics of the units of one layer: dormant, dead and cloned units, norms of features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.functional.layouts import sample_count
from lightning_plasticity.functional.ranks import second_moments
from lightning_plasticity.functional.units import (
    CLONED_THRESHOLD,
    DORMANT_THRESHOLD,
    cloned_share,
    dormant_share,
    magnitude_sums,
    norm_sum,
    unit_sums,
    valid_correlation,
    valid_threshold,
)
from lightning_plasticity.metrics.base import PlasticityMetric, finite_or_nan, is_empty


class DormantFraction(PlasticityMetric):
    """Fraction of the units of a layer that are dormant (:func:`~lightning_plasticity.functional.dormant_fraction`).

    The mean magnitudes are taken over all samples of all batches and devices.

    Args:
        threshold: The score, in units of the layer's mean magnitude, up to which a unit is dormant, in [0, 1].
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is out of range, or an update has another number of units than those before.

    Shape:
        ``update(activations)`` takes ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``. ``compute()`` returns a
        fraction, float64; NaN if there were no samples or an activation was not finite.

    References:
        Sokar et al. 2023, arXiv 2302.12902.

    Example:
        >>> metric = DormantFraction()
        >>> metric.update(torch.tensor([[1.0, 0.0, 3.0, 0.01]]))
        >>> metric.update(torch.tensor([[1.0, 0.0, 3.0, 1.0]]))
        >>> metric.compute().item()
        0.25
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    magnitude_sum: Tensor

    def __init__(self, threshold: float = DORMANT_THRESHOLD, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = valid_threshold(threshold)
        self.channel_dim = channel_dim
        self._add_sums("magnitude_sum")

    @override
    def update(self, activations: Tensor) -> None:
        """Add the samples of a batch; one without samples adds nothing."""
        if not is_empty(activations):
            self._accumulate(magnitude_sum=magnitude_sums(activations.detach(), self.channel_dim))

    @override
    def compute(self) -> Tensor:
        """Return the fraction over all samples of all updates."""
        if not self.magnitude_sum.ndim:
            return torch.full_like(self.magnitude_sum, math.nan)
        return dormant_share(self.magnitude_sum, self.threshold)


class DeadFraction(DormantFraction):
    """Fraction of the units of a layer that are always zero (:func:`~lightning_plasticity.functional.dead_fraction`).

    Args:
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Shape:
        As :class:`DormantFraction`; this is its case with a threshold of 0.

    References:
        Dohare et al. 2024, Nature 632, 768-774.

    Example:
        >>> metric = DeadFraction()
        >>> metric.update(torch.tensor([[1.0, 0.0, 3.0, 0.0]]))
        >>> metric.update(torch.tensor([[1.0, 0.0, 3.0, 1e-9]]))
        >>> metric.compute().item()
        0.25
    """

    def __init__(self, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(0.0, channel_dim=channel_dim, **kwargs)


class ClonedFraction(PlasticityMetric):
    """Fraction of the units of a layer that are clones (:func:`~lightning_plasticity.functional.cloned_fraction`).

    The correlations are those over all samples of all batches and devices, from second moments, which take ``d × d``
    numbers in float64.

    Args:
        threshold: The correlation above which two units are clones, in [0, 1].
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is out of range, or an update has another number of units than those before.

    Shape:
        ``update(activations)`` takes ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``. ``compute()`` returns a
        fraction, float64; NaN if there were no samples or an activation was not finite.

    References:
        Joudaki et al. 2025, arXiv 2510.00304.

    Example:
        >>> metric = ClonedFraction()
        >>> metric.update(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))
        >>> metric.update(torch.tensor([[2.0, 1.0, 4.0, 0.0]]))
        >>> metric.compute().item()
        0.25
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    moment_sum: Tensor
    unit_sum: Tensor
    samples: Tensor

    def __init__(self, threshold: float = CLONED_THRESHOLD, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = valid_correlation(threshold)
        self.channel_dim = channel_dim
        self._add_sums("moment_sum", "unit_sum", "samples")

    @override
    def update(self, activations: Tensor) -> None:
        """Add the samples of a batch; one without samples adds nothing."""
        if not is_empty(activations):
            activations = activations.detach()
            self._accumulate(
                moment_sum=second_moments(activations, self.channel_dim),
                unit_sum=unit_sums(activations, self.channel_dim),
                samples=sample_count(activations, self.channel_dim),
            )

    @override
    def compute(self) -> Tensor:
        """Return the fraction over all samples of all updates."""
        if not self.moment_sum.ndim:
            return torch.full_like(self.moment_sum, math.nan)
        return cloned_share(self.moment_sum, self.unit_sum, self.samples, self.threshold)


class FeatureNorm(PlasticityMetric):
    """Mean norm of the feature vectors (:func:`~lightning_plasticity.functional.feature_norm`).

    Args:
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Shape:
        ``update(features)`` takes ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``. ``compute()`` returns a norm,
        float64; NaN if there were no samples or a feature was not finite.

    References:
        Lyle et al. 2024, arXiv 2402.18762.

    Example:
        >>> metric = FeatureNorm()
        >>> metric(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item()
        3.0
    """

    plot_lower_bound = 0.0

    norm_sum: Tensor
    samples: Tensor

    def __init__(self, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channel_dim = channel_dim
        self._add_sums("norm_sum", "samples")

    @override
    def update(self, features: Tensor) -> None:
        """Add the samples of a batch; one without samples adds nothing."""
        if not is_empty(features):
            self._accumulate(
                norm_sum=norm_sum(features.detach(), self.channel_dim), samples=sample_count(features, self.channel_dim)
            )

    @override
    def compute(self) -> Tensor:
        """Return the mean over all samples of all updates."""
        return finite_or_nan(self.norm_sum / self.samples)
