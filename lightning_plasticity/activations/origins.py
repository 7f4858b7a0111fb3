"""Track the origins of the tensors of a forward pass: their axes, activations and last layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_plasticity.activations.unit_axes import Axes


@dataclass(eq=False)
class LayerCall:
    """A call of a layer with weights.

    Attributes:
        owner: The name of the layer.
        index: The position of the call among all calls.
        num_activations: The number of activation functions that its output has gone through.
    """

    owner: str
    index: int
    num_activations: int = 0


@dataclass(eq=False)
class Activations:
    """The statistics of a tensor, kept until the tensor turns out to belong to a hidden layer.

    Attributes:
        name: The name of the layer.
        axes: The axes of the tensor.
        observed: The statistics by the dimension that may count units; the first one is assumed.
        certain: Whether that dimension was known when they were observed.
        reported: Whether they were reported, or replaced by the product that they are a factor of.
    """

    name: str
    axes: Sequence[Axes]
    observed: dict[int, Any]
    certain: bool
    reported: bool = False


@dataclass
class Origin:
    """The origin of a tensor.

    Attributes:
        axes: The axes that its dimensions stand for.
        activations: The activations in it that no layer has read yet.
        result: The activations among them that the tensor itself is.
        layer_call: The last call of a layer with weights that it comes from.
        is_mask: Whether it was made by comparing units.
        is_zero: Whether it was made as a tensor of zeros.
    """

    axes: Sequence[Axes] = ()
    activations: tuple[Activations, ...] = ()
    result: Activations | None = None
    layer_call: LayerCall | None = None
    is_mask: bool = False
    is_zero: bool = False

    @property
    def has_units(self) -> bool:
        """``True`` if the tensor comes from units of the network."""
        return bool(self.axes or self.activations)


class Origins:
    """A mapping from living tensors to their origins."""

    def __init__(self) -> None:
        # By id, since tensors compare elementwise. The weak reference shows that the id was not reused.
        self._origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}

    def __len__(self) -> int:
        return len(self._origins)

    def __setitem__(self, tensor: Tensor, origin: Origin) -> None:
        key, origins = id(tensor), self._origins
        self._origins[key] = weakref.ref(tensor, lambda _: origins.pop(key, None)), origin

    def get(self, tensor: Tensor) -> Origin | None:
        """Return the origin of a tensor, if it is known."""
        reference, origin = self._origins.get(id(tensor), (None, None))
        return origin if reference is not None and reference() is tensor else None

    def clear(self) -> None:
        """Remove all tensors."""
        self._origins.clear()


def latest_layer_call(origins: Iterable[Origin]) -> LayerCall | None:
    """Return the call of the layer that ran last, among those that several tensors come from."""
    calls = [origin.layer_call for origin in origins if origin.layer_call is not None]
    return max(calls, key=lambda call: call.index, default=None)
