"""Tests of what the package uses of Lightning that is not public.

Docstrings tell what a user would notice if a new release of Lightning broke it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks, loggers, strategies
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, RichProgressBar, TQDMProgressBar
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, _compat
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer


class Recorder(Callback):
    """A callback that records the results of a function of Trainer and module before every batch."""

    def __init__(self, function: Callable[[Trainer, LightningModule], Any]) -> None:
        self.function = function
        self.results: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.results.append(self.function(trainer, module))


class Data(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader()


def test_fit_datamodule_is_that_of_the_running_fit() -> None:
    """Otherwise, data modules of earlier fits start false tasks."""
    recorder, data = Recorder(lambda trainer, _: _compat.fit_datamodule(trainer)), Data()
    one = trainer(recorder)
    one.fit(Classifier(), datamodule=data)
    assert recorder.results == [data] * 3
    one.fit_loop.max_epochs += 1
    one.fit(Classifier(), loader())
    assert recorder.results[3:] == [None] * 3
    assert one.datamodule is data, "trainer.datamodule is up to date now: fit_datamodule can go"


def test_is_logging_step_agrees_with_lightning() -> None:
    """Otherwise, penalties are logged at other steps than losses."""

    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", loss := super().training_step(batch, batch_idx))
            return loss

    class LoggingSteps(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            is_logging[trainer.global_step] = _compat.is_logging_step(trainer)

    is_logging: dict[int, bool] = {}
    logger = MemoryLogger()
    trainer(LoggingSteps(), logger=logger, log_every_n_steps=2).fit(Logging(), loader(5))
    assert is_logging == {step: step in logger.values("loss") for step in range(5)}
    assert list(is_logging.values()) == [False, True, False, True, False]


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
# The loader ignores the batch size that was found.
@pytest.mark.filterwarnings("ignore:.*batch_size:UserWarning")
def test_checkpoints_of_finders_are_recognised(finder: type[Callback], tmp_path: Path) -> None:
    """Otherwise, the fit after a finder counts as resumed and starts no task."""

    class Restoring(Callback):
        def on_load_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            restored.append(_compat.is_restoring_for_finder(trainer))

    restored: list[bool] = []
    options = {LearningRateFinder: {"num_training_steps": 5}, BatchSizeFinder: {"max_trials": 1, "steps_per_trial": 1}}
    search = finder(**options[finder])
    first = trainer(Restoring(), search, default_root_dir=tmp_path)
    first.fit(Classifier(), datamodule=Data())
    assert restored == [True]
    first.save_checkpoint(tmp_path / "own.ckpt")
    trainer(Restoring(), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "own.ckpt")
    assert restored == [True, False]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_scale_is_the_factor_of_gradients(scaled: bool, fused: bool) -> None:
    """Otherwise, the gradients of regularizers vanish in half precision."""

    class Linear(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 3 * self.weight

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradients.append(self.weight.grad / _compat.gradient_scale(self.trainer, optimizer))

    gradients: list[Tensor] = []
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))] if scaled else []
    trainer(plugins=plugins).fit(Linear(), loader())
    assert gradients == [3.0] * 3


def test_compiled_methods_are_all_that_the_trainer_stores() -> None:
    """Otherwise, a probe trains the original module."""

    def stored_methods(_: Trainer, module: LightningModule) -> tuple[dict[str, Any], set[str]]:
        bound = {name for name, value in vars(module).items() if getattr(value, "__self__", None) is module}
        return _compat.compiled_methods(module), bound | {n for n, v in vars(module).items() if callable(v)}

    recorder = Recorder(stored_methods)
    trainer(recorder).fit(torch.compile(Classifier(), backend="eager"), loader())
    compiled, stored = recorder.results[0]
    assert "training_step" in compiled
    assert compiled.keys() == stored - vars(Classifier()).keys()
    plain = Recorder(stored_methods)
    trainer(plain).fit(Classifier(), loader())
    assert plain.results[0][0] == {}


def test_takes_batch_index_matches_trainer() -> None:
    """Otherwise, probes call ``training_step`` with wrong arguments."""

    class BatchOnly(Classifier):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.record(batch)

        def record(self, *arguments: Any) -> Tensor:
            counts.append(len(arguments))
            return Classifier.training_step(self, arguments[0], 0)

    class BatchAndIndex(BatchOnly):
        def training_step(self, batch: Any, i: int) -> Tensor:  # type: ignore[override]
            return self.record(batch, i)

    class Variadic(BatchOnly):
        def training_step(self, *arguments: Any) -> Tensor:  # type: ignore[override]
            return self.record(*arguments)

    counts: list[int] = []
    for kind in (BatchOnly, BatchAndIndex, Variadic):
        trainer(max_steps=1).fit(module := kind(), loader())
        assert counts.pop() == 1 + _compat.takes_batch_index(module.training_step), kind


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_takes_dataloader_iter_matches_trainer() -> None:
    """Otherwise, the callback probes on an iterator instead of a batch."""

    class WithIterator(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            received.append(dataloader_iter)
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    received: list[Any] = []
    trainer(max_steps=1).fit(module := WithIterator(), loader())
    assert iter(received[0]) is received[0]
    assert _compat.takes_dataloader_iter(module.training_step)
    assert not _compat.takes_dataloader_iter(Classifier().training_step)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("is_sized", [False, True])
def test_batches_of_unknown_number_are_fetched_ahead(*, is_sized: bool) -> None:
    """Otherwise, a task that a data set announces starts one batch too early or too late."""

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            for sample in loader().dataset:
                record()
                yield sample
            record()

    class SizedStream(Stream):
        def __len__(self) -> int:
            return 12

    class Hooks(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            record()
            return batch

        on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_epoch_start = lambda *_: record()

    def record() -> None:
        # The first batch of an epoch is fetched before the loop over batches advances.
        stack = {(Path(frame.filename).name, frame.function) for frame in inspect.stack(0)}
        is_in_fetch = {("training_epoch_loop.py", "advance"), ("fetchers.py", "__next__")} <= stack
        results.append((_compat.is_fetching_ahead(fitted), is_in_fetch and not is_sized))

    results: list[tuple[bool, bool]] = []
    fitted = trainer(max_epochs=2)
    data = (SizedStream if is_sized else Stream)()
    fitted.fit(Hooks(), DataLoader(data, batch_size=4))
    assert len(results) > 2 * (12 + 3 * 3)
    assert {ahead for ahead, _ in results} == {not is_sized, False}
    assert all(ahead == expected for ahead, expected in results)


@pytest.mark.parametrize("manual", [False, True])
def test_epoch_that_does_not_train_is_recognised(*, manual: bool) -> None:
    """Otherwise, the epoch that updates the statistics of BatchNorm starts a task."""

    class Normalized(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.BatchNorm1d(3))
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def on_after_backward(self) -> None:
            trained.append(self.global_step)

    def steps_and_trains(trainer: Trainer, _: LightningModule) -> tuple[int, bool]:
        return trainer.global_step, _compat.trains(trainer)

    trained: list[int] = []
    recorder = Recorder(steps_and_trains)
    averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer(recorder, averaging, max_epochs=2).fit(Normalized(), loader())
    assert len(recorder.results) == 9
    assert [step for step, trains in recorder.results if trains] == trained


def test_schedulers_are_those_of_the_fit() -> None:
    """Otherwise, probes change the learning rate."""

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [self.scheduler]

    recorder = Recorder(lambda trainer, module: _compat.schedulers(trainer) == [module.scheduler])
    trainer(recorder).fit(Scheduled(), loader())
    assert recorder.results == [True] * 3


@pytest.mark.parametrize(
    ("bar", "text"),
    [
        (TQDMProgressBar, lambda bar: bar.train_progress_bar.desc.removesuffix(": ")),
        (RichProgressBar, lambda bar: bar.train_progress_bar.description.rstrip()),
    ],
)
def test_description_of_the_bar_is_shown_and_restored(
    bar: type[Any], text: Callable[[Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise, a long probe looks like a hanging run."""

    def change(trainer: Trainer, _: LightningModule) -> list[str]:
        description = _compat.training_description(trainer)
        assert description is not None
        texts = [text(trainer.progress_bar_callback)]
        description.show("probing")
        texts.append(text(trainer.progress_bar_callback))
        description.restore()
        return [*texts, text(trainer.progress_bar_callback)]

    recorder = Recorder(change)
    options = {"console_kwargs": {"file": io.StringIO()}} if bar is RichProgressBar else {}
    trainer(recorder, bar(**options), enable_progress_bar=True).fit(Classifier(), loader())
    before, changed, after = recorder.results[0]
    assert before == after
    assert "Epoch 0" in before
    assert changed == "probing"


def test_callbacks_that_average_weights_are_recognised() -> None:
    """Otherwise, no warning is issued that averaging undoes repairs."""
    kinds = [kind for name, kind in vars(callbacks).items() if "Averag" in name]
    assert len(kinds) in (1, 3), "Lightning 2.6 added WeightAveraging and a subclass"
    for kind in kinds:
        if kind.__name__ == "WeightAveraging":
            averaging = kind()
        else:
            averaging = kind(swa_lrs=0.1) if kind.__name__ == "StochasticWeightAveraging" else kind(decay=0.5)
        assert _compat.weight_averages(trainer(averaging)) == [kind.__name__]
    assert _compat.weight_averages(trainer(TQDMProgressBar(), enable_progress_bar=True)) == []


def test_only_supported_strategies_have_full_weights() -> None:
    """Otherwise, the probe takes a shard for the full weights."""
    kinds = [kind for kind in vars(strategies).values() if isinstance(kind, type) and not inspect.isabstract(kind)]
    instances = [kind.__new__(kind) for kind in kinds]
    full_weights = {type(strategy).__name__ for strategy in instances if _compat.has_full_weights(strategy)}
    model_parallel = {type(strategy).__name__ for strategy in instances if _compat.is_model_parallel(strategy)}
    assert full_weights == {"SingleDeviceStrategy", "DDPStrategy"}
    assert model_parallel == {"ModelParallelStrategy"}


def test_dummy_logger_logs_nothing() -> None:
    """Otherwise, the logs of a probed copy appear in those of the run."""
    dummy = _compat.DummyLogger()
    assert isinstance(dummy, loggers.Logger)
    dummy.log_metrics({"loss": 1.0}, step=0)
    dummy.log_image("name", [])
    dummy.experiment.add_histogram_raw("name", min=0)
    dummy.experiment[0].log({})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LightningModule", "LightningModule"),
        ("LightningDataModule", "LightningDataModule"),
        ("loggers.CSVLogger", "loggers.Logger"),
        ("loggers.TensorBoardLogger", "loggers.TensorBoardLogger"),
        ("callbacks.TQDMProgressBar", "callbacks.TQDMProgressBar"),
        ("callbacks.RichProgressBar", "callbacks.RichProgressBar"),
        ("strategies.SingleDeviceStrategy", "strategies.SingleDeviceStrategy"),
        ("strategies.SingleDeviceXLAStrategy", "strategies.SingleDeviceXLAStrategy"),
        ("strategies.DDPStrategy", "strategies.DDPStrategy"),
        ("strategies.DeepSpeedStrategy", "strategies.DeepSpeedStrategy"),
    ],
)
def test_classes_of_pytorch_lightning_are_recognised(name: str, kind: str) -> None:
    """Otherwise, users of the package ``pytorch_lightning`` are not supported."""
    other = attrgetter(name)(pytest.importorskip("pytorch_lightning"))
    assert not issubclass(other, expected := attrgetter(kind)(lightning.pytorch))
    assert _compat.is_lightning(other.__new__(other), expected)
    assert not _compat.is_lightning(object(), expected)


def test_strategies_that_spawn_processes_are_recognised() -> None:
    """Otherwise, no warning is issued that the history is lost with the processes."""
    spawning = {"auto": False, "ddp": False, "ddp_spawn": True, "ddp_fork": True, "ddp_notebook": True}
    for name, spawns in spawning.items():
        fitted = trainer(strategy=name, devices=1 if name == "auto" else 2)
        assert _compat.spawns_processes(fitted.strategy) == spawns
        callback = SpectralCollapseCallback()
        with pytest.warns(PlasticityWarning, match="history, and all that") if spawns else contextlib.nullcontext():
            callback.setup(fitted, Classifier(), "fit")
