"""Record the outputs of a network that its loss is computed from, and how far a training step moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.functional.outputs import movement, relative_movement
from lightning_plasticity.isolation.batches import tensors_in
from lightning_plasticity.isolation.state import isolated_rng, preserve_buffers

_LOSSES = {getattr(F, name) for name in dir(F) if name.endswith("_loss") or "cross_entropy" in name or name == "kl_div"}
"""The loss functions of torch."""

_MAX_ENTRIES = 2**16
"""Number of entries of a tensor that are kept, evenly spaced: the outputs of a language model are large."""


class StepOutputs(NamedTuple):
    """The outputs of a network before and after a step, on its batch and on other samples.

    Each is a list of the tensors that loss functions have received, and of the loss as its last element.
    """

    batch_before: list[Tensor]
    others_before: list[Tensor]
    batch_after: list[Tensor]
    others_after: list[Tensor]

    @property
    def have_outputs(self) -> bool:
        """Whether loss functions have received the same tensors before and after."""
        shapes = [[tensor.shape for tensor in tensors] for tensors in self]
        return len(shapes[0]) > 1 and shapes[:2] == shapes[2:]


def outputs_on(context: ProbeContext, model: nn.Module, batch: Any) -> list[Tensor]:
    """Return what loss functions receive from a copy of a model on a batch, and the loss, without a trace in the copy.

    Its modules are in the modes that they are in, and random numbers are the same at each call.

    Args:
        context: The context that the model is a copy of.
        model: The copy.
        batch: The batch.
    """
    arguments = _LossArguments()
    with preserve_buffers(model), isolated_rng(), torch.no_grad(), arguments:
        torch.manual_seed(0)
        loss = context.loss_on(model, batch)
    return [*arguments.seen, loss]


def churn_of_steps(steps: Sequence[StepOutputs]) -> float:
    """Return the churn over several steps, each from the same weights.

    It is that of the tensors that the loss functions of torch receive, targets included, which do not move. Where the
    loss is computed in another way, it is that of the loss.

    Args:
        steps: The outputs before and after each step.

    Returns:
        The result of :func:`~lightning_plasticity.functional.churn`; NaN if there is no step, if the outputs do not
        move on the batches of the steps, or if they are not finite.
    """
    if not steps:
        return math.nan
    kept = slice(-1) if all(step.have_outputs for step in steps) else slice(-1, None)
    on_batch = [_movement(step.batch_before[kept], step.batch_after[kept]) for step in steps]
    on_others = [_movement(step.others_before[kept], step.others_after[kept]) for step in steps]
    return relative_movement(torch.cat(on_others), torch.cat(on_batch)).item()


def _movement(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    return torch.cat([movement(*pair).flatten() for pair in zip(before, after, strict=True)])


class _LossArguments(TorchFunctionMode):
    """A mode that keeps the tensors of floating-point numbers that loss functions receive, or some of their entries."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _LOSSES:
            received = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
            # A copy: the loss may overwrite its arguments.
            self.seen += [tensor.flatten()[:: tensor.numel() // _MAX_ENTRIES + 1].clone() for tensor in received]
        return func(*args, **(kwargs or {}))
