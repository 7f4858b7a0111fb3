"""Processes that train together decide together."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes of ``torch.distributed``; the tensor itself if there is one only.

    Every process must ask at the same point. What is decided from it is then the same everywhere.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total


def mean_over_processes(value: Tensor) -> Tensor:
    """As :func:`sum_over_processes`, the mean."""
    total = sum_over_processes(value)
    return total if total is value else total / torch.distributed.get_world_size()
