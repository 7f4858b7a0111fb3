"""Test that interventions say what they did, what they left out, and that they have nothing to act on."""

import logging

import pytest
import torch
from torch import nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import (
    FIRE,
    ContinualBackprop,
    Intervention,
    ReDo,
    ReGraMa,
    SelfNormalizedReset,
)
from tests.helpers.faults import NoUnits
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, MemoryLogger, loader, trainer

BY_UNITS = pytest.mark.parametrize(
    "intervention",
    [ReDo(when=2), ReGraMa(when="task"), ContinualBackprop(), SelfNormalizedReset()],
    ids=lambda i: i.name,
)


@BY_UNITS
def test_nothing_to_act_on_warns_once(intervention: Intervention) -> None:
    callback = SpectralCollapseCallback(interventions=[intervention], **WITHOUT_FIT_TEST)
    module = NoUnits()
    reason = f"{intervention.name} rests, since NoUnits has nothing that it acts on: 'net.0': logits: no layer reads it"
    with pytest.warns(PlasticityWarning) as caught:
        trainer(callback).fit(module, loader(batches=4))
    assert [str(warning.message) for warning in caught if warning.category is PlasticityWarning] == [reason]
    # Any other warning fails the test.
    trainer(callback).fit(module, loader(batches=4))
    assert all(reason in report.remarks and not report.errors for report in callback.history)


def test_fire_without_matrices_warns() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten())
    with pytest.warns(PlasticityWarning, match="FIRE rests, since Sequential has .* '0.weight': Conv2d: neither"):
        FIRE().repair(model)


def test_repair_is_logged_with_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Dead(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            with torch.no_grad():
                self.net[0].bias[:3] = -100

    logger = MemoryLogger()
    callback = SpectralCollapseCallback(interventions=[ReDo(0.0, when=2)], **WITHOUT_FIT_TEST)
    with caplog.at_level(logging.INFO, logger="lightning_plasticity"):
        trainer(callback, logger=logger).fit(Dead(), loader(batches=2))
    [repair] = callback.history[0].repairs
    assert (repair.candidates, repair.skipped) == (8, {"net.2": "logits: no layer reads it"})
    did = f"3 of 8 units in 'net.0' (3), {repair.num_parameters_changed} parameters changed; 1 layer left out"
    assert f"step 2: ReDo: {did}" in caplog.messages
    [name] = {name for row in logger.rows for name in row if name.endswith("ReDo/units")}
    assert logger.values(name) == {2: 3.0}
