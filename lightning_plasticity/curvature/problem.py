"""What a curvature is of: a model, a batch and a loss, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""

Progress = Callable[[int, int], None]
"""Called after each product with a matrix: the number of those done, and of all of them at most."""


def trainable_parameters(model: nn.Module, pattern: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name.

    Args:
        model: The model.
        pattern: Only those whose name matches; ``*`` and ``?`` are wildcards.

    Raises:
        ValueError: If there are none, they are not all float32 or all float64, or the pattern is no string.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to probe")
    if uninitialized := [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(f"{uninitialized[0]!r} is not initialised yet: run one forward pass before the probe")
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"the parameters are {found}; curvature needs all of them in float32 or all in float64: probe model.float()"
        )
    if pattern is None:
        return parameters
    if not isinstance(pattern, str):
        raise ValueError(f"parameters={pattern!r} must be a pattern of names, such as 'encoder.*', or None")
    every_name = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter has several
    chosen = {id(parameter) for name, parameter in every_name.items() if fnmatchcase(name, pattern)}
    matching = {name: parameter for name, parameter in parameters.items() if id(parameter) in chosen}
    if not matching:
        raise ValueError(f"parameters={pattern!r} matches none of the trainable parameters {list(parameters)}")
    return matching


def check_loss(loss: Tensor) -> None:
    """What every probe needs of a loss.

    Raises:
        ValueError: If it is not a finite scalar with a graph.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) returned {found}; it must return the mean loss, a scalar tensor")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any trainable parameter (was it detached, or under no_grad?)")
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss on the probe batch is {loss.item()}: there is no curvature to measure. Look for NaN or infinite "
            "values in the batch and the weights"
        )


NOT_FINITE = (
    "the curvature of the loss on the probe batch is NaN or infinite although the loss is not. Look for a square root "
    "or a norm of zero, or a logarithm, in the model and the loss"
)
"""Said of a matrix or a gradient that is not finite."""
