"""Accumulate the mean magnitude of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.functional.weights import magnitude_total
from lightning_plasticity.metrics.base import PlasticityMetric, finite_or_nan


class WeightMagnitude(PlasticityMetric):
    """Mean magnitude of the weights (:func:`~lightning_plasticity.functional.weight_magnitude`).

    The mean is taken over the entries of all updates, which may come from several layers, steps or devices.

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Shape:
        ``update(weights)`` takes a tensor of any shape, several tensors, or a module. ``compute()`` returns a
        magnitude in the units of the weights, float64; NaN if there were no entries or one was not finite.

    References:
        Dohare et al. 2024, Nature 632, 768-774.

    Example:
        >>> import torch
        >>> metric = WeightMagnitude()
        >>> metric.update(torch.nn.Linear(2, 2, bias=False).requires_grad_(False).weight.fill_(-3.0))
        >>> metric.compute().item()
        3.0
    """

    plot_lower_bound = 0.0

    magnitude_sum: Tensor
    entries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("magnitude_sum", "entries")

    @override
    def update(self, weights: nn.Module | Tensor | Iterable[Tensor]) -> None:
        """Add the entries of all tensors."""
        total, count = magnitude_total(weights)
        self._accumulate(magnitude_sum=total, entries=count)

    @override
    def compute(self) -> Tensor:
        """Return the mean over the entries of all updates."""
        return finite_or_nan(self.magnitude_sum / self.entries)
