"""Average gradients over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plasticity.distributed.agreement import all_reduce_mean, all_reduce_sum, is_distributed


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace ``.grad`` of parameters by its mean over ranks, as DDP does after a backward pass.

    A gradient that is missing counts as zero, and stays missing if it is on all ranks. All ranks must call this at the
    same point. Without a process group it does nothing.

    Args:
        parameters: The parameters, the same on all ranks, on one device.
    """
    if not is_distributed():
        return
    exists = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    counts = all_reduce_sum(exists, "the numbers of ranks with a gradient").tolist()
    reached = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
    if not reached:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in reached]
    mean = all_reduce_mean(torch.cat([gradient.flatten() for gradient in gradients]), "gradients")
    for parameter, part in zip(reached, mean.split([p.numel() for p in reached]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
