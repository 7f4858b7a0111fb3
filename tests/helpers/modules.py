"""LightningModules, loaders and Trainers for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import SpectralCollapseCallback


class Classifier(LightningModule):
    """A small classifier that knows nothing of the callback."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class LoggingByItself(Classifier):
    """Has a logger of its own."""

    def __init__(self, own: Logger) -> None:
        super().__init__()
        self.own = own

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.own.log_metrics({"x": 1.0}, step=self.trainer.global_step)
        return super().training_step(batch, batch_idx)


class MemoryLogger(Logger):
    """Keeps what it is given (CSVLogger forgets what it has written)."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": -1 if step is None else step})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def values(self, name: str) -> dict[int, float]:
        """The values of one name by step."""
        return {round(row["step"]): row[name] for row in self.rows if name in row}


def loader(batches: int = 3, size: int = 4, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * size, 4, generator=generator)
    y = torch.randint(3, (batches * size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
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


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def tasks_seen(callback: SpectralCollapseCallback) -> list[tuple[int, int | str | None, int]]:
    return [(report.task, report.task_id, report.step) for report in callback.history]
