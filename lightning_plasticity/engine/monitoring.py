"""Measure hidden activations: on a copy at the start of a task, and on batches in training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_or_none, all_reduce_sum
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.isolation.state import device_of, probe_mode
from lightning_plasticity.isolation.weights import trained_names, untrained_copies
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.metrics import PlasticityMonitor


def measure_activations(
    monitor: PlasticityMonitor,
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    left_out: Collection[str] = (),
) -> tuple[dict[str, float], str]:
    """Return the measures of a monitor on one forward pass in evaluation mode, and a remark.

    Args:
        monitor: The settings of the measurement. It is not changed.
        model: A copy of the model.
        batch: The batch, on the device of the model.
        loss_fn: Runs the model on the batch.
        left_out: Names of modules that are not measured, such as target networks.

    Returns:
        Each measure over all layers, and of each layer as ``<measure>/<layer>``, empty if no hidden layer ran; and the
        layers whose ranks are estimates, empty if there are none.
    """
    monitor = copy.deepcopy(monitor)
    monitor.reset()
    monitor.left_out = left_out
    # All ranks have the same samples. torchmetrics reads sync_on_compute in its constructor only.
    monitor._to_sync = False
    # Everything runs uncompiled in a probe.
    monitor.compiled = "eager"
    monitor.to(device_of(model))
    with probe_mode(model), monitor.attach(model):
        loss_fn(model, batch)
    estimated = [name for name, layer in monitor.layers.items() if layer.ranks_are_estimates]
    remark = (
        f"the ranks of {', '.join(estimated)} are estimates, from {monitor.max_samples} samples of at most "
        f"{monitor.max_units} units: monitor=PlasticityMonitor(max_samples=..., max_units=...) takes more"
        if estimated
        else ""
    )
    return values_of(monitor) if monitor.layers else {}, remark


def values_of(monitor: PlasticityMonitor) -> dict[str, float]:
    """Return the measures of a monitor as floats.

    The warning that ranks of wide layers are estimates is left out: it would come each time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the ranks of .* are estimates", UserWarning)
        return {name: value.item() for name, value in monitor.compute().items()}


class StepMonitor:
    """Measures the activations of a training batch every few optimizer steps, without an extra forward pass.

    If an optimizer step has several batches, the first one is measured. If a batch takes several steps, the next batch
    after ``every_n_steps`` is measured.

    Args:
        monitor: The settings of the measurement. It is not changed.
        every_n_steps: Number of optimizer steps between two measurements; ``None`` measures nothing.
        errors: Where errors are recorded.
    """

    def __init__(self, monitor: PlasticityMonitor | None, every_n_steps: int | None, errors: ErrorLog) -> None:
        self._monitor = PlasticityMonitor() if monitor is None else copy.deepcopy(monitor)
        # An error in the middle of the model's forward pass would end the run.
        self._monitor.suppress_errors = True
        self.every_n_steps = every_n_steps
        self._errors = errors
        self.last: int | None = None
        """The optimizer step of the last measurement; a part of checkpoints."""
        self._has_succeeded = False

    def begin(self, model: nn.Module, step: int, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Attach the monitor to the model, if a measurement is due.

        Args:
            model: The model.
            step: The number of optimizer steps so far.
            optimizers: The optimizers: copies of the network that none of them trains are not measured.

        Raises:
            MisconfigurationError: If the model cannot be monitored, and never could.

        Warns:
            PlasticityWarning: If the model could be monitored before and cannot be now.
        """
        if self.every_n_steps is None:
            return
        if self.last is not None and step // self.every_n_steps == self.last // self.every_n_steps:
            return
        self.last = step
        try:
            with all_or_none():
                self._monitor.reset()
                self._monitor.left_out = untrained_copies(model, trained_names(model, optimizers))
                self._monitor.to(device_of(model))
                self._monitor.attach(model)
        except Exception as error:
            self.cancel()
            if not self._has_succeeded:
                # The next fit must raise the error, too.
                self.last = None
                raise MisconfigurationError(f"monitor_every_n_steps: {error}") from error
            self._record(error)

    def postpone(self) -> None:
        """Detach the monitor if it is attached, and let :meth:`begin` attach it again."""
        if self._monitor.attached:
            self.cancel()
            self.last = None

    def end(self) -> dict[str, float]:
        """Detach the monitor and return its measures; empty if nothing was measured."""
        if not self._monitor.attached:
            return {}
        try:
            with all_or_none():
                self._monitor.detach()
                if self._monitor.errors:
                    self._record(self._monitor.errors[0])
                    self._monitor.errors.clear()
                num_layers = all_reduce_sum(torch.tensor(float(len(self._monitor.layers))))
                values = values_of(self._monitor) if num_layers else {}
        except Exception as error:
            self._record(error)
            return {}
        self._has_succeeded = True
        return values

    def cancel(self) -> None:
        """Detach the monitor, if it is attached, without a measurement."""
        if self._monitor.attached:
            self._monitor.detach()

    def _record(self, error: Exception | str) -> None:
        self._errors.record("monitor", "some activations could not be monitored", error)
