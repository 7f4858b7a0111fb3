"""Processes that train together decide together."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes of ``torch.distributed``; the tensor itself if there is one only.

    Every process must ask at the same point. What is decided from it is then the same everywhere.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()
