"""Are units and features alive? A monitor is asked: on a copy at the start of a task, and on batches in flight."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plasticity.distributed.agreement import all_or_none, all_reduce_sum
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.reporting.errors import ErrorLog
from lightning_plasticity.training.sandbox import LossFunction


def monitored_copy(
    monitor: PlasticityMonitor, module: LightningModule, batch: Any, loss_fn: LossFunction
) -> dict[str, float]:
    """What a monitor sees of one forward pass in evaluation mode.

    Args:
        monitor: Says what is measured. It is not changed.
        module: A copy of the module that may be used up.
        batch: The batch, on the module's device.
        loss_fn: Runs the module on the batch.

    Returns:
        Each measure over all layers, and as ``<measure>/<layer>`` of each.
    """
    monitor = copy.deepcopy(monitor)
    monitor.reset()
    monitor._to_sync = False  # all processes have the same samples; sync_on_compute is heard at the construction only
    monitor.compiled = "eager"  # as everything is in a probe
    monitor.to(module.device)
    with probe_mode(module), monitor.attach(module):
        loss_fn(module, batch)
    return values_of(monitor) if monitor.layers else {}


def values_of(monitor: PlasticityMonitor) -> dict[str, float]:
    """The monitor's numbers as plain floats.

    That ranks of wide layers are estimates is not warned of every time: its documentation says so.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the ranks of .* are estimates", UserWarning)
        return {name: value.item() for name, value in monitor.compute().items()}


class StepMonitor:
    """Watches the batch in flight every few optimizer steps, without an extra forward pass.

    Of the batches between two steps it is the first, and where a batch takes several steps the first after as many.

    Args:
        monitor: Says what is measured. It is not changed.
        every_n_steps: The number of optimizer steps from one look to the next; ``None``: never.
        errors: Where it says what it could not see.
    """

    def __init__(self, monitor: PlasticityMonitor | None, every_n_steps: int | None, errors: ErrorLog) -> None:
        self._monitor = PlasticityMonitor() if monitor is None else copy.deepcopy(monitor)
        self._monitor.suppress_errors = True  # a monitor never kills a run
        self._every_n_steps = every_n_steps
        self._errors = errors
        self.last: int | None = None
        """The optimizer step of the last look, for checkpoints."""
        self._has_succeeded = False

    def begin(self, module: LightningModule, step: int) -> None:
        """Begins to watch, if it is time.

        Raises:
            MisconfigurationException: If the module cannot be looked into, and never could.

        Warns:
            PlasticityWarning: If it could be before.
        """
        if self._every_n_steps is None:
            return
        if self.last is not None and step // self._every_n_steps == self.last // self._every_n_steps:
            return
        self.last = step
        try:
            with all_or_none():
                self._monitor.reset()
                self._monitor.to(module.device)
                self._monitor.attach(module)
        except Exception as error:
            self.cancel()
            if not self._has_succeeded:
                self.last = None  # another fit would find out at its first step, too
                raise MisconfigurationException(f"monitor_every_n_steps: {error}") from error
            self._failed(error)

    def postpone(self) -> None:
        """If it has begun, it will when it is told the next time."""
        if self._monitor.attached:
            self.cancel()
            self.last = None

    def end(self) -> dict[str, float]:
        """What was seen, if anything was watched."""
        if not self._monitor.attached:
            return {}
        try:
            with all_or_none():
                self._monitor.detach()
                if self._monitor.errors:
                    self._failed(self._monitor.errors[0])
                    self._monitor.errors.clear()
                seen = all_reduce_sum(torch.tensor(float(len(self._monitor.layers))))
                values = values_of(self._monitor) if seen else {}
        except Exception as error:
            self._failed(error)
            return {}
        self._has_succeeded = True
        return values

    def cancel(self) -> None:
        """Leaves nothing in the module."""
        if self._monitor.attached:
            self._monitor.detach()

    def _failed(self, error: Exception | str) -> None:
        self._errors.record("monitor", "some activations could not be monitored", error)
