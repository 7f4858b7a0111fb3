"""Load weights into a copy of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_weights(copy: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of a copy of a model, in the dtype and on the device that they have.

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
            try:
                tensor.copy_(values[name])
            except RuntimeError:
                # A buffer that is expanded, or was made in inference mode, cannot be written to.
                if isinstance(tensor, nn.Parameter):
                    raise
                tensor.data = values[name].to(tensor, copy=True)


@contextlib.contextmanager
def with_weights_of(copy: nn.Module, model: nn.Module) -> Iterator[None]:
    """Give a copy of a model the parameters and buffers that the model has now, and its own ones back on exit.

    Parameters share the memory of the model's, buffers do not, since running the copy may change them.

    Args:
        copy: The copy.
        model: The model that it is a copy of.
    """
    own = {name: (tensor, tensor.data) for name, tensor in named_tensors(copy).items()}
    try:
        for name, value in named_tensors(model).items():
            tensor, _ = own[name]
            tensor.data = value.data if isinstance(tensor, nn.Parameter) else value.data.clone()
        yield
    finally:
        for tensor, data in own.values():
            tensor.data = data
