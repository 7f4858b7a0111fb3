"""Test that interventions which fail during training are reported, and that training and the others go on."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import (
    ContinualBackprop,
    EffectiveRankRegularizer,
    L2Init,
    Regularizer,
    StepIntervention,
)
from tests.helpers.faults import NoUnits, ZeroPenalty
from tests.helpers.modules import NEVER, WITHOUT_FIT_TEST, Classifier, loader, trainer, weights


def test_interventions_without_target_at_a_later_task_rest() -> None:
    module = Classifier()
    callback = SpectralCollapseCallback(
        collapse=NEVER, interventions=[ContinualBackprop(0.5, 0), EffectiveRankRegularizer(0.1, 4), L2Init()]
    )
    trainer(callback).fit(module, loader())
    module.net = NoUnits().net
    before = weights(module)
    with pytest.warns(PlasticityWarning) as caught:
        trainer(callback).fit(module, loader())
    messages = [str(warning.message) for warning in caught if warning.category is PlasticityWarning]
    assert len(messages) == 2
    assert messages[0].startswith("ContinualBackprop rests, since Classifier has nothing that it acts on: 'net.0'")
    assert messages[1].startswith("EffectiveRankRegularizer rests, since Classifier has nothing that it acts on")
    assert not torch.equal(weights(module), before)
    first, second = callback.history
    assert first.errors == second.errors == {}
    assert second.remarks == messages
    assert second.spectrum is not None


class Flaky(Regularizer):
    """Has a penalty of zero, and fails at its third evaluation."""

    calls = 0

    def penalty(self, model: nn.Module) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("out of range")
        return 0.0 * torch.stack([parameter.sum() for parameter in model.parameters()]).sum()


def test_failing_regularizer_leaves_the_others_active() -> None:
    trained_weights = []
    for others in ([], [Flaky(1.0)]):
        torch.manual_seed(0)
        module, callback = (
            Classifier(),
            SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[*others, L2Init(0.3)]),
        )
        expected = "Flaky failed and was left out of this step, training goes on: out of range"
        with pytest.warns(PlasticityWarning, match=expected) if others else contextlib.nullcontext():
            trainer(callback).fit(module, loader(batches=4))
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)
    assert callback.history[0].errors == {"Flaky": "ArithmeticError: out of range"}


@pytest.mark.parametrize("returned", [3, True, {"units": 1}], ids=["int", "bool", "dict"])
def test_after_step_that_returns_no_report_only_warns(returned: object) -> None:
    class Wrong(StepIntervention):
        def step(self, *_: Any) -> Any:
            return returned

    trained_weights = []
    for interventions in ([], [Wrong()]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        expected = f"Wrong.after_step must return a RepairReport or None, not {type(returned).__name__}"
        with pytest.warns(PlasticityWarning, match=expected) if interventions else contextlib.nullcontext():
            trainer(callback).fit(module, loader())
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)
    assert callback.history[0].errors == {"Wrong": f"TypeError: {expected}"}


def test_step_intervention_without_step_is_refused() -> None:
    class Narrow(StepIntervention):
        def after_step(self, model: nn.Module, optimizers: Any) -> None: ...  # type: ignore[override]

    with pytest.raises(TypeError, match=r"abstract class Narrow .*'?step'?"):
        SpectralCollapseCallback(interventions=[Narrow()])  # type: ignore[abstract]


def test_equal_and_unhashable_regularizers_are_kept_apart() -> None:
    @dataclasses.dataclass
    class Term(Regularizer):
        coefficient: float = 0.3
        fails: bool = False
        calls: int = dataclasses.field(default=0, compare=False)

        def penalty(self, model: nn.Module) -> Tensor:
            self.calls += 1
            if self.fails and self.calls == 3:
                raise ArithmeticError("out of range")
            return self.coefficient * model.net[0].weight.square().sum()

    trained_weights = []
    for others in ([], [Term(0.0, fails=True)]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[*others, Term()])
        with pytest.warns(PlasticityWarning, match="Term failed and was") if others else contextlib.nullcontext():
            trainer(callback).fit(module, loader(batches=4))
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)


def test_penalty_of_frozen_weights_adds_no_gradient() -> None:
    class FirstLayerPenalty(Regularizer):
        def penalty(self, model: nn.Module) -> Tensor:
            return self.coefficient * model.net[0].weight.square().sum()

    trained_weights = []
    for interventions in ([], [FirstLayerPenalty(1.0)]):
        torch.manual_seed(0)
        module = Classifier()
        module.net[0].requires_grad_(False)
        callback = SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        trainer(callback).fit(module, loader())
        trained_weights.append(weights(module))
        assert callback.history[0].errors == {}
    assert torch.equal(*trained_weights)


class Stuck(ZeroPenalty):
    def stop(self) -> None:
        raise RuntimeError("stuck")


@pytest.mark.parametrize("error", [None, KeyError("of the training")])
def test_failing_stop_neither_ends_training_nor_masks_its_error(error: Exception | None) -> None:
    class FailingTraining(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if error is not None:
                raise error

    callback = SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[Stuck(), L2Init(0.1)])
    expected = contextlib.nullcontext() if error is None else pytest.raises(KeyError, match="of the training")
    with expected, pytest.warns(PlasticityWarning, match="Stuck could not be stopped, training goes on: stuck"):
        trainer(callback).fit(FailingTraining(), loader())
    assert callback.history[-1].errors == {"Stuck": "RuntimeError: stuck"}
