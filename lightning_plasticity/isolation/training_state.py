"""Store the weights and optimizer state of a model, and restore them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_plasticity.isolation.weights import named_tensors


class TrainingState:
    """A copy of the parameters and buffers of a model and of the state of its optimizers.

    Args:
        model: The model.
        optimizers: The optimizers that hold its parameters.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> state, before = TrainingState(layer, []), layer.weight.detach().clone()
        >>> _ = nn.init.zeros_(layer.weight)
        >>> state.restore()
        >>> bool((layer.weight == before).all())
        True
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._weights = [(tensor, tensor.detach().clone()) for tensor in named_tensors(model).values()]
        self._optimizers = [
            (optimizer, {parameter: _cloned(state) for parameter, state in optimizer.state.items()})
            for optimizer in optimizers
        ]

    def restore(self) -> None:
        """Restore the weights and the optimizer state."""
        with torch.no_grad():
            for tensor, value in self._weights:
                tensor.copy_(value)
        for optimizer, states in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update(states)


def _cloned(state: Any) -> Any:
    return apply_to_collection(state, Tensor, lambda tensor: tensor.detach().clone())
