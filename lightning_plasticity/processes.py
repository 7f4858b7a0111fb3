"""Processes that train together decide together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.batches import concatenated


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all_processes(value: Any) -> list[Any]:
    """What each of the processes that train together has, in the order of their ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    values[torch.distributed.get_rank()] = value
    return values


def gathered(batch: Any) -> Any:
    """One batch of the samples of all processes."""
    return concatenated(of_all_processes(batch), like=batch)


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes of ``torch.distributed``; the tensor itself if there is one only.

    Every process must ask at the same point. What is decided from it is then the same everywhere.
    """
    if not is_distributed():
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
