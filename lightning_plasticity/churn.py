"""Measure how far a training step moves the outputs of a network that its loss is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.activations.loss_arguments import LossArguments
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.functional.outputs import movement, relative_movement
from lightning_plasticity.isolation.attributes import preserve_attributes
from lightning_plasticity.isolation.state import preserve_buffers, repeatable_rng


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a network on some samples.

    Args:
        tensors: What the loss functions have received.
        loss: The loss.
    """

    tensors: list[Tensor]
    loss: Tensor


def outputs_on(context: ProbeContext, model: nn.Module, batches: Sequence[Any]) -> list[Outputs]:
    """Return the outputs of a copy of a model on each of some batches, without a trace in the copy.

    The modules are in the modes that they are in, and random numbers are the same at each call.

    Args:
        context: The context that the model is a copy of.
        model: The copy.
        batches: The batches.
    """
    outputs = []
    with preserve_buffers(model), preserve_attributes(model), repeatable_rng(), torch.no_grad():
        for batch in batches:
            with LossArguments() as arguments:
                loss = context.training_loss(model, batch)
            outputs.append(Outputs(arguments.seen, loss))
    return outputs


def churn_of_step(before: Sequence[Outputs], after: Sequence[Outputs]) -> float:
    """Return the churn of a training step.

    It is that of the tensors that the loss functions of torch receive, targets included, which do not move. Where the
    loss is computed in another way, it is that of the loss.

    Args:
        before: The outputs on the batch of the step and on other samples.
        after: The same after the step.

    Returns:
        The result of :func:`~lightning_plasticity.functional.churn`; NaN if the outputs on the batch do not move, or
        are not finite.
    """
    pairs = list(zip(before, after, strict=True))
    if all(first.tensors and _shapes(first) == _shapes(second) for first, second in pairs):
        on_batch, on_others = (
            torch.cat([movement(*tensors) for tensors in zip(first.tensors, second.tensors, strict=True)])
            for first, second in pairs
        )
    else:
        on_batch, on_others = (movement(first.loss, second.loss) for first, second in pairs)
    return relative_movement(on_others, on_batch).item()


def _shapes(outputs: Outputs) -> list[torch.Size]:
    return [tensor.shape for tensor in outputs.tensors]
