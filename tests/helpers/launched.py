"""Train on two ranks that Lightning launches.

Usage: ``python -m tests.helpers.launched STRATEGY NET FOLDER [with_callback]``.
"""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, SpectralCollapseCallback
from tests.helpers import usages
from tests.helpers.modules import trainer
from tests.helpers.usages import StatefulClassifier


class SavingFinalState(StatefulClassifier):
    """Saves the final state of its rank to a folder."""

    def __init__(self, net: str, folder: Path) -> None:
        super().__init__(getattr(usages, net)())
        self.folder = folder

    def on_train_end(self) -> None:
        result: dict[str, Any] = {
            "weights and buffers": self.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "losses": [loss.item() for loss in self.outputs],
            "noise": self.noise,
            "metric state": {name: getattr(self.tally, name) for name in self.tally._defaults},
            "metrics": {n: value for n, value in self.trainer.callback_metrics.items() if "plasticity" not in n},
            "random numbers": torch.get_rng_state(),
        }
        torch.save(result, self.folder / f"{self.global_rank}.pt")


def main(strategy: str, net: str, folder: Path, *, with_callback: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    callback = SpectralCollapseCallback(collapse=Collapse(above=1e9), monitor_every_n_steps=1)
    data = TensorDataset(torch.randn(40, 1, 6, 6), torch.randint(3, (40,)))
    options: dict[str, Any] = {"strategy": strategy, "devices": 2, "max_epochs": 2, "logger": CSVLogger(folder)}
    trainer(*[callback] * with_callback, **options).fit(
        SavingFinalState(net, folder), DataLoader(data, batch_size=8, shuffle=True)
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), with_callback=sys.argv[4:] == ["with_callback"])
