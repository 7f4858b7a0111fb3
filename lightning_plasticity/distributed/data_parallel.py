"""Train a copy of a model on the batches of all ranks as DDP does: average gradients, and share buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import (
    all_reduce_mean,
    all_reduce_sum,
    backend_device,
    fatal_if_unreachable,
    is_distributed,
    sync_errors,
)


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


def broadcast_buffers(model: nn.Module) -> None:
    """Give a model the buffers of rank 0, as DDP does before the first forward pass after a step.

    All ranks must call this at the same point. Without a process group it does nothing.

    Args:
        model: The model, a copy of the one in training.
    """
    if not is_distributed():
        return
    buffers = list(model.buffers())
    sync_errors(point=f"a broadcast of {len(buffers)} buffers")
    with fatal_if_unreachable():
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            alike = [buffer for buffer in buffers if buffer.dtype == dtype]
            values = torch.cat([buffer.detach().flatten() for buffer in alike])
            sent = values.to(backend_device(values.device, torch.distributed.get_backend()))
            torch.distributed.broadcast(sent, 0)
            for buffer, part in zip(alike, sent.to(values.device).split([b.numel() for b in alike]), strict=True):
                buffer.data = part.view_as(buffer).clone()
