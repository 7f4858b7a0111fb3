"""In every way to use Lightning: remedies in the training loop equal the same written into it."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn

from lightning_plasticity import Collapse, HessianProbe, PlasticityWarning, SpectralCollapseCallback
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
from tests.helpers.modules import Classifier, loader, trainer
from tests.helpers.usages import (
    PLAIN,
    USAGES,
    ByLBFGS,
    Quartic,
    Truncated,
    Usage,
    convolutional,
    data_loss,
    gru,
    mlp,
    transformer,
    weight_averages,
)

NEVER = Collapse(below=1e-9)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # the compiler
]


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


in_every_usage = pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)


def trained(
    usage: Usage, make_net: Callable[[], nn.Module], *callbacks: Callback, term: Quartic | None = None
) -> Tensor:
    """Weights and buffers after training."""
    torch.manual_seed(0)
    module = usage.module(make_net())
    module.term = term
    if usage.module is not ByLBFGS:
        module.make_optimizer = partial(torch.optim.SGD, momentum=0.9)  # Adam makes much of rounding errors
    usage.fit(module, *callbacks)
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


def by_callback(usage: Usage, *interventions: Intervention) -> SpectralCollapseCallback:
    return SpectralCollapseCallback(collapse=NEVER, interventions=interventions, loss_fn=usage.loss_fn)


@in_every_usage
@pytest.mark.parametrize("make_net", [mlp, convolutional, slow(transformer), slow(gru)])
def test_a_regularizer_equals_the_same_term_in_training_step(usage: Usage, make_net: Callable[[], nn.Module]) -> None:
    expected = trained(usage, make_net, term=Quartic(1.0))
    assert (trained(usage, make_net, by_callback(usage, Quartic(1.0))) - expected).abs().max() <= 1e-6
    assert (trained(usage, make_net) - expected).abs().max() > 1e-3, "without the term it is another training"


class ByHand(Callback):
    """Repairs after every other optimizer step of all fits."""

    def __init__(self, repair: Repair) -> None:
        self.repair, self.step, self.repairs = repair, 0, 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.before_fit = self.step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before, self.step = self.step, self.before_fit + trainer.global_step
        if self.step // 2 == before // 2:
            return
        self.repairs += 1
        self.repair.repair(
            module,
            optimizers=trainer.optimizers,
            forward=lambda module: module.net(module.inputs_and_labels(batch)[0]),
            generator=torch.Generator().manual_seed(2**32 + 1000 * self.step),
        )


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
def test_a_repair_equals_the_same_by_hand(
    usage: Usage, make_repair: Callable[..., Repair], make_net: Callable[[], nn.Module]
) -> None:
    callback, hand = by_callback(usage, make_repair(when=2)), ByHand(make_repair())
    repaired, expected = trained(usage, make_net, callback), trained(usage, make_net, hand)
    assert hand.repairs == sum(len(report.repairs) for report in callback.history) > 2
    assert sum(repair.num_parameters_changed for report in callback.history for repair in report.repairs) > 0
    assert torch.equal(repaired, expected)


def swa() -> list[Callback]:
    return [StochasticWeightAveraging(swa_lrs=1e-2)]


@pytest.mark.parametrize(
    ("averages", "average"), [(weight_averages, "EMAWeightAveraging"), (swa, "StochasticWeightAveraging")]
)
@pytest.mark.parametrize("intervention", [ShrinkPerturb(), ContinualBackprop()], ids=lambda i: i.name)
def test_averages_that_would_keep_what_is_replaced_are_warned_of(
    intervention: Intervention, averages: Callable[[], list[Callback]], average: str
) -> None:
    expected = f"^{average} averages weights over training steps, and {intervention.name} changes weights between"
    fitted = trainer(by_callback(PLAIN, L2Init(), intervention), *averages())
    with pytest.warns(PlasticityWarning, match=expected):
        fitted.fit(Classifier(), loader())


def test_so_is_a_remedy_that_averages_and_drags_back_what_is_repaired() -> None:
    ends = []
    for others in ([], [HareTortoise(decay=0.5, every_n_steps=4)]):
        torch.manual_seed(0)
        module = Classifier(lr=0)
        before = module.net[2].weight.detach().clone()
        fitted = trainer(by_callback(PLAIN, Reset(["net.2"], when=3), *others))
        expected = "^HareTortoise averages weights over training steps, and Reset changes weights between"
        with pytest.warns(PlasticityWarning, match=expected) if others else contextlib.nullcontext():
            fitted.fit(module, loader(batches=4))
        ends.append(module.net[2].weight.detach() - before)
    assert ends[0].abs().max() > 0
    torch.testing.assert_close(ends[1], ends[0] / 2, rtol=1e-5, atol=1e-6)


def test_a_remedy_that_averages_gets_along_with_those_that_run_along() -> None:
    trainer(by_callback(PLAIN, HareTortoise(), L2Init(), SoftShrinkPerturb())).fit(Classifier(), loader())


@pytest.mark.parametrize("averages", [weight_averages, swa])
@pytest.mark.parametrize("interventions", [[], [L2Init()]], ids=["none", "L2Init"])
def test_other_remedies_get_along_with_averages(
    interventions: Sequence[Intervention], averages: Callable[[], list[Callback]]
) -> None:
    trainer(by_callback(PLAIN, *interventions), *averages()).fit(Classifier(), loader())


def test_averages_keep_what_is_replaced_as_the_warning_says() -> None:
    torch.manual_seed(0)
    module = Classifier(lr=0)
    before = module.net[2].weight.detach().clone()
    callback = by_callback(PLAIN, Reset(["net.2"], when=3))
    fitted = trainer(callback, *weight_averages())
    with pytest.warns(PlasticityWarning):
        fitted.fit(module, loader(batches=4))
    assert [repair.step for repair in callback.history[0].repairs] == [3]
    torch.manual_seed(0)
    alone = Classifier(lr=0)
    trainer(by_callback(PLAIN, Reset(["net.2"], when=3))).fit(alone, loader(batches=4))
    assert not torch.equal(alone.net[2].weight, before)
    expected = before / 4 + alone.net[2].weight * 3 / 4  # two updates with a decay of one half after the repair
    torch.testing.assert_close(module.net[2].weight, expected, rtol=1e-5, atol=1e-6)


def test_what_a_module_carries_from_batch_to_batch_is_the_same_whenever_its_loss_is_asked_for() -> None:
    module, batch = Truncated(mlp()), {"x": torch.randn(8, 1, 6, 6), "y": torch.randint(3, (8,))}
    module.logits(torch.randn(8, 1, 6, 6))
    at = TrainerContext.of(trainer(), module, batch, 0, data_loss)
    copy = at.copy()
    carried = copy.carried
    first, second = at.loss(copy), at.loss(copy)
    assert torch.equal(first, second)
    assert copy.carried is carried
    assert not torch.equal(data_loss(copy, batch), data_loss(copy, batch)), "left to itself it goes on"


def test_the_hessian_of_a_module_that_carries_something_on_is_one_operator() -> None:
    usage = next(usage for usage in USAGES if usage.module is Truncated)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=2, num_steps=3), collapse=NEVER)
    usage.fit(usage.module(mlp()), callback)
    assert [report.spectrum is not None for report in callback.history] == [True, True]


def test_what_a_copy_is_given_by_its_own_step_is_taken_back() -> None:
    def step(module: Any, batch: Any) -> Tensor:
        module.net.seen = True
        return module.net(batch).sum()

    module = Classifier()
    at = TrainerContext.of(trainer(), module, torch.randn(2, 4), 0, step)
    copy = at.copy()
    assert at.loss(copy).requires_grad
    assert not hasattr(copy.net, "seen")
