r"""Compute soft ranks of the features: effective rank, stable rank and srank, which the literature often confuses.

Each is a function of the singular values :math:`\sigma_i` of the feature matrix :math:`F` of shape ``(N, d)``, one row
per sample, not centred. Each lies between 1 and :math:`\min(N, d)`, and is 0 for a zero matrix. Use more samples than
there are units; otherwise the number of samples bounds the rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plasticity._validation import check_number
from lightning_plasticity.functional.layouts import channel_dim_of, finite, pieces_of, rows_of

SRANK_DELTA = 0.01
"""Value of Kumar et al. 2020."""

_ROUNDING = 1e-9
"""Relative tolerance of the srank: equal singular values make exact ties, which rounding must not decide."""


def effective_rank(features: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Compute the effective rank :math:`\exp(-\sum_i p_i \log p_i)` with :math:`p_i = \sigma_i / \sum_j \sigma_j`.

    Args:
        features: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A number from 1 to ``min(N, d)``; 0 if all features are zero.

    Raises:
        ValueError: If there are no samples or units, or some feature is not finite.

    References:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example:
        >>> round(effective_rank(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).item(), 6)
        2.0
    """
    return entropy_rank(singular_values(features, channel_dim))


def stable_rank(features: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Compute the stable rank :math:`\lVert F \rVert_F^2 / \lVert F \rVert_2^2 = \sum_i \sigma_i^2 / \sigma_1^2`.

    Dohare et al. 2024 and several code bases call :func:`srank` the stable rank, and others the participation ratio
    :math:`(\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4`.

    Args:
        features: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``, or a weight matrix.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A number from 1 to ``min(N, d)``; 0 if all features are zero.

    Raises:
        ValueError: If there are no samples or units, or some feature is not finite.

    References:
        Rudelson and Vershynin 2007, "Sampling from large matrices", arXiv math/0503442.

    Example:
        >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 6)
        1.5
    """
    return squared_ratio(singular_values(features, channel_dim))


def srank(features: Tensor, delta: float = SRANK_DELTA, *, channel_dim: int | None = None) -> Tensor:
    r"""Count the largest singular values that make up the fraction :math:`1 - \delta` of the sum of all.

    The srank is :math:`\min \{k : \sum_{i \le k} \sigma_i \ge (1 - \delta) \sum_i \sigma_i\}`. Sums that differ by one
    part in 10⁹ or less count as equal.

    Args:
        features: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``.
        delta: The fraction :math:`\delta` of the sum to leave out, in [0, 1).
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        An integer from 1 to ``min(N, d)``; 0 if all features are zero.

    Raises:
        ValueError: If there are no samples or units, some feature is not finite, or ``delta`` is out of range.

    References:
        Kumar et al. 2020, "Implicit under-parameterization inhibits data-efficient deep RL", arXiv 2010.14498.

    Example:
        >>> srank(torch.diag(torch.tensor([100.0, 50.0, 1.0]))).item()
        2.0
    """
    return leading_count(singular_values(features, channel_dim), valid_delta(delta))


def entropy_rank(values: Tensor, multiplicity: Tensor | None = None) -> Tensor:
    r"""Compute the exponential of the Shannon entropy of the values, normalised to a sum of 1 in magnitude.

    For the singular values of a matrix, this is its effective rank.

    Args:
        values: Singular values or eigenvalues, shape ``(k,)``. Their signs do not matter.
        multiplicity: Number of times that each value occurs, shape ``(k,)``; by default 1.

    Returns:
        A scalar, float64; 0 if all values are zero.

    Example:
        >>> round(entropy_rank(torch.tensor([1.0, 1.0, 0.0])).item(), 6)
        2.0
    """
    magnitude = values.double().abs()
    counts = torch.ones_like(magnitude) if multiplicity is None else multiplicity.double()
    total = (counts * magnitude).sum()
    p = magnitude / torch.where(total == 0, 1, total)
    rank = torch.exp(-(counts * torch.xlogy(p, p)).sum())
    return torch.where(total == 0, 0, rank)


def squared_ratio(values: Tensor) -> Tensor:
    r"""Compute the stable rank :math:`\sum_i \sigma_i^2 / \sigma_1^2` from singular values ``(k,)`` in any order."""
    largest = values.max()
    return (values / torch.where(largest == 0, 1, largest)).square().sum()


def leading_count(values: Tensor, delta: float) -> Tensor:
    """Compute the srank from singular values ``(k,)`` in descending order; NaN if one is not finite."""
    sums = values.cumsum(0)
    reached = sums >= (1 - delta - _ROUNDING) * sums[-1]
    count = torch.where(sums[-1] == 0, 0, (~reached).sum() + 1).double()
    return torch.where(torch.isfinite(sums[-1]), count, math.nan)


def valid_delta(delta: float) -> float:
    r"""Return :math:`\delta`.

    Raises:
        ValueError: If it is not in [0, 1).
    """
    check_number("[0, 1)", None, "the share of the sum of singular values to leave out, such as 0.01", delta=delta)
    return delta


def singular_values(features: Tensor, channel_dim: int | None = None) -> Tensor:
    """Compute the singular values of the feature matrix, shape ``(min(N, d),)``, descending, float64.

    Raises:
        ValueError: If some feature is not finite.
    """
    # Without the check the decomposition would raise an error, or return finite numbers, depending on the device.
    values: Tensor = torch.linalg.svdvals(finite(rows_of(features, channel_dim), "features").double())
    return values


def second_moments(features: Tensor, channel_dim: int | None = None) -> Tensor:
    r"""Compute :math:`F^\top F`, shape ``(d, d)``, float64, which can be summed over batches and devices."""
    dim = channel_dim_of(features, channel_dim)
    moments = features.new_zeros((features.shape[dim],) * 2, dtype=torch.float64)
    for piece in pieces_of(features, dim):
        rows = rows_of(piece, dim).double()
        moments += rows.T @ rows
    return moments


def singular_values_of_moments(moments: Tensor) -> Tensor:
    r"""Compute the singular values of :math:`F` from the eigenvalues of :math:`F^\top F` or :math:`F F^\top`.

    Values below :math:`2 \sqrt{\epsilon \sqrt{d}}\, \sigma_1`, which is 1e-7 of the largest one for 1000 units, are
    smaller than the rounding errors of the eigenvalues and are set to zero. Otherwise they would add up for a matrix
    without full rank.

    Args:
        moments: Shape ``(d, d)``, float64.

    Returns:
        Shape ``(d,)``, descending; NaN if some moment is not finite.
    """
    # The decomposition of a matrix with NaN or infinite entries may raise an error, or never return.
    if not torch.isfinite(moments).all():
        return moments.new_full((len(moments),), math.nan)
    squares = torch.linalg.eigvalsh(moments).flip(0)
    floor = 4 * math.sqrt(len(moments)) * torch.finfo(squares.dtype).eps * squares[0]
    return torch.where(squares > floor, squares, 0).sqrt()
