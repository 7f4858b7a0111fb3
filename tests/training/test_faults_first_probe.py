"""Test that what cannot work is an error at the first probe, before anything is trained, repaired or logged."""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plasticity import Collapse, PlasticityMonitor, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import (
    Reset,
    ShrinkPerturb,
)
from tests.helpers.faults import FailingLoss, NoUnits, ZeroPenalty
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights

ALWAYS = Collapse(above=1e-9)


class NotFinite(ZeroPenalty):
    def penalty(self, model: nn.Module) -> Tensor:
        return super().penalty(model) * math.nan


class Failing(ZeroPenalty):
    def penalty(self, model: nn.Module) -> Tensor:
        raise KeyError("encoder.weight")


class Number(ZeroPenalty):
    def penalty(self, model: nn.Module) -> Any:
        return super().penalty(model).item()


class Vector(ZeroPenalty):
    def penalty(self, model: nn.Module) -> Tensor:
        return torch.stack([parameter.square().sum() for parameter in model.parameters()])


class Counted(Reset):
    def repair(self, model: nn.Module, **_: Any) -> Any:
        return 5


# The first task is a collapse, so that a repair which can work would change the weights.
@pytest.mark.filterwarnings("ignore:task 0. handicap")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interventions": [ShrinkPerturb(), Reset(layers=["encoder"])]}, "'encoder' matches no module"),
        ({"interventions": [ShrinkPerturb(), NotFinite()]}, "a gradient is not finite"),
        ({"interventions": [ShrinkPerturb(), Failing()]}, "encoder.weight"),
        ({"interventions": [ShrinkPerturb(), Number()]}, "Number.penalty must return a scalar tensor, not float"),
        ({"interventions": [Vector()]}, r"Vector.penalty must return a scalar tensor, not one of shape \(2,\)"),
        ({"interventions": [ShrinkPerturb(), Counted()]}, "Counted.repair must return a RepairReport, not int"),
        ({"interventions": [ShrinkPerturb()], "loss_fn": FailingLoss(ValueError("no luck"), fails=True)}, "no luck"),
        (
            {"interventions": [ShrinkPerturb()], "monitor": PlasticityMonitor(layers=["encoder"])},
            "'encoder'. can match nothing in NoUnits",
        ),
    ],
)
def test_unusable_arguments_fail_before_any_weight_changes(arguments: dict[str, Any], message: str) -> None:
    callback, module = SpectralCollapseCallback(**{"collapse": ALWAYS, **arguments}), NoUnits()
    before = weights(module)
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        trainer(callback).fit(module, loader())
    assert torch.equal(weights(module), before), "the usable repair has not run either"
    assert callback.history == []


class TwoNumbers:
    """Is no drift detector: ``update`` takes two numbers."""

    drift_detected = False

    def update(self, x: Any, y: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:task 0. handicap")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor_every_n_steps": 1}, r"monitor_every_n_steps: PlasticityMonitor cannot observe compiled modules"),
        ({"task_detector": TaskDetector(drift_detector=TwoNumbers())}, r"drift_detector=.* cannot take a number"),
    ],
)
def test_unusable_arguments_train_and_log_nothing(arguments: dict[str, Any], message: str) -> None:
    module, logger = Classifier(), MemoryLogger()
    module.net = torch.compile(module.net, backend="eager")
    callback = SpectralCollapseCallback(collapse=ALWAYS, interventions=[ShrinkPerturb()], **arguments)
    before = weights(module)
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match=message):
            trainer(callback, logger=logger).fit(module, loader())
        assert torch.equal(weights(module), before)
        assert callback.history == []
        assert logger.rows == []
