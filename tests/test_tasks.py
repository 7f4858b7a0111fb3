"""New tasks are recognised, and nothing else is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_plasticity import Collapse, SpectralCollapseCallback
from tests.modules import Classifier, loader, tasks_seen, trainer


def watcher() -> SpectralCollapseCallback:
    """One that only counts tasks: it takes a lot to alarm it."""
    return SpectralCollapseCallback(collapse=Collapse(below=1e-9))


class Data(LightningDataModule):
    def __init__(self, task_id: Any = None) -> None:
        super().__init__()
        self.task_id = task_id

    def train_dataloader(self) -> Any:
        return loader()


def test_a_new_trainer_for_each_task() -> None:
    callback, module = watcher(), Classifier()
    for _ in range(3):
        trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3), (2, None, 6)]


def test_one_trainer_with_raised_max_epochs() -> None:
    callback, module = watcher(), Classifier()
    one = trainer(callback, max_epochs=0)
    for _ in range(3):
        one.fit_loop.max_epochs += 2
        one.fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 6), (2, None, 12)]


@pytest.mark.parametrize("attribute", ["task_id", "current_task"])
@pytest.mark.parametrize("owner", ["module", "data module"])
def test_task_id_on_module_or_data_module_decides_not_the_fit(owner: str, attribute: str) -> None:
    callback, module, data = watcher(), Classifier(), Data()
    for task_id in (7, 7, "b", torch.tensor(9)):
        setattr(module if owner == "module" else data, attribute, task_id)
        trainer(callback).fit(module, datamodule=data)
    assert tasks_seen(callback) == [(0, 7, 0), (1, "b", 6), (2, 9, 9)]


def test_task_id_that_changes_within_one_fit() -> None:
    class Switching(Data):
        def train_dataloader(self) -> Any:
            self.task_id = self.trainer.current_epoch // 2
            return loader()

    callback = watcher()
    trainer(callback, max_epochs=5, reload_dataloaders_every_n_epochs=1).fit(Classifier(), datamodule=Switching())
    assert tasks_seen(callback) == [(0, 0, 0), (1, 1, 6), (2, 2, 12)]


def test_stale_data_module_does_not_decide() -> None:
    callback, module = watcher(), Classifier()
    one = trainer(callback, max_epochs=1)
    one.fit(module, datamodule=Data(task_id=5))
    one.fit_loop.max_epochs += 1
    one.fit(module, loader())  # trainer.datamodule still is the old one
    assert tasks_seen(callback) == [(0, 5, 0), (1, None, 3)]


def test_explicit_signal_in_the_middle_of_a_fit() -> None:
    callback = watcher()

    class Announcer(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                callback.new_task("second")

    trainer(callback, Announcer(), max_epochs=3).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, "second", 4)]


def test_explicit_signal_before_a_fit_is_that_fits_task() -> None:
    callback = watcher()
    callback.new_task("first")
    trainer(callback).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, "first", 0)]


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"fast_dev_run": True}, {"overfit_batches": 1}]
)
def test_unusual_fits(options: dict[str, Any]) -> None:
    callback = watcher()
    data = DataLoader(loader().dataset, batch_size=4)  # overfit_batches would warn of shuffling
    trainer(callback, **options).fit(Classifier(), data)
    trains = "fast_dev_run" in options or "overfit_batches" in options
    assert len(callback.history) == trains


def test_validation_only_is_no_task() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.training_step(batch, batch_idx)

    callback, module = watcher(), Validated()
    data = DataLoader(loader().dataset, batch_size=4)
    trainer(callback).validate(module, data, verbose=False)
    assert callback.history == []
    trainer(callback, num_sanity_val_steps=2).fit(module, loader(), data)
    assert tasks_seen(callback) == [(0, None, 0)]


def test_learning_rate_finder_is_no_task(tmp_path: Path) -> None:
    callback = watcher()
    finder = LearningRateFinder(num_training_steps=5)
    trainer(callback, finder, default_root_dir=tmp_path).fit(Classifier(), loader(8))
    assert tasks_seen(callback) == [(0, None, 0)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_resumed_fit_is_the_same_task(tmp_path: Path, when: dict[str, int]) -> None:
    first = watcher()
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, **when)
    trainer(first, saver, max_epochs=2, enable_checkpointing=True).fit(Classifier(), loader())
    path = sorted(tmp_path.glob("epoch=0*.ckpt"))[0]

    resumed = watcher()
    second = trainer(resumed, saver, max_epochs=2, enable_checkpointing=True)
    second.fit(Classifier(), loader(), ckpt_path=path)
    assert tasks_seen(resumed) == [(0, None, 0)]
    assert resumed.history[0].metrics == first.history[0].metrics
    assert torch.equal(resumed.history[0].spectrum.eigenvalues, first.history[0].spectrum.eigenvalues)
    trainer(resumed).fit(Classifier(), loader())
    assert second.global_step >= 6, "old Lightning trains the rest of a resumed epoch anew"
    assert tasks_seen(resumed) == [(0, None, 0), (1, None, second.global_step)]


def test_task_id_of_another_kind_is_refused() -> None:
    module = Classifier()
    module.task_id = [1, 2]
    with pytest.raises(TypeError, match=r"Classifier.task_id is \[1, 2\]; the name of a task must be an int or a str"):
        trainer(watcher()).fit(module, loader())


def test_a_resumed_fit_with_nothing_left_to_train_does_not_hide_the_next_task(tmp_path: Path) -> None:
    callback, module = watcher(), Classifier()
    one = trainer(callback)
    one.fit(module, loader())
    one.save_checkpoint(tmp_path / "done.ckpt")
    trainer(callback).fit(module, loader(), ckpt_path=tmp_path / "done.ckpt")
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3)]


def test_task_ids_may_be_numpy_numbers() -> None:
    callback, module = watcher(), Classifier()
    module.task_id = np.int64(3)
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, 3, 0)]
    assert type(callback.history[0].task_id) is int
