"""Tests of recognising new tasks."""

import contextlib
import enum
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_plasticity import Collapse, GGNProbe, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import ReDo, ShrinkPerturb
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, loader, tasks_seen, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was measured on . samples, fewer than the 8 that a verdict needs"),
    pytest.mark.filterwarnings("ignore:.*was measured on .* samples. below 16, the numbers depend on which samples"),
]


def callback_with(samples: int = 2, **options: Any) -> SpectralCollapseCallback:
    """Return a callback that only records tasks, with a threshold that no collapse reaches."""
    detector = TaskDetector(**options) if options else None
    return SpectralCollapseCallback(
        GGNProbe(samples=samples), collapse=Collapse(above=1e9), task_detector=detector, monitor=False
    )


class Data(LightningDataModule):
    def __init__(self, task_id: Any = None) -> None:
        super().__init__()
        self.task_id = task_id

    def train_dataloader(self) -> Any:
        return loader()


def test_every_fit_by_a_new_trainer_is_a_task() -> None:
    callback, module = callback_with(), Classifier()
    for _ in range(3):
        trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3), (2, None, 6)]


def test_every_fit_by_one_trainer_is_a_task() -> None:
    callback, module = callback_with(), Classifier()
    one = trainer(callback, max_epochs=0)
    for _ in range(3):
        one.fit_loop.max_epochs += 2
        one.fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 6), (2, None, 12)]


@pytest.mark.parametrize("attribute", ["task_id", "current_task"])
@pytest.mark.parametrize("owner", ["module", "data module"])
def test_task_id_attribute_takes_precedence_over_the_fit(owner: str, attribute: str) -> None:
    callback, module, data = callback_with(), Classifier(), Data()
    for task_id in (7, 7, "b", torch.tensor(9)):
        setattr(module if owner == "module" else data, attribute, task_id)
        trainer(callback).fit(module, datamodule=data)
    assert tasks_seen(callback) == [(0, 7, 0), (1, "b", 6), (2, 9, 9)]


def test_task_id_that_changes_within_one_fit() -> None:
    class Switching(Data):
        def train_dataloader(self) -> Any:
            self.task_id = self.trainer.current_epoch // 2
            return loader()

    callback = callback_with()
    trainer(callback, max_epochs=5, reload_dataloaders_every_n_epochs=1).fit(Classifier(), datamodule=Switching())
    assert tasks_seen(callback) == [(0, 0, 0), (1, 1, 6), (2, 2, 12)]


def test_data_module_of_an_earlier_fit_is_ignored() -> None:
    """``trainer.datamodule`` still is that of the first fit."""
    callback, module = callback_with(), Classifier()
    one = trainer(callback, max_epochs=1)
    one.fit(module, datamodule=Data(task_id=5))
    one.fit_loop.max_epochs += 1
    one.fit(module, loader())
    assert tasks_seen(callback) == [(0, 5, 0), (1, None, 3)]


def test_new_task_in_the_middle_of_a_fit() -> None:
    callback = callback_with()

    class Announcer(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                callback.new_task("second")

    trainer(callback, Announcer(), max_epochs=3).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, "second", 4)]


class Announcing(Classifier):
    """Announces a task from its own ``training_step`` when ``is_due``."""

    def __init__(self, *, is_due: Callable[[LightningModule, int], bool]) -> None:
        super().__init__()
        self.is_due = is_due

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.is_due(self, batch_idx):
            for callback in self.trainer.callbacks:
                if isinstance(callback, SpectralCollapseCallback):
                    callback.new_task("next")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("is_due", "steps"),
    [(lambda module, batch_idx: batch_idx == 0, [0, 1, 4]), (lambda module, batch_idx: not module.net.training, [0])],
    ids=["in the first batch of an epoch", "in evaluation mode"],
)
def test_training_step_announces_tasks_but_not_in_probes(is_due: Any, steps: list[int]) -> None:
    callback = SpectralCollapseCallback(collapse=Collapse(above=1e9), interventions=[ReDo(when=1)])
    trainer(callback, max_epochs=2).fit(Announcing(is_due=is_due), loader())
    assert tasks_seen(callback) == [(task, "next" if task else None, step) for task, step in enumerate(steps)]


class Stream(IterableDataset[Any]):
    """Yields samples with the numbers 0, 1, 2, … over all epochs, and announces each task before its first sample."""

    def __init__(self, callback: SpectralCollapseCallback, first_samples: list[int], samples: int = 12) -> None:
        self.callback = callback
        self.first_samples = first_samples
        self.samples = samples
        self.numbers = itertools.count()

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator()
        for number in itertools.islice(self.numbers, self.samples):
            if number in self.first_samples:
                self.callback.new_task(f"from {number}")
            generator.manual_seed(number)
            yield torch.randn(4, generator=generator), number % 3, number


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.samples


class Recording(Classifier):
    """Records the batches that it trains on, by optimizer step. Its weights stay the same."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.batches: dict[int, list[torch.Tensor]] = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches[self.global_step] = self.samples_of(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(self.samples_of(batch), batch_idx)

    def samples_of(self, batch: Any) -> Any:
        return batch

    def loss_on(self, steps: range, samples: int) -> float:
        """Return the mean loss of the first samples of the batches of these steps."""
        x, y, _ = (torch.cat(tensors)[:samples] for tensors in zip(*map(self.batches.get, steps), strict=True))
        loss: float = super().training_step((x, y), 0).item()
        return loss

    def step_of(self, number: int) -> int:
        """Return the step whose batch holds the sample of this number."""
        (step,) = (step for step, batch in self.batches.items() if number in batch[2])
        return step


def assert_tasks_start_with_samples(
    callback: SpectralCollapseCallback, module: Recording, numbers: list[int], samples: int
) -> None:
    """Assert that tasks start at the batches of these samples, have their names and were measured on them.

    They are measured on so many samples from this batch on, or on those that come before the next task.
    """
    assert tasks_seen(callback) == [(i, f"from {n}", module.step_of(n)) for i, n in enumerate(numbers)]
    starts = [*(report.step for report in callback.history), len(module.batches)]
    for report, (start, end) in zip(callback.history, itertools.pairwise(starts), strict=True):
        steps = range(start, end)
        available = sum(len(module.batches[step][1]) for step in steps)
        assert report.metrics["probe_samples"] == min(samples, available)
        assert report.metrics["probe_loss"] == pytest.approx(module.loss_on(steps, samples), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("samples", [1, 8], ids=["measured at once", "gathered"])
@pytest.mark.parametrize("kind", [Stream, SizedStream])
@pytest.mark.parametrize(
    ("batch_size", "first_samples"),
    [
        # Between two batches of 3, the first of epochs 1 and 2, and the last batch of epoch 1.
        (3, [0, 6, 12, 21, 24]),
        # In the middle of a batch.
        (4, [0, 5, 15, 26]),
        # Each batch is a task.
        (6, [0, 6, 12, 18, 24, 30]),
        # Epochs that end in a smaller batch.
        (5, [0, 10, 12, 17, 27]),
        (1, [0, 1, 2, 11, 12, 13, 35]),
        (None, [0, 3, 12, 23, 24]),
    ],
)
def test_data_set_announces_the_batch_of_its_next_sample(
    kind: type[Stream], batch_size: int | None, first_samples: list[int], samples: int
) -> None:
    """Lightning fetches the batches of a data set without length one ahead.

    Some tasks are announced while the samples of the earlier one are still being gathered.
    """
    callback, module = callback_with(samples), Recording()
    data: Any = DataLoader(kind(callback, first_samples), batch_size=batch_size)
    if batch_size is None:
        data = DataLoader(kind(callback, first_samples), batch_size=None, collate_fn=one_sample)
    fitted = trainer(callback, max_epochs=3, val_check_interval=1.0)
    fitted.fit(module, data)
    assert fitted.global_step == len(module.batches)
    assert_tasks_start_with_samples(callback, module, first_samples, samples)


def one_sample(sample: Any) -> list[torch.Tensor]:
    """Return a batch of one sample."""
    return [torch.as_tensor(value)[None] for value in sample]


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_one_of_several_data_sets_announces_its_next_sample(mode: Any) -> None:
    class OfTwoLoaders(Recording):
        def samples_of(self, batch: Any) -> Any:
            return batch["stream"]

    callback, module = callback_with(samples=3), OfTwoLoaders()
    stream = DataLoader(Stream(callback, first_samples := [0, 6, 12, 17]), batch_size=3)
    # It is longer in the modes that then stop or go on without it.
    others = loader(batches=8 if mode == "min_size" else 3, size=3)
    trainer(callback, max_epochs=2).fit(module, CombinedLoader({"stream": stream, "others": others}, mode))
    assert_tasks_start_with_samples(callback, module, first_samples, samples=3)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_train_batch_start", "on_train_batch_end"])
def test_hooks_announce_the_next_batch_not_the_one_fetched_ahead(hook: str) -> None:
    """The callback sees a batch before the module's ``on_train_batch_start``, and after the transfer to the device."""
    callback, module, calls = callback_with(), Recording(), itertools.count()

    def announce(*arguments: Any) -> Any:
        if next(calls) == 1:
            callback.new_task("from a hook")
        return original(*arguments)

    original = getattr(module, hook)
    setattr(module, hook, announce)
    trainer(callback, max_epochs=2).fit(module, DataLoader(Stream(callback, [0, 9], samples=9), batch_size=3))
    step = 1 if hook == "on_before_batch_transfer" else 2
    assert tasks_seen(callback) == [(0, "from 0", 0), (1, "from a hook", step), (2, "from 9", 3)]


def test_last_fetch_of_an_epoch_is_not_ahead() -> None:
    """A batch is then in flight, none is fetched, and the next one is this batch."""
    callback, module = callback_with(), Recording()

    def announce(batch: Any, dataloader_idx: int) -> Any:
        if 8 in batch[2]:
            callback.new_task("last batch")
        return batch

    module.on_before_batch_transfer = announce  # type: ignore[method-assign]
    trainer(callback).fit(module, DataLoader(Stream(callback, [0], samples=9), batch_size=3))
    assert tasks_seen(callback) == [(0, "from 0", 0), (1, "last batch", 2)]


def test_data_set_announces_the_next_fit_where_a_fetch_fails() -> None:
    class Interrupted(Stream):
        def __iter__(self) -> Iterator[Any]:
            yield from super().__iter__()
            self.callback.new_task("next")
            raise OSError("no connection")

    callback, module = callback_with(task_key=lambda trainer, module: "same"), Recording()
    with pytest.raises(OSError, match="no connection"):
        trainer(callback).fit(module, DataLoader(Interrupted(callback, [], samples=6), batch_size=3))
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, "same", 0), (1, "next", 1)]


class WarnedStream(Stream):
    def __iter__(self) -> Iterator[Any]:
        expected = r"^new_task\('next'\) was called in a worker process .* pass TaskDetector\(batch_label=...\)"
        with pytest.warns(PlasticityWarning, match=expected):
            self.callback.new_task("next")
        yield from super().__iter__()


@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_new_task_in_a_worker_process_warns(start_method: Any) -> None:
    callback, module = callback_with(), Recording()
    stream = WarnedStream(callback, [])
    data = DataLoader(stream, batch_size=3, num_workers=1, multiprocessing_context=start_method)
    trainer(callback, max_epochs=2).fit(module, data)
    assert len(module.batches) == 8
    assert tasks_seen(callback) == [(0, None, 0)]


def test_new_task_before_a_fit_names_its_first_task() -> None:
    callback = callback_with()
    callback.new_task("first")
    trainer(callback).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, "first", 0)]


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"fast_dev_run": True}, {"overfit_batches": 1}]
)
def test_only_fits_with_training_batches_are_tasks(options: dict[str, Any]) -> None:
    callback = callback_with()
    # Lightning warns if overfit_batches meets a shuffling loader.
    data = DataLoader(loader().dataset, batch_size=4)
    trainer(callback, **options).fit(Classifier(), data)
    trains = "fast_dev_run" in options or "overfit_batches" in options
    assert len(callback.history) == trains


def test_validation_starts_no_task() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.training_step(batch, batch_idx)

    callback, module = callback_with(), Validated()
    data = DataLoader(loader().dataset, batch_size=4)
    trainer(callback).validate(module, data, verbose=False)
    assert callback.history == []
    trainer(callback, num_sanity_val_steps=2).fit(module, loader(), data)
    assert tasks_seen(callback) == [(0, None, 0)]


def test_learning_rate_finder_starts_no_task(tmp_path: Path) -> None:
    callback = callback_with()
    finder = LearningRateFinder(num_training_steps=5)
    trainer(callback, finder, default_root_dir=tmp_path).fit(Classifier(), loader(8))
    assert tasks_seen(callback) == [(0, None, 0)]


class Resizable(Data):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(loader(batches=8, size=4).dataset, batch_size=self.batch_size)


def test_batch_size_finder_starts_no_task(tmp_path: Path) -> None:
    callback, data = callback_with(), Resizable()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    trainer(callback, finder, default_root_dir=tmp_path).fit(Classifier(), datamodule=data)
    assert data.batch_size > 2, "the finder changed it"
    assert tasks_seen(callback) == [(0, None, 0)]


def test_tuner_before_the_fits_starts_no_task(tmp_path: Path) -> None:
    callback, module, data = callback_with(), Classifier(), Resizable()
    one = trainer(callback, default_root_dir=tmp_path)
    Tuner(one).lr_find(module, datamodule=data, num_training=6)
    Tuner(one).scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=1)
    assert callback.history == []
    one.fit(module, datamodule=data)
    trainer(callback).fit(module, datamodule=data)
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 32 // data.batch_size)]


def test_reloading_dataloaders_every_epoch_starts_no_task() -> None:
    callback = callback_with()
    trainer(callback, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(Classifier(), datamodule=Data())
    assert tasks_seen(callback) == [(0, None, 0)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_evaluation_between_and_during_fits_starts_no_task(tmp_path: Path) -> None:
    class Evaluated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.training_step(batch, batch_idx))

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    callback, module, data = callback_with(), Evaluated(), DataLoader(loader().dataset, batch_size=4)
    for _ in range(3):
        saver = ModelCheckpoint(tmp_path, monitor="loss")
        stopper = EarlyStopping("loss", min_delta=10, patience=1)
        one = trainer(callback, saver, stopper, max_epochs=5, val_check_interval=2, enable_checkpointing=True)
        one.fit(module, loader(batches=5), data)
        one.validate(module, data, ckpt_path="best", verbose=False)
        one.test(module, data, verbose=False)
        one.predict(module, data)
        assert one.current_epoch < 5, "it stopped early"
    steps = one.global_step
    assert tasks_seen(callback) == [(0, None, 0), (1, None, steps), (2, None, 2 * steps)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("when", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}])
def test_resumed_fit_is_the_same_task(tmp_path: Path, when: dict[str, int]) -> None:
    first = callback_with()
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, **when)
    trainer(first, saver, max_epochs=2, enable_checkpointing=True).fit(Classifier(), loader())
    path = sorted(tmp_path.glob("epoch=0*.ckpt"))[0]

    resumed = callback_with()
    second = trainer(resumed, saver, max_epochs=2, enable_checkpointing=True)
    second.fit(Classifier(), loader(), ckpt_path=path)
    assert tasks_seen(resumed) == [(0, None, 0)]
    assert resumed.history[0].metrics == first.history[0].metrics
    assert torch.equal(resumed.history[0].spectrum.eigenvalues, first.history[0].spectrum.eigenvalues)
    trainer(resumed).fit(Classifier(), loader())
    assert second.global_step >= 6, "older Lightning repeats the rest of a resumed epoch"
    assert tasks_seen(resumed) == [(0, None, 0), (1, None, second.global_step)]


def test_callback_new_in_a_resumed_run_counts_earlier_steps(tmp_path: Path) -> None:
    before, path = trainer(), tmp_path / "before.ckpt"
    before.fit(Classifier(), loader())
    before.save_checkpoint(path)
    callback, logger, module = callback_with(), MemoryLogger(), Classifier()
    for max_epochs, resumed_from in ((2, path), (1, None)):
        trainer(callback, logger=logger, max_epochs=max_epochs).fit(module, loader(), ckpt_path=resumed_from)
    assert tasks_seen(callback) == [(0, None, 3), (1, None, 6)]
    assert list(logger.values("plasticity/learnable_fraction")) == [3, 6]


def test_task_id_of_wrong_type_is_refused() -> None:
    module = Classifier()
    module.task_id = [1, 2]
    with pytest.raises(TypeError, match=r"Classifier.task_id is \[1, 2\]; the name of a task must be an int or a str"):
        trainer(callback_with()).fit(module, loader())


def test_resumed_fit_without_steps_does_not_hide_the_next_task(tmp_path: Path) -> None:
    callback, module = callback_with(), Classifier()
    one = trainer(callback)
    one.fit(module, loader())
    one.save_checkpoint(tmp_path / "done.ckpt")
    trainer(callback).fit(module, loader(), ckpt_path=tmp_path / "done.ckpt")
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3)]


@pytest.mark.parametrize("number", [np.int64(3), np.array(3), torch.tensor([3])], ids=["scalar", "array", "tensor"])
def test_task_ids_may_be_numpy_and_torch_integers(number: Any) -> None:
    callback, module = callback_with(), Classifier()
    module.task_id = number
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, 3, 0)]
    assert type(callback.history[0].task_id) is int


def test_task_key_names_the_task() -> None:
    callback = callback_with(task_key=lambda trainer, module: "early" if trainer.global_step < 4 else "late")
    trainer(callback, max_epochs=3).fit(Classifier(), loader())
    trainer(callback).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, "early", 0), (1, "late", 4), (2, "early", 9)]


def test_every_fit_is_a_task_if_task_key_returns_none() -> None:
    callback, module = callback_with(task_key=lambda trainer, module: None), Classifier()
    module.task_id = 3
    for _ in range(2):
        trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3)]


def labelled(labels: list[list[int]]) -> DataLoader[Any]:
    """Return a loader with one batch for each list of labels."""
    data = loader(batches=len(labels)).dataset
    return DataLoader(
        [(*data[i], label) for i, label in enumerate(itertools.chain(*labels))], batch_size=len(labels[0])
    )


def test_new_label_in_a_batch_starts_a_task() -> None:
    # Later batches replay samples of earlier tasks.
    stream = [[0, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 2, 0]]
    callback, module = callback_with(batch_label=2), Classifier()
    for _ in range(2):
        trainer(callback).fit(module, labelled(stream))
    assert tasks_seen(callback) == [(0, 0, 0), (1, 1, 2), (2, 2, 5)]


def test_labels_may_be_strings_under_a_key() -> None:
    class Dicts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    data = [{"x": x, "y": y, "task": "cats" if i < 8 else "dogs"} for i, (x, y) in enumerate(loader(size=4).dataset)]
    callback = callback_with(batch_label="task")
    trainer(callback).fit(Dicts(), DataLoader(data, batch_size=4))
    assert tasks_seen(callback) == [(0, "cats", 0), (1, "dogs", 2)]


def test_batch_without_label_raises() -> None:
    with pytest.raises(ValueError, match=r"batch_label=2, but a batch is a list without it"):
        trainer(callback_with(batch_label=2)).fit(Classifier(), loader())


def test_every_n_epochs_of_a_fit() -> None:
    callback, module = callback_with(every_n_epochs=2), Classifier()
    trainer(callback, max_epochs=5).fit(module, loader())
    trainer(callback, max_epochs=1).fit(module, loader())
    assert [step for _, _, step in tasks_seen(callback)] == [0, 6, 12, 15]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("options", "expected"), [({}, [12]), ({"every_n_epochs": 2}, [6, 6]), ({"every_n_steps": 5}, [5, 5, 5])]
)
def test_expected_steps_of_tasks(options: dict[str, int], expected: list[int], accumulate: int) -> None:
    callback = callback_with(**options)
    fitted = trainer(callback, max_epochs=4, accumulate_grad_batches=accumulate)
    fitted.fit(Classifier(), loader(batches=3 * accumulate))
    assert [report.expected_steps for report in callback.history] == expected
    new = callback_with(**options)
    trainer(new, max_epochs=4, max_steps=3).fit(Classifier(), loader(batches=3))
    assert new.history[0].expected_steps == (expected[0] if options else 3)


def test_task_within_a_fit_is_expected_to_be_as_long_as_the_last() -> None:
    callback = callback_with()

    class Announcing(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step in (4, 7):
                callback.new_task()

    trainer(callback, max_epochs=4).fit(Announcing(), loader(batches=3))
    trainer(callback, max_epochs=2).fit(Classifier(), loader(batches=3))
    assert [report.step for report in callback.history] == [0, 4, 7, 12]
    assert [report.expected_steps for report in callback.history] == [12, 4, 3, 6]


def test_epochs_are_counted_over_fits_of_one_trainer() -> None:
    callback, module = callback_with(every_n_epochs=2), Classifier()
    one = trainer(callback, max_epochs=0)
    for _ in range(2):
        one.fit_loop.max_epochs += 3
        one.fit(module, loader())
    assert [step / 3 for _, _, step in tasks_seen(callback)] == [0, 2, 3, 4]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_n_steps_of_a_fit(accumulate: int) -> None:
    callback, module = callback_with(every_n_steps=4), Classifier()
    trainer(callback, accumulate_grad_batches=accumulate).fit(module, loader(batches=10 * accumulate))
    trainer(callback).fit(module, loader(batches=3))
    assert [step for _, _, step in tasks_seen(callback)] == [0, 4, 8, 10]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("options", [{"every_n_epochs": 2}, {"every_n_steps": 4}, {"batch_label": 2}])
@pytest.mark.parametrize("saved_at", [3, 5, 6])
def test_resuming_starts_no_task_and_misses_none(tmp_path: Path, options: dict[str, Any], saved_at: int) -> None:
    def data() -> Any:
        return labelled([[0, 0]] * 2 + [[1, 1]] if "batch_label" in options else [[0, 0]] * 3)

    uninterrupted = callback_with(**options)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    trainer(uninterrupted, saver, max_epochs=4, enable_checkpointing=True).fit(Classifier(), data())
    resumed = callback_with(**options)
    (path,) = tmp_path.glob(f"*step={saved_at}.ckpt")
    again = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fitted = trainer(resumed, again, max_epochs=4, enable_checkpointing=True)
    fitted.fit(Classifier(), data(), ckpt_path=path)
    if fitted.global_step > 12:
        pytest.skip("older Lightning repeats the rest of a resumed epoch")
    assert tasks_seen(resumed) == tasks_seen(uninterrupted)


class Shifted(Classifier):
    """A classifier whose loss increases by 5 from batch 60 on."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 5 * (batch_idx >= 60)


def test_drift_of_the_loss_starts_a_task() -> None:
    drift = pytest.importorskip("river.drift", reason="river needs Python 3.11")
    seen = {}
    for kind in (drift.ADWIN, drift.PageHinkley):
        for module in (Classifier, Shifted):
            torch.manual_seed(0)
            callback = callback_with(drift_detector=kind())
            trainer(callback).fit(module(lr=1e-3), loader(batches=120))
            seen[kind.__name__, module.__name__] = [step for _, _, step in tasks_seen(callback)]
    assert seen["ADWIN", "Classifier"] == seen["PageHinkley", "Classifier"] == [0]
    for kind in ("ADWIN", "PageHinkley"):
        _, when = seen[kind, "Shifted"]
        assert 60 < when < 110


def test_drift_of_the_inputs_starts_a_task() -> None:
    drift = pytest.importorskip("river.drift", reason="river needs Python 3.11")
    x, y = loader(batches=120, size=4).dataset.tensors
    x[240:] += 3
    callback = callback_with(
        drift_detector=drift.PageHinkley(threshold=5), drift_statistic=lambda batch: batch[0].mean()
    )
    trainer(callback).fit(Classifier(), DataLoader(TensorDataset(x, y), batch_size=4))
    (_, _, first), (_, _, when) = tasks_seen(callback)
    assert first == 0
    assert 60 <= when < 70


def test_binary_drift_detector_is_refused_before_training() -> None:
    drift = pytest.importorskip("river.drift", reason="river needs Python 3.11")
    module = Classifier()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"(?s)drift_detector=DDM .* cannot take a number, as update"):
        trainer(callback_with(drift_detector=drift.binary.DDM())).fit(module, loader())
    assert torch.equal(weights(module), before)


class Alarming:
    """A drift detector that detects a drift at numbers above 9."""

    drift_detected = False

    def update(self, x: float) -> None:
        self.drift_detected = x > 9


def test_drift_statistic_starts_the_task_at_its_own_batch() -> None:
    values = [0.0, 1.0, 10.0, 2.0, math.nan, 11.0]
    callback = callback_with(drift_detector=Alarming(), drift_statistic=lambda batch: batch[0][0, 0])
    data = [(torch.full((4, 4), value).nan_to_num(nan=1.0), torch.zeros(4, dtype=torch.long)) for value in values]
    trainer(callback).fit(Classifier(), DataLoader(data, batch_size=None))
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 2), (2, None, 5)]


@pytest.mark.parametrize("value", [None, "high", torch.zeros(4)])
def test_drift_statistic_that_is_no_number_raises(value: Any) -> None:
    callback = callback_with(drift_detector=Alarming(), drift_statistic=lambda batch: value)
    with pytest.raises(TypeError, match=r"drift_statistic returned .*; it must return a number"):
        trainer(callback).fit(Classifier(), loader())


def test_drift_keeps_the_name_of_an_announced_task() -> None:
    callback = callback_with(drift_detector=Alarming(), drift_statistic=lambda batch: 10.0)
    callback.new_task("cats")
    trainer(callback, limit_train_batches=1).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, "cats", 0)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task_key": "task"}, TypeError, r"task_key='task' must be a function"),
        ({"batch_label": 1.5}, TypeError, r"batch_label=1.5 must be an index or a key"),
        ({"batch_label": True}, TypeError, r"batch_label=True must be an index or a key"),
        ({"every_n_epochs": 0}, ValueError, r"every_n_epochs=0"),
        ({"every_n_steps": 2.5}, ValueError, r"every_n_steps=2.5"),
        ({"every_n_steps": 2, "every_n_epochs": 3}, ValueError, r"give one of them"),
        ({"drift_detector": "ADWIN"}, TypeError, r"drift_detector='ADWIN' must have update"),
        ({"drift_detector": Alarming(), "drift_statistic": 1}, TypeError, r"drift_statistic=1 must be a function"),
        ({"drift_statistic": len}, ValueError, r"drift_statistic needs a drift_detector"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskDetector(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "TaskDetector()"),
        ({"every_n_epochs": 10}, "TaskDetector(every_n_epochs=10)"),
        ({"batch_label": "t", "every_n_steps": 3}, "TaskDetector(batch_label='t', every_n_steps=3)"),
        ({"batch_label": 0}, "TaskDetector(batch_label=0)"),
        ({"task_key": len}, "TaskDetector(task_key=<built-in function len>)"),
    ],
)
def test_repr_shows_the_given_arguments(options: dict[str, Any], expected: str) -> None:
    assert repr(TaskDetector(**options)) == expected


def test_repr_shows_a_drift_detector_and_its_statistic() -> None:
    detector = TaskDetector(drift_detector=(drift := Alarming()), drift_statistic=len)
    assert repr(detector) == f"TaskDetector(drift_detector={drift!r}, drift_statistic=<built-in function len>)"


class Failing:
    """A loss function that raises ``error``, if set."""

    error: BaseException | None = None

    def __call__(self, module: LightningModule, batch: Any) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.parametrize("announced", [False, True])
def test_fit_after_a_failed_first_probe_starts_the_task(*, announced: bool) -> None:
    loss_fn = Failing()
    callback = SpectralCollapseCallback(collapse=Collapse(above=1e9), loss_fn=loss_fn, interventions=[ShrinkPerturb()])
    for error in (ValueError("no luck"), None):
        module, loss_fn.error = Classifier(), error
        module.task_id = 7
        if announced and error is not None:
            callback.new_task("cats")
        with pytest.raises(ValueError, match="no luck") if error else contextlib.nullcontext():
            trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, "cats" if announced else 7, 0)]
    relative = {name: value for name, value in callback.history[0].metrics.items() if name.endswith("_vs_initial")}
    assert set(relative.values()) == {1.0}, "initial weights are those of the second module"


def test_interrupted_task_starts_with_the_next_fit() -> None:
    loss_fn, module = Failing(), Classifier()
    callback = SpectralCollapseCallback(collapse=Collapse(above=1e9), loss_fn=loss_fn)
    module.task_id = 0
    trainer(callback).fit(module, loader())
    module.task_id, loss_fn.error = 1, KeyboardInterrupt()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(callback).fit(module, loader())
    loss_fn.error = None
    trainer(callback).fit(module, loader())
    trainer(callback).fit(module, loader())
    assert tasks_seen(callback) == [(0, 0, 0), (1, 1, 3)]


def test_second_callback_with_a_detector_starts_anew() -> None:
    detector = TaskDetector(batch_label=2)
    for _ in range(2):
        callback = SpectralCollapseCallback(GGNProbe(samples=2), task_detector=detector, monitor=False)
        trainer(callback).fit(Classifier(), labelled([[0, 0], [1, 1]]))
        assert tasks_seen(callback) == [(0, 0, 0), (1, 1, 1)]


def test_first_batch_starts_a_task_without_a_label() -> None:
    callback = SpectralCollapseCallback(
        GGNProbe(samples=4), task_detector=TaskDetector(batch_label="t"), interventions=[ShrinkPerturb()]
    )

    class Dicts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    x, y = loader(size=4).dataset.tensors
    stream = [{"x": x[i : i + 4], "y": y[i : i + 4], "t": ["cats"] * (i == 4)} for i in (0, 4, 8)]
    trainer(callback).fit(Dicts(), DataLoader(stream, batch_size=None))
    assert tasks_seen(callback) == [(0, None, 0), (1, "cats", 1)]


@pytest.mark.filterwarnings("ignore:new tasks could not be detected")
def test_announced_task_starts_although_task_key_fails() -> None:
    def key(trainer: Trainer, module: LightningModule) -> int:
        if trainer.global_step >= 2:
            raise OSError("no connection")
        return 5

    callback = callback_with(task_key=key)

    class Announcer(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 4:
                callback.new_task("announced")

    trainer(callback, Announcer()).fit(Classifier(), loader(batches=6))
    assert tasks_seen(callback) == [(0, 5, 0), (1, "announced", 4)]


class Animal(str, enum.Enum):
    CAT = "cat"


@pytest.mark.parametrize(
    ("name", "expected"),
    [(np.int64(3), 3), (np.str_("x"), "x"), (Animal.CAT, "cat"), (torch.tensor(2), 2)],
    ids=["numpy number", "numpy string", "enum", "tensor"],
)
@pytest.mark.parametrize("announced", [True, False])
def test_task_ids_are_plain_in_reports_and_checkpoints(
    tmp_path: Path, name: Any, expected: Any, *, announced: bool
) -> None:
    callback, module = callback_with(), Classifier()
    if announced:
        callback.new_task(name)
    else:
        module.task_id = name
    one = trainer(callback)
    one.fit(module, loader())
    assert callback.history[0].task_id == expected
    assert type(callback.history[0].task_id) is type(expected)
    one.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("name", [1.5, [1], torch.zeros(2)])
def test_announced_name_of_wrong_type_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=r"new_task\(task_id\) is .*; the name of a task must be an int or a str"):
        callback_with().new_task(name)


class Epochs(Dataset[Any]):
    """Three batches of 4 samples with the epoch as their label."""

    def __init__(self) -> None:
        self.samples = loader().dataset
        self.module = Classifier()

    def __getitem__(self, index: int) -> Any:
        return (*self.samples[index], self.module.current_epoch)

    def __len__(self) -> int:
        return 12

    def loader_for(self, module: LightningModule) -> DataLoader[Any]:
        self.module = module
        return DataLoader(self, batch_size=4)


class RecordingDetector:
    """A drift detector that records the numbers after those of the dry run."""

    drift_detected = False

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def __deepcopy__(self, memo: Any) -> "RecordingDetector":
        return RecordingDetector()

    def update(self, x: float) -> None:
        self.numbers.append(x)


@pytest.mark.parametrize("samples", [4, 48], ids=["measured at once", "gathered"])
@pytest.mark.parametrize("statistic", [None, lambda batch: batch[2].float().mean()], ids=["loss", "statistic"])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0]),
        ({"every_n_epochs": 1}, [0, 3, 6]),
        ({"task_key": lambda trainer, module: trainer.current_epoch}, [0, 3, 6]),
        ({"batch_label": 2}, [0, 3, 6]),
    ],
    ids=["fit", "every_n_epochs", "task_key", "batch_label"],
)
def test_pass_for_batch_norm_after_averaging_is_no_task(
    options: dict[str, Any], steps: list[int], statistic: Any, samples: int
) -> None:
    """With 3 epochs of training, the pass is a fourth; Lightning takes an optimizer step at its end.

    All epochs of training together have 36 samples, and the pass gives none to the last task.
    """

    class Passes(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            epochs.append(trainer.current_epoch)

    class Normalized(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.BatchNorm1d(3))

    epochs: list[int] = []
    module, logger, drift = Normalized(), MemoryLogger(), RecordingDetector()
    callback = SpectralCollapseCallback(
        GGNProbe(samples=samples),
        collapse=Collapse(above=1e9),
        task_detector=TaskDetector(**options, drift_detector=drift, drift_statistic=statistic),
        monitor_every_n_steps=1,
        interventions=[ReDo(when=1)],
    )
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    fitted = trainer(callback, Passes(), averaging, max_epochs=3, logger=logger)
    with pytest.warns(PlasticityWarning, match="averages weights over training steps"):
        fitted.fit(module, Epochs().loader_for(module))
    assert epochs == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [step for _, _, step in tasks_seen(callback)] == steps
    assert {report.metrics["probe_samples"] for report in callback.history} == {min(samples, 36 // len(steps))}
    assert [repair.step for report in callback.history for repair in report.repairs] == [*range(1, 10)]
    assert [*logger.values("plasticity_training/dormant_fraction")] == [*range(9)]
    assert len(drift.numbers) == 9
    assert statistic is None or drift.numbers == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


class SavingProbe(GGNProbe):
    """Saves a checkpoint in the middle of a task's measurement, as a handler of SLURM's signal does."""

    def __init__(self, path: Path, task: int, samples: int = 4) -> None:
        super().__init__(samples=samples)
        self.path, self.task = path, task

    def measure(self, context: Any, progress: Any) -> Any:
        result = super().measure(context, progress)
        (callback,) = (c for c in context.trainer.callbacks if isinstance(c, SpectralCollapseCallback))
        if len(callback.history) == self.task and not self.path.exists():
            context.trainer.save_checkpoint(self.path)
        return result


class Increasing:
    """A drift detector that detects a drift at a number above the last one."""

    last, drift_detected = math.inf, False

    def update(self, x: float) -> None:
        self.last, self.drift_detected = x, x > self.last


class Announced(Classifier):
    """Announces a task at the start of each epoch."""

    def on_train_epoch_start(self) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, SpectralCollapseCallback):
                callback.new_task(f"epoch {self.current_epoch}")


class Named(Classifier):
    @property
    def task_id(self) -> int:
        return self.current_epoch


def drift() -> dict[str, Any]:
    return {"drift_detector": Increasing(), "drift_statistic": lambda batch: float(batch[2][0])}


@pytest.mark.parametrize("samples", [4, 16], ids=["measured at once", "gathered"])
@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Classifier, lambda: {"every_n_epochs": 1}),
        (Classifier, lambda: {"every_n_steps": 3}),
        (Classifier, lambda: {"batch_label": 2}),
        (Classifier, drift),
        (Announced, dict),
        (Named, dict),
    ],
    ids=["every_n_epochs", "every_n_steps", "batch_label", "drift", "new_task", "task_id"],
)
def test_task_saved_in_its_probe_starts_again(
    tmp_path: Path, kind: type[Classifier], options: Callable[[], dict[str, Any]], task: int, samples: int
) -> None:
    """Each of three epochs is a task. It ends before 16 samples are gathered, and is measured when the next one starts.

    The probe is tried before the first task.
    """
    path = tmp_path / "saved.ckpt"
    saving, resumed = (
        SpectralCollapseCallback(
            SavingProbe(path, task, samples), collapse=NEVER, task_detector=TaskDetector(**options())
        )
        for _ in range(2)
    )
    for callback, resumed_from in ((saving, None), (resumed, path)):
        module = kind()
        trainer(callback, max_epochs=3).fit(module, Epochs().loader_for(module), ckpt_path=resumed_from)
    assert [step for _, _, step in tasks_seen(saving)] == [0, 3, 6]
    assert_same_reports(resumed, saving)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_fit_saved_in_its_first_probe_starts_its_task_again(tmp_path: Path, task: int) -> None:
    path = tmp_path / "saved.ckpt"
    saving, resumed = (SpectralCollapseCallback(SavingProbe(path, task), collapse=NEVER) for _ in range(2))
    for callback, fits in ((saving, [None] * 3), (resumed, [path, None, None][: 3 - task])):
        module = Classifier()
        for resumed_from in fits:
            trainer(callback).fit(module, Epochs().loader_for(module), ckpt_path=resumed_from)
    assert tasks_seen(saving) == [(0, None, 0), (1, None, 3), (2, None, 6)]
    assert_same_reports(resumed, saving)


@pytest.mark.parametrize("samples", [4, 16], ids=["measured at once", "gathered"])
@pytest.mark.parametrize("kind", [Announced, Named])
def test_task_saved_at_its_exception_starts_again(tmp_path: Path, kind: type[Classifier], samples: int) -> None:
    loss_fn, path = Failing(), tmp_path / "saved.ckpt"

    class Interruption(Callback):
        def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
            loss_fn.error = KeyboardInterrupt() if trainer.current_epoch == 1 else None

        def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
            loss_fn.error = None
            trainer.save_checkpoint(path)

    def fit(*callbacks: Callback, resumed_from: Path | None = None) -> None:
        torch.manual_seed(0)
        module = kind()
        trainer(*callbacks, max_epochs=3).fit(module, Epochs().loader_for(module), ckpt_path=resumed_from)

    uninterrupted, interrupted, resumed = (
        SpectralCollapseCallback(GGNProbe(samples=samples), collapse=NEVER, loss_fn=loss_fn) for _ in range(3)
    )
    fit(uninterrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(interrupted, Interruption())
    assert len(interrupted.history) == 1
    fit(resumed, resumed_from=path)
    assert_same_reports(resumed, uninterrupted)


@pytest.mark.parametrize("task", [1, 2, 3])
def test_fit_saved_in_the_measurement_at_its_end_is_measured_once(tmp_path: Path, task: int) -> None:
    """A fit that resumes from it has nothing left to train."""
    path = tmp_path / "saved.ckpt"
    saving, resumed = (SpectralCollapseCallback(SavingProbe(path, task, 16), collapse=NEVER) for _ in range(2))
    for callback, fits in ((saving, [None] * 3), (resumed, [path, None, None, None][: 4 - task])):
        module = Classifier()
        for resumed_from in fits:
            trainer(callback).fit(module, Epochs().loader_for(module), ckpt_path=resumed_from)
    assert tasks_seen(saving) == [(0, None, 0), (1, None, 3), (2, None, 6)]
    assert_same_reports(resumed, saving)


def loss_of_single_batches(module: LightningModule, batch: Any) -> torch.Tensor:
    if len(batch[0]) > 4:
        raise ValueError("too many samples")
    return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])


# The first batch of the first task alone was measured before its samples were gathered.
@pytest.mark.parametrize(
    ("task", "loss_fn", "measured"),
    [(1, None, 16), (2, None, 16), (2, loss_of_single_batches, 4)],
    ids=["first joined", "second joined", "second alone"],
)
def test_task_saved_when_its_samples_are_gathered_is_measured_once(
    tmp_path: Path, task: int, loss_fn: Any, measured: int
) -> None:
    """Each of two tasks lasts two epochs, and the first batch of its second epoch completes the samples."""
    path = tmp_path / "saved.ckpt"
    saving, resumed = (
        SpectralCollapseCallback(
            SavingProbe(path, task, 16),
            collapse=NEVER,
            loss_fn=loss_fn,
            task_detector=TaskDetector(every_n_epochs=2),
        )
        for _ in range(2)
    )
    for callback, resumed_from in ((saving, None), (resumed, path)):
        module = Classifier()
        trainer(callback, max_epochs=4).fit(module, Epochs().loader_for(module), ckpt_path=resumed_from)
    assert tasks_seen(saving) == [(0, None, 0), (1, None, 6)]
    assert [report.metrics["probe_samples"] for report in saving.history] == [measured, measured]
    assert_same_reports(resumed, saving)


def assert_same_reports(actual: SpectralCollapseCallback, expected: SpectralCollapseCallback) -> None:
    assert tasks_seen(actual) == tasks_seen(expected)
    for report, other in zip(actual.history, expected.history, strict=True):
        assert report.metrics == other.metrics
        assert report.remarks == other.remarks
        assert torch.equal(report.spectrum.eigenvalues, other.spectrum.eigenvalues)


def test_announcement_after_an_interrupted_start_is_kept() -> None:
    """The interrupted task and the announced one start together."""
    loss_fn = Failing()
    callback = SpectralCollapseCallback(collapse=NEVER, loss_fn=loss_fn)
    trainer(callback).fit(Classifier(), loader())
    loss_fn.error = KeyboardInterrupt()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(callback).fit(Classifier(), loader())
    loss_fn.error = None
    callback.new_task("announced")
    trainer(callback).fit(Classifier(), loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, "announced", 3)]
