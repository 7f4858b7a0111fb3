"""Define the LightningModules, loaders, loggers and Trainers that the tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, SpectralCollapseCallback

NEVER = Collapse(above=1e9)
"""A rule under which no task of these tests is a collapse."""

ALWAYS = Collapse(above=1e-9)
"""A rule under which every task of these tests is a collapse."""

WITHOUT_FIT_TEST: dict[str, Any] = {"fit_test": None, "collapse": Collapse("learnable_fraction", below=1e-9)}
"""Arguments of a callback that trains no copies, and under which no task of these tests is a collapse."""


class Classifier(LightningModule):
    """A small classifier without any reference to the callback."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class FirstBatchRecorder(Classifier):
    """Records the first batch of each fit, and the weights before its step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.current_epoch == 0:
            self.first_batch = [tensor.clone() for tensor in batch]
            self.first_state = {name: value.clone() for name, value in self.state_dict().items()}


class DirectLogging(Classifier):
    """Writes to a logger that the Trainer does not know."""

    def __init__(self, direct_logger: Logger) -> None:
        super().__init__()
        self.direct_logger = direct_logger

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.direct_logger.log_metrics({"x": 1.0}, step=self.trainer.global_step)
        return super().training_step(batch, batch_idx)


class MemoryLogger(Logger):
    """Keeps all rows in memory; ``CSVLogger`` drops those that it has written."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": -1 if step is None else step})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def values(self, name: str) -> dict[int, float]:
        """Return the logged values of one metric, by step."""
        return {round(row["step"]): row[name] for row in self.rows if name in row}


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def loader(batches: int = 3, size: int = 64, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Return shuffled batches of random inputs of shape ``(size, 4)`` with labels of three classes.

    The default size is the number of samples that the default probe takes.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * size, 4, generator=generator)
    y = torch.randint(3, (batches * size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Return a quiet Trainer for one epoch on the CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit_three_tasks(*loggers: Logger, **arguments: Any) -> SpectralCollapseCallback:
    """Train a classifier in three fits, each with a new Trainer, and return the callback."""
    callback, module = SpectralCollapseCallback(**{"collapse": NEVER, **arguments}), Classifier()
    for _ in range(3):
        trainer(callback, logger=list(loggers)).fit(module, loader())
    return callback


def weights(module: nn.Module) -> Tensor:
    """Return a copy of all parameters as one flat vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def tasks_seen(callback: SpectralCollapseCallback) -> list[tuple[int, int | str | None, int]]:
    """Return ``(task, task_id, step)`` of every report."""
    return [(report.task, report.task_id, report.step) for report in callback.history]
