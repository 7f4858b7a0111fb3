"""Validate the model, batch and loss of a curvature problem, and compute in full precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_plasticity._validation import is_str_list
from lightning_plasticity.isolation.precision import HALF

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""

Progress = Callable[[int, int], None]
"""Called after each matrix-vector product as ``progress(done, total)``; ``total`` is an upper bound."""


def trainable_parameters(model: nn.Module, selection: str | Collection[str] | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name.

    Args:
        model: The model.
        selection: Select the parameters that :func:`parameters_named` finds by this name or pattern, or any of several.

    Raises:
        ValueError: If no parameter is selected, the parameters are not all float32 or all float64, one of them is not
            initialised, or the selection is neither a string nor strings.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to probe")
    if uninitialized := [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(f"{uninitialized[0]!r} is not initialised yet: run one forward pass before the probe")
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"the parameters are {names}; curvature needs all of them in float32 or all in float64: probe model.float()"
        )
    if selection is None:
        return parameters
    if not isinstance(selection, str) and not is_str_list(selection):
        raise ValueError(
            f"parameters={selection!r} must be a pattern of names, such as 'encoder.*', several of them, or None"
        )
    matching = {name: parameters[name] for name in parameters_named(model, selection) if name in parameters}
    if not matching:
        raise ValueError(f"parameters={selection!r} matches none of the trainable parameters {list(parameters)}")
    return matching


def parameters_named(model: nn.Module, selection: str | Collection[str]) -> dict[str, nn.Parameter]:
    """Return the parameters with certain names, in the order of the model.

    Args:
        model: The model.
        selection: A name or a pattern, in which ``*`` and ``?`` are wildcards, or several. A tied parameter is selected
            by any of its names.

    Example:
        >>> list(parameters_named(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["0.*", "1.bias"]))
        ['0.weight', '0.bias', '1.bias']
    """
    wanted = {selection} if isinstance(selection, str) else set(selection)
    every_name = list(model.named_parameters(remove_duplicate=False))
    # The names of all parameters of a large model are compared quickly, and patterns slowly.
    patterns = wanted - {name for name, _ in every_name}
    selected = {
        id(parameter)
        for name, parameter in every_name
        if name in wanted or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in selected}


def check_loss(loss: Tensor) -> None:
    """Check that a loss is a finite scalar with a graph.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        returned = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) returned {returned}; it must return the mean loss, a scalar tensor")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any trainable parameter (was it detached, under no_grad, or computed by "
            "a network that no optimizer trains?)"
        )
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss on the probe batch is {loss.item()}: there is no curvature to measure. Look for NaN or infinite "
            "values in the batch and the weights"
        )


NOT_FINITE = (
    "the curvature of the loss on the probe batch is NaN or infinite although the loss is not. Look for a square root "
    "or a norm of zero, or a logarithm, in the model and the loss"
)
"""Error message for a matrix, a product or a gradient that is not finite."""


class full_precision(TorchFunctionMode):  # noqa: N801 (a context manager)
    """Leave out autocast and casts to half precision in every torch function, wherever the model or the loss has them.

    Rounding errors of half precision are larger than most eigenvalues.

    Raises:
        ValueError: If a tensor with a gradient is computed in half precision all the same.

    Example:
        >>> x = torch.ones(2, 2, requires_grad=True)
        >>> with full_precision(), torch.autocast("cpu", torch.bfloat16):
        ...     product = x @ x
        >>> product.dtype
        torch.float32
        >>> with full_precision():
        ...     cast = x.bfloat16()
        >>> cast.dtype
        torch.float32
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function without autocast and casts, and check the dtype of its result."""
        func, args, kwargs = _without_cast(func, args, kwargs or {})
        device = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype in HALF and result.requires_grad:
            raise ValueError(
                f"the model or the loss computes {getattr(func, '__name__', func)!r} in {result.dtype}, in which "
                "curvature drowns in rounding errors: pass a loss_fn without casts to half precision"
            )
        return result


def _without_cast(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
    """Return a call in the precision of its tensor, or else the default one, if it asks for half precision."""
    is_cast = func in (Tensor.half, Tensor.bfloat16)
    if not is_cast and not any(isinstance(arg, torch.dtype) and arg in HALF for arg in (*args, *kwargs.values())):
        return func, args, kwargs
    first = args[0] if args and isinstance(args[0], Tensor) else None
    is_full = first is not None and first.is_floating_point() and first.dtype not in HALF
    dtype = first.dtype if first is not None and is_full else torch.get_default_dtype()
    if is_cast:
        return Tensor.to, (first, dtype), kwargs
    args = [dtype if isinstance(arg, torch.dtype) and arg in HALF else arg for arg in args]
    kwargs = {name: dtype if isinstance(arg, torch.dtype) and arg in HALF else arg for name, arg in kwargs.items()}
    return func, args, kwargs


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal numbers on the CPU in float64: the same numbers for every device and precision.

    Args:
        shape: Shape of the result.
        like: A tensor with the dtype and the device of the result.
        generator: A CPU generator; by default one seeded with 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(like)
