"""What the callback costs in a Trainer. Run: python -m benchmarks.overhead.

Contenders train fits of whole tasks of 500 steps with a TensorBoardLogger, and take turns after every 20 steps; counted
is process CPU time with one thread. Printed is the median over rounds of what each adds to the fit without a callback
in the same round, and the smallest and largest: where steps are long, two fits differ by more than the callback costs.
Hence also the time that the fit spent in the callback's own hooks, as a share of the rest of the same fit; it leaves
out what a monitor does during the forward pass. ``empty`` is a callback whose hooks do nothing, so that its share is
that of the clock; ``idle`` is ours while the task never changes; ``defaults`` probes the curvature of the network and
of its initial weights and monitors the hidden layers at each task, and draws a picture at the end of each fit; the last
looks at the hidden layers every 50 steps too.
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
"""Makes a network, the data, and the size of a batch."""


class Classifier(LightningModule):
    """Trains by Adam."""

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
    """Permuted digits, and an MLP."""
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
    """Has hooks for every step, as ours, and does nothing in them."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Nothing."""

    def on_after_backward(self, *_: Any) -> None:
        """Nothing."""

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing."""


class Clock:
    """Adds up the time that is spent in the hooks of callbacks."""

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
    """Lets the other contenders go on from time to time."""

    hand_over: Callable[[], None]
    given = 0

    def __iter__(self) -> Any:
        """Return the batches."""
        for batch in super().__iter__():
            self.given += 1
            if self.given % TURN == 0:
                self.hand_over()
            yield batch


def contender(
    stream: Stream, callbacks: list[Callback], folder: str, *, tasks: int, one_task: bool = False
) -> Callable[[Callable[[], None]], None]:
    """Every call is a fit."""
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


def cost(name: str, stream: Stream, rounds: int, tasks: int) -> None:
    """One table."""

    def callback(every_n_steps: int | None = TASK, **options: Any) -> SpectralCollapseCallback:
        detector = TaskDetector(every_n_steps=every_n_steps)
        return SpectralCollapseCallback(collapse=Collapse(below=1e-9), task_detector=detector, **options)

    with tempfile.TemporaryDirectory() as folder:
        make = partial(contender, stream, folder=folder, tasks=tasks)
        callbacks: dict[str, list[Callback]] = {
            "nothing": [],
            "empty": [Empty()],
            "idle": [callback(None)],
            "defaults": [callback()],
            "defaults, monitor_every_n_steps=50": [callback(monitor_every_n_steps=50)],
        }
        clocks = {who: Clock(theirs) for who, theirs in callbacks.items()}
        contenders = {who: make(theirs, one_task=who == "idle") for who, theirs in callbacks.items()}
        take_turns(contenders)  # warms up
        for clock in clocks.values():
            clock.seconds = 0.0
        seconds = [take_turns(contenders) for _ in range(rounds)]
    without = statistics.median(each["nothing"] for each in seconds)
    print(f"{name}: {1e3 * without / (tasks * TASK):.2f} ms a step without a callback; added:")
    for who in list(contenders)[1:]:
        added = [100 * (each[who] / each["nothing"] - 1) for each in seconds]
        spread = f"({min(added):.1f} to {max(added):.1f})"
        inside, whole = clocks[who].seconds, sum(each[who] for each in seconds)
        hooks = f"in its hooks {100 * inside / (whole - inside):.2f} %"
        bar = f"   bar {BARS[who]}" if who in BARS else ""
        print(f"  {who:<36}{statistics.median(added):>7.1f} %   {spread:<16}{hooks}{bar}", flush=True)


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
