r"""In how many directions do the features spread? Three ranks that are often confused.

All are taken of the feature matrix :math:`F` itself, ``(N, d)``, one row a sample: not centred, singular values not
squared unless said. All are between 1 and :math:`\min(N, d)`, and 0 for a matrix that is zero: take more samples than
there are units, or the number of samples is what you measure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plasticity._validation import check_number
from lightning_plasticity.functional.layouts import channel_dim_of, finite, pieces_of, rows_of

SRANK_DELTA = 0.01
"""Kumar 2020."""

_ROUNDING = 1e-9
"""Relative rounding that must not decide about a tie in the srank: equal singular values make exact ties."""


def effective_rank(features: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Effective rank: :math:`\exp(-\sum_i p_i \log p_i)` with :math:`p_i = \sigma_i / \sum_j \sigma_j`.

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
    r"""Stable rank: :math:`\lVert F \rVert_F^2 / \lVert F \rVert_2^2 = \sum_i \sigma_i^2 / \sigma_1^2`.

    What the Nature paper and several code bases call stable rank is :func:`srank`, and what some others do is the
    participation ratio :math:`(\sum_i \sigma_i^2)^2 / \sum_i \sigma_i^4`.

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
    r"""Number of the largest singular values that make up the share :math:`1 - \delta` of their sum.

    :math:`\min \{k : \sum_{i \le k} \sigma_i \ge (1 - \delta) \sum_i \sigma_i\}`, where a difference of one part in
    10⁹ counts as none.

    Args:
        features: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``.
        delta: :math:`\delta` in [0, 1).
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A whole number from 1 to ``min(N, d)``; 0 if all features are zero.

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
    """Effective rank of a list of singular values or eigenvalues: their signs do not count.

    Args:
        values: Shape ``(k,)``.
        multiplicity: How often each occurs, shape ``(k,)``; once each by default.

    Returns:
        0 if all of them are zero.

    Example:
        >>> round(entropy_rank(torch.tensor([1.0, 1.0, 0.0])).item(), 6)
        2.0
    """
    magnitude = values.double().abs()
    times = torch.ones_like(magnitude) if multiplicity is None else multiplicity.double()
    total = (times * magnitude).sum()
    share = magnitude / torch.where(total == 0, 1, total)
    rank = torch.exp(-(times * torch.xlogy(share, share)).sum())
    return torch.where(total == 0, 0, rank)


def squared_ratio(values: Tensor) -> Tensor:
    """Stable rank of a list of singular values in any order."""
    largest = values.max()
    return (values / torch.where(largest == 0, 1, largest)).square().sum()


def leading_count(values: Tensor, delta: float) -> Tensor:
    """The srank of a list of singular values, descending."""
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
    """Singular values of the feature matrix, shape ``(min(N, d),)``, descending, float64.

    Raises:
        ValueError: If some feature is not finite: the decomposition would not always say so.
    """
    values: Tensor = torch.linalg.svdvals(finite(rows_of(features, channel_dim), "features").double())
    return values


def second_moments(features: Tensor, channel_dim: int | None = None) -> Tensor:
    r"""The matrix :math:`F^\top F` that can be summed over batches and devices: shape ``(d, d)``, float64."""
    dim = channel_dim_of(features, channel_dim)
    moments = features.new_zeros((features.shape[dim],) * 2, dtype=torch.float64)
    for piece in pieces_of(features, dim):
        rows = rows_of(piece, dim).double()
        moments += rows.T @ rows
    return moments


def singular_values_of_moments(moments: Tensor) -> Tensor:
    r"""Singular values of :math:`F`, from the eigenvalues of :math:`F^\top F` or :math:`F F^\top`.

    What is below :math:`2 \sqrt{\epsilon \sqrt{d}}\, \sigma_1`, 1e-7 of the largest for 1000 units, drowns in the
    rounding of the larger ones and is taken as zero: of matrices without full rank it would add up.

    Args:
        moments: Shape ``(d, d)``, float64.

    Returns:
        Shape ``(d,)``, descending; NaN if some moment is not finite.
    """
    if not torch.isfinite(moments).all():  # the decomposition would fail, or hang
        return moments.new_full((len(moments),), math.nan)
    squares = torch.linalg.eigvalsh(moments).flip(0)
    floor = 4 * math.sqrt(len(moments)) * torch.finfo(squares.dtype).eps * squares[0]
    return torch.where(squares > floor, squares, 0).sqrt()
