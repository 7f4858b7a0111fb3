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
    total = value.to(reachable(value.device, torch.distributed.get_backend()), copy=True)
    torch.distributed.all_reduce(total)
    return total.to(value.device)


def reachable(device: torch.device, backend: str) -> torch.device:
    """Where a tensor of this device must be to be sent: NCCL knows nothing but what is on the GPU of the process."""
    return torch.device("cuda") if backend == "nccl" and device.type != "cuda" else device


def mean_over_processes(value: Tensor) -> Tensor:
    """As :func:`sum_over_processes`, the mean."""
    total = sum_over_processes(value)
    return total if total is value else total / torch.distributed.get_world_size()
