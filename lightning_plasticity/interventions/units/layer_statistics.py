"""What the layers that read a model's units see while it is trained, gathered from one optimizer step to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_reduce_sum
from lightning_plasticity.layers import input_channel_dim

Statistic = Callable[[Tensor, int], Tensor]
"""From the input of a layer and the dimension of its channels to sums over all other dimensions,
``(statistics, channels)``."""


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer has read.

    Args:
        sums: What the statistic says, summed over calls and processes, ``(statistics, channels)``, on the CPU in
            float64.
        values: Number of values of each channel, those at several positions included.
        samples: Number of samples: the length of the first dimension.
    """

    sums: Tensor
    values: float
    samples: float


class UnitStatistics:
    """Listens at layers while a model is trained: in training mode, with gradients.

    Other calls, such as those of validation, are not heard. Nothing is run for it. (Layers inside an activation
    checkpoint are called twice for each batch, and heard twice.)

    Args:
        model: The model.
        channels: Number of input channels of each layer to listen at, by name.
        statistic: What to sum up.
    """

    def __init__(self, model: nn.Module, channels: Mapping[str, int], statistic: Statistic) -> None:
        layers = {name: model.get_submodule(name) for name in channels}
        self._listeners = {
            name: _StatisticsHook(statistic, channels[name], next(layer.parameters()), input_channel_dim(layer))
            for name, layer in layers.items()
        }
        self._handles = [
            layer.register_forward_pre_hook(self._listeners[name], with_kwargs=True) for name, layer in layers.items()
        ]
        self._unheard = _weights(model, channels)
        self._unheard_steps = 0

    def heard(self) -> dict[str, LayerStatistics]:
        """What was heard since :meth:`forget` in all processes together, by layer; layers not called are not there.

        Every process must ask at the same point. The one moment that waits for the device.
        """
        packed = [listener.packed() for listener in self._listeners.values()]
        together = torch.cat([vector.to(packed[0].device) for vector in packed])
        total = all_reduce_sum(together, ", ".join(self._listeners)).cpu().double()
        result = {}
        for (name, listener), vector in zip(self._listeners.items(), total.split(list(map(len, packed))), strict=True):
            values, samples = vector[:2].tolist()
            if values:
                result[name] = LayerStatistics(vector[2:].view_as(listener.nothing), values, samples)
        return result

    def hooks_never_ran(self, model: nn.Module, heard: Mapping[str, LayerStatistics]) -> bool:
        """Whether the layers are trained although nothing is heard. To be asked once after every step.

        A step that leaves the layers as they are, such as that of another optimizer, says nothing, and one may belong
        to a forward pass from before the start.

        Args:
            model: The model.
            heard: What was heard of the step.
        """
        before, self._unheard = self._unheard, {} if heard else _weights(model, self._unheard)
        trained = any(not torch.equal(weight, before[name]) for name, weight in self._unheard.items())
        self._unheard_steps += trained
        return trained and self._unheard_steps > 1

    def forget(self) -> None:
        """Begins anew."""
        for listener in self._listeners.values():
            listener.forget()

    def stop(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


def _weights(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Copies, to tell whether they have changed."""
    weights = {name: next(model.get_submodule(name).parameters()) for name in layers}
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


class _StatisticsHook:
    """A forward pre-hook; an object rather than a function, so that a copy of the model listens for itself."""

    def __init__(self, statistic: Statistic, channels: int, weight: Tensor, dim: int) -> None:
        self.statistic, self.dim = statistic, dim
        silence = weight.detach().new_zeros(1, channels, *[1] * (-dim - 1))
        self.nothing = statistic(silence, dim).zero_().to(torch.promote_types(weight.dtype, torch.float32))
        self.sums = self.nothing
        self.values = self.samples = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        if not x.numel():
            return
        if x.ndim == -self.dim:  # one sample, without a batch
            x = x[None]
        with torch.no_grad():
            self.sums = self.sums + self.statistic(x, self.dim).to(self.nothing)
        self.values += x.numel() // x.shape[self.dim]
        self.samples += len(x)

    def forget(self) -> None:
        self.sums = self.nothing
        self.values = self.samples = 0

    def packed(self) -> Tensor:
        """All of it as one vector: number of values, of samples, and the sums."""
        return torch.cat([self.nothing.new_tensor([self.values, self.samples]), self.sums.flatten()])


def other_dims(x: Tensor, dim: int) -> list[int]:
    """All dimensions of a tensor but one."""
    return [d for d in range(x.ndim) if d != dim % x.ndim]


def by_unit(values: Tensor, owner: Tensor, num_units: int) -> Tensor:
    """Sums a value of each channel over the channels of each unit: ``(channels,)`` to ``(units,)``.

    Args:
        values: The values.
        owner: The unit that each channel belongs to; -1 means none.
        num_units: How many units there are.
    """
    return values.new_zeros(num_units).index_add_(0, owner[owner >= 0], values[owner >= 0])
