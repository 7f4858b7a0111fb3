"""Accumulate soft ranks of the features of one layer: effective rank, stable rank and srank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn
from typing_extensions import override

from lightning_plasticity.functional.layouts import sample_count
from lightning_plasticity.functional.ranks import (
    SRANK_DELTA,
    entropy_rank,
    leading_count,
    second_moments,
    singular_values_of_moments,
    squared_ratio,
    valid_delta,
)
from lightning_plasticity.metrics.base import PlasticityMetric, is_empty


class EffectiveRank(PlasticityMetric):
    r"""Effective rank of the features of a layer (:func:`~lightning_plasticity.functional.effective_rank`).

    The rank is that of the matrix :math:`F` of the features of all batches and devices. It is computed exactly from the
    second moments :math:`F^\top F`, which take ``d × d`` numbers in float64, by an eigenvalue decomposition in
    ``compute()``. It agrees with the rank from the singular values of :math:`F` to 1e-6 up to condition numbers of 10⁶;
    beyond, singular values below about 1e-7 of the largest one count as zero.

    Args:
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an update has another number of units than those before.

    Warns:
        UserWarning: If there are fewer samples than units, which bounds the rank.

    Shape:
        ``update(features)`` takes ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``. ``compute()`` returns a number from 1
        to ``min(N, d)``, float64; 0 if all features are zero; NaN if there were no samples or a feature was not
        finite.

    References:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example:
        >>> metric = EffectiveRank()
        >>> metric.update(torch.tensor([[2.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 2.0]]))
        >>> round(metric.compute().item(), 6), int(metric.samples)
        (2.0, 2)
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    moment_sum: Tensor
    samples: Tensor

    def __init__(self, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channel_dim = channel_dim
        self._add_sums("moment_sum", "samples")

    @override
    def update(self, features: Tensor) -> None:
        """Add the samples of a batch; one without samples adds nothing."""
        if not is_empty(features):
            self._accumulate(
                moment_sum=second_moments(features.detach(), self.channel_dim),
                samples=sample_count(features, self.channel_dim),
            )

    @override
    def compute(self) -> Tensor:
        """Return the rank of the features of all updates."""
        if not self.moment_sum.ndim:
            return torch.full_like(self.moment_sum, math.nan)
        units = len(self.moment_sum)
        if self.samples < units:
            rank_zero_warn(
                f"{type(self).__name__} has fewer samples than the {units} units that there are: the number of samples "
                "bounds it",
                category=UserWarning,
            )
        return self._rank(singular_values_of_moments(self.moment_sum))

    def _rank(self, singular_values: Tensor) -> Tensor:
        return entropy_rank(singular_values)


class StableRank(EffectiveRank):
    r"""Stable rank of the features of a layer, ‖F‖²_F / ‖F‖²₂ (:func:`~lightning_plasticity.functional.stable_rank`).

    Args:
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Shape:
        As :class:`EffectiveRank`. The two share their states in a ``MetricCollection``.

    References:
        Rudelson and Vershynin 2007, arXiv math/0503442.

    Example:
        >>> metric = StableRank()
        >>> metric.update(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        >>> round(metric.compute().item(), 6)
        1.5
    """

    @override
    def _rank(self, singular_values: Tensor) -> Tensor:
        return squared_ratio(singular_values)


class SRank(EffectiveRank):
    r"""Number of singular values that make up 1 - δ of their sum (:func:`~lightning_plasticity.functional.srank`).

    Args:
        delta: The fraction δ of the sum to leave out, in [0, 1). With 0, all singular values above the rounding error
            (:func:`~lightning_plasticity.functional.ranks.singular_values_of_moments`) count.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``delta`` is out of range.

    Shape:
        As :class:`EffectiveRank`. The two share their states in a ``MetricCollection``.

    References:
        Kumar et al. 2020, arXiv 2010.14498.

    Example:
        >>> metric = SRank()
        >>> metric.update(torch.diag(torch.tensor([100.0, 50.0, 1.0])))
        >>> metric.compute().item()
        2.0
    """

    def __init__(self, delta: float = SRANK_DELTA, *, channel_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(channel_dim=channel_dim, **kwargs)
        self.delta = valid_delta(delta)

    @override
    def _rank(self, singular_values: Tensor) -> Tensor:
        return leading_count(singular_values, self.delta)
