"""Check what is measured after a repair, and that a repair that made it worse can be undone."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import Repair, RepairReport, ShrinkPerturb
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from tests.helpers.modules import NEVER, Classifier, loader, trainer


class Multiply(Repair):
    """Multiply all weights."""

    def __init__(self, factor: float, when: int | str = "collapse") -> None:
        super().__init__(when)
        self.factor = factor

    def plan(self, model: nn.Module, context: Any) -> WeightUpdate:
        return WeightUpdate({parameter: parameter.detach() * self.factor for parameter in model.parameters()})


class Recorder(SpectralCollapseCallback):
    """Keeps the module and its optimizer state right after the repairs of a task."""

    def _repair_and_log(self, trainer: Any, report: Any, context: Any) -> None:
        if context is not None:
            self.before = copy.deepcopy(context.model.state_dict())
            self.batch = context.batch
        super()._repair_and_log(trainer, report, context)
        if context is not None:
            self.after = copy.deepcopy(context.model.state_dict())
            self.states = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in context.optimizers])


def fit_two_tasks(callback: SpectralCollapseCallback) -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    for _ in range(2):
        trainer(callback).fit(module, loader())
    return module


def fit_loss(weights: dict[str, Tensor], batch: Any, steps: int) -> float:
    """Train a module in a plain loop on each 16 of the first 64 samples, and return the mean loss."""
    losses = []
    for start in range(0, 64, 16):
        module = Classifier()
        module.load_state_dict(weights)
        optimizer = module.configure_optimizers()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = module.training_step([part[start : start + 16] for part in batch], 0)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
    return sum(losses) / len(losses)


def test_repaired_network_is_measured_on_the_same_samples() -> None:
    repair = ShrinkPerturb(0.5, when="task")
    callback = Recorder(collapse=NEVER, fit_test=FitTest(steps=5), interventions=[repair], monitor=False)
    fit_two_tasks(callback)
    report = callback.history[1]
    before, after = (fit_loss(weights, callback.batch, 5) for weights in (callback.before, callback.after))
    assert report.metrics["fit_loss"] == pytest.approx(before, rel=1e-5)
    assert report.after["fit_loss"] == pytest.approx(after, rel=1e-5)
    assert report.after["fit_loss"] != pytest.approx(report.metrics["fit_loss"], rel=1e-3)
    assert not report.repairs[0].undone
    assert {"handicap", "learnable_fraction"} <= set(report.after)


def test_without_repairs_nothing_is_measured_again() -> None:
    callback = SpectralCollapseCallback(fit_test=FitTest(steps=2), interventions=[ShrinkPerturb()])
    fit_two_tasks(callback)
    assert [report.after for report in callback.history if not report.repairs] == [{}] * 2


@pytest.mark.parametrize("undo", [False, True])
def test_worse_repair_is_reported_and_undone(undo: bool) -> None:
    callback = Recorder(
        collapse=Collapse(above=1e-9),
        fit_test=FitTest(steps=5),
        interventions=[Multiply(30.0, when="task")],
        undo_if_worse=undo,
        monitor=False,
    )
    with pytest.warns(PlasticityWarning) as warned:
        fit_two_tasks(callback)
    messages = [str(warning.message) for warning in warned]
    assert any(re.search(r"after Multiply, handicap .* → .*: worse than before", message) for message in messages)
    report = callback.history[1]
    assert report.after["handicap"] > report.metrics["handicap"]
    assert [repair.undone for repair in report.repairs] == [undo]
    for name, value in callback.before.items():
        assert torch.equal(callback.after[name], value if undo else 30 * value)


def test_undone_repair_leaves_training_as_it_was() -> None:
    arguments: dict[str, Any] = {"collapse": NEVER, "fit_test": FitTest(steps=3), "monitor": False}
    repaired = fit_two_tasks(
        SpectralCollapseCallback(interventions=[Multiply(30.0, when="task")], undo_if_worse=True, **arguments)
    )
    plain = fit_two_tasks(SpectralCollapseCallback(**arguments))
    for one, other in zip(repaired.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_report_with_numbers_after_repairs_is_restored() -> None:
    repair = ShrinkPerturb(when="task")
    callback = Recorder(collapse=NEVER, fit_test=FitTest(steps=2), interventions=[repair], monitor=False)
    fit_two_tasks(callback)
    restored = SpectralCollapseCallback()
    restored.load_state_dict(callback.state_dict())
    assert restored.history[1].after == callback.history[1].after
    assert restored.history[1].fit_curve == callback.history[1].fit_curve
    assert isinstance(restored.history[1].repairs[0], RepairReport)
