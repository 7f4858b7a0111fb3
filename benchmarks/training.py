"""Train modules of any package on two tasks, each a fit with its own Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 32
TASKS = range(2)
SAMPLES, BATCH = 256, 32

Train: TypeAlias = Callable[[list[Callback]], nn.Module]
"""Trains a new module on both tasks with these callbacks, and returns it."""


@dataclass(frozen=True)
class Case:
    """A module to train.

    Args:
        package: The package that the module comes from.
        module: What it is.
        train: Trains it.
        needs: All packages that it needs.
    """

    package: str
    module: str
    train: Train
    needs: tuple[str, ...]

    def __str__(self) -> str:
        """Return the name on the command line."""
        return f"{self.package}: {self.module}"


class Cases(list[Case]):
    """A table of modules, to which a decorator adds rows."""

    def add(self, package: str, module: str, *needs: str) -> Callable[[Train], Train]:
        """Add the decorated function as a row."""

        def decorate(train: Train) -> Train:
            self.append(Case(package, module, train, (package, *needs)))
            return train

        return decorate


class Module(LightningModule):
    """A network trained by Adam; subclasses write ``training_step``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit(module: LightningModule, tasks: Iterable[Any], callbacks: list[Callback]) -> LightningModule:
    """Train on the data loaders of all tasks, one after the other, and return the module."""
    for loader in tasks:
        Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, train_dataloaders=loader)
    return module


def two(draw: Callable[[], tuple[Tensor, ...]], batch_size: int = BATCH) -> list[DataLoader[Any]]:
    """Return a loader of shuffled tuples of tensors for each task; ``draw`` returns the data of one."""
    return [DataLoader(TensorDataset(*draw()), batch_size, shuffle=True) for _ in TASKS]


def images(classes: int = 10, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return random images ``(256, 3, size, size)`` with random labels."""
    return torch.randn(SAMPLES, 3, size, size), torch.randint(classes, (SAMPLES,))
