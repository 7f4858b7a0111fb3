"""Which dimension of a tensor counts units; every other one counts samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity._validation import is_int


def channel_dim_of(tensor: Tensor, channel_dim: int | None = None) -> int:
    """The dimension that counts the units, by default the one that torch's own layers use.

    ==================  ===========  =====================================
    shape               units        samples
    ==================  ===========  =====================================
    ``(N, d)``          ``d``        ``N``
    ``(N, T, d)``       ``d``        ``N · T``: every token is a sample
    ``(N, C, H, W)``    ``C``        ``N · H · W``: every position is one
    ``(N, C, D, H, W)``  ``C``       ``N · D · H · W``
    ==================  ===========  =====================================

    Args:
        tensor: Real floating-point numbers in at least two dimensions.
        channel_dim: Another one: 1 for ``(N, C, L)``, -1 for ``(N, H, W, C)``. Negative counts from the end.

    Returns:
        A number from 0 to ``tensor.ndim - 1``.

    Raises:
        TypeError: If ``tensor`` is not a tensor of floating-point numbers.
        ValueError: If it has fewer than two dimensions, no samples or no units, or is on the meta device, or if
            ``channel_dim`` is not one of its dimensions.

    Example:
        >>> channel_dim_of(torch.zeros(8, 3, 32, 32)), channel_dim_of(torch.zeros(8, 20, 64))
        (1, 2)
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"expected a tensor of floating-point numbers, (samples, units), and got {found}")
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
    """The features as a matrix, one row a sample and one column a unit: shape ``(N, d)``, the tensor's own dtype.

    Example:
        >>> rows_of(torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8192, 3])
    """
    dim = channel_dim_of(features, channel_dim)
    return features.movedim(dim, -1).reshape(-1, features.shape[dim])


def pieces_of(features: Tensor, channel_dim: int | None = None) -> tuple[Tensor, ...]:
    """The features in pieces of some samples each, to be turned into wider numbers one by one.

    On a CPU they fit its cache, which takes half the time; elsewhere they only bound the memory.
    """
    samples = int(channel_dim_of(features, channel_dim) == 0)
    numbers = 2**18 if features.device.type == "cpu" else 2**24
    pieces: tuple[Tensor, ...] = features.split(max(numbers * features.shape[samples] // features.numel(), 1), samples)
    return pieces


def sample_count(features: Tensor, channel_dim: int | None = None) -> int:
    """How many samples there are, positions and tokens included."""
    return features.numel() // features.shape[channel_dim_of(features, channel_dim)]


def finite(statistic: Tensor, of: str) -> Tensor:
    """The statistic itself.

    Raises:
        ValueError: If it is not finite.
    """
    if not torch.isfinite(statistic).all():
        raise ValueError(
            f"the {of} hold NaN or infinite numbers, or numbers whose sum overflows: find out where they come from, "
            "for instance with torch.autograd.set_detect_anomaly(True)"
        )
    return statistic
