"""Compare the fit test with plain training loops, and check that it leaves no trace in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity import fit_test as module_of_fit_test
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import UnsupportedModelError
from lightning_plasticity.interventions import L2ER, L2Init, Parseval, Regularizer, SpectralRegularizer
from lightning_plasticity.messages import MisconfigurationError
from tests.helpers.modules import NEVER, Classifier, loader, trainer

Optimizer = torch.optim.Optimizer

STEPS = 20

pytestmark = pytest.mark.full_fit_test


@pytest.fixture
def all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit all samples, whatever it costs."""
    monkeypatch.setattr(module_of_fit_test, "_COST", 1e9)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def with_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def with_batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def sgd(parameters: Any, lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def warm_up(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)


def one_cycle(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=100, cycle_momentum=False)


def data_loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0].to(module.dtype)), batch[1])


@dataclass(frozen=True)
class Case:
    """A way to train, and the optimizer of the plain loop that the fit test must equal.

    Args:
        make_optimizer: The optimizer of ``configure_optimizers``.
        schedule: The scheduler of ``configure_optimizers``.
        lr: The learning rate that the plain loop uses in place of the one of ``make_optimizer``.
        options: Arguments of the Trainer.
        make_net: The network.
        terms: Makes the regularizers.
    """

    make_optimizer: Callable[..., Optimizer] = sgd
    schedule: Callable[[Optimizer], Any] | None = None
    lr: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    make_net: Callable[[], nn.Module] = mlp
    terms: Callable[[], list[Regularizer]] = list
    is_manual: bool = False


class Module(Classifier):
    """A classifier that trains as a case says."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.net = case, case.make_net()
        self.automatic_optimization = not case.is_manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = data_loss(self, batch)
        if not self.case.is_manual:
            return loss
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.case.is_manual:
            return two_optimizers(self)
        optimizer = self.case.make_optimizer(self.parameters())
        if self.case.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.case.schedule(optimizer), "interval": "step"},
        }


def two_optimizers(module: Any) -> list[Optimizer]:
    return [torch.optim.AdamW(module.net[0].parameters(), lr=1e-2), sgd(module.net[2].parameters())]


CASES = {
    "momentum": Case(),
    "AdamW": Case(partial(torch.optim.AdamW, lr=1e-2)),
    "clipping by norm": Case(options={"gradient_clip_val": 0.1}),
    "warm-up": Case(schedule=warm_up, lr=0.1),
    "one cycle": Case(schedule=one_cycle, lr=0.3),
    "LBFGS": Case(partial(torch.optim.LBFGS, lr=0.1, max_iter=4)),
    "two optimizers": Case(is_manual=True),
    "dropout": Case(make_net=with_dropout),
    "BatchNorm": Case(make_net=with_batch_norm),
    "SpectralRegularizer": Case(terms=lambda: [SpectralRegularizer(0.1)]),
    "L2Init": Case(terms=lambda: [L2Init(0.5)]),
    "decoupled": Case(terms=lambda: [Parseval(0.5, decoupled=True)]),
    "L2ER": Case(terms=lambda: [L2ER(weight_decay=0.5)]),
    "bf16": Case(options={"precision": "bf16-true"}),
}

for_each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def mean_losses(losses_on: Callable[[Tensor, Tensor], list[float]], x: Tensor, y: Tensor) -> list[float]:
    """Return the mean losses over batches of 16 samples."""
    batches = [losses_on(*pair) for pair in zip(x.split(16), y.split(16), strict=True)]
    return [sum(values) / len(values) for values in zip(*batches, strict=True)]


class StartRecorder(Callback):
    """Copies all that the fit test starts from, before the first batch of each fit."""

    def __init__(self, callback: SpectralCollapseCallback) -> None:
        self.callback = callback
        self.terms: list[Any] = []
        self.modules: list[Any] = []
        self.batches: list[list[Tensor]] = []
        self.random_states: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            self.modules.append(copy.deepcopy(pl_module))
            self.batches.append([tensor.clone() for tensor in batch])
            self.random_states.append(torch.get_rng_state())
            self.terms.append([copy.deepcopy(term.state_dict()) for term in self.callback.interventions])


def plain_losses(
    case: Case, module: Any, random_state: Tensor, terms: Sequence[Regularizer], x: Tensor, y: Tensor
) -> list[float]:
    """Train a copy of a module in a plain loop, and return the losses before each step and after the last one.

    The regularizers start from the same state for each batch.
    """
    module, terms = copy.deepcopy(module).float(), copy.deepcopy(terms)
    torch.set_rng_state(random_state)
    if case.is_manual:
        optimizers = two_optimizers(module)
    elif case.lr is None:
        optimizers = [case.make_optimizer(module.parameters())]
    else:
        optimizers = [case.make_optimizer(module.parameters(), lr=case.lr)]
    losses: list[float] = []

    def closure() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(module.net(x), y)
        evaluated.append(loss.item())
        (loss + sum(term.penalty(module) for term in terms if not term.decoupled)).backward()
        if "gradient_clip_val" in case.options:
            nn.utils.clip_grad_norm_(module.parameters(), case.options["gradient_clip_val"])
        for term in terms:
            if term.decoupled:
                term.descend(module, optimizers)
        return loss

    for _ in range(STEPS):
        evaluated: list[float] = []
        if len(optimizers) == 1:
            optimizers[0].step(closure)  # type: ignore[arg-type]
        else:
            closure()
            for optimizer in optimizers:
                optimizer.step()
        losses.append(evaluated[0])
    with torch.no_grad():
        losses.append(F.cross_entropy(module.net(x), y).item())
    return losses


def fit_twice(case: Case, *callbacks: Callback) -> tuple[Any, list[Any]]:
    """Train from a fixed seed on two tasks with one Trainer each, and return the module and the Trainers."""
    torch.manual_seed(0)
    module, trainers = Module(case), []
    for task in range(2):
        trainers.append(trainer(*callbacks, **case.options))
        trainers[-1].fit(module, loader(batches=2, size=80, seed=task))
    return module, trainers


def make_callback(case: Case, fit_test: FitTest | None, **options: Any) -> SpectralCollapseCallback:
    arguments = {"collapse": NEVER, "loss_fn": data_loss if case.is_manual else None, **options}
    return SpectralCollapseCallback(fit_test=fit_test, interventions=case.terms(), **arguments)


@pytest.mark.usefixtures("all_batches")
@for_each_case
def test_losses_equal_those_of_a_plain_loop(case: Case) -> None:
    callback = make_callback(case, FitTest(STEPS), probe=None, monitor=False)
    recorder = StartRecorder(callback)
    fit_twice(case, recorder, callback)
    initial = recorder.modules[0]
    starts = zip(recorder.modules, recorder.batches, recorder.random_states, recorder.terms, strict=True)
    for report, (module, batch, random_state, states) in zip(callback.history, starts, strict=True):
        x, y = (tensor[:64] for tensor in batch)
        for start, losses in ((module, report.fit_curve), (initial, report.fresh_fit_curve)):
            terms = case.terms()
            for term, state in zip(terms, states, strict=True):
                term.load_state_dict(state)
                term.start(copy.deepcopy(initial).float())
            losses_on = partial(plain_losses, case, start, random_state, terms)
            expected = mean_losses(losses_on, x.float(), y)
            assert losses == pytest.approx(expected, abs=1e-6)
            assert len(set(losses)) == STEPS + 1, "every step changes the loss"
    assert callback.history[0].fit_curve == callback.history[0].fresh_fit_curve
    assert callback.history[1].fit_curve != callback.history[1].fresh_fit_curve


@for_each_case
def test_training_is_bit_identical_with_a_fit_test(case: Case) -> None:
    """Regularizers change training, so they are in both runs."""
    results = []
    for fit_test in (None, FitTest(steps=3)):
        callbacks = []
        if fit_test is not None:
            callbacks = [make_callback(case, fit_test)]
        elif case.terms():
            callbacks = [make_callback(case, None, collapse=Collapse("learnable_fraction", below=1e-9))]
        module, trainers = fit_twice(case, *callbacks)
        results.append(
            {
                "weights and buffers": module.state_dict(),
                "gradients": [parameter.grad for parameter in module.parameters()],
                "optimizers": [o.state_dict() for each in trainers for o in each.optimizers],
                "rates": [group["lr"] for each in trainers for o in each.optimizers for group in o.param_groups],
                "schedules": [config.scheduler.last_epoch for each in trainers for config in each.lr_scheduler_configs],
                "random numbers": torch.get_rng_state(),
                "modes": [part.training for part in module.modules()],
            }
        )
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=0, msg=f"{name} differ")


def plain_context(model: nn.Module, optimizers: Sequence[Optimizer]) -> ProbeContext:
    x, y = loader(batches=1).dataset.tensors  # type: ignore[attr-defined]
    return ProbeContext(model, (x, y), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), optimizers)


def test_plain_module_is_fitted_with_the_rates_before_a_schedule() -> None:
    """Without a Trainer there is no function that makes optimizers: they are made from those of the run."""
    torch.manual_seed(0)
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = warm_up(optimizer)
    context = plain_context(model, [optimizer])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    state = copy.deepcopy(optimizer.state_dict())
    curve = FitTest(steps=5).fit(context)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)

    model = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "momentum": 0.5}]
    optimizer, losses = torch.optim.SGD(groups, lr=0.1), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = context.loss_fn(model, context.batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert curve.losses == pytest.approx(losses, abs=1e-6)


def test_progress_counts_steps() -> None:
    model, calls = mlp(), []
    FitTest(steps=3).fit(plain_context(model, [sgd(model.parameters())]), progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_samples_are_split_into_full_batches() -> None:
    model, calls = mlp(), []
    context = plain_context(model, [sgd(model.parameters())])
    for samples, batches in ((64, 4), (60, 3), (16, 2), (11, 2), (None, 1)):
        curve = FitTest(steps=1).fit(context, samples)
        assert len(curve.batches) == batches
        calls.append(curve.losses[0])
    first = context.loss_fn(model, context.batch).item()
    assert (calls[0], calls[-1]) == pytest.approx((first, first), abs=1e-6)
    assert calls[3] == pytest.approx(context.loss_fn(model, context.samples(10)).item(), abs=1e-6)
    assert len(FitTest(steps=1, batch_size=5).fit(context, 64).batches) == 12


def test_loss_that_needs_its_whole_batch_gets_it() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) + torch.zeros(64, 3), batch[1])

    model = mlp()
    context = plain_context(model, [sgd(model.parameters())])
    curve = FitTest(steps=3).fit(replace(context, loss_fn=loss_fn), 64)
    assert curve.batches == FitTest(steps=3).fit(context, None).batches
    assert curve.remark.startswith("copies were fitted to the whole batch at once, since small ones fail: RuntimeError")
    with pytest.raises(RuntimeError, match="must match the size"):
        FitTest(steps=3).fit(replace(context, loss_fn=loss_fn).with_batch(context.samples(40)), 40)


def test_fallback_to_the_whole_batch_is_a_remark_of_each_report(caplog: pytest.LogCaptureFixture) -> None:
    class Coupled(Classifier):
        """A classifier of batches of 64 and less than 16 samples only."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) == 16:
                raise ValueError("16 samples are too few")
            return super().training_step(batch, batch_idx)

    module, callback = Coupled(), SpectralCollapseCallback(collapse=NEVER, fit_test=FitTest(steps=2), monitor=False)
    caplog.set_level("INFO")
    for _ in range(2):
        trainer(callback, max_steps=1).fit(module, loader())
    remark = "copies were fitted to the whole batch at once, since small ones fail: ValueError: 16 samples are too few"
    assert [report.remarks.count(remark) for report in callback.history] == [1, 1]
    assert caplog.text.count(remark) == 1


class Breaking(L2Init):
    """A regularizer that fails from the second task on."""

    works = True

    def penalty(self, model: nn.Module) -> Tensor:
        if not self.works:
            raise ValueError("the weights are gone")
        return super().penalty(model)


@pytest.mark.filterwarnings("ignore:Breaking failed and was left out of this step")
def test_failing_regularizer_leaves_the_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Classifier(), SpectralCollapseCallback(interventions=[Breaking(0.1)])
    trainer(callback, max_steps=1).fit(module, loader())
    monkeypatch.setattr(Breaking, "works", False)
    with pytest.warns(PlasticityWarning) as warned:
        trainer(callback, max_steps=1).fit(module, loader())
    messages = [str(warning.message) for warning in warned]
    failed = "the fit test failed and is left out of this task, training goes on: the weights are gone"
    assert messages.count(failed) == 1
    assert "task 1: handicap is not a number, so it is unknown whether this is a collapse" in messages
    report = callback.history[1]
    assert report.errors["fit_test"] == "ValueError: the weights are gone"
    assert {"learnable_fraction", "learnable_fraction_vs_initial", "dormant_fraction"} <= report.metrics.keys()
    assert not {"handicap", "fit_loss"} & report.metrics.keys()


def test_regularizer_that_fails_at_once_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breaking, "works", False)
    with pytest.raises(ValueError, match="the weights are gone"):
        trainer(SpectralCollapseCallback(interventions=[Breaking(0.1)])).fit(Classifier(), loader())


def test_fit_needs_an_optimizer() -> None:
    with pytest.raises(MisconfigurationError, match="there is no optimizer to train a copy of the model with"):
        FitTest().fit(plain_context(mlp(), []))


@pytest.mark.parametrize("steps", [0, -1, 1.0, True])
def test_steps_must_be_a_positive_whole_number(steps: Any) -> None:
    with pytest.raises(ValueError, match=rf"FitTest\(steps={steps}\) must be a whole number, at least 1"):
        FitTest(steps)


def test_divergence_makes_all_later_losses_infinite() -> None:
    model = mlp()
    losses = FitTest(steps=8).fit(plain_context(model, [torch.optim.SGD(model.parameters(), 1e30)])).losses
    assert math.isfinite(losses[0])
    assert losses[-3:] == (math.inf,) * 3
    first = losses.index(math.inf)
    assert losses[first:] == (math.inf,) * (9 - first)


def losses_of_loop(net: nn.Module, make_optimizer: Callable[[Any], Optimizer], x: Tensor, y: Tensor) -> list[float]:
    """Train a copy of a network in a plain loop, and return the losses before each step and after the last one."""
    net = copy.deepcopy(net)
    optimizer, losses = make_optimizer(net), []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


class HalfTrained(Classifier):
    """Trains its last layer only, although the others require gradients."""

    def configure_optimizers(self) -> Optimizer:
        return sgd(self.net[2].parameters())


@pytest.mark.usefixtures("all_batches")
def test_parameters_without_an_optimizer_stay_fixed() -> None:
    torch.manual_seed(0)
    module, callback = HalfTrained(), SpectralCollapseCallback(fit_test=FitTest(STEPS), collapse=NEVER)
    start = copy.deepcopy(module.net)
    data = loader(batches=1)
    trainer(callback, max_steps=1).fit(module, DataLoader(data.dataset, batch_size=64))
    x, y = data.dataset.tensors  # type: ignore[attr-defined]
    losses_on = partial(losses_of_loop, start, lambda net: sgd(net[2].parameters()))
    assert callback.history[0].fit_curve == pytest.approx(mean_losses(losses_on, x, y), abs=1e-6)


class Finetuning(BaseFinetuning):
    """Freezes the first layer, and trains it from the second epoch on, at a tenth of the rate."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, initial_denom_lr=10)


class Finetuned(Classifier):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.usefixtures("all_batches")
def test_finetuned_layers_are_trained_at_their_own_rate() -> None:
    torch.manual_seed(0)
    module, recorder = Finetuned(), EpochRecorder()
    callback = SpectralCollapseCallback(
        fit_test=FitTest(STEPS), collapse=NEVER, task_detector=TaskDetector(every_n_epochs=1)
    )
    trainer(Finetuning(), recorder, callback, max_epochs=2).fit(module, loader(batches=1))
    for report, net, (x, y), rate in zip(callback.history, recorder.nets, recorder.batches, (0.0, 0.01), strict=True):

        def make_optimizer(net: Any, rate: float = rate) -> Optimizer:
            return torch.optim.SGD([{"params": net[0].parameters(), "lr": rate}, {"params": net[2].parameters()}], 0.1)

        losses = mean_losses(partial(losses_of_loop, net, make_optimizer), x, y)
        assert report.fit_curve == pytest.approx(losses, abs=1e-6)


class EpochRecorder(Callback):
    """Copies the network and the batch before the first batch of each epoch."""

    def __init__(self) -> None:
        self.nets: list[Any] = []
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.nets.append(copy.deepcopy(pl_module.net).requires_grad_())
        self.batches.append([tensor.clone() for tensor in batch])


def test_dead_network_is_a_collapse_at_its_first_task() -> None:
    module, callback = Classifier(), SpectralCollapseCallback()
    with torch.no_grad():
        for layer in (module.net[0], module.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    module.net[2].bias.requires_grad_(False)
    with pytest.warns(PlasticityWarning, match="task 0: handicap inf, above 1.25: a fresh network would learn this"):
        trainer(callback, max_steps=1).fit(module, loader())
    report = callback.history[0]
    assert report.collapsed
    assert report.fit_curve == pytest.approx([math.log(3)] * 13)


def test_unsupported_model_gets_a_verdict_and_a_remark() -> None:
    class Unsupported(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(self.net, x, use_reentrant=True), batch[1])

    torch.manual_seed(0)
    module, callback = Unsupported(lr=0.1), SpectralCollapseCallback()
    trainer(callback).fit(module, loader())
    with torch.no_grad():
        module.net[0].bias.fill_(-100.0)
        module.net[2].bias.fill_(1.0)
        module.net[2].bias[0] = -30.0
    with pytest.warns(PlasticityWarning, match="task 1: handicap .* a fresh network would learn this task better"):
        trainer(callback).fit(module, loader())
    for report in callback.history:
        assert report.spectrum is None
        assert report.errors == {}
        assert report.metrics["probe_samples"] == 64
        (remark,) = report.remarks
        assert remark.startswith("the curvature is left out: ")
    with pytest.raises(UnsupportedModelError):
        trainer(SpectralCollapseCallback(collapse=Collapse("learnable_fraction"))).fit(Unsupported(), loader())


def test_alike_tasks_ring_no_alarm() -> None:
    """The network has learned the second task already: it begins with a smaller loss than a fresh one."""
    torch.manual_seed(0)
    module, callback = Classifier(), SpectralCollapseCallback()
    for _ in range(2):
        trainer(callback, max_epochs=10).fit(module, loader(batches=1))
    first, second = callback.history
    assert first.metrics["handicap"] == 1
    assert first.metrics["fit_gap"] == 0
    assert second.metrics["fit_gap"] < 0
    assert not second.collapsed


def test_undefined_handicap_is_inconclusive_at_the_first_task() -> None:
    """Training goes on, although both copies diverge."""

    class Divergent(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e30)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)]

    callback = SpectralCollapseCallback()
    with pytest.warns(PlasticityWarning, match="task 0: handicap is not a number, so it is unknown whether"):
        trainer(callback).fit(Divergent(), loader())
    assert not callback.history[0].collapsed
    assert "handicap" not in callback.history[0].metrics


def test_without_a_fit_test_another_metric_must_be_watched() -> None:
    with pytest.raises(MisconfigurationException, match=r"'handicap'\) watches what fit_test=None leaves out.*'learn"):
        trainer(SpectralCollapseCallback(fit_test=None)).fit(Classifier(), loader())
    with pytest.raises(TypeError, match="fit_test=20 must be an instance of FitTest, or None"):
        SpectralCollapseCallback(fit_test=20)  # type: ignore[arg-type]
    callback = SpectralCollapseCallback(fit_test=None, collapse=Collapse("learnable_fraction"))
    trainer(callback, max_steps=1).fit(Classifier(), loader())
    assert callback.history[0].fit_curve == ()
    assert not {"handicap", "fit_loss", "fit_gap"} & callback.history[0].metrics.keys()


def test_run_resumed_between_tasks_fits_the_same_curves(tmp_path: Path) -> None:
    class Saver(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    data = DataLoader(loader(batches=2).dataset, batch_size=32)
    histories = []
    for resumed in (False, True):
        torch.manual_seed(0)
        module = Module(Case(make_net=with_batch_norm, terms=lambda: [L2Init(0.5)]))
        callback = make_callback(module.case, FitTest(steps=3), task_detector=TaskDetector(every_n_epochs=1))
        path = tmp_path / "last.ckpt" if resumed else None
        trainer(callback, Saver(), max_epochs=3).fit(module, data, ckpt_path=path)
        histories.append([(report.fit_curve, report.fresh_fit_curve, report.metrics) for report in callback.history])
    assert len(histories[0]) == 3
    assert histories[0] == histories[1]


@pytest.mark.parametrize(("samples_per_step", "batches"), [(1024, 4), (4, 2)])
def test_few_batches_where_training_steps_are_cheap(samples_per_step: int, batches: int) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)), torch.randn(64, 500, 64)
    context = ProbeContext(
        model,
        x,
        lambda model, x: model(x).square().mean(),
        [torch.optim.Adam(model.parameters())],
        samples_per_step=samples_per_step,
    )
    curve = FitTest().fit(context, 64)
    assert len(curve.batches) == batches
