"""Find the unit dimension of a tensor and reshape the tensor to one row per sample and one column per unit."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity._validation import is_int


def channel_dim_of(tensor: Tensor, channel_dim: int | None = None) -> int:
    """Return the dimension that counts the units, by default the one that torch's own layers use.

    Every other dimension counts samples:

    ==================  ===========  =====================================
    shape               units        samples
    ==================  ===========  =====================================
    ``(N, d)``          ``d``        ``N``
    ``(N, T, d)``       ``d``        ``N · T``, one per token
    ``(N, C, H, W)``    ``C``        ``N · H · W``, one per position
    ``(N, C, D, H, W)``  ``C``       ``N · D · H · W``
    ==================  ===========  =====================================

    Args:
        tensor: Floating-point tensor with at least two dimensions.
        channel_dim: The unit dimension where it is another one: 1 for ``(N, C, L)``, -1 for ``(N, H, W, C)``. A
            negative value counts from the end.

    Returns:
        The dimension, from 0 to ``tensor.ndim - 1``.

    Raises:
        TypeError: If ``tensor`` is not a tensor of floating-point numbers.
        ValueError: If ``tensor`` has fewer than two dimensions, no samples or no units, or is on the meta device, or if
            ``channel_dim`` is not one of its dimensions.

    Example:
        >>> channel_dim_of(torch.zeros(8, 3, 32, 32)), channel_dim_of(torch.zeros(8, 20, 64))
        (1, 2)
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        received = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"expected a tensor of floating-point numbers, (samples, units), and got {received}")
    if tensor.ndim < 2:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} does not tell samples from units: write tensor[None] for one "
            "sample, or tensor[:, None] for one unit"
        )
    if tensor.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} holds no samples or no units")
    if tensor.is_meta:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} on the meta device holds no numbers to measure")
    if channel_dim is None:
        return tensor.ndim - 1 if tensor.ndim <= 3 else 1
    if not is_int(channel_dim) or not -tensor.ndim <= channel_dim < tensor.ndim:
        raise ValueError(f"channel_dim={channel_dim!r} is not a dimension of a tensor of shape {tuple(tensor.shape)}")
    return channel_dim % tensor.ndim


def rows_of(features: Tensor, channel_dim: int | None = None) -> Tensor:
    """Return the features as a matrix ``(N, d)``, one row per sample and one column per unit, in their own dtype.

    Example:
        >>> rows_of(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8192, 3])
    """
    dim = channel_dim_of(features, channel_dim)
    return features.movedim(dim, -1).reshape(-1, features.shape[dim])


def pieces_of(features: Tensor, channel_dim: int | None = None) -> tuple[Tensor, ...]:
    """Split the features along a sample dimension, so that one piece at a time can be cast to a wider dtype.

    On a CPU a piece fits into the cache, which halves the time; on other devices the split only bounds the memory.
    """
    sample_dim = int(channel_dim_of(features, channel_dim) == 0)
    entries = 2**18 if features.device.type == "cpu" else 2**24
    length = max(entries * features.shape[sample_dim] // features.numel(), 1)
    pieces: tuple[Tensor, ...] = features.split(length, sample_dim)
    return pieces


def sample_count(features: Tensor, channel_dim: int | None = None) -> int:
    """Count the samples; every position and every token is one."""
    return features.numel() // features.shape[channel_dim_of(features, channel_dim)]


def finite(statistic: Tensor, source: str) -> Tensor:
    """Return the statistic if all of its entries are finite.

    Args:
        statistic: A statistic that is NaN or infinite where the data are, such as their sum.
        source: The data in the words of the error message, in the plural: ``"features"``.

    Raises:
        ValueError: If an entry is NaN or infinite.
    """
    if not torch.isfinite(statistic).all():
        raise ValueError(
            f"the {source} hold NaN or infinite numbers, or numbers whose sum overflows: find out where they come "
            "from, for instance with torch.autograd.set_detect_anomaly(True)"
        )
    return statistic
