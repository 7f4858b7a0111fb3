"""Test that interventions of the callback equal the same interventions written into the training loop."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from lightning_plasticity import HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import (
    ContinualBackprop,
    HareTortoise,
    Intervention,
    L2Init,
    ReDo,
    Repair,
    Reset,
    ShrinkPerturb,
    SoftShrinkPerturb,
)
from lightning_plasticity.training.sandbox import TrainerContext
from tests.helpers.modules import NEVER, Classifier, loader, trainer
from tests.helpers.training_runs import ManualRepair, callback_with, trained_state
from tests.helpers.usages import (
    PLAIN,
    USAGES,
    Quartic,
    TruncatedBPTT,
    Usage,
    convolutional,
    data_loss,
    gru,
    mlp,
    transformer,
    weight_averages,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was measured on . samples"),
    pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*"),
    # torch.compile reads .grad of tensors that are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


in_every_usage = pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)


@in_every_usage
@pytest.mark.parametrize("make_net", [mlp, convolutional, slow(transformer), slow(gru)])
def test_regularizer_equals_penalty_in_training_step(usage: Usage, make_net: Callable[[], nn.Module]) -> None:
    expected = trained_state(usage, make_net, term=Quartic(1.0))
    assert (trained_state(usage, make_net, callback_with(usage, Quartic(1.0))) - expected).abs().max() <= 1e-6
    assert (trained_state(usage, make_net) - expected).abs().max() > 1e-3, "the penalty changes training"


@pytest.mark.filterwarnings("ignore:.* averages weights over training steps:lightning_plasticity.PlasticityWarning")
@in_every_usage
@pytest.mark.parametrize(
    ("make_repair", "make_net"),
    [
        pytest.param(ShrinkPerturb, convolutional, id="ShrinkPerturb"),
        pytest.param(partial(ReDo, threshold=0.9), mlp, id="ReDo"),
        *[pytest.param(ShrinkPerturb, net, id=net.__name__, marks=pytest.mark.slow) for net in (transformer, gru)],
    ],
)
def test_repair_equals_manual_repair(
    usage: Usage, make_repair: Callable[..., Repair], make_net: Callable[[], nn.Module]
) -> None:
    callback, manual = callback_with(usage, make_repair(when=2)), ManualRepair(make_repair())
    repaired, expected = trained_state(usage, make_net, callback), trained_state(usage, make_net, manual)
    assert manual.repairs == sum(len(report.repairs) for report in callback.history) > 2
    assert sum(repair.num_parameters_changed for report in callback.history for repair in report.repairs) > 0
    assert torch.equal(repaired, expected)


def swa() -> list[Callback]:
    return [StochasticWeightAveraging(swa_lrs=1e-2)]


@pytest.mark.parametrize(
    ("averages", "average"), [(weight_averages, "EMAWeightAveraging"), (swa, "StochasticWeightAveraging")]
)
@pytest.mark.parametrize("intervention", [ShrinkPerturb(), ContinualBackprop()], ids=lambda i: i.name)
def test_repair_under_weight_averaging_warns(
    intervention: Intervention, averages: Callable[[], list[Callback]], average: str
) -> None:
    expected = f"^{average} averages weights over training steps, and {intervention.name} changes weights between"
    fitted = trainer(callback_with(PLAIN, L2Init(), intervention), *averages())
    with pytest.warns(PlasticityWarning, match=expected):
        fitted.fit(Classifier(), loader())


def test_repair_under_hare_tortoise_warns_and_is_pulled_back() -> None:
    """HareTortoise resets the weights to their average, which still holds half of the weights before the repair."""
    changes = []
    for others in ([], [HareTortoise(decay=0.5, every_n_steps=4)]):
        torch.manual_seed(0)
        module = Classifier(lr=0)
        before = module.net[2].weight.detach().clone()
        fitted = trainer(callback_with(PLAIN, Reset(["net.2"], when=3), *others))
        expected = "^HareTortoise averages weights over training steps, and Reset changes weights between"
        with pytest.warns(PlasticityWarning, match=expected) if others else contextlib.nullcontext():
            fitted.fit(module, loader(batches=4))
        changes.append(module.net[2].weight.detach() - before)
    assert changes[0].abs().max() > 0
    torch.testing.assert_close(changes[1], changes[0] / 2, rtol=1e-5, atol=1e-6)


def test_hare_tortoise_with_step_interventions_does_not_warn() -> None:
    trainer(callback_with(PLAIN, HareTortoise(), L2Init(), SoftShrinkPerturb())).fit(Classifier(), loader())


@pytest.mark.parametrize("averages", [weight_averages, swa])
@pytest.mark.parametrize("interventions", [[], [L2Init()]], ids=["none", "L2Init"])
def test_regularizer_under_weight_averaging_does_not_warn(
    interventions: Sequence[Intervention], averages: Callable[[], list[Callback]]
) -> None:
    trainer(callback_with(PLAIN, *interventions), *averages()).fit(Classifier(), loader())


def test_weight_average_keeps_replaced_weights() -> None:
    torch.manual_seed(0)
    module = Classifier(lr=0)
    before = module.net[2].weight.detach().clone()
    callback = callback_with(PLAIN, Reset(["net.2"], when=3))
    fitted = trainer(callback, *weight_averages())
    with pytest.warns(PlasticityWarning):
        fitted.fit(module, loader(batches=4))
    assert [repair.step for repair in callback.history[0].repairs] == [3]
    torch.manual_seed(0)
    alone = Classifier(lr=0)
    trainer(callback_with(PLAIN, Reset(["net.2"], when=3))).fit(alone, loader(batches=4))
    assert not torch.equal(alone.net[2].weight, before)
    # The average is updated twice after the repair, with a decay of one half.
    expected = before / 4 + alone.net[2].weight * 3 / 4
    torch.testing.assert_close(module.net[2].weight, expected, rtol=1e-5, atol=1e-6)


def test_probe_loss_is_repeatable_with_carried_state() -> None:
    """Each evaluation of the probe's loss starts from the same carried state and restores it."""
    module, batch = TruncatedBPTT(mlp()), {"x": torch.randn(8, 1, 6, 6), "y": torch.randint(3, (8,))}
    module.logits(torch.randn(8, 1, 6, 6))
    context = TrainerContext.of(trainer(), module, batch, 0, data_loss)
    copy = context.copy()
    carried = copy.carried
    first, second = context.loss(copy), context.loss(copy)
    assert torch.equal(first, second)
    assert copy.carried is carried
    assert not torch.equal(data_loss(copy, batch), data_loss(copy, batch)), "outside the context the state moves on"


def test_hessian_of_module_with_carried_state_is_constant() -> None:
    usage = next(usage for usage in USAGES if usage.module is TruncatedBPTT)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=2, num_steps=3), collapse=NEVER)
    usage.fit(usage.module(mlp()), callback)
    assert [report.spectrum is not None for report in callback.history] == [True, True]


def test_attributes_set_by_the_step_are_removed_from_the_copy() -> None:
    def step(module: Any, batch: Any) -> Tensor:
        module.net.attribute = True
        return module.net(batch).sum()

    module = Classifier()
    context = TrainerContext.of(trainer(), module, torch.randn(2, 4), 0, step)
    copy = context.copy()
    assert context.loss(copy).requires_grad
    assert not hasattr(copy.net, "attribute")
