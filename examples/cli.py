"""Configure the callback from a file: LightningCLI trains a small network on a sequence of digit recognition tasks.

    python examples/cli.py fit --config examples/configs/monitor.yaml

Each task permutes the pixels of scikit-learn's handwritten digits in a new way.
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class PermutedDigits(L.LightningDataModule):
    """A sequence of tasks; the callback reads ``task_id`` to detect a new one.

    Args:
        epochs_per_task: Length of a task.
        batch_size: Samples per batch.
        seed: Seed of the permutations.
    """

    def __init__(self, epochs_per_task: int = 2, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.epochs_per_task, self.batch_size, self.seed = epochs_per_task, batch_size, seed
        self.task_id = 0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the data of the current task.

        The Trainer calls this every ``reload_dataloaders_every_n_epochs`` epochs.
        """
        assert self.trainer is not None
        self.task_id = self.trainer.current_epoch // self.epochs_per_task
        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        pixels = torch.randperm(64, generator=torch.Generator().manual_seed(self.seed + self.task_id))
        return DataLoader(TensorDataset(images[:, pixels], labels), batch_size=self.batch_size, shuffle=True)


class Digits(L.LightningModule):
    """A multilayer perceptron, without any code for the callback.

    Args:
        width: Units in each hidden layer.
        lr: Learning rate of Adam.
    """

    def __init__(self, width: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line."""
    return LightningCLI(Digits, PermutedDigits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
