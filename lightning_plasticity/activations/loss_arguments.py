"""Record the outputs of a network: what the loss functions of torch receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_plasticity.isolation.batches import tensors_in

_LOSSES = {getattr(F, name) for name in dir(F) if name.endswith("_loss") or "cross_entropy" in name or name == "kl_div"}
"""The loss functions of torch."""

_MAX_ENTRIES = 2**16
"""Number of entries of a tensor that are kept, evenly spaced: the outputs of a language model are large."""


class LossArguments(TorchFunctionMode):
    """A mode that keeps the tensors of floating-point numbers that loss functions receive, or some of their entries.

    Targets are among them. In a pass with a graph the entries that are kept have one, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        """The tensors, flattened, in the order in which they were received."""

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
            self.seen += [some_entries(tensor).clone() for tensor in received]
        return func(*args, **(kwargs or {}))


def some_entries(tensor: Tensor) -> Tensor:
    """Return all entries of a tensor as a vector, or evenly spaced ones of a large tensor."""
    return tensor.flatten()[:: tensor.numel() // _MAX_ENTRIES + 1]
