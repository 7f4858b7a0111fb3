"""Define a run for a child process that kills itself at a chosen moment, and that resumes when it is started again."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_plasticity import Collapse, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import (
    ContinualBackprop,
    L2Init,
    ReDo,
    SelfNormalizedReset,
    ShrinkPerturb,
    SpectralRegularizer,
)
from lightning_plasticity.interventions.weights import updates
from lightning_plasticity.probes import GGNProbe
from tests.helpers.modules import MemoryLogger, trainer

EPOCHS, BATCHES, EPOCHS_OF_A_TASK = 6, 8, 2


class Epoch:
    """The batches of one epoch, which depend on their index only; its state is the number of batches taken."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.epoch // EPOCHS_OF_A_TASK))
        while self.taken < BATCHES:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.epoch * BATCHES + self.taken))
            self.taken += 1
            yield x, (x @ teacher).argmax(1)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> Epoch:
        return Epoch(self.trainer.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def make_callback() -> SpectralCollapseCallback:
    """Return a callback with all interventions that have a state."""
    return SpectralCollapseCallback(
        # Every task is a collapse.
        collapse=Collapse(above=1e-9),
        task_detector=TaskDetector(every_n_epochs=EPOCHS_OF_A_TASK),
        monitor_every_n_steps=5,
        interventions=[
            ShrinkPerturb(),
            ReDo(threshold=0.5, when=7),
            ContinualBackprop(replacement_rate=0.05, maturity_threshold=3, decay=0.9, transfer_bias=True),
            SelfNormalizedReset(0.3),
            SpectralRegularizer(1e-2),
            L2Init(1e-2),
        ],
    )


class Killer(Callback):
    """Kills the process in a hook of a batch, such as ``"on_after_backward 17"``; batches count from 1."""

    def __init__(self, moment: str) -> None:
        self._hook, _, batch = moment.partition(" ")
        self._batch = int(batch)
        self._current_batch = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._current_batch += 1
        self._kill_in("on_train_batch_start")

    def on_after_backward(self, *_: Any) -> None:
        self._kill_in("on_after_backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._kill_in("on_before_optimizer_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self._kill_in("on_train_batch_end")

    def _kill_in(self, hook: str) -> None:
        if hook == self._hook and self._current_batch == self._batch:
            kill()


def kill() -> None:
    """Send SIGKILL, as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_call(owner: Any, name: str, number: int) -> Any:
    """Patch a function to kill the process in its ``number``-th call, after its work and before it returns."""
    function, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls == number:
            kill()
        return result

    return patch.object(owner, name, wrapper)


KILLED_CALLS: dict[str, Callable[[int], Any]] = {
    "probe": lambda number: killed_at_call(GGNProbe, "measure", number),
    # Weights and optimizer state are new at this point, the callback's counts are not.
    "repair": lambda number: killed_at_call(updates, "reset_state", number),
    "checkpoint": lambda number: killed_at_call(Trainer, "save_checkpoint", number),
}


def weights_only_option() -> dict[str, bool]:
    """Return the option of ``Trainer.fit`` (Lightning 2.6) that loads only tensors and plain Python objects."""
    return {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def run(folder: Path, moment: str | None, every_n_train_steps: int | None = None) -> None:
    """Train from the newest checkpoint in ``folder`` or from scratch, and save the result there unless killed."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, plasticity, logger = Model(), make_callback(), MemoryLogger()
    checkpointing = ModelCheckpoint(folder, save_last=True, every_n_train_steps=every_n_train_steps)
    last, killed_call = folder / "last.ckpt", contextlib.nullcontext()
    others: list[Callback] = []
    if moment is not None:
        where, _, number = moment.partition(" ")
        if where in KILLED_CALLS:
            killed_call = KILLED_CALLS[where](int(number))
        else:
            others = [Killer(moment)]
    options: dict[str, Any] = {"max_epochs": EPOCHS, "reload_dataloaders_every_n_epochs": 1, "logger": logger}
    pl_trainer = trainer(plasticity, *others, checkpointing, enable_checkpointing=True, **options)
    with killed_call:
        pl_trainer.fit(model, ckpt_path=last if last.exists() else None, **weights_only_option())
    result = {
        "callback": plasticity.state_dict(),
        "weights": model.state_dict(),
        "optimizer": pl_trainer.optimizers[0].state_dict(),
        "schedule": pl_trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "logged": logger.rows,
    }
    torch.save(result, folder / "result.pt")
