"""Can gradient descent still make progress? Diagnostics of gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_plasticity.functional.layouts import finite, rows_of
from lightning_plasticity.functional.ranks import entropy_rank, singular_values


def gradient_norm(gradients: nn.Module | Tensor | Iterable[Tensor]) -> Tensor:
    r"""Length of the gradient, :math:`\lVert \nabla L \rVert_2` over all entries of all tensors.

    Args:
        gradients: One tensor of any shape, several, or a module: then the ``.grad`` of its parameters.

    Returns:
        A length, in units of the loss by those of the weights.

    Raises:
        ValueError: If there is no gradient, or some entry is not finite.

    Example:
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
        5.0
    """
    return finite(torch.linalg.vector_norm(flat_gradient(gradients)), "gradients")


def optimization_readiness(loss: Tensor | float, minibatch_gradients: Iterable[Tensor]) -> Tensor:
    r"""Strong gradients that agree with one another: the share of the loss that a gradient step can remove.

    :math:`R = \lVert g \rVert^4 / (L \cdot \mathbb{E}_b \lVert \hat g_b \rVert^2)`. Where the loss is
    :math:`\beta`-smooth, one step of the best size along a minibatch gradient removes, in expectation, at least the
    share :math:`R / 2\beta` of it. 0 where the loss or all gradients are zero: there is nothing to gain.

    Args:
        loss: :math:`L \ge 0`, the mean loss of the probe batch.
        minibatch_gradients: :math:`\hat g_b`, the gradients of minibatches of equal size that make up the probe batch,
            ``(B, P)``, or ``B`` tensors of the same shape. :math:`g` is their mean.

    Returns:
        A number ≥ 0, in units of the loss by those of the weights squared.

    Raises:
        ValueError: If the loss is negative, there are no gradients, or something is not finite.

    References:
        "Predicting plasticity in deep continual learning: a theoretical perspective" 2026, arXiv 2605.09044.

    Example:
        >>> optimization_readiness(2.0, torch.tensor([[1.0, 0.0], [1.0, 2.0]])).item()
        0.6666666666666666
    """
    gradients = [flat_gradient(gradient) for gradient in minibatch_gradients]
    if not gradients:
        raise ValueError("minibatch_gradients holds none: give the gradient of each minibatch, shape (B, P)")
    stacked = finite(torch.stack(gradients), "gradients")
    mean_loss = finite(torch.as_tensor(loss, dtype=torch.float64, device=stacked.device), "losses")
    return readiness(mean_loss, stacked.mean(0).square().sum(), stacked.square().sum(1).mean())


class KroneckerRanks(NamedTuple):
    """Effective ranks of the Kronecker factors of a layer's curvature, and of their product."""

    inputs: Tensor
    gradients: Tensor
    product: Tensor


def kronecker_ranks(inputs: Tensor, gradients: Tensor) -> KroneckerRanks:
    r"""Effective ranks of the Kronecker-factored curvature of a layer, :math:`A \otimes G`.

    :math:`A = \mathbb{E}[h h^\top]` of the layer's inputs and :math:`G = \mathbb{E}[\delta \delta^\top]` of the
    gradients by its outputs. The eigenvalues of :math:`A \otimes G` are the products of theirs, so that the effective
    rank of the product, of eigenvalues, is the product of the effective ranks.

    Args:
        inputs: :math:`h`, ``(N, d_in)`` or another layout of
            :func:`~lightning_plasticity.functional.layouts.channel_dim_of`.
        gradients: :math:`\delta`, ``(N, d_out)``.

    Returns:
        The effective ranks of :math:`A`, :math:`G` and :math:`A \otimes G`; 0 where a factor is zero.

    Raises:
        ValueError: If one of them is empty or not finite.

    References:
        Martens and Grosse 2015, arXiv 1503.05671; section 7 of arXiv 2509.22335.

    Example:
        >>> ranks = kronecker_ranks(torch.eye(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        >>> [round(rank.item(), 6) for rank in ranks]
        [3.0, 2.0, 6.0]
    """
    a, g = (entropy_rank(singular_values(rows_of(factor)).square()) for factor in (inputs, gradients))
    return KroneckerRanks(a, g, a * g)


def flat_gradient(gradients: nn.Module | Tensor | Iterable[Tensor]) -> Tensor:
    """All gradients in one vector, ``(P,)``, float64; a parameter of a module without a gradient counts as zeros."""
    if isinstance(gradients, nn.Module):
        parameters = [parameter for parameter in gradients.parameters() if parameter.requires_grad]
        if all(parameter.grad is None for parameter in parameters):
            raise ValueError(
                f"no parameter of {type(gradients).__name__} has a gradient: call backward() first, and measure before "
                "the optimizer's zero_grad()"
            )
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    else:
        pieces = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    if not any(piece.numel() for piece in pieces):
        raise ValueError("the gradients hold no numbers: give a module after backward(), or tensors that are not empty")
    return torch.cat([piece.detach().flatten().double() for piece in pieces])


def readiness(loss: Tensor, squared_mean: Tensor, mean_square: Tensor) -> Tensor:
    r"""Optimization readiness from :math:`L`, :math:`\lVert g \rVert^2` and :math:`\mathbb{E}\lVert\hat g_b\rVert^2`.

    Raises:
        ValueError: If the loss is negative.
    """
    if loss < 0:
        raise ValueError(f"loss={loss.item():g} is negative, and optimization readiness is a share of a loss ≥ 0")
    nothing_to_gain = (loss == 0) | (mean_square == 0)
    return torch.where(nothing_to_gain, 0, squared_mean.square() / (loss * mean_square))
