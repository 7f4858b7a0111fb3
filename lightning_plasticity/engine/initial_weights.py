"""Store the initial weights of a model, and load weights into its copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plasticity.messages import MisconfigurationError


class InitialWeights:
    """The first value of every parameter and buffer of a model, on the CPU and in its own dtype."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def store(self, model: nn.Module) -> bool:
        """Store the value of every parameter and buffer that is new, or that has another shape than before.

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
            if name not in self.values or self.values[name].shape != tensor.shape:
                self.values[name] = tensor.detach().cpu().clone()
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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_weights(copy: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of a copy of a model, their dtype included.

    Args:
        copy: The copy.
        model: The model that it is a copy of. Tensors that a custom ``__deepcopy__`` shares with it stay as they are.
        values: The values by name.
    """
    shared = {id(tensor) for tensor in named_tensors(model).values()}
    with torch.no_grad():
        for name, tensor in named_tensors(copy).items():
            if id(tensor) in shared:
                continue
            value = values[name]
            try:
                if tensor.dtype == value.dtype:
                    tensor.copy_(value)
                    continue
            except RuntimeError:
                # A buffer that is expanded, or was made in inference mode, cannot be written to.
                if isinstance(tensor, nn.Parameter):
                    raise
            tensor.data = value.to(device=tensor.device, copy=True)
