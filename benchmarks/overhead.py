"""What the callback costs in a Trainer. Run: python -m benchmarks.overhead.

Each contender trains fits of 1000 steps with a TensorBoardLogger, a task every 500; they alternate, in process CPU time
with one thread, medians. ``idle`` is a callback for which the task never changes; ``defaults`` probes the curvature of
the network and of its initial weights and monitors the hidden layers at each task, and draws a picture at the end of
each fit; the last looks at the hidden layers every 50 steps too.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.curvature import conv
from benchmarks.timing import alternate
from lightning_plasticity import Collapse, SpectralCollapseCallback, TaskDetector

STEPS, TASK = 1000, 500
BARS = {"idle": "≤ 1 %", "defaults": "≤ 3 %"}


class Classifier(LightningModule):
    """Trains by Adam."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.task_id: int | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters())


def digits() -> tuple[nn.Module, Dataset[Any], int]:
    """Permuted digits: 64-256-256-10, batch 64."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return net, TensorDataset(images[:, torch.randperm(64)], labels), 64


def images() -> tuple[nn.Module, Dataset[Any], int]:
    """The conv net of the curvature benchmark on random images, batch 128."""
    net, (x, y) = conv(1024)
    return net, TensorDataset(x, y), 128


def fits(
    stream: Callable[[], tuple[nn.Module, Dataset[Any], int]],
    callback: SpectralCollapseCallback | None,
    folder: str,
    *,
    one_task: bool = False,
) -> Callable[[], None]:
    """A contender: every call is a fit."""
    torch.manual_seed(0)
    net, data, size = stream()
    module = Classifier(net)
    module.task_id = 0 if one_task else None
    logger = TensorBoardLogger(folder)

    def fit() -> None:
        trainer = Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=[] if callback is None else [callback],
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=size, shuffle=True, drop_last=True))

    return fit


def cost(name: str, stream: Callable[[], tuple[nn.Module, Dataset[Any], int]], rounds: int) -> None:
    """One table."""

    def callback(every_n_steps: int | None = TASK, **options: Any) -> SpectralCollapseCallback:
        detector = TaskDetector(every_n_steps=every_n_steps)
        return SpectralCollapseCallback(collapse=Collapse(below=1e-9), task_detector=detector, **options)

    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "nothing": fits(stream, None, folder),
            "idle": fits(stream, callback(None), folder, one_task=True),
            "defaults": fits(stream, callback(), folder),
            "defaults, monitor_every_n_steps=50": fits(stream, callback(monitor_every_n_steps=50), folder),
        }
        medians = alternate(contenders, rounds=rounds)
    print(f"{name}: {STEPS / medians['nothing']:.0f} steps a second without the callback; added by it:")
    for contender, seconds in medians.items():
        if contender != "nothing":
            added = 100 * (seconds / medians["nothing"] - 1)
            bar = f"   bar {BARS[contender]}" if contender in BARS else ""
            print(f"  {contender:<40}{added:>8.1f} %{bar}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cost("permuted digits, 64-256-256-10, batch 64", digits, options.rounds)
    cost("conv net on images, batch 128", images, options.rounds)
