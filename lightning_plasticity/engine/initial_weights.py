"""Store the initial weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plasticity.isolation.weights import named_tensors
from lightning_plasticity.messages import MisconfigurationError


class InitialWeights:
    """The first value of every parameter and buffer of a model, on the CPU and in its own dtype."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def store(self, model: nn.Module) -> bool:
        """Store the value of every parameter and buffer that is new, or that has another shape than before.

        A tensor that has grown, such as the head of a classifier for more classes, keeps the initial values of the
        entries that it had before: the present ones may be trained rows that were copied into it.

        Returns:
            Whether the model has its initial weights, because none were stored before.

        Raises:
            MisconfigurationError: If a parameter of a lazy layer has no shape yet.
        """
        is_initial = not self.values
        for name, tensor in named_tensors(model).items():
            if is_lazy(tensor):
                raise MisconfigurationError(
                    f"{name!r} gets its shape in the first forward pass, and the probe comes before it: run "
                    f"{type(model).__name__} on one batch before the fit, as in its __init__"
                )
            before = self.values.get(name)
            if before is None or before.shape != tensor.shape:
                self.values[name] = tensor.detach().cpu().clone()
                if before is not None and _has_grown(before, tensor):
                    self.values[name][tuple(slice(size) for size in before.shape)] = before
        return is_initial

    def clear(self) -> None:
        """Remove all values."""
        self.values = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the values by name, for checkpoints."""
        return self.values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values that :meth:`state_dict` returned."""
        self.values = dict(state)


def _has_grown(before: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor holds the entries of an earlier one in its first rows and columns."""
    return before.dim() == tensor.dim() and all(old <= new for old, new in zip(before.shape, tensor.shape, strict=True))
