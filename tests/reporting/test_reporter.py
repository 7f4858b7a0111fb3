"""Test what people read, and what other callbacks can monitor."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_plasticity import FitTest, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import L2Init, ReDo, ShrinkPerturb
from tests.helpers.modules import ALWAYS, NEVER, Classifier, fit_three_tasks, loader, trainer


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns the lines that contain a phrase, as they are shown at the default level."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        caplog.set_level(logging.INFO, logger=name)
    return lambda phrase: [record.getMessage() for record in caplog.records if phrase in record.getMessage()]


class MetricRecorder(Callback):
    """Keeps ``callback_metrics`` of the first batch of each fit."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_lead_numbers_can_be_monitored_at_once() -> None:
    callback, recorder, module = SpectralCollapseCallback(collapse=NEVER), MetricRecorder(), Classifier()
    for _ in range(2):
        trainer(callback, recorder).fit(module, loader())
    for task, seen in enumerate(recorder.metrics):
        metrics = callback.history[task].metrics
        names = ("learnable_fraction", "fit_loss_vs_initial", "handicap", "epsilon_rank", "dormant_fraction")
        assert {name: seen[f"plasticity/{name}"] for name in names} == pytest.approx({n: metrics[n] for n in names})
        assert seen["plasticity/collapsed"] == seen["plasticity/alarms"] == seen["plasticity/repairs"] == 0


def test_named_callback_has_its_own_metrics() -> None:
    recorder = MetricRecorder()
    trainer(SpectralCollapseCallback(name="actor"), recorder).fit(Classifier(), loader())
    assert "plasticity_actor/learnable_fraction" in recorder.metrics[0]
    assert "plasticity/learnable_fraction" not in recorder.metrics[0]


def test_early_stopping_ends_training_at_an_alarm() -> None:
    stopping = EarlyStopping("plasticity/collapsed", strict=True, stopping_threshold=0.5, mode="max", patience=100)
    detector = TaskDetector(every_n_epochs=1)
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=detector)
    going_on = trainer(callback, stopping, max_epochs=3)
    going_on.fit(Classifier(), loader())
    assert going_on.current_epoch == 3
    callback = SpectralCollapseCallback(collapse=ALWAYS, task_detector=detector)
    stopped = trainer(callback, stopping, max_epochs=3)
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        stopped.fit(Classifier(), loader())
    assert stopped.current_epoch == 1


def test_checkpoint_of_best_learnable_fraction(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="plasticity/learnable_fraction", mode="max", save_top_k=1)
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=TaskDetector(every_n_epochs=1))
    trainer(callback, checkpoint, max_epochs=4, enable_checkpointing=True).fit(Classifier(lr=0.1), loader())
    assert checkpoint.best_model_score == pytest.approx(max(r.metrics["learnable_fraction"] for r in callback.history))


def test_verdict_is_still_there_in_a_fit_without_new_task() -> None:
    callback, recorder, module = SpectralCollapseCallback(collapse=NEVER), MetricRecorder(), Classifier()
    module.task_id = 0
    for _ in range(2):
        trainer(callback, recorder).fit(module, loader())
    assert len(callback.history) == 1
    assert recorder.metrics[1] == recorder.metrics[0]


@pytest.mark.parametrize("kind", [TQDMProgressBar, RichProgressBar])
def test_progress_bar_shows_the_last_verdict(kind: Any) -> None:
    shown = []

    class Recorder(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            shown.append(bar.get_metrics(trainer, module)["plasticity"])

    bar, callback = kind(), SpectralCollapseCallback(collapse=ALWAYS)
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        trainer(callback, bar, Recorder(), enable_progress_bar=True).fit(Classifier(), loader())
    assert shown == ["alarm, handicap 1"] * 3


def test_repair_is_said_in_a_sentence(said: Any) -> None:
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        callback = fit_three_tasks(collapse=ALWAYS, interventions=[ShrinkPerturb()])
    report = callback.history[1]
    (line,) = said("task 1: ShrinkPerturb: 67 parameters changed; handicap ")
    for name in ("handicap", "fit_loss"):
        assert f"{report.metrics[name]:.3g} → {report.after[name]:.3g}" in line
    assert line.endswith(f"fit loss of a fresh network {report.fresh['fit_loss']:.3g}")


@pytest.mark.parametrize(
    ("interventions", "reason"),
    [
        ([], r"the callback has no interventions: write SpectralCollapseCallback\(interventions="),
        ([ReDo(when=1000), L2Init()], "ReDo, L2Init run at other times: when='collapse'"),
    ],
)
def test_alarm_without_repair_says_why_once(interventions: Any, reason: str, said: Any) -> None:
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        fit_three_tasks(collapse=ALWAYS, interventions=interventions)
    (line,) = said("nothing is repaired at an alarm")
    assert re.search(reason, line)


def test_single_task_is_said_to_be_no_curve_once(said: Any) -> None:
    fit_three_tasks()
    (line,) = said("a single point is no curve")
    assert "TaskDetector(every_n_epochs=...)" in line


def test_several_tasks_of_a_fit_need_no_advice(said: Any) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=TaskDetector(every_n_epochs=1))
    trainer(callback, max_epochs=2).fit(Classifier(), loader())
    assert not said("a single point is no curve")


def test_new_log_directory_at_second_task_is_noted_once(tmp_path: Path, said: Any) -> None:
    callback, module = SpectralCollapseCallback(collapse=NEVER), Classifier()
    for version in range(3):
        trainer(callback, logger=CSVLogger(tmp_path, version=version)).fit(module, loader())
    (line, *_) = lines = said("become one curve")
    assert line.startswith(
        "task 1 is logged as lightning_logs/1, and earlier ones as lightning_logs/0: pass one logger"
    )
    assert len(lines) == 1


def test_shared_logger_needs_no_note(tmp_path: Path, said: Any) -> None:
    fit_three_tasks(CSVLogger(tmp_path))
    assert not said("become one curve")


def test_logger_without_a_place_does_not_end_training() -> None:
    class Placeless(Logger):
        @property
        def name(self) -> str:
            raise OSError("no connection")

        version = 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    callback = SpectralCollapseCallback(collapse=NEVER)
    with pytest.warns(PlasticityWarning, match="Placeless could not log .* training goes on: OSError: no connection"):
        trainer(callback, logger=Placeless()).fit(Classifier(), loader())
    assert len(callback.history) == 1


def test_warning_is_shown_without_a_path() -> None:
    script = (
        "import warnings\n"
        "from lightning.pytorch import Trainer\n"
        "from lightning_plasticity.messages import rank_zero_warn\n"
        "rank_zero_warn('task 3: handicap 2')\n"
        "warnings.warn('another')\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    assert shown.splitlines()[-2:] == ["PlasticityWarning: task 3: handicap 2", "<string>:5: UserWarning: another"]


def test_live_comparison_is_shown_after_its_verdict() -> None:
    recorder = MetricRecorder()
    callback = SpectralCollapseCallback(collapse=NEVER, fit_test=FitTest(live=True, steps=8))
    torch.manual_seed(0)
    module = Classifier()
    for _ in range(2):
        run = trainer(callback, recorder)
        run.fit(module, loader(batches=12))
    assert run.callback_metrics["plasticity/fit_loss_vs_initial"].item() == pytest.approx(
        callback.history[1].metrics["fit_loss_vs_initial"]
    )
    assert recorder.metrics[1]["plasticity/handicap"] == callback.history[0].metrics["handicap"], "the last verdict"
