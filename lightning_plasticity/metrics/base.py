"""What all metrics here have in common: sums in float64 that take their shape from the first data."""

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

    A state starts as a zero without dimensions and takes the shape of what is first added to it, so that nobody has to
    say how many units there are. Before devices are summed they agree on the shapes: one without any data takes part.
    Sums stay in float64 whatever a network they are part of is converted to, ``set_dtype`` included.

    Args:
        kwargs: What every metric of torchmetrics takes.
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
                    f"{type(self).__name__} has seen {state.shape[-1]} units and now gets {value.shape[-1]}: "
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
            self._agree_on_shapes(process_group or self.process_group)
        super().sync(dist_sync_fn, process_group, should_sync, distributed_available)

    def _agree_on_shapes(self, group: Any | None) -> None:
        sums = {name: state for name in self._defaults if isinstance(state := getattr(self, name), Tensor)}
        mine = {name: tuple(state.shape) for name, state in sums.items()}
        everyone: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, mine, group=group)
        for name, state in sums.items():
            shapes = {theirs[name] for theirs in everyone if theirs[name]}
            if len(shapes) > 1:
                raise ValueError(
                    f"the processes give {type(self).__name__} different numbers of units: {name} has the shapes "
                    f"{sorted(shapes)}"
                )
            for shape in shapes:
                setattr(self, name, state.expand(shape).clone())

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def moved(state: Tensor) -> Tensor:  # to another device, and never to fewer digits
            there = fn(state)
            return there if there.dtype == state.dtype else state.to(there.device)

        super()._apply(moved, *args, **kwargs)
        return self

    @override
    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any | None = None) -> Any:
        """Plots a value or several, by default the current one; needs matplotlib.

        Args:
            val: What ``forward`` or ``compute`` returned, or a list of it.
            ax: The axes of matplotlib to draw in.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


def is_empty(data: Tensor) -> bool:
    """Whether a batch holds nothing: it adds nothing then, and its shape may be that of no layer."""
    return isinstance(data, Tensor) and data.numel() == 0


def finite_or_nan(value: Tensor) -> Tensor:
    """The value, or NaN where it is infinite: what is not a number must look like it."""
    return torch.where(torch.isfinite(value), value, math.nan)
