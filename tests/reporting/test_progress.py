"""A long probe in the progress bar."""

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
from tests.helpers.modules import Classifier, loader, trainer

PROBE = HessianProbe(num_probes=2, num_steps=4)


class Watching(SpectralCollapseCallback):
    """Keeps what the bar says before and after a probe."""

    def __init__(self, read: Callable[[Trainer], str]) -> None:
        super().__init__(PROBE)
        self.read = read
        self.around: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        before = self.read(trainer)
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        if batch_idx == 0:
            self.around += [before, self.read(trainer)]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows every update."""
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)


@pytest.mark.usefixtures("unhurried")
def test_tqdm_shows_the_probe_and_afterwards_what_it_did_before(capsys: pytest.CaptureFixture[str]) -> None:
    callback = Watching(lambda trainer: trainer.progress_bar_callback.train_progress_bar.desc)
    module = Classifier()
    for _ in range(2):  # before the first task, the network has its initial weights
        trainer(callback, TQDMProgressBar(), enable_progress_bar=True).fit(module, loader())
    shown = capsys.readouterr().out
    for done in range(1, 9):
        assert f"probing curvature {done}/8: " in shown
        assert f"probing curvature of the initial weights {done}/8: " in shown
    assert callback.around == ["Epoch 0: "] * 4


@pytest.mark.usefixtures("unhurried")
def test_rich_shows_the_probe_and_afterwards_what_it_did_before() -> None:
    pytest.importorskip("rich")
    output = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": output, "force_terminal": True, "width": 200})
    callback = Watching(lambda trainer: trainer.progress_bar_callback.train_progress_bar.description)
    trainer(callback, bar, enable_progress_bar=True).fit(Classifier(), loader())
    for done in range(1, 9):
        assert f"probing curvature {done}/8" in output.getvalue()
    before, after = callback.around
    assert "Epoch 0/0" in before
    assert after == before


@pytest.mark.usefixtures("unhurried")
def test_the_description_is_put_back_after_an_exception() -> None:
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


def test_updates_too_fast_to_be_read_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A bar of somebody else's."""

    def disable(self) -> None: ...


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize(
    ("bars", "enabled"),
    [([], False), ([Foreign()], True), ([TQDMProgressBar(refresh_rate=0)], True)],
    ids=["none", "foreign", "disabled"],
)
def test_without_a_bar_to_be_seen_nothing_happens(
    bars: list[Callback], enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    class Asking(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.append(training_description(trainer))

    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, Asking(), *bars, enable_progress_bar=enabled).fit(Classifier(), loader())
    assert seen == [None] * 3
    assert callback.history[0].spectrum is not None
    assert "probing" not in capsys.readouterr().out


def test_a_disabled_rich_bar_is_left_alone() -> None:
    pytest.importorskip("rich")
    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, RichProgressBar(refresh_rate=0), enable_progress_bar=True).fit(Classifier(), loader())
    assert callback.history[0].spectrum is not None


class Unmade(TQDMProgressBar):
    """Says something else instead of a bar."""

    def on_train_start(self, *_: Any) -> None: ...

    on_train_epoch_start = on_train_batch_end = on_train_epoch_end = on_train_end = on_train_start


class OfNothing(Unmade):
    """Has something else in the place of the bar."""

    train_progress_bar: Any = SimpleNamespace(disable=False, desc="", set_description=None, set_description_str=None)


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("bar", [Unmade, OfNothing])
def test_a_bar_that_cannot_be_written_to_ends_no_run(bar: type[TQDMProgressBar]) -> None:
    callback = SpectralCollapseCallback(PROBE)
    trainer(callback, bar(), enable_progress_bar=True).fit(Classifier(), loader())
    assert callback.history[0].spectrum is not None
