"""Provide the base class of all metrics: sums in float64 that take their shape from the first data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self, override

from lightning_plasticity.distributed.agreement import sync_errors


class PlasticityMetric(Metric):
    """A metric whose states are sums over batches and devices.

    A state starts as a zero without dimensions and takes the shape of the first addend, so the number of units is no
    argument. Processes agree on the shapes before they sum the states, so that one without data takes part. States stay
    in float64 under ``set_dtype`` and when a module that contains the metric is cast.

    Args:
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _add_sums(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _accumulate(self, **addends: Tensor | float) -> None:
        device = next(addend.device for addend in addends.values() if isinstance(addend, Tensor))
        if device.type == "meta":
            raise RuntimeError(
                f"{type(self).__name__} got data on the meta device, where there are no numbers to measure"
            )
        for name, addend in addends.items():
            state, value = getattr(self, name), torch.as_tensor(addend, dtype=torch.float64, device=device)
            if state.ndim and state.shape != value.shape:
                raise ValueError(
                    f"{type(self).__name__} has accumulated {state.shape[-1]} units and now gets {value.shape[-1]}: "
                    "reset() it first, or use one metric for each layer"
                )
            setattr(self, name, state.to(device) + value)

    @override
    def sync(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if should_sync and not self._is_synced and dist.is_available() and dist.is_initialized():
            sync_errors()
            self._sync_shapes(process_group or self.process_group)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _sync_shapes(self, group: Any | None) -> None:
        """Expand the states of a process without data to the shapes that they have in the other processes."""
        states = {name: state for name in self._defaults if isinstance(state := getattr(self, name), Tensor)}
        local_shapes = {name: tuple(state.shape) for name, state in states.items()}
        all_shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(all_shapes, local_shapes, group=group)
        for name, state in states.items():
            shapes = {rank_shapes[name] for rank_shapes in all_shapes if rank_shapes[name]}
            if len(shapes) > 1:
                raise ValueError(
                    f"the processes give {type(self).__name__} different numbers of units: {name} has the shapes "
                    f"{sorted(shapes)}"
                )
            for shape in shapes:
                setattr(self, name, state.expand(shape).clone())

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def move(state: Tensor) -> Tensor:
            # A cast to half precision would lose digits of the sums; only the device may change.
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        super()._apply(move, *args, **kwargs)
        return self

    @override
    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any | None = None) -> Any:
        """Plot one value or several; requires matplotlib.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of results; by default the current value.
            ax: The matplotlib axes to draw in; by default new ones.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


def is_empty(data: Tensor) -> bool:
    """Return whether a batch has no entries. It adds nothing then, and its shape may not be that of the layer."""
    return isinstance(data, Tensor) and data.numel() == 0


def finite_or_nan(value: Tensor) -> Tensor:
    """Return the value, with NaN where it is infinite, so that all results of invalid data look alike."""
    return torch.where(torch.isfinite(value), value, math.nan)
