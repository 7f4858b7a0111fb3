"""Check what is measured after repairs that follow the verdict of a live fit test."""

import re
from typing import Any

import pytest
import torch

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback, fit_test
from lightning_plasticity.interventions import ShrinkPerturb
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, loader, trainer
from tests.test_repaired_networks import Multiply, Recorder, fit_loss

ALWAYS = Collapse(above=1e-9)


class Logging(Classifier):
    """Logs a constant, by which no network is better than another one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_acc", 0.5)
        return super().training_step(batch, batch_idx)


def recorder(*, metric: str | None = None, rule: Collapse = ALWAYS, **options: Any) -> Recorder:
    return Recorder(fit_test=FitTest(live=True, steps=8, metric=metric), collapse=rule, monitor=False, **options)


def fit_two_tasks(callback: SpectralCollapseCallback, size: int = 64, **options: Any) -> Classifier:
    torch.manual_seed(0)
    module = Logging()
    for seed in range(2):
        # The first 64 samples are gathered before the verdict.
        trainer(callback, **options).fit(module, loader(batches=12 if size > 1 else 80, size=size, seed=seed))
    return module


def test_repaired_network_is_fitted_to_the_batch_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # All samples are fitted, whatever it costs.
    monkeypatch.setattr(fit_test, "_COST", 1e9)
    monkeypatch.setattr(fit_test, "_STEPS", 5)
    callback, logger = recorder(rule=NEVER, interventions=[ShrinkPerturb(0.5, when="task")], log="all"), MemoryLogger()
    torch.manual_seed(0)
    start = Logging().state_dict()
    fit_two_tasks(callback, logger=logger)
    report = callback.history[1]
    before, after, fresh = (fit_loss(each, callback.batch, 5) for each in (callback.before, callback.after, start))
    assert report.before["fit_loss"] == pytest.approx(before, rel=1e-5)
    assert report.after["fit_loss"] == pytest.approx(after, rel=1e-5)
    assert report.after["fit_loss_vs_initial"] == pytest.approx(after / fresh, rel=1e-5)
    assert report.after["handicap"] != report.before["handicap"]
    assert report.metrics["fit_loss"] != pytest.approx(before, rel=1e-3)
    assert list(logger.values("plasticity_details/fit_loss_before_repair").values()) == [report.before["fit_loss"]]
    assert list(logger.values("plasticity_details/fit_loss_after_repair").values()) == [report.after["fit_loss"]]


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("metric", [None, "train_acc"])
def test_worse_repair_is_reported_and_undone(metric: str | None, *, undo: bool) -> None:
    """With a metric, the handicap on the batch at hand tells."""
    rule = ALWAYS if metric is None else Collapse("live_metric_gap", above=-1.0)
    callback = recorder(metric=metric, rule=rule, interventions=[Multiply(30.0)], undo_if_worse=undo)
    with pytest.warns(PlasticityWarning) as warned:
        fit_two_tasks(callback)
    pattern = r"task 1: after Multiply, on the batch at hand, handicap .* → .*, fit loss .* → .*, .*: worse than before"
    assert any(re.search(pattern, str(warning.message)) for warning in warned)
    report = callback.history[1]
    assert report.after["handicap"] > report.before["handicap"]
    assert [repair.undone for repair in report.repairs] == [undo]
    for name, value in callback.before.items():
        assert torch.equal(callback.after[name], value if undo else 30 * value)


def test_undone_repair_leaves_training_as_it_was() -> None:
    repaired = fit_two_tasks(recorder(rule=NEVER, interventions=[Multiply(30.0, when="task")], undo_if_worse=True))
    plain = fit_two_tasks(recorder(rule=NEVER))
    for one, other in zip(repaired.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_repaired_network_that_beats_a_fresh_one_is_not_worse() -> None:
    """Of the weights that have trained on the task, a part is always lost."""
    callback = recorder(rule=ALWAYS, interventions=[Multiply(0.99)], undo_if_worse=True)
    with pytest.warns(PlasticityWarning, match="a fresh network would learn"):
        fit_two_tasks(callback)
    report = callback.history[1]
    assert report.before["handicap"] != report.after["handicap"] < 1.25
    assert [repair.undone for repair in report.repairs] == [False]


def test_batch_of_one_measures_no_repair() -> None:
    callback = recorder(rule=NEVER, interventions=[Multiply(30.0, when="task")], undo_if_worse=True)
    fit_two_tasks(callback, size=1)
    report = callback.history[1]
    assert (report.before, report.after, report.errors) == ({}, {}, {})
    assert [repair.undone for repair in report.repairs] == [False]
    assert "the repaired network is not measured: the batch at hand holds 1 samples, fewer than 8" in report.remarks


def test_numbers_before_the_repairs_are_restored() -> None:
    callback = recorder(rule=NEVER, interventions=[ShrinkPerturb(when="task")])
    fit_two_tasks(callback)
    restored = recorder(interventions=[ShrinkPerturb(when="task")])
    restored.load_state_dict(callback.state_dict())
    assert restored.history[1].before == callback.history[1].before != {}
