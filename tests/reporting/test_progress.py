"""Test the progress of a probe in the progress bar of the Trainer."""

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_plasticity import HessianProbe, SpectralCollapseCallback
from lightning_plasticity._compat import training_description
from lightning_plasticity.reporting import progress
from lightning_plasticity.reporting.progress import shown_progress
from tests.helpers.modules import NEVER, Classifier, loader, trainer

PROBE = HessianProbe(samples=64, num_probes=2, num_steps=4)


class DescriptionRecorder(SpectralCollapseCallback):
    """A callback that records the description of the progress bar before and after a probe."""

    def __init__(self, read: Callable[[Trainer], str]) -> None:
        super().__init__(PROBE, collapse=NEVER)
        self.read = read
        self.around: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        before = self.read(trainer)
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if batch_idx == 0:
            self.around += [before, self.read(trainer)]


@pytest.fixture
def show_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)


@pytest.mark.usefixtures("show_every_update")
def test_tqdm_shows_probe_and_restores_description(capsys: pytest.CaptureFixture[str]) -> None:
    callback = DescriptionRecorder(lambda trainer: trainer.progress_bar_callback.train_progress_bar.desc)
    module = Classifier()
    # From the second task on, the initial weights are probed too; at the first task the network still has them.
    for _ in range(2):
        trainer(callback, TQDMProgressBar(), enable_progress_bar=True).fit(module, loader())
    shown = capsys.readouterr().out
    for done in range(1, 9):
        assert f"probing curvature {done}/8: " in shown
        assert f"probing curvature of the initial weights {done}/8: " in shown
    assert callback.around == ["Epoch 0: "] * 4


@pytest.mark.usefixtures("show_every_update")
def test_rich_shows_probe_and_restores_description() -> None:
    pytest.importorskip("rich")
    output = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": output, "force_terminal": True, "width": 200})
    callback = DescriptionRecorder(lambda trainer: trainer.progress_bar_callback.train_progress_bar.description)
    trainer(callback, bar, enable_progress_bar=True).fit(Classifier(), loader())
    for done in range(1, 9):
        assert f"probing curvature {done}/8" in output.getvalue()
    before, after = callback.around
    assert "Epoch 0/0" in before
    assert after == before


@pytest.mark.usefixtures("show_every_update")
def test_description_is_restored_after_exception() -> None:
    shown = []

    def fail(trainer: Trainer) -> None:
        with shown_progress(trainer, "probing") as report:
            report(1, 2)
            shown.append(trainer.progress_bar_callback.train_progress_bar.desc)
            raise ZeroDivisionError

    class Failing(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            with pytest.raises(ZeroDivisionError):
                fail(trainer)
            shown.append(trainer.progress_bar_callback.train_progress_bar.desc)

    trainer(Failing(), TQDMProgressBar(), enable_progress_bar=True, max_steps=1).fit(Classifier(), loader())
    assert shown == ["probing 1/2: ", "Epoch 0: "]


def test_updates_are_at_least_one_interval_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = [0.0], []

    class Ticking(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            bar: Any = trainer.progress_bar_callback
            with shown_progress(trainer, "probing") as report:
                for done in range(1, 11):
                    clock[0] += 0.1
                    report(done, 10)
                    shown.append(bar.train_progress_bar.desc)

    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    trainer(Ticking(), TQDMProgressBar(), enable_progress_bar=True, max_steps=1).fit(Classifier(), loader())
    assert shown == ["Epoch 0: "] * 2 + ["probing 3/10: "] * 3 + ["probing 6/10: "] * 3 + ["probing 9/10: "] * 2


class Foreign(ProgressBar):
    """A progress bar that is not Lightning's."""

    def disable(self) -> None: ...


@pytest.mark.usefixtures("show_every_update")
@pytest.mark.parametrize(
    ("bars", "enabled"),
    [([], False), ([Foreign()], True), ([TQDMProgressBar(refresh_rate=0)], True)],
    ids=["none", "foreign", "disabled"],
)
def test_nothing_is_shown_without_lightning_bar(
    bars: list[Callback], enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    descriptions = []

    class Recorder(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            descriptions.append(training_description(trainer))

    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, Recorder(), *bars, enable_progress_bar=enabled).fit(Classifier(), loader())
    assert descriptions == [None] * 3
    assert callback.history[0].spectrum is not None
    assert "probing" not in capsys.readouterr().out


def test_disabled_rich_bar_is_left_unchanged() -> None:
    pytest.importorskip("rich")
    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, RichProgressBar(refresh_rate=0), enable_progress_bar=True).fit(Classifier(), loader())
    assert callback.history[0].spectrum is not None


class WithoutBar(TQDMProgressBar):
    """A TQDM progress bar that never creates the training bar."""

    def on_train_start(self, *_: Any) -> None: ...

    on_train_epoch_start = on_train_batch_end = on_train_epoch_end = on_train_end = on_train_start


class WithBrokenBar(WithoutBar):
    """A TQDM progress bar whose training bar has no methods."""

    train_progress_bar: Any = SimpleNamespace(disable=False, desc="", set_description=None, set_description_str=None)


@pytest.mark.usefixtures("show_every_update")
@pytest.mark.parametrize("bar", [WithoutBar, WithBrokenBar])
def test_broken_bar_does_not_end_training(bar: type[TQDMProgressBar]) -> None:
    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, bar(), enable_progress_bar=True).fit(Classifier(), loader())
    assert callback.history[0].spectrum is not None
