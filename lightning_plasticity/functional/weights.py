"""Compute diagnostics of the weights: their magnitude, and the deviation of a layer from an isometry."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_plasticity.functional.layouts import finite


def weight_magnitude(weights: nn.Module | Tensor | Iterable[Tensor]) -> Tensor:
    r"""Compute the mean magnitude of the weights, :math:`\mathbb{E} |w|` over all entries of all tensors.

    Args:
        weights: A tensor of any shape, several tensors, or a module: its parameters are taken, shared ones once.

    Returns:
        A magnitude, in the units of the weights.

    Raises:
        ValueError: If there are no entries, or some entry is not finite.

    References:
        Dohare et al. 2024, "Loss of plasticity in deep continual learning", Nature 632, 768-774.

    Example:
        >>> weight_magnitude([torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])]).item()
        2.0
    """
    total, count = magnitude_total(weights)
    if not count:
        raise ValueError("the weights hold no numbers: give a module with parameters, or tensors that are not empty")
    return finite(total, "weights") / count


def isometry_deviation(weight: Tensor) -> Tensor:
    r"""Compute the deviation of a layer from an isometry, :math:`\lVert W^\top W - I \rVert_F^2`.

    Args:
        weight: ``(out, in)`` or ``(out, in, *kernel)``. Every spatial tap of a kernel is a matrix, and the deviations
            of all taps are summed.

    Returns:
        A dimensionless number ≥ 0. It is at least ``in - out`` for a matrix with fewer rows than columns, because its
        columns cannot be orthogonal.

    Raises:
        ValueError: If the weight has fewer than two dimensions, is empty or not finite.

    References:
        Han et al. 2026, FIRE, arXiv 2602.08040.

    Example:
        >>> isometry_deviation(torch.eye(3)).item(), isometry_deviation(2 * torch.eye(3)[:2]).item()
        (0.0, 19.0)
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix (out, in) or kernel (out, in, ...)")
    taps = finite(weight, "weights").double().reshape(*weight.shape[:2], -1).movedim(-1, 0)
    outputs, inputs = taps.shape[1:]
    # The smaller one of WᵀW and WWᵀ suffices: the larger one has the same eigenvalues and |in - out| zeros.
    wide = taps if outputs < inputs else taps.mT
    gram = wide @ wide.mT
    deviation = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum()
    return deviation + len(taps) * max(inputs - outputs, 0)


def magnitude_total(weights: nn.Module | Tensor | Iterable[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of all magnitudes, float64, and the number of entries."""
    tensors = list(tensors_of(weights))
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
    for tensor in tensors:
        total = total + tensor.detach().abs().sum(dtype=torch.float64).to(total.device)
    return total, sum(tensor.numel() for tensor in tensors)


def tensors_of(source: nn.Module | Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    """Return the parameters of a module, or the given tensors as an iterable."""
    if isinstance(source, nn.Module):
        return source.parameters()
    return [source] if isinstance(source, Tensor) else source
