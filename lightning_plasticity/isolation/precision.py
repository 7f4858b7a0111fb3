"""Convert a model in half precision to float32 for a measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
"""Data types in which rounding errors are larger than most eigenvalues."""


@contextlib.contextmanager
def in_full_precision(model: nn.Module, batch: Any) -> Iterator[Any]:
    """Convert a model in half precision to float32, and back on exit; yield the batch, converted likewise."""
    if not any(parameter.dtype in HALF for parameter in model.parameters()):
        yield batch
        return
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        model.float()
        yield apply_to_collection(batch, Tensor, lambda t: t.float() if t.is_floating_point() else t)
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, originals in buffers:
            module._buffers.update(originals)
