"""Record the inputs of the layers that read a model's units, and accumulate statistics of them between steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.distributed.agreement import all_reduce_sum, is_distributed
from lightning_plasticity.interventions.units.groups import UnitGroup
from lightning_plasticity.layers import input_channel_dim

Statistic = Callable[..., Tensor]
"""Maps the input of a layer and its channel dimension, and where it takes them the gradient with respect to this input,
to sums over all other dimensions, ``(statistics, channels)``."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer's input.

    Args:
        sums: The statistic, summed over calls and processes, ``(statistics, channels)``, on the CPU in float64.
        num_values: Number of values of each channel, over all samples and positions.
        num_samples: Number of samples: the length of the first dimension.
        is_finite: Whether all sums are finite.
    """

    sums: Tensor
    num_values: float
    num_samples: float
    is_finite: bool = True


class UnitStatistics:
    """Accumulates statistics of the inputs of layers in the forward passes of training.

    Hooks record calls in training mode with gradients; other calls, such as those of validation, do not count. No
    forward pass is run for the statistics. (Layers inside an activation checkpoint are called twice for each batch, and
    recorded twice.)

    Args:
        model: The model.
        channels: Number of input channels of each layer to observe, by name.
        statistic: The statistic to accumulate.
        with_gradients: Whether the statistic takes gradients: then it is computed in the backward passes of training,
            of what each layer contributes to the gradient of its input. Passes whose gradients are not finite, as with
            a gradient scaler, do not count.
    """

    def __init__(
        self, model: nn.Module, channels: Mapping[str, int], statistic: Statistic, *, with_gradients: bool = False
    ) -> None:
        layers = {name: model.get_submodule(name) for name in channels}
        kind = _GradientStatisticsHook if with_gradients else _StatisticsHook
        self._hooks = {
            name: kind(statistic, channels[name], next(layer.parameters()), input_channel_dim(layer))
            for name, layer in layers.items()
        }
        self._handles = [
            layer.register_forward_pre_hook(self._hooks[name], with_kwargs=True) for name, layer in layers.items()
        ]
        # Copies of the weights while no hook has run: a change shows that the layers are trained all the same.
        self._last_weights = _copy_weights(model, channels)
        self._unobserved_updates = 0

    def reduce(self) -> dict[str, LayerStatistics]:
        """Return the statistics since :meth:`reset`, summed over all processes, by name of the layer.

        Layers that were not called are missing. A collective operation: call it in all processes at the same point. The
        only method that waits for the device.
        """
        hooks = self._hooks.values()
        device = next(iter(hooks)).sums.device
        counts = [[hook.num_values, hook.num_samples] for hook in hooks]
        sums = torch.cat([hook.sums if hook.sums.device == device else hook.sums.to(device) for hook in hooks], dim=1)
        if is_distributed():
            packed = torch.cat([sums.new_tensor(counts).flatten(), sums.flatten()])
            total = all_reduce_sum(packed, ", ".join(self._hooks))
            counts = total[: 2 * len(counts)].view(-1, 2).tolist()
            sums = total[2 * len(counts) :].view_as(sums)
        sums = sums.cpu().double()
        # Layer by layer only if there is one that is not.
        all_finite = math.isfinite(sums.sum().item())
        by_layer = zip(self._hooks, sums.split([hook.sums.shape[1] for hook in hooks], dim=1), counts, strict=True)
        return {
            name: LayerStatistics(x, float(num_values), float(num_samples), all_finite or bool(x.isfinite().all()))
            for name, x, (num_values, num_samples) in by_layer
            if num_values
        }

    def take(self) -> dict[str, tuple[Tensor, int]] | None:
        """Return the sums and number of values of each layer in this process, and reset them, if all were called."""
        hooks = self._hooks.items()
        if not all(hook.num_values for _, hook in hooks):
            return None
        # Hooks that ran are none that were compiled away.
        self._last_weights = {}
        taken = {name: (hook.sums, int(hook.num_values)) for name, hook in hooks}
        self.reset()
        return taken

    def hooks_never_ran(self, model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> bool:
        """Return whether the layers are trained although their hooks do not run. Call it once after every step.

        Only steps that change the layers count, not those of another optimizer; and only from the second one on, since
        the first may belong to a forward pass from before the hooks were registered.

        Args:
            model: The model.
            statistics: The statistics of the step.
        """
        before = self._last_weights
        self._last_weights = {} if statistics else _copy_weights(model, before)
        trained = any(not torch.equal(weight, before[name]) for name, weight in self._last_weights.items())
        self._unobserved_updates += trained
        return trained and self._unobserved_updates > 1

    def reset(self) -> None:
        """Set all statistics to zero."""
        for hook in self._hooks.values():
            hook.reset()

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _copy_weights(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    weights = {name: next(model.get_submodule(name).parameters()) for name in layers}
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


class _StatisticsHook:
    """A forward pre-hook that accumulates a statistic of the layer's input.

    It is an object rather than a function so that a deep copy of the model has statistics of its own.
    """

    def __init__(self, statistic: Statistic, channels: int, weight: Tensor, dim: int) -> None:
        self.statistic, self.dim = statistic, dim
        example = weight.detach().new_zeros(1, channels, *[1] * (-dim - 1))
        self.zeros = self.statistic_of_zeros(example).zero_().to(torch.promote_types(weight.dtype, torch.float32))
        self.sums = self.zeros
        self.num_values: Tensor | int = 0
        self.num_samples: Tensor | int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return
        x = layer_input(args, kwargs).detach()
        if not x.numel():
            return
        # One sample, without a batch dimension.
        if x.ndim == -self.dim:
            x = x[None]
        sums = self.statistic(x, self.dim).to(self.zeros)
        self.sums = self.sums + sums if self.num_values else sums
        self.num_values += x.numel() // x.shape[self.dim]
        self.num_samples += len(x)

    def statistic_of_zeros(self, example: Tensor) -> Tensor:
        return self.statistic(example, self.dim)

    def reset(self) -> None:
        self.sums = self.zeros
        self.num_values = self.num_samples = 0


class _GradientStatisticsHook(_StatisticsHook):
    """A forward pre-hook that accumulates a statistic of the layer's input and of the gradient with respect to it.

    The layer reads an alias of its input, whose gradient is what this layer alone contributes.
    """

    @override
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = layer_input(args, kwargs)
        if not (module.training and torch.is_grad_enabled() and x.requires_grad and x.numel()):
            return None
        alias = x.view_as(x)
        alias.register_hook(lambda gradient: self.add(x.detach(), gradient.detach()))
        return with_layer_input(args, kwargs, alias)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Add the statistic of a backward pass."""
        if x.ndim == -self.dim:
            x, gradient = x[None], gradient[None]
        with torch.no_grad():
            sums = self.statistic(x, self.dim, gradient).to(self.zeros)
            # On the device, which a condition would wait for.
            is_finite = sums.isfinite().all()
            self.sums = self.sums + torch.where(is_finite, sums, 0)
            self.num_values = self.num_values + is_finite * (x.numel() // x.shape[self.dim])
            self.num_samples = self.num_samples + is_finite * len(x)

    @override
    def statistic_of_zeros(self, example: Tensor) -> Tensor:
        return self.statistic(example, self.dim, example)


@contextlib.contextmanager
def recorded_inputs(
    model: nn.Module, layers: Iterable[str], *, differentiable: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs of each of the given layers.

    Args:
        model: The model.
        layers: Names of the layers.
        differentiable: Whether the layers read the copies that are recorded, so that the gradient with respect to a
            copy is what this layer contributes.

    Yields:
        Copies of the inputs of all calls by name of the layer, filled while the layers are called.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            copied = layer_input(args, kwargs).clone()
            inputs[name].append(copied.requires_grad_() if differentiable else copied)
            return with_layer_input(args, kwargs, copied) if differentiable else None

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name), with_kwargs=True) for name in inputs]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a call of a linear or convolution layer."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def with_layer_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of a linear or convolution layer with another input."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def other_dims(x: Tensor, dim: int) -> list[int]:
    """Return all dimensions of a tensor but one."""
    return [d for d in range(x.ndim) if d != dim % x.ndim]


def by_unit(values: Tensor, unit_index: Tensor, num_units: int) -> Tensor:
    """Sum one value per channel over the channels of each unit: ``(..., channels)`` to ``(..., units)``.

    Args:
        values: The values.
        unit_index: The unit of each channel, -1 for channels of none.
        num_units: Number of units.
    """
    # The last entry collects the channels of no unit.
    sums = values.new_zeros(*values.shape[:-1], num_units + 1)
    return sums.index_add_(-1, unit_index % (num_units + 1), values)[..., :-1]


class PooledUnits:
    """The units of several layers, one after the other, so that one operation serves all of them.

    Args:
        groups: The layers.
        called: Names of the consumers that count.
    """

    def __init__(self, groups: Sequence[UnitGroup], called: Container[str]) -> None:
        self.sizes = [group.num_units for group in groups]
        self.num_units = sum(self.sizes)
        self.consumers: list[str] = []
        """The consumers that were called, once for each layer that they read."""
        offset, indices = 0, []
        for group in groups:
            for name, unit_index in group.consumers.items():
                if name in called:
                    self.consumers.append(name)
                    indices.append(torch.where(unit_index < 0, -1, unit_index + offset))
            offset += group.num_units
        self.layer_index = torch.arange(len(groups)).repeat_interleave(torch.tensor(self.sizes))
        """The number of the layer of each unit."""
        self.unit_index = torch.cat(indices)
        """The unit of each channel of these consumers, -1 for channels of none."""
        self._is_one_to_one = torch.equal(self.unit_index, torch.arange(self.num_units))

    def by_unit(self, values: Sequence[Tensor]) -> Tensor:
        """Sum values of each consumer, ``(..., channels)``, over the channels of each unit, ``(..., units)``."""
        joined = torch.cat(list(values), dim=-1)
        return joined if self._is_one_to_one else by_unit(joined, self.unit_index, self.num_units)

    def by_layer(self, values: Tensor) -> Tensor:
        """Sum values of units, ``(..., units)``, over the units of each layer, ``(..., layers)``, in float64."""
        sums = torch.zeros(*values.shape[:-1], len(self.sizes), dtype=torch.float64)
        return sums.index_add_(-1, self.layer_index, values.double())
