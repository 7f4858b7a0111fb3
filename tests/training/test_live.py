"""Test the live fit test: a fresh network trains beside the network, and the verdict comes some batches later."""

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.engine.shadow_run import ShadowRun
from lightning_plasticity.interventions import ShrinkPerturb
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.training.checks import check_live
from tests.helpers.killed_run import weights_only_option
from tests.helpers.modules import NEVER, Classifier, loader, trainer, weights
from tests.helpers.training_runs import check_identical, train
from tests.helpers.usages import USAGES, Quartic, Usage, convolutional
from tests.training.test_resume import assert_same

LATER_QUARTERS = [slice(6, 7), slice(7, 9), slice(9, 10), slice(10, 12)]
"""The parts of the later half of 12 batches."""


class Noisy(Classifier):
    """A classifier with dropout, BatchNorm and a buffer that is replaced; it logs an accuracy by epoch only."""

    moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("moments", torch.zeros(4))
        self.accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.moments = 0.9 * self.moments + 0.1 * x.mean(0)
        logits = self.net(x - self.moments)
        self.accuracy(logits, y)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        self.last_accuracy = (logits.argmax(1) == y).float().mean().item()
        return F.cross_entropy(logits, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Adam would amplify rounding errors in gradients that are zero, such as those of biases before BatchNorm.
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Recorder(Callback):
    """Records the batches, random states and losses of each fit, and the first weights of all."""

    def __init__(self) -> None:
        self.initial: Any = None
        self.fits: list[list[Any]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.fits.append([])
        if self.initial is None:
            trainers = module._trainer
            module._trainer = None
            self.initial = copy.deepcopy(module)
            module._trainer = trainers

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = [tensor.clone() for tensor in batch], torch.get_rng_state()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fits[-1].append((*self.batch, outputs["loss"].item(), getattr(module, "last_accuracy", None)))


def live(steps: int = 8, *, rule: Collapse = NEVER, **options: Any) -> SpectralCollapseCallback:
    fit_test = FitTest(live=True, steps=steps, metric=options.pop("metric", None))
    return SpectralCollapseCallback(collapse=rule, fit_test=fit_test, **options)


def fit_twice(callback: SpectralCollapseCallback, module: Any, *others: Callback, **options: Any) -> Recorder:
    """Train two tasks of 12 batches each, and return what was recorded before the callback saw the batches."""
    recorder = Recorder()
    size = options.pop("size", 64)
    for seed in range(2):
        trainer(recorder, callback, *others, **options).fit(module, loader(batches=12, size=size, seed=seed))
    return recorder


@pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_training_is_bit_identical_with_live_test(usage: Usage) -> None:
    callback = live(loss_fn=usage.loss_fn)
    without = train(usage=usage, make_net=convolutional)
    with_callback = train(callback, usage=usage, make_net=convolutional)
    assert not any(report.errors for report in callback.history)
    check_identical(with_callback, without, callback)


@pytest.mark.parametrize("accumulated", [1, 5])
def test_fresh_network_trains_as_plain_loop(accumulated: int) -> None:
    """Its losses and accuracies are those of a copy of the first module, trained by hand on the same batches."""
    torch.manual_seed(0)
    callback = live(12, metric="train_acc", interventions=[Quartic(0.1)])
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulated}
    recorder = fit_twice(callback, Noisy(), **options)
    module = recorder.initial.train()
    optimizer = module.configure_optimizers()
    losses, accuracies = [], []
    for number, (batch, rng_state, *_) in enumerate(recorder.fits[1], start=1):
        torch.set_rng_state(rng_state)
        x, y = batch
        module.moments = 0.9 * module.moments + 0.1 * x.mean(0)
        logits = module.net(x - module.moments)
        loss = F.cross_entropy(logits, y)
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == y).float().mean().item())
        (loss / accumulated).backward()
        if number % accumulated == 0 or number == 12:
            (0.1 * sum(p.pow(4).sum() for p in module.parameters())).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    report = callback.history[1]
    torch.testing.assert_close(report.fresh_fit_curve, tuple(losses), rtol=1e-5, atol=1e-6)
    # Lightning returns losses over the number of batches that are accumulated.
    own = tuple(loss * accumulated for *_, loss, _ in recorder.fits[1])
    torch.testing.assert_close(report.fit_curve, own, rtol=1e-5, atol=1e-6)
    mean, fresh_mean = (sum(curve[6:]) / 6 for curve in (report.fit_curve, losses))
    ratios = [sum(report.fit_curve[part]) / sum(losses[part]) for part in LATER_QUARTERS]
    assert report.metrics["handicap"] == pytest.approx(statistics.geometric_mean(ratios), rel=1e-5)
    error = statistics.stdev(map(math.log, ratios)) / 2 * statistics.geometric_mean(ratios)
    assert report.metrics["handicap_standard_error"] == pytest.approx(error, rel=1e-3)
    assert report.metrics["fit_loss"] == pytest.approx(mean, rel=1e-5)
    assert report.metrics["fit_loss_vs_initial"] == pytest.approx(mean / fresh_mean, rel=1e-5)
    gap = sum(accuracies[6:]) / 6 - sum(accuracy for *_, accuracy in recorder.fits[1][6:]) / 6
    assert report.metrics["live_metric_gap"] == pytest.approx(gap, abs=1e-6)


def test_first_task_needs_no_fresh_network() -> None:
    callback = live(rule=Collapse())
    trainer(callback).fit(Classifier(), loader(batches=2))
    report = callback.history[0]
    assert (report.metrics["handicap"], report.metrics["fit_gap"]) == (1, 0)
    assert (report.collapsed, report.fit_curve, report.remarks) == (False, (), [])


def test_batches_of_one_are_compared() -> None:
    callback, module = live(), Classifier()
    for seed in range(2):
        trainer(callback).fit(module, loader(batches=70, size=1, seed=seed))
    report = callback.history[1]
    assert report.metrics["handicap"] > 0
    assert len(report.fresh_fit_curve) == 8
    assert report.metrics["probe_samples"] == 64


class Observer(Callback):
    """Records at the end of each batch the weights, whether there is a verdict, and the number of repairs."""

    def __init__(self, callback: SpectralCollapseCallback) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        report = self.callback.history[-1]
        self.seen.append(("handicap" in report.metrics, report.collapsed, len(report.repairs)))


@pytest.mark.filterwarnings("ignore:.*a fresh network would learn this task better")
def test_repairs_run_at_the_verdict() -> None:
    callback = live(9, rule=Collapse(above=1e-9), interventions=[ShrinkPerturb()])
    fit_twice(callback, Classifier(), observer := Observer(callback))
    # The networks are compared at the ninth batch, before the training step on it.
    assert observer.seen[12:] == [(False, False, 0)] * 8 + [(True, True, 1)] * 4
    assert callback.history[1].remarks == []


@pytest.mark.parametrize(("batches", "has_verdict"), [(7, False), (8, True)])
def test_comparison_ends_with_the_fit(batches: int, *, has_verdict: bool) -> None:
    callback, module = live(200), Classifier()
    for seed in range(2):
        trainer(callback).fit(module, loader(batches=batches, seed=seed))
    report = callback.history[1]
    assert report.remarks[0] == f"the task ended after {batches} of the 200 batches of the fit test"
    assert ("handicap" in report.metrics, len(report.fit_curve)) == (has_verdict, batches if has_verdict else 0)
    assert "learnable_fraction" in report.metrics


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_ends_the_same(tmp_path: Path) -> None:
    """The checkpoint is saved at the fourth of eight batches that are compared."""

    def fit(module: Any, callback: Any, *others: Callback, seed: int = 1, **options: Any) -> None:
        # Lightning does not restore the random numbers of dropout.
        module.net[3].p = 0.0
        pl_trainer = trainer(callback, *others, max_epochs=3, enable_checkpointing=bool(others))
        batches = DataLoader(loader(batches=4, seed=seed).dataset, batch_size=64)
        pl_trainer.fit(module, batches, **options, **weights_only_option())

    module, callback = Noisy(), live(metric="train_acc")
    fit(module, callback, seed=0)
    fit(module, callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    checkpoint = tmp_path / "epoch=0.ckpt"
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["SpectralCollapseCallback"]
    assert len(state["shadow"]["losses"]) == 4
    resumed, resumed_callback = Noisy(), live(metric="train_acc")
    fit(resumed, resumed_callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), ckpt_path=checkpoint)
    assert len(resumed_callback.history[1].fresh_fit_curve) == 8
    assert_same(resumed_callback.state_dict(), callback.state_dict())
    assert_same(dict(resumed.state_dict()), dict(module.state_dict()))


def test_error_ends_the_comparison_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    callback, module = live(), Classifier()
    trainer(callback).fit(module, loader())
    monkeypatch.setattr(ShadowRun, "_loss_of_network", fail)
    with pytest.warns(PlasticityWarning, match="a fresh network could not be trained .*out of memory"):
        trainer(callback).fit(module, loader())
    report = callback.history[1]
    assert report.errors == {"fit_test": "RuntimeError: out of memory"}
    assert "learnable_fraction" in report.metrics
    assert report.remarks == []


def test_metric_that_is_not_logged_is_an_error_at_once() -> None:
    module = Noisy()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"metric='train_accuracy'\) is not logged.*\['train_acc'\]"):
        trainer(live(metric="train_accuracy")).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_metric_is_the_default_rule() -> None:
    fit_test = FitTest(live=True, metric="train_acc")
    assert SpectralCollapseCallback(fit_test=fit_test).collapse == Collapse("live_metric_gap")
    assert SpectralCollapseCallback(fit_test=fit_test, collapse=NEVER).collapse == NEVER


def test_undoing_repairs_with_live_test_is_refused() -> None:
    with pytest.raises(ValueError, match="undo_if_worse=True measures a repaired network"):
        live(undo_if_worse=True)


def test_several_processes_are_refused() -> None:
    several = trainer(live(), devices=2, strategy="ddp")
    with pytest.raises(MisconfigurationError, match=r"FitTest\(live=True\) does not support DDPStrategy with 2"):
        check_live(several)


def test_spectral_rule_with_live_test_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'learnable_fraction'.* is decided at the start of a task"):
        trainer(live(rule=Collapse("learnable_fraction"))).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"live": True, "steps": 7}, "at least 8 batches"),
        ({"metric": "train_acc"}, "live=True"),
        ({"live": True, "metric_mode": "max"}, "without metric="),
        ({"live": True, "metric": "train_acc", "metric_mode": "high"}, "must be one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitTest(**arguments)


@pytest.mark.parametrize(
    ("metric", "mode", "higher"),
    [("train_acc", None, True), ("train_loss", None, False), ("Error", None, False), ("train_loss", "max", True)],
)
def test_direction_of_the_metric(metric: str, mode: Any, *, higher: bool) -> None:
    assert FitTest(live=True, metric=metric, metric_mode=mode).higher_is_better == higher
