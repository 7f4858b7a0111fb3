"""Curvature is measured in the precision of the parameters, whatever a model's code asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)


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
