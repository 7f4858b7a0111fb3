"""Are units and features alive? A monitor is asked: on a copy at the start of a task, and on batches in flight."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plasticity.failures import Failures
from lightning_plasticity.isolation import probing
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.training_loss import LossFunction


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
    monitor.sync_on_compute = False  # all processes have the same samples
    monitor.compiled = "eager"  # as everything is in a probe
    monitor.to(module.device)
    with probing(module), monitor.attach(module):
        loss_fn(module, batch)
    return values_of(monitor)


def values_of(monitor: PlasticityMonitor) -> dict[str, float]:
    """The monitor's numbers as plain floats; none if it has seen no hidden layer.

    That ranks of wide layers are estimates is not warned of every time: its documentation says so.
    """
    if not monitor.layers:
        return {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the ranks of .* are estimates", UserWarning)
        return {name: value.item() for name, value in monitor.compute().items()}


class StepMonitor:
    """Watches the batch in flight every few optimizer steps, without an extra forward pass.

    Of the batches between two steps it is the first, and where a batch takes several steps the first after as many.

    Args:
        monitor: Says what is measured. It is not changed.
        every_n_steps: The number of optimizer steps from one look to the next; ``None``: never.
        failures: Where it says what it could not see.
    """

    def __init__(self, monitor: PlasticityMonitor | None, every_n_steps: int | None, failures: Failures) -> None:
        self._monitor = PlasticityMonitor() if monitor is None else copy.deepcopy(monitor)
        self._monitor.forgiving = True  # a monitor never kills a run
        self._every_n_steps = every_n_steps
        self._failures = failures
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
        self._monitor.reset()
        self._monitor.to(module.device)
        try:
            self._monitor.attach(module)
        except Exception as error:
            if not self._has_succeeded:
                raise MisconfigurationException(f"monitor_every_n_steps: {error}") from error
            self._failed(error)

    def end(self) -> dict[str, float]:
        """What was seen, if anything was watched."""
        if not self._monitor.attached:
            return {}
        self._monitor.detach()
        if self._monitor.errors:
            self._failed(self._monitor.errors[0])
            self._monitor.errors.clear()
        try:
            values = values_of(self._monitor)
        except Exception as error:
            self._failed(error)
            return {}
        self._has_succeeded = True
        return values

    def abandon(self) -> None:
        """Leaves nothing in the module."""
        if self._monitor.attached:
            self._monitor.detach()

    def _failed(self, error: Exception | str) -> None:
        self._failures.add("monitor", "some activations could not be monitored", error)
