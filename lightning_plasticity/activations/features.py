"""The features of the hidden layers with the graph that leads to them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.activations.tracker import ActivationTracker
from lightning_plasticity.functional.layouts import rows_of


def hidden_features(model: nn.Module, forward: Callable[[nn.Module], object]) -> tuple[dict[str, list[Tensor]], int]:
    """What the activation functions of the hidden layers return, as in the plasticity monitor, but with gradients.

    Args:
        model: The model.
        forward: Runs it once.

    Returns:
        Feature matrices, shape ``(N, d)``, by name of the layer, one each time that the layer is called; and how many
        samples there were: the first dimension of the first activations.

    Raises:
        ValueError: If no activation function was called whose results feed another layer.
    """
    kept = _Kept()
    watch = _WatchWithGraph(model, kept, ())
    watch.start()
    try:
        forward(model)
    finally:
        watch.stop()
    if not kept.features:
        raise ValueError(
            f"forward(model) has called no activation function of {type(model).__name__} whose results feed another "
            "layer: there are no hidden features whose rank could be raised"
        )
    return kept.features, kept.samples


class _Kept:
    """Observes by keeping."""

    channel_dim: int | None = None

    def __init__(self) -> None:
        self.features: dict[str, list[Tensor]] = {}
        self.samples = 0
        self.output = torch.empty(0)

    def selects(self, name: str) -> bool:
        return True

    def observe(self, activations: Tensor, channel_dim: int | None) -> tuple[Tensor, int]:
        with torch.enable_grad():
            output = self.output.reshape(activations.shape)
            # A copy: what comes next in the network may change the output in place.
            return rows_of(output, channel_dim).clone(), len(output)

    def report(self, name: str, observed: tuple[Tensor, int], *, assumed: bool, certain: bool) -> None:
        rows, samples = observed
        self.features.setdefault(name, []).append(rows)
        self.samples = self.samples or samples

    def tolerates(self, error: Exception) -> bool:
        return False


class _WatchWithGraph(ActivationTracker):
    """Hands over the tensor itself, where a :class:`ActivationTracker` shows detached ones."""

    def __init__(self, root: nn.Module, kept: _Kept, chosen: Collection[str]) -> None:
        super().__init__(root, kept, chosen)
        self._kept = kept

    @override
    def _observe_tensor(self, name: str, output: Tensor) -> Any:
        self._kept.output = output
        return super()._observe_tensor(name, output)
