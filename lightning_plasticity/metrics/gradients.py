"""Diagnostics of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.functional.gradients import flat_gradient, readiness
from lightning_plasticity.functional.units import GRADIENT_DORMANT_THRESHOLD
from lightning_plasticity.metrics.base import PlasticityMetric, finite_or_nan
from lightning_plasticity.metrics.units import DormantFraction


class GradientDormantFraction(DormantFraction):
    """Share of units that hardly learn (:func:`~lightning_plasticity.functional.gradient_dormant_fraction`).

    Args:
        threshold: Units whose incoming weights have at most this share of the layer's mean gradient, in [0, 1].
        channel_dim: The dimension of the weight that counts units: 0, or 1 for transposed convolutions.
        kwargs: What every metric of torchmetrics takes.

    Raises:
        ValueError: If ``threshold`` is out of range; at an update with another number of units than before.

    Shape:
        ``update(gradient)`` takes the gradient of a weight on one batch, ``(out, in)`` or ``(out, in, *kernel)``.
        ``compute()`` returns a share, float64; NaN if there was no gradient, or an entry that is not finite.

    References:
        Liu et al. 2025, arXiv 2505.24061.

    Example:
        >>> metric = GradientDormantFraction()
        >>> metric.update(torch.tensor([[1.0, -1.0], [0.001, 0.0], [2.0, 0.0], [1.0, 1.0]]))
        >>> metric.compute().item()
        0.25
    """

    def __init__(self, threshold: float = GRADIENT_DORMANT_THRESHOLD, *, channel_dim: int = 0, **kwargs: Any) -> None:
        super().__init__(threshold, channel_dim=channel_dim, **kwargs)

    @override
    def update(self, gradient: Tensor) -> None:
        """Adds the magnitudes of the gradient on one batch."""
        super().update(gradient)


class OptimizationReadiness(PlasticityMetric):
    """Whether gradients are strong and agree (:func:`~lightning_plasticity.functional.optimization_readiness`).

    Give it the loss and the gradient of each of several minibatches of the same size, at the same weights. Keeps one
    vector of all parameters in float64.

    Args:
        kwargs: What every metric of torchmetrics takes.

    Raises:
        ValueError: At ``compute()`` if the mean loss is negative.

    Shape:
        ``update(loss, gradients)`` takes a number and a tensor of any shape, several, or a module: then the ``.grad``
        of its parameters. ``compute()`` returns a number ≥ 0, float64; NaN without updates, or if something is not
        finite.

    References:
        "Predicting plasticity in deep continual learning: a theoretical perspective" 2026, arXiv 2605.09044.

    Example:
        >>> metric = OptimizationReadiness()
        >>> metric.update(3.0, torch.tensor([1.0, 0.0]))
        >>> metric.update(1.0, torch.tensor([1.0, 2.0]))
        >>> metric.compute().item()
        0.6666666666666666
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    gradient_sum: Tensor
    square_sum: Tensor
    loss_sum: Tensor
    minibatches: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("gradient_sum", "square_sum", "loss_sum", "minibatches")

    @override
    def update(self, loss: Tensor | float, gradients: nn.Module | Tensor | Iterable[Tensor]) -> None:
        """Adds one minibatch."""
        gradient = flat_gradient(gradients)
        self._accumulate(
            gradient_sum=gradient,
            square_sum=gradient.square().sum(),
            loss_sum=loss.detach() if isinstance(loss, Tensor) else loss,
            minibatches=1,
        )

    @override
    def compute(self) -> Tensor:
        """The readiness over all minibatches seen."""
        if not self.gradient_sum.ndim:
            return torch.full_like(self.gradient_sum, math.nan)
        mean = self.gradient_sum / self.minibatches
        square = self.square_sum / self.minibatches
        return finite_or_nan(readiness(self.loss_sum / self.minibatches, mean.square().sum(), square))
