"""The callback from a configuration file: LightningCLI trains a small network on a stream of digit-recognition tasks.

    python examples/cli.py fit --config examples/configs/monitor.yaml

At every task the pixels of scikit-learn's handwritten digits are permuted anew.
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
    """One task after another; the callback reads ``task_id``.

    Args:
        epochs_per_task: Length of a task.
        batch_size: Samples in a batch.
        seed: Of the permutations.
    """

    def __init__(self, epochs_per_task: int = 2, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.epochs_per_task, self.batch_size, self.seed = epochs_per_task, batch_size, seed
        self.task_id = 0

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Of the current task; the Trainer asks anew every ``reload_dataloaders_every_n_epochs`` epochs."""
        assert self.trainer is not None
        self.task_id = self.trainer.current_epoch // self.epochs_per_task
        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
        pixels = torch.randperm(64, generator=torch.Generator().manual_seed(self.seed + self.task_id))
        return DataLoader(TensorDataset(images[:, pixels], labels), batch_size=self.batch_size, shuffle=True)


class Digits(L.LightningModule):
    """A multilayer perceptron that knows nothing of the callback.

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
    """Runs the command line."""
    return LightningCLI(Digits, PermutedDigits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
