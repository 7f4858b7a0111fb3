"""Compute diagnostics of gradients, which measure how much progress gradient descent can make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_plasticity.functional.layouts import finite, rows_of
from lightning_plasticity.functional.ranks import entropy_rank, singular_values


def gradient_norm(gradients: nn.Module | Tensor | Iterable[Tensor]) -> Tensor:
    r"""Compute the norm of the gradient, :math:`\lVert \nabla L \rVert_2` over all entries of all tensors.

    Args:
        gradients: A tensor of any shape, several tensors, or a module: the ``.grad`` of its parameters are taken.

    Returns:
        A norm, in the units of the loss divided by those of the weights.

    Raises:
        ValueError: If there is no gradient, or some entry is not finite.

    Example:
        >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
        5.0
    """
    return finite(torch.linalg.vector_norm(flat_gradient(gradients)), "gradients")


def optimization_readiness(loss: Tensor | float, minibatch_gradients: Iterable[Tensor]) -> Tensor:
    r"""Compute the optimization readiness :math:`R = \lVert g \rVert^4 / (L \, \mathbb{E}_b \lVert \hat g_b \rVert^2)`.

    It is large for strong gradients that agree across minibatches. If the loss is :math:`\beta`-smooth, one step of
    optimal size along a minibatch gradient reduces it, in expectation, by at least the fraction :math:`R / 2\beta`.

    Args:
        loss: Mean loss of the probe batch, :math:`L \ge 0`.
        minibatch_gradients: The gradients :math:`\hat g_b` of minibatches of equal size that make up the probe batch,
            ``(B, P)``, or ``B`` tensors of the same shape. :math:`g` is their mean.

    Returns:
        A number ≥ 0, in the units of the loss divided by the square of those of the weights; 0 if the loss is zero or
        all gradients are.

    Raises:
        ValueError: If the loss is negative, there are no gradients, or the loss or a gradient is not finite.

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
    r"""Compute the effective ranks of the Kronecker-factored curvature of a layer, :math:`A \otimes G`.

    The factors are :math:`A = \mathbb{E}[h h^\top]` of the layer's inputs :math:`h` and
    :math:`G = \mathbb{E}[\delta \delta^\top]` of the gradients :math:`\delta` with respect to its outputs. Each rank is
    the exponential of the entropy of the eigenvalues. Those of :math:`A \otimes G` are the products of the eigenvalues
    of the factors, so its effective rank is the product of theirs.

    Args:
        inputs: :math:`h`, ``(N, d_in)`` or another layout of
            :func:`~lightning_plasticity.functional.layouts.channel_dim_of`.
        gradients: :math:`\delta`, ``(N, d_out)``.

    Returns:
        The effective ranks of :math:`A`, :math:`G` and :math:`A \otimes G`; 0 where a factor is zero.

    Raises:
        ValueError: If the inputs or the gradients are empty or not finite.

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
    """Concatenate all gradients into a vector ``(P,)``, float64, with zeros for parameters without a gradient.

    Raises:
        ValueError: If no parameter of a module has a gradient, or there are no entries.
    """
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
    r"""Compute the optimization readiness from its moments.

    Args:
        loss: :math:`L`, a scalar.
        squared_mean: :math:`\lVert g \rVert^2`.
        mean_square: :math:`\mathbb{E}_b \lVert \hat g_b \rVert^2`.

    Returns:
        :math:`R`; 0 if the loss or all gradients are zero, and no step can reduce the loss.

    Raises:
        ValueError: If the loss is negative.
    """
    if loss < 0:
        raise ValueError(f"loss={loss.item():g} is negative; optimization readiness is defined for a loss ≥ 0")
    irreducible = (loss == 0) | (mean_square == 0)
    return torch.where(irreducible, 0, squared_mean.square() / (loss * mean_square))
