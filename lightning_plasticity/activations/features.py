"""Collect the features of the hidden layers with the autograd graph that leads to them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.activations.tracker import ActivationTracker
from lightning_plasticity.functional.layouts import rows_of


class NoFeaturesError(ValueError):
    """No activation function was called whose output feeds another layer."""


def hidden_features(
    model: nn.Module, forward: Callable[[nn.Module], object], left_out: Collection[str] = ()
) -> tuple[dict[str, list[Tensor]], int]:
    """Return the activations of the hidden layers, as :class:`PlasticityMonitor` finds them, with their graph.

    Args:
        model: The model.
        forward: Runs the model once.
        left_out: Names of modules whose layers do not count.

    Returns:
        Feature matrices, shape ``(N, d)``, by name of the layer, one for each call of the layer; and the number of
        samples, the first dimension of the first activations.

    Raises:
        NoFeaturesError: If no activation function was called whose output feeds another layer.
    """
    sink = _FeatureSink(left_out)
    tracker = _GraphTracker(model, sink, ())
    tracker.start()
    try:
        forward(model)
    finally:
        tracker.stop()
    if not sink.features:
        raise NoFeaturesError(
            f"forward(model) has called no activation function of {type(model).__name__} whose results feed another "
            "layer: there are no hidden features whose rank could be raised"
        )
    return sink.features, sink.samples


class _FeatureSink:
    """An activation sink that stores every activation, apart from those of some modules."""

    channel_dim: int | None = None

    def __init__(self, left_out: Collection[str]) -> None:
        self.left_out = left_out
        self.features: dict[str, list[Tensor]] = {}
        self.samples = 0
        self.output = torch.empty(0)

    def selects(self, name: str) -> bool:
        return not any(name == module or name.startswith(f"{module}.") for module in self.left_out)

    def observe(self, activations: Tensor, channel_dim: int | None) -> tuple[Tensor, int]:
        with torch.enable_grad():
            output = self.output.reshape(activations.shape)
            # Later layers may change the output in place.
            return rows_of(output, channel_dim).clone(), len(output)

    def report(self, name: str, observed: tuple[Tensor, int], *, assumed: bool, certain: bool) -> None:
        rows, samples = observed
        self.features.setdefault(name, []).append(rows)
        self.samples = self.samples or samples

    def tolerates(self, error: Exception) -> bool:
        return False


class _GraphTracker(ActivationTracker):
    """An :class:`ActivationTracker` that hands the sink the tensor with its graph beside the detached one."""

    def __init__(self, root: nn.Module, sink: _FeatureSink, chosen: Collection[str]) -> None:
        super().__init__(root, sink, chosen)
        self._features = sink

    @override
    def observe_output(self, name: str, output: Tensor) -> Any:
        self._features.output = output
        return super().observe_output(name, output)
