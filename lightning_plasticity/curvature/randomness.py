"""Random numbers that are the same on every device and in every process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, drawn on the CPU in float64.

    Args:
        shape: The shape.
        like: A tensor of the precision and on the device that the result shall have.
        generator: A CPU generator; by default one seeded with 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(like)
