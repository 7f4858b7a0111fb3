"""Check interventions when other parameters are trained than at the start of the fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import (
    ContinualBackprop,
    L2Init,
    Regularizer,
    SelfNormalizedReset,
    StepIntervention,
)
from tests.helpers.interventions import INTERVENTIONS, Row, for_each, select
from tests.helpers.interventions_in_training import (
    NEVER,
    BySGD,
    Counting,
    Regularized,
    cross_entropy,
    hooks,
)
from tests.helpers.modules import Classifier, loader, trainer, weights


class Unfreezing(BaseFinetuning):
    """A callback that trains the head alone, and all layers from the third epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.net[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.1)


class OnlyTrainable(BySGD):
    """A module whose optimizer holds the trainable parameters only."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Growing(BySGD):
    """A module that gets a fourth class in the middle of a task."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.net[2] = nn.Linear(8, 4)
            self.trainer.strategy.setup_optimizers(self.trainer)


MID_TASK = pytest.mark.parametrize(
    ("kind", "others"),
    [pytest.param(OnlyTrainable, [Unfreezing()], id="unfrozen"), pytest.param(Growing, [], id="grown")],
)


class StartBeforeEachBatch(Callback):
    """A callback that starts a regularizer before each step, which adds only missing initial values."""

    def __init__(self, term: Regularizer) -> None:
        self.term = term

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.term.start(module)


@MID_TASK
def test_regularizer_of_parameters_trained_from_mid_task_on(kind: type[Regularized], others: list[Callback]) -> None:
    ends, callback = [], SpectralCollapseCallback(collapse=NEVER, interventions=[L2Init(0.1)], loss_fn=cross_entropy)
    for term in (None, L2Init(0.1)):
        torch.manual_seed(0)
        module = kind()
        module.term = term
        regularizing = callback if term is None else StartBeforeEachBatch(term)
        trainer(*copy.deepcopy(others), regularizing, max_epochs=4).fit(module, loader())
        ends.append(weights(module))
    assert (ends[0] - ends[1]).abs().max() <= 1e-6
    assert [report.errors for report in callback.history] == [{}]


@MID_TASK
@for_each(row for row in INTERVENTIONS if row.needs == {"start"})
def test_start_covers_parameters_trained_from_mid_task_on(
    row: Row, kind: type[Regularized], others: list[Callback]
) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[row.make()])
    trainer(callback, *copy.deepcopy(others), max_epochs=4).fit(kind(), loader())
    assert [report.errors for report in callback.history] == [{}]


def test_interventions_restart_only_for_new_parameters() -> None:
    class InTurn(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx % 2 == 0)

    intervention, module = Counting(), InTurn()
    module.net[0].requires_grad_(False)
    trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])).fit(module, loader(batches=8))
    assert intervention.events.count("start") == 2


@for_each(select(StepIntervention, on_units=True))
def test_task_without_units_lets_it_rest(row: Row) -> None:
    class Two(Classifier):
        task = 0

        def __init__(self) -> None:
            super().__init__()
            # This head has no hidden units.
            self.second = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy((self.second if self.task else self.net)(batch[0]), batch[1])

    callback, module = SpectralCollapseCallback(collapse=NEVER, interventions=[row.make()], monitor=False), Two()
    trainer(callback).fit(module, loader())
    module.task = 1
    with pytest.warns(PlasticityWarning, match="rests, since Two has nothing that it acts on: .*'second': logits"):
        trainer(callback).fit(module, loader())
    module.task = 0
    trainer(callback).fit(module, loader())
    assert ["rests" in "".join(report.remarks) for report in callback.history] == [False, True, False]
    assert (len(callback.history), hooks(module)) == (3, 0)


def test_frozen_layers_keep_their_ages() -> None:
    class InTurn(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), self.net)

        def on_train_epoch_start(self) -> None:
            first = self.current_epoch % 2 == 0
            self.net[0].requires_grad_(first)
            self.net[3].requires_grad_(not first)

    intervention, ages = ContinualBackprop(replacement_rate=1e-6), []

    class Record(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            ages.append(
                {layer: int(record["age"].max()) for layer, record in intervention.state_dict()["layers"].items()}
            )

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    trainer(callback, Record(), max_epochs=4).fit(InTurn(), loader(batches=4))
    assert [layers["net.0"] for layers in ages] == [4, 4, 8, 8]
    assert [layers.get("net.3.0", 0) for layers in ages][1::2] == [4, 8]


@pytest.mark.parametrize(
    "intervention",
    [
        ContinualBackprop(replacement_rate=0.2, maturity_threshold=3),
        SelfNormalizedReset(cap=200),
    ],
    ids=["contribution", "silence"],
)
def test_layers_frozen_in_mid_task_stay(intervention: StepIntervention) -> None:
    frozen = []

    class Freezing(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.net[0].requires_grad_(False)
                # This unit never fires, and its utility is the lowest.
                with torch.no_grad():
                    self.net[0].bias[0] = -100
                frozen.append(weights(self.net[0]))

    module = Freezing()
    trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])).fit(module, loader(batches=8))
    assert torch.equal(weights(module.net[0]), frozen[0])
