"""What the package takes from Lightning that is not public: each test says what breaks for whom when it goes."""

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

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, _compat
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer


class Asking(Callback):
    """Asks something of the Trainer and the module before every batch."""

    def __init__(self, question: Callable[[Trainer, LightningModule], Any]) -> None:
        self.question = question
        self.answers: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.answers.append(self.question(trainer, module))


class Data(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return loader()


def test_fit_datamodule_is_that_of_the_running_fit_or_else_stale_ones_start_false_tasks() -> None:
    asking, data = Asking(lambda trainer, _: _compat.fit_datamodule(trainer)), Data()
    one = trainer(asking)
    one.fit(Classifier(), datamodule=data)
    assert asking.answers == [data] * 3
    one.fit_loop.max_epochs += 1
    one.fit(Classifier(), loader())
    assert asking.answers[3:] == [None] * 3
    assert one.datamodule is data, "Lightning tells by itself now: fit_datamodule can go"


def test_logging_steps_are_those_of_lightning_or_else_penalties_are_logged_at_other_steps_than_losses() -> None:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("loss", loss := super().training_step(batch, batch_idx))
            return loss

    class Deciding(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            logging[trainer.global_step] = _compat.is_logging_step(trainer)

    logging: dict[int, bool] = {}
    logger = MemoryLogger()
    trainer(Deciding(), logger=logger, log_every_n_steps=2).fit(Logging(), loader(5))
    assert logging == {step: step in logger.values("loss") for step in range(5)}
    assert list(logging.values()) == [False, True, False, True, False]


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
@pytest.mark.filterwarnings("ignore:.*batch_size:UserWarning")  # on a loader that ignores what was found
def test_finders_are_told_by_their_checkpoints_or_else_the_fit_behind_one_is_taken_for_resumed(
    finder: type[Callback], tmp_path: Path
) -> None:
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
def test_gradient_scale_is_what_gradients_are_multiplied_by_or_else_regularizers_of_half_precision_vanish(
    scaled: bool, fused: bool
) -> None:
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


def test_compiled_methods_are_all_that_the_trainer_stored_or_else_a_probe_trains_the_original() -> None:
    def asked(_: Trainer, module: LightningModule) -> tuple[dict[str, Any], set[str]]:
        callables = {name for name, value in vars(module).items() if getattr(value, "__self__", None) is module}
        return _compat.compiled_methods(module), callables | {n for n, v in vars(module).items() if callable(v)}

    asking = Asking(asked)
    trainer(asking).fit(torch.compile(Classifier(), backend="eager"), loader())
    compiled, stored = asking.answers[0]
    assert "training_step" in compiled
    assert compiled.keys() == stored - vars(Classifier()).keys()
    plain = Asking(asked)
    trainer(plain).fit(Classifier(), loader())
    assert plain.answers[0][0] == {}


def test_the_trainer_passes_the_index_where_takes_batch_index_says_or_else_probes_call_training_step_wrongly() -> None:
    class One(Classifier):
        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            return self.seen(batch)

        def seen(self, *arguments: Any) -> Tensor:
            numbers.append(len(arguments))
            return Classifier.training_step(self, arguments[0], 0)

    class Two(One):
        def training_step(self, batch: Any, i: int) -> Tensor:  # type: ignore[override]
            return self.seen(batch, i)

    class Whatever(One):
        def training_step(self, *arguments: Any) -> Tensor:  # type: ignore[override]
            return self.seen(*arguments)

    numbers: list[int] = []
    for kind in (One, Two, Whatever):
        trainer(max_steps=1).fit(module := kind(), loader())
        assert numbers.pop() == 1 + _compat.takes_batch_index(module.training_step), kind


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_the_trainer_passes_the_iterator_where_fetches_batches_says_or_else_there_is_no_batch_to_probe_on() -> None:
    class Fetching(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            given.append(dataloader_iter)
            batch, index, _ = next(dataloader_iter)
            return super().training_step(batch, index)

    given: list[Any] = []
    trainer(max_steps=1).fit(module := Fetching(), loader())
    assert iter(given[0]) is given[0]
    assert _compat.takes_dataloader_iter(module.training_step)
    assert not _compat.takes_dataloader_iter(Classifier().training_step)


def test_schedulers_are_those_of_the_fit_or_else_probes_move_the_learning_rate() -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            return [optimizer], [self.scheduler]

    asking = Asking(lambda trainer, module: _compat.schedulers(trainer) == [module.scheduler])
    trainer(asking).fit(Scheduled(), loader())
    assert asking.answers == [True] * 3


@pytest.mark.parametrize(
    ("bar", "text"),
    [
        (TQDMProgressBar, lambda bar: bar.train_progress_bar.desc.removesuffix(": ")),
        (RichProgressBar, lambda bar: bar.train_progress_bar.description.rstrip()),
    ],
)
def test_the_text_beside_the_bar_can_be_set_and_put_back_or_else_long_probes_look_like_hanging(
    bar: type[Any], text: Callable[[Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def change(trainer: Trainer, _: LightningModule) -> list[str]:
        description = _compat.training_description(trainer)
        assert description is not None
        texts = [text(trainer.progress_bar_callback)]
        description.show("probing")
        texts.append(text(trainer.progress_bar_callback))
        description.restore()
        return [*texts, text(trainer.progress_bar_callback)]

    asking = Asking(change)
    options = {"console_kwargs": {"file": io.StringIO()}} if bar is RichProgressBar else {}
    trainer(asking, bar(**options), enable_progress_bar=True).fit(Classifier(), loader())
    before, changed, after = asking.answers[0]
    assert before == after
    assert "Epoch 0" in before
    assert changed == "probing"


def test_callbacks_that_average_weights_are_known_or_else_nobody_is_warned_that_repairs_are_undone() -> None:
    kinds = [kind for name, kind in vars(callbacks).items() if "Averag" in name]
    assert len(kinds) in (1, 3), "WeightAveraging and its kinds are there since Lightning 2.6"
    for kind in kinds:
        if kind.__name__ == "WeightAveraging":
            averaging = kind()
        else:
            averaging = kind(swa_lrs=0.1) if kind.__name__ == "StochasticWeightAveraging" else kind(decay=0.5)
        assert _compat.weight_averages(trainer(averaging)) == [kind.__name__]
    assert _compat.weight_averages(trainer(TQDMProgressBar(), enable_progress_bar=True)) == []


def test_no_other_strategy_passes_for_one_with_whole_weights_or_else_shards_are_probed_as_if_they_were_all() -> None:
    kinds = [kind for kind in vars(strategies).values() if isinstance(kind, type) and not inspect.isabstract(kind)]
    made = [kind.__new__(kind) for kind in kinds]
    assert {type(each).__name__ for each in made if _compat.has_full_weights(each)} == {
        "SingleDeviceStrategy",
        "DDPStrategy",
    }
    assert {type(each).__name__ for each in made if _compat.is_model_parallel(each)} == {"ModelParallelStrategy"}


def test_the_dummy_logger_swallows_everything_or_else_what_a_probed_copy_logs_is_logged() -> None:
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
def test_classes_have_the_same_names_in_pytorch_lightning_or_else_its_users_are_taken_for_strangers(
    name: str, kind: str
) -> None:
    other = attrgetter(name)(pytest.importorskip("pytorch_lightning"))
    assert not issubclass(other, own := attrgetter(kind)(lightning.pytorch))
    assert _compat.is_lightning(other.__new__(other), own)
    assert not _compat.is_lightning(object(), own)


def test_processes_that_are_started_for_a_fit_are_known_or_else_nobody_is_told_that_history_ends_with_them() -> None:
    kept = {"auto": False, "ddp": False, "ddp_spawn": True, "ddp_fork": True, "ddp_notebook": True}
    for name, forgets in kept.items():
        fitted = trainer(strategy=name, devices=1 if name == "auto" else 2)
        assert _compat.spawns_processes(fitted.strategy) == forgets
        callback = SpectralCollapseCallback()
        with pytest.warns(PlasticityWarning, match="history, and all that") if forgets else contextlib.nullcontext():
            callback.setup(fitted, Classifier(), "fit")
