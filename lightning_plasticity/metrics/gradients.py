"""Accumulate diagnostics of gradients: gradient-dormant units and optimization readiness."""

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
    """Fraction of units with small gradients (:func:`~lightning_plasticity.functional.gradient_dormant_fraction`).

    Args:
        threshold: The score, in units of the layer's mean gradient magnitude, up to which a unit is dormant, in [0, 1].
        channel_dim: The dimension of the weight that counts units: 0, or 1 for transposed convolutions.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is out of range, or an update has another number of units than those before.

    Shape:
        ``update(gradient)`` takes the gradient of a weight on one batch, ``(out, in)`` or ``(out, in, *kernel)``.
        ``compute()`` returns a fraction, float64; NaN if there was no gradient or an entry was not finite.

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
        """Add the magnitudes of the gradient on one batch."""
        super().update(gradient)


class OptimizationReadiness(PlasticityMetric):
    """Optimization readiness (:func:`~lightning_plasticity.functional.optimization_readiness`).

    Update it with the loss and the gradient of several minibatches of the same size, all at the same weights. The state
    is one vector with as many entries as there are parameters, in float64.

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``compute()`` if the mean loss is negative.

    Shape:
        ``update(loss, gradients)`` takes a scalar, and a tensor of any shape, several tensors, or a module: the
        ``.grad`` of its parameters are taken. ``compute()`` returns a number ≥ 0, float64; NaN if there were no
        updates, or the loss or an entry of a gradient was not finite.

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
        """Add one minibatch."""
        gradient = flat_gradient(gradients)
        self._accumulate(
            gradient_sum=gradient,
            square_sum=gradient.square().sum(),
            loss_sum=loss.detach() if isinstance(loss, Tensor) else loss,
            minibatches=1,
        )

    @override
    def compute(self) -> Tensor:
        """Return the readiness over all minibatches."""
        if not self.gradient_sum.ndim:
            return torch.full_like(self.gradient_sum, math.nan)
        loss = self.loss_sum / self.minibatches
        squared_mean = (self.gradient_sum / self.minibatches).square().sum()
        mean_square = self.square_sum / self.minibatches
        return finite_or_nan(readiness(loss, squared_mean, mean_square))
