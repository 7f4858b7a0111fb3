"""Differentiate the penalty of a regularizer, and add gradients to those of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.sharded_weights import sharded_like
from lightning_plasticity.isolation.state import device_of

if TYPE_CHECKING:
    from lightning_plasticity.interventions.base import Regularizer


def differentiate_penalty(
    regularizer: Regularizer, model: nn.Module, parameters: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the penalty of a regularizer and its gradients; ``None`` where it does not depend on a parameter.

    Raises:
        TypeError: If ``penalty`` does not return a scalar tensor.
        ValueError: If a gradient is not finite.
    """
    with torch.enable_grad(), torch.autocast(device_of(model).type, enabled=False):
        penalty: object = regularizer.penalty(model)
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            received = f"one of shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise TypeError(f"{regularizer.name}.penalty must return a scalar tensor, not {received}")
        # All parameters that the penalty depends on may be frozen.
        if not penalty.requires_grad:
            return penalty, [None] * len(parameters)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(penalty, parameters, allow_unused=True)
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError("a gradient is not finite")
    return penalty, gradients


def add_gradients(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums of gradients; ``None`` where both are."""
    return [a if b is None else b if a is None else a + b for a, b in zip(first, second, strict=True)]


def accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float) -> None:
    """Add gradients, times a factor, to ``.grad`` of parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        shard = sharded_like(parameter, gradient.detach())
        if parameter.grad is None:
            # In the layout of the parameter, which fused optimizers assume.
            parameter.grad = torch.zeros_like(parameter).add_(shard, alpha=factor)
        elif parameter.grad.is_sparse:
            # nn.Embedding(sparse=True): a dense tensor cannot be added to a sparse one in place.
            parameter.grad = (factor * shard + parameter.grad).to(parameter.dtype)
        else:
            parameter.grad.add_(shard, alpha=factor)
