"""Compute diagnostics of network outputs before and after an optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plasticity.functional.layouts import finite


def churn(before: Tensor, after: Tensor, batch_before: Tensor, batch_after: Tensor) -> Tensor:
    r"""Compute the churn: how much the outputs on other samples move in an optimizer step on a batch.

    The root mean square of the movement is relative to that on the batch itself, so that it does not depend on the
    scale of the outputs, and hardly on the length of the step:

    .. math:: \sqrt{\mathbb{E}_{x \notin B} \lVert f_{\theta'}(x) - f_\theta(x) \rVert^2 \,\big/\,
        \mathbb{E}_{x \in B} \lVert f_{\theta'}(x) - f_\theta(x) \rVert^2}

    It is 0 if a step on some samples does not change the outputs on others, and about 1 if it moves all alike. For a
    step of gradient descent the two movements are the off-diagonal and the diagonal blocks of the tangent kernel times
    the residual of the batch. The source takes the mean distance on other samples, without a reference.

    Args:
        before: :math:`f_\theta(x)` on other samples, of any shape.
        after: :math:`f_{\theta'}(x)` on the same, in the same shape. Entries that are infinite before and after, such
            as masked ones, have not moved.
        batch_before: :math:`f_\theta(x)` on the batch of the step, of any shape.
        batch_after: :math:`f_{\theta'}(x)` on the same.

    Returns:
        A number ≥ 0; NaN if the outputs on the batch do not move.

    Raises:
        ValueError: If a tensor is empty, or some movement is not finite.

    References:
        Tang et al. 2025, "Mitigating plasticity loss in continual reinforcement learning by reducing churn",
        arXiv 2506.00592.

    Example:
        >>> churn(torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]), torch.zeros(1, 1), torch.tensor([[2.0]])).item()
        0.5
    """
    if not before.numel() or not batch_before.numel():
        raise ValueError("the outputs are empty: give those of one sample or more, on the batch and on others")
    moved = (movement(before, after), movement(batch_before, batch_after))
    return relative_movement(*(finite(each, "movements of the outputs") for each in moved))


def movement(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each output has moved, float64; 0 for one that was infinite and still is."""
    return torch.where(before == after, 0, after.double() - before.double())


def relative_movement(others: Tensor, batch: Tensor) -> Tensor:
    """Compute the churn from movements of the outputs, on other samples and on the batch; NaN if it is not defined."""
    ratio = (others.square().mean() / batch.square().mean()).sqrt()
    return torch.where(torch.isfinite(ratio), ratio, math.nan)
