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
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.engine.shadow_run import ShadowRun
from lightning_plasticity.interventions import ShrinkPerturb
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.training.checks import check_live
from tests.helpers.killed_run import weights_only_option
from tests.helpers.modules import NEVER, Classifier, cross_entropy, loader, trainer, weights
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
    callback = live(12, metric="train_acc", interventions=[Quartic(0.1), Quartic(0.3, decoupled=True)])
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
            Quartic(0.3).descend(module, [optimizer])
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
@pytest.mark.filterwarnings("ignore:.*worse than before")
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
@pytest.mark.parametrize("precision", ["32-true", "fp16"])
def test_resumed_run_ends_the_same(tmp_path: Path, precision: str) -> None:
    """The checkpoint is saved at the fourth of eight batches that are compared."""

    def fit(module: Any, callback: Any, *others: Callback, seed: int = 1, **options: Any) -> None:
        # Lightning does not restore the random numbers of dropout.
        module.net[3].p = 0.0
        of_precision = fp16() if precision == "fp16" else {}
        pl_trainer = trainer(callback, *others, max_epochs=3, enable_checkpointing=bool(others), **of_precision)
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


def test_sharded_weights_are_refused() -> None:
    sharded = trainer(live(), devices=2, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationError, match=r"FitTest\(live=True\) does not support ModelParallelStrategy, wh"):
        check_live(sharded)


class Restarting(Classifier):
    """A classifier that does not train in its first fit, so that it begins the second one as a fresh network."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0 if self.trainer.max_steps == 1 else 0.5, momentum=0.9)


def fp16() -> dict[str, Any]:
    """Return options for half precision whose first gradients overflow, so that their steps are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed", "fp16"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=str)
def test_fresh_network_trains_in_the_precision_of_training(precision: str, options: dict[str, Any]) -> None:
    """Both networks begin with the same weights, so that their losses must be those of training, bit for bit."""
    module, callback, recorder = Restarting(), live(12), Recorder()
    for steps in (1, -1):
        of_precision = fp16() if precision == "fp16" else {"precision": precision}
        pl_trainer = trainer(recorder, callback, max_steps=steps, **of_precision, **options)
        pl_trainer.fit(module, loader(batches=12))
    report = callback.history[1]
    window = options.get("accumulate_grad_batches", 1)
    assert report.fit_curve == report.fresh_fit_curve == tuple(window * loss for *_, loss, _ in recorder.fits[1])
    assert report.metrics["handicap"] == 1
    if precision == "fp16":
        assert pl_trainer.precision_plugin.scaler.get_scale() < 2.0**22


@pytest.mark.parametrize(("batches", "expected"), [(40, 16), (10, 8)])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_share_of_the_task_is_compared(batches: int, expected: int, accumulated: int) -> None:
    callback, module = SpectralCollapseCallback(collapse=NEVER, fit_test=FitTest(live=True, share=0.4)), Classifier()
    for seed in range(2):
        pl_trainer = trainer(callback, accumulate_grad_batches=accumulated)
        pl_trainer.fit(module, loader(batches=batches, size=8, seed=seed))
    assert len(callback.history[1].fresh_fit_curve) == expected


class TwoOptimizers(Classifier):
    """Steps two optimizers for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.1) for layer in (0, 2)]


@pytest.mark.parametrize("every_n_epochs", [None, 1])
def test_share_counts_batches_with_two_optimizers(every_n_epochs: int | None) -> None:
    module = TwoOptimizers()
    options = {"task_detector": TaskDetector(every_n_epochs=every_n_epochs), "loss_fn": cross_entropy}
    callback = SpectralCollapseCallback(collapse=NEVER, fit_test=FitTest(live=True, share=0.4), **options)
    for _ in range(2):
        trainer(callback, max_epochs=2).fit(module, loader(batches=12, size=8))
    length = 24 if every_n_epochs is None else 12
    assert [report.expected_steps for report in callback.history[:2]] == [2 * length] * 2
    assert len(callback.history[1].fresh_fit_curve) == max(round(0.4 * length), 8)


def test_unknown_length_gets_the_default_number_and_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskDetector, "expected_steps", lambda *_: None)
    callback, module = SpectralCollapseCallback(collapse=NEVER, fit_test=FitTest(live=True, share=0.4)), Classifier()
    for seed in range(2):
        trainer(callback).fit(module, loader(batches=20, size=8, seed=seed))
    remarks = callback.history[1].remarks
    assert "the length of the task is not known: the fit test compares 200 batches, not a share of 0.4" in remarks
    assert "the task ended after 20 of the 200 batches of the fit test" in remarks


class Dead(Noisy):
    """A classifier of which no gradient reaches a weight that is trained."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for layer in (self.net[0], self.net[4]):
                layer.weight.zero_()
                layer.bias.zero_()
        self.net[1].requires_grad_(requires_grad=False)
        self.net[4].bias.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("metric", [None, "train_acc"])
def test_network_that_is_dead_from_the_start_is_a_collapse(metric: str | None) -> None:
    """It is one at every task: the initial weights, which it is compared with, are as dead."""
    module, callback = Dead(), live(metric=metric, rule=Collapse())
    with pytest.warns(PlasticityWarning, match="task [01]: .* inf, above .*: a fresh network would learn"):
        fit_twice(callback, module)
    assert [report.collapsed for report in callback.history] == [True, True]
    assert [report.metrics["handicap"] for report in callback.history] == [math.inf] * 2
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in module.parameters())


def test_gradient_on_a_later_batch_is_enough() -> None:
    class Gated(Classifier):
        """A classifier that learns from every third batch only."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (batch_idx % 3 == 2) * super().training_step(batch, batch_idx) + 1

    callback = live(12, rule=Collapse(above=2.0))
    module = Gated()
    trainer(callback, limit_train_batches=0).fit(module, loader())
    with pytest.warns(PlasticityWarning, match="task 0: handicap inf"):
        fit_twice(callback, module)
    assert callback.history[1].metrics["handicap"] < 2


def test_spectral_rule_with_live_test_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'learnable_fraction'.* is decided at the start of a task"):
        trainer(live(rule=Collapse("learnable_fraction"))).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"live": True, "steps": 7}, "at least 8 batches"),
        (
            {"live": True, "steps": 0.2},
            "steps=0.2.* must be a whole number of batches; for a share .*, write share=0.2",
        ),
        ({"live": True, "share": 20}, r"share=20\) must be in \(0, 1\]: a share of the task, 0.2 for its first fifth"),
        ({"live": True, "share": 0.2, "steps": 100}, "steps=100, share=0.2.*: write one of them"),
        ({"share": 0.2}, r"share=0.2\) is a share of the batches of the task: write live=True, too"),
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
