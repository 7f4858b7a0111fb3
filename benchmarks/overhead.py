"""Measure the cost of the callback in a Trainer. Run: python -m benchmarks.overhead.

Each contender fits whole tasks of 500 steps with a TensorBoardLogger. The contenders take turns after every 20 steps,
on one thread, and are timed by process CPU time. The table shows the median over rounds of the time that each contender
adds to the fit without a callback in the same round, with the minimum and the maximum. Where steps are long, two fits
differ by more than the cost of the callback. Therefore the table also shows the time in the callback's own hooks, as a
fraction of the rest of the same fit; it leaves out the work of a monitor during the forward pass.

The contenders: ``empty`` is a callback whose hooks do nothing, so that its share is that of the clock. ``idle`` is ours
while the task never changes. ``defaults`` probes the network and its initial weights and monitors the hidden layers at
each task, and draws a figure at the end of each fit. The last one also monitors the hidden layers every 50 steps.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.curvature import conv
from benchmarks.timing import take_turns
from lightning_plasticity import Collapse, SpectralCollapseCallback, TaskDetector

TASK, TURN = 500, 20
BARS = {"idle": "≤ 1 %", "defaults": "≤ 3 %"}

Stream = Callable[[], tuple[nn.Module, Dataset[Any], int]]
"""Returns a network, the data and the batch size."""


class Classifier(LightningModule):
    """A classifier trained by Adam."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.task_id: int | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters())


def digits(width: int, depth: int, batch_size: int) -> tuple[nn.Module, Dataset[Any], int]:
    """Return an MLP and permuted digits."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    layers: list[nn.Module] = []
    for inputs in (64, *[width] * (depth - 1)):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    return net, TensorDataset(images[:, torch.randperm(64)], labels), batch_size


def images() -> tuple[nn.Module, Dataset[Any], int]:
    """Return the conv net of the curvature benchmark and random images in batches of 128."""
    net, (x, y) = conv(1024)
    return net, TensorDataset(x, y), 128


class Empty(Callback):
    """A callback with the same hooks for every step as ours, which do nothing."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Do nothing."""

    def on_after_backward(self, *_: Any) -> None:
        """Do nothing."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Do nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Do nothing."""


class Clock:
    """Sums up the time in the hooks of callbacks."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.seconds = 0.0
        for callback in callbacks:
            for name in dir(Callback):
                if getattr(type(callback), name) is not getattr(Callback, name) and name.startswith("on_"):
                    setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any, **options: Any) -> None:
            started = time.process_time()
            hook(*arguments, **options)
            self.seconds += time.process_time() - started

        return timed


class TakingTurns(DataLoader[Any]):
    """A data loader that lets the other contenders run after every ``TURN`` batches."""

    hand_over: Callable[[], None]
    num_batches = 0

    def __iter__(self) -> Any:
        """Return the batches."""
        for batch in super().__iter__():
            self.num_batches += 1
            if self.num_batches % TURN == 0:
                self.hand_over()
            yield batch


def contender(
    stream: Stream, callbacks: list[Callback], folder: str, *, tasks: int, one_task: bool = False
) -> Callable[[Callable[[], None]], None]:
    """Return a function that runs one fit, and calls its argument after every ``TURN`` steps."""
    torch.manual_seed(0)
    net, data, size = stream()
    module = Classifier(net)
    module.task_id = 0 if one_task else None
    logger = TensorBoardLogger(folder)

    def fit(hand_over: Callable[[], None]) -> None:
        trainer = Trainer(
            max_steps=tasks * TASK,
            accelerator="cpu",
            callbacks=callbacks,
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = TakingTurns(data, batch_size=size, shuffle=True, drop_last=True)
        loader.hand_over = hand_over
        trainer.fit(module, loader)

    return fit


def cost(title: str, stream: Stream, rounds: int, tasks: int) -> None:
    """Print the table of one stream."""

    def callback(every_n_steps: int | None = TASK, **options: Any) -> SpectralCollapseCallback:
        detector = TaskDetector(every_n_steps=every_n_steps)
        return SpectralCollapseCallback(collapse=Collapse(above=1e9), task_detector=detector, **options)

    with tempfile.TemporaryDirectory() as folder:
        make = partial(contender, stream, folder=folder, tasks=tasks)
        callbacks: dict[str, list[Callback]] = {
            "nothing": [],
            "empty": [Empty()],
            "idle": [callback(None)],
            "defaults": [callback()],
            "defaults, monitor_every_n_steps=50": [callback(monitor_every_n_steps=50)],
        }
        clocks = {name: Clock(of_contender) for name, of_contender in callbacks.items()}
        contenders = {name: make(of_contender, one_task=name == "idle") for name, of_contender in callbacks.items()}
        # The first round warms up.
        take_turns(contenders)
        for clock in clocks.values():
            clock.seconds = 0.0
        seconds = [take_turns(contenders) for _ in range(rounds)]
    without = statistics.median(each["nothing"] for each in seconds)
    print(f"{title}: {1e3 * without / (tasks * TASK):.2f} ms a step without a callback; added:")
    for name in list(contenders)[1:]:
        added = [100 * (each[name] / each["nothing"] - 1) for each in seconds]
        spread = f"({min(added):.1f} to {max(added):.1f})"
        in_hooks, total = clocks[name].seconds, sum(each[name] for each in seconds)
        hooks = f"in its hooks {100 * in_hooks / (total - in_hooks):.2f} %"
        bar = f"   bar {BARS[name]}" if name in BARS else ""
        print(f"  {name:<36}{statistics.median(added):>7.1f} %   {spread:<16}{hooks}{bar}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cost("permuted digits, MLP 64-256²-10, batch 64", partial(digits, 256, 2, 64), options.rounds, tasks=2)
    cost("permuted digits, MLP 64-1000³-10, batch 128", partial(digits, 1000, 3, 128), options.rounds, tasks=2)
    cost("conv net on images, batch 128", images, options.rounds, tasks=1)
