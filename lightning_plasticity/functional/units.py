"""Compute diagnostics of single units: dormant, dead and cloned units, norms of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_plasticity._validation import check_number
from lightning_plasticity.functional.layouts import channel_dim_of, finite, pieces_of, rows_of, sample_count

DORMANT_THRESHOLD = 0.025
"""Middle one of the values of Sokar et al. 2023: 0, 0.025 and 0.1."""

GRADIENT_DORMANT_THRESHOLD = 0.01
"""Value of Liu et al. 2025."""

CLONED_THRESHOLD = 0.95
"""Value of the code of Joudaki et al. 2025."""

_CONSTANT = 1e-10
"""Share of the variance in the mean square up to which a unit is constant: its variation is rounding of float32."""


def dormant_fraction(
    activations: Tensor, threshold: float = DORMANT_THRESHOLD, *, channel_dim: int | None = None
) -> Tensor:
    r"""Compute the fraction of the units that are dormant: far less active than the average of their layer.

    The score of unit :math:`i` is :math:`s_i = \mathbb{E}|h_i| \,/\, \tfrac1d \sum_k \mathbb{E}|h_k|`, with
    expectations over samples. The unit is dormant if :math:`s_i \le \tau`. If all activations of a layer are zero, all
    of its units are dormant.

    Args:
        activations: :math:`h`, ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``, of any activation function. A unit of a
            saturating function that is stuck at ±1 has a large magnitude, so it is not dormant by this definition.
        threshold: :math:`\tau` in [0, 1], in units of the layer's mean.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If there are no samples or units, some activation is not finite, or ``threshold`` is out of range.

    References:
        Sokar et al. 2023, "The dormant neuron phenomenon in deep reinforcement learning", arXiv 2302.12902.

    Example:
        >>> dormant_fraction(torch.tensor([[1.0, 0.01, 0.0, 3.0], [2.0, 0.01, 0.0, 1.0]])).item()
        0.5
    """
    return dormant_share(finite(magnitude_sums(activations, channel_dim), "activations"), valid_threshold(threshold))


def dead_fraction(activations: Tensor, *, channel_dim: int | None = None) -> Tensor:
    """Compute the fraction of the units that are exactly zero on every sample.

    Args:
        activations: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A fraction in [0, 1]. Units with small or negative activations are not dead.

    Raises:
        ValueError: If there are no samples or units, or some activation is not finite.

    References:
        Dohare et al. 2024, "Loss of plasticity in deep continual learning", Nature 632, 768-774.

    Example:
        >>> dead_fraction(torch.tensor([[1.0, 0.0, -1e-9, 0.0], [0.0, 0.0, 0.0, 3.0]])).item()
        0.25
    """
    return dormant_fraction(activations, 0.0, channel_dim=channel_dim)


def cloned_fraction(
    activations: Tensor, threshold: float = CLONED_THRESHOLD, *, channel_dim: int | None = None
) -> Tensor:
    r"""Compute the fraction of the units that are clones: a later unit of the layer has nearly the same activations.

    With the Pearson correlation over samples, :math:`c_{ij} = \operatorname{corr}(h_i, h_j)`, unit :math:`i` is a clone
    if :math:`c_{ij} > \tau` for some :math:`j > i`: of :math:`k` equal units, :math:`k - 1` are clones, whatever their
    scales. Units with equal incoming and equal outgoing weights have equal gradients, so gradient descent never tells
    them apart again. A unit that is constant, such as a dead one, has no correlation and is no clone.

    The code of the source does not subtract the mean, which makes clones of most units whose activations are positive,
    such as those of a sigmoid.

    Args:
        activations: :math:`h`, ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``. A few samples correlate by chance: take
            10 or more.
        threshold: :math:`\tau` in [0, 1].
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A fraction in [0, 1).

    Raises:
        ValueError: If there are no samples or units, some activation is not finite, or ``threshold`` is out of range.

    References:
        Joudaki et al. 2025, "Barriers for learning in an evolving world: mathematical understanding of loss of
        plasticity", arXiv 2510.00304.

    Example:
        >>> cloned_fraction(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0], [2.0, 1.0, 4.0, 0.0]])).item()
        0.25
    """
    rows = finite(rows_of(activations, channel_dim), "activations").double()
    return cloned_share_of_rows(rows, valid_correlation(threshold))


def gradient_dormant_fraction(
    gradient: Tensor, threshold: float = GRADIENT_DORMANT_THRESHOLD, *, channel_dim: int = 0
) -> Tensor:
    r"""Compute the fraction of the units whose incoming weights have far smaller gradients than average (GraMa).

    The score is that of :func:`dormant_fraction` with :math:`\mathbb{E}|\partial L / \partial w_{\mathrm{in},i}|`, the
    mean over the incoming weights of unit :math:`i`, in place of the mean activation. Unlike the activations, the
    gradients are informative for GELU, residual networks and LayerNorm too.

    Args:
        gradient: Gradient of the loss with respect to a weight, ``(out, in)`` or ``(out, in, *kernel)``, as in
            ``weight.grad``.
        threshold: :math:`\tau` in [0, 1], in units of the layer's mean.
        channel_dim: The dimension that counts units: 0, or 1 for transposed convolutions.

    Returns:
        A fraction in [0, 1]; 1 for a gradient that is zero everywhere.

    Raises:
        ValueError: If the gradient is empty or not finite, or ``threshold`` is out of range.

    References:
        Liu et al. 2025, "Measure gradients, not activations!", arXiv 2505.24061.

    Example:
        >>> gradient_dormant_fraction(torch.tensor([[1.0, -1.0], [0.001, 0.0], [2.0, 0.0], [1.0, 1.0]])).item()
        0.25
    """
    return dormant_share(finite(magnitude_sums(gradient, channel_dim), "gradients"), valid_threshold(threshold))


def feature_norm(features: Tensor, *, channel_dim: int | None = None) -> Tensor:
    r"""Compute the mean norm of the feature vectors, :math:`\mathbb{E} \lVert h \rVert_2`.

    Args:
        features: ``(N, d)``, ``(N, T, d)`` or ``(N, C, H, W)``; every position or token has its own vector.
        channel_dim: The dimension that counts units; by default the last one, or 1 from four dimensions on.

    Returns:
        A norm, in the units of the features.

    Raises:
        ValueError: If there are no samples or units, or some feature is not finite.

    References:
        Lyle et al. 2024, "Disentangling the causes of plasticity loss in neural networks", arXiv 2402.18762.

    Example:
        >>> feature_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item()
        3.0
    """
    return finite(norm_sum(features, channel_dim), "features") / sample_count(features, channel_dim)


def magnitude_sums(activations: Tensor, channel_dim: int | None = None) -> Tensor:
    """Sum the magnitudes of every unit over the samples: shape ``(d,)``, float64, not finite where an entry is not.

    Positions are summed in float32 (in float64 for float64 inputs), then samples in float64. Summing a feature map in
    float64 from the start takes seven times as long and changes the result by less than 1e-6.
    """
    dim = channel_dim_of(activations, channel_dim)
    samples, *positions = (other for other in range(activations.ndim) if other != dim)
    wide = torch.promote_types(activations.dtype, torch.float32)
    sums = activations.new_zeros(activations.shape[dim], dtype=torch.float64)
    for piece in pieces_of(activations, dim):
        magnitudes = piece.abs()
        if positions:
            magnitudes = magnitudes.sum(positions, keepdim=True, dtype=wide)
        sums += magnitudes.sum(samples, keepdim=True, dtype=torch.float64).flatten()
    return sums


def unit_sums(activations: Tensor, channel_dim: int | None = None) -> Tensor:
    """Sum the activations of every unit over the samples: shape ``(d,)``, float64, not finite where an entry is not."""
    dim = channel_dim_of(activations, channel_dim)
    parts = [rows_of(piece, dim).sum(0, dtype=torch.float64) for piece in pieces_of(activations, dim)]
    return torch.stack(parts).sum(0)


def norm_sum(features: Tensor, channel_dim: int | None = None) -> Tensor:
    """Sum the norms of the feature vectors, float64.

    Squares are summed in float32 (in float64 for float64 inputs), and again in float64 if they underflow or overflow.
    """
    dim = channel_dim_of(features, channel_dim)
    total = features.new_zeros((), dtype=torch.float64)
    for wide in (torch.promote_types(features.dtype, torch.float32), torch.float64):
        total.zero_()
        # torch.linalg.vector_norm takes seven times as long.
        for piece in pieces_of(features, dim):
            total += piece.to(wide).square().sum(dim).sqrt().sum(dtype=torch.float64)
        if 0 < total < math.inf:
            break
    return total


def dormant_share(magnitudes: Tensor, threshold: float) -> Tensor:
    """Compute the fraction of the units with a magnitude of at most ``threshold`` times the mean.

    Args:
        magnitudes: Sum or mean of the magnitudes of every unit, shape ``(d,)``.
        threshold: In units of the mean over the layer.

    Returns:
        A fraction in [0, 1]; NaN if some magnitude is not finite.
    """
    fraction = (magnitudes <= threshold * magnitudes.mean()).double().mean()
    return torch.where(torch.isfinite(magnitudes).all(), fraction, math.nan)


def cloned_share(moments: Tensor, sums: Tensor, samples: Tensor | float, threshold: float) -> Tensor:
    r"""Compute the fraction of the units that correlate with a later one from sums over samples.

    Args:
        moments: :math:`\sum_n h_n h_n^\top`, shape ``(d, d)``, float64.
        sums: :math:`\sum_n h_n`, shape ``(d,)``, float64.
        samples: Number of samples.
        threshold: The correlation above which two units are clones.

    Returns:
        A fraction in [0, 1); NaN if some moment is not finite.
    """
    covariance = moments - sums[:, None] * sums / samples
    scale = _scale(covariance.diagonal(), moments.diagonal())
    fraction = _share_above(threshold, covariance * scale[:, None] * scale)
    return torch.where(torch.isfinite(moments).all(), fraction, math.nan)


def cloned_share_of_rows(rows: Tensor, threshold: float) -> Tensor:
    """Compute the fraction of the units that correlate with a later one from the samples.

    Args:
        rows: The activations, ``(N, d)``, float64.
        threshold: The correlation above which two units are clones.

    Returns:
        A fraction in [0, 1); NaN if some activation is not finite.
    """
    centred = rows - rows.mean(0)
    scaled = centred * _scale(centred.square().sum(0), rows.square().sum(0))
    # Twice as fast as in float64 where layers are wide, and rounded only after the means are subtracted.
    scaled = scaled.float()
    fraction = _share_above(threshold, scaled.T @ scaled)
    return torch.where(torch.isfinite(rows).all(), fraction, math.nan)


def _scale(centred_squares: Tensor, squares: Tensor) -> Tensor:
    """Return the reciprocal of the length of each centred unit, 0 for a constant one."""
    return torch.where(centred_squares > _CONSTANT * squares, centred_squares, math.inf).rsqrt()


def _share_above(threshold: float, correlations: Tensor) -> Tensor:
    return (correlations > threshold).triu(1).any(1).double().mean()


def valid_threshold(threshold: float, name: str = "threshold") -> float:
    """Return the threshold.

    Raises:
        ValueError: If the threshold is not in [0, 1].
    """
    check_number("[0, 1]", None, "a fraction of the layer's mean magnitude, such as 0.025", **{name: threshold})
    return threshold


def valid_correlation(threshold: float) -> float:
    """Return the threshold of a correlation.

    Raises:
        ValueError: If the threshold is not in [0, 1].
    """
    check_number("[0, 1]", None, "the correlation of two clones, such as 0.95", threshold=threshold)
    return threshold
