"""What a curvature is of: a model, a batch and a loss, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""

Progress = Callable[[int, int], None]
"""Called after each product with a matrix: the number of those done, and of all of them at most."""

HALF = (torch.float16, torch.bfloat16)


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


class full_precision(TorchFunctionMode):  # noqa: N801 (a context manager)
    """Switches autocast off within every torch function, also where the code in between has switched it on.

    Rounding errors of half precision are larger than most eigenvalues.

    Raises:
        ValueError: If something with a gradient is computed in half precision nonetheless.

    Example:
        >>> x = torch.ones(2, 2, requires_grad=True)
        >>> with full_precision(), torch.autocast("cpu", torch.bfloat16):
        ...     product = x @ x
        >>> product.dtype
        torch.float32
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every torch function."""
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in HALF and result.requires_grad:
            raise ValueError(
                f"the model or the loss computes {getattr(func, '__name__', func)!r} in {result.dtype}, in which "
                "curvature drowns in rounding errors: pass a loss_fn without casts to half precision"
            )
        return result


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers, drawn on the CPU in float64.

    Args:
        shape: The shape.
        like: A tensor of the precision and on the device that the result shall have.
        generator: A CPU generator; by default one seeded with 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(like)
