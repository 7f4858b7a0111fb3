"""Test on which samples a task is measured, and with which tasks it is compared."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_plasticity import Collapse, GGNProbe, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.curvature import UnsupportedModelError, ggn_spectrum
from lightning_plasticity.interventions import Reset, ShrinkPerturb
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, cross_entropy, loader, trainer, weights


class Normalized(Classifier):
    """Has buffers that every training batch changes."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.net.insert(1, nn.BatchNorm1d(8))


def batches(*sizes: int, seed: int = 0) -> DataLoader[Any]:
    """Return batches of these sizes, in order."""
    x, y = loader(batches=1, size=sum(sizes), seed=seed).dataset.tensors
    return DataLoader(list(zip(x.split(sizes), y.split(sizes), strict=True)), batch_size=None)


def joined(*data: DataLoader[Any], samples: int = 64) -> list[Tensor]:
    """Return the first samples of loaders, one after the other."""
    pairs = [batch for one in data for batch in one]
    return [torch.cat(tensors)[:samples] for tensors in zip(*pairs, strict=True)]


def assert_measured(callback: SpectralCollapseCallback, task: int, state: Any, samples: list[Tensor]) -> None:
    """Assert that a task was measured on these weights and samples."""
    copy = Normalized()
    copy.load_state_dict(state)
    copy.eval()
    report = callback.history[task]
    expected = ggn_spectrum(copy, samples, cross_entropy)
    assert report.metrics["probe_samples"] == len(samples[0])
    assert torch.equal(report.spectrum.eigenvalues, expected.eigenvalues)
    assert report.metrics["learnable_fraction"] == expected.learnable_fraction()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_samples_are_gathered_and_measured_on_the_weights_of_the_start() -> None:
    """The second task has enough samples in its first batch, the third one in its first three."""
    callback, module, logger = SpectralCollapseCallback(collapse=NEVER, log="all"), Normalized(), MemoryLogger()
    data: list[Any] = []
    states = []
    for seed, sizes in enumerate(((24, 24, 24, 24), (64, 8), (30, 2, 40))):
        data.append(batches(*sizes, seed=seed))
        states.append(state_of(module))
        trainer(callback, logger=logger).fit(module, data[-1])
    for task in range(3):
        assert_measured(callback, task, states[task], joined(data[task]))
    assert logger.values("plasticity_details/probe_samples") == {0: 64, 4: 64, 6: 64}
    assert list(logger.values("plasticity_by_task/learnable_fraction")) == [0, 1, 2]
    assert callback.history[0].metrics["ggn_trace_vs_initial"] == 1.0
    assert [report.remarks for report in callback.history] == [[], [], []]


def test_task_that_ends_is_measured_on_the_samples_that_it_had() -> None:
    class Announcer(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                callback.new_task()

    callback, module, data = SpectralCollapseCallback(collapse=NEVER), Normalized(), batches(20, 20, 20, 20)
    first = state_of(module)
    trainer(Announcer(), callback).fit(module, data)
    assert_measured(callback, 0, first, joined(data, samples=40))
    assert [report.metrics["probe_samples"] for report in callback.history] == [40, 40]
    assert [report.step for report in callback.history] == [0, 2]


def test_samples_of_several_epochs_are_gathered() -> None:
    callback, module, data = SpectralCollapseCallback(collapse=NEVER), Normalized(), batches(20, 20)
    first = state_of(module)
    trainer(callback, max_epochs=3).fit(module, data)
    assert_measured(callback, 0, first, joined(data, data))


def test_report_is_empty_until_there_are_enough_samples() -> None:
    seen = []

    class Reader(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append([bool(report.metrics) for report in callback.history])

    callback = SpectralCollapseCallback()
    trainer(callback, Reader()).fit(Normalized(), batches(24, 24, 24))
    assert seen == [[False], [False], [True]]


@pytest.mark.filterwarnings("ignore:task 1. after ShrinkPerturb, .* worse than before")
def test_repairs_run_when_the_samples_are_measured() -> None:
    repair = ShrinkPerturb(when="task")
    callback, module = SpectralCollapseCallback(collapse=NEVER, interventions=[repair]), Normalized()
    for _ in range(2):
        trainer(callback).fit(module, batches(32, 32, 32))
    assert [(r.name, r.step) for r in callback.history[1].repairs] == [("ShrinkPerturb", 4)]
    trainer(callback).fit(module, batches(32))
    assert callback.history[2].repairs == []
    assert callback.history[2].remarks[-1] == "the repairs that were due are left out, since the fit has ended"


def test_misconfiguration_is_an_error_before_any_weight_has_changed() -> None:
    module = Normalized()
    before = weights(module)
    with pytest.raises(ValueError, match="matches no module"):
        trainer(SpectralCollapseCallback(interventions=[Reset(layers=["encoder"])])).fit(module, batches(8, 8))
    assert torch.equal(weights(module), before)


class Sequences(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x).mean(1), y)


def sequences(*lengths: int) -> DataLoader[Any]:
    return DataLoader([(torch.randn(20, n, 4), torch.arange(20) % 3) for n in lengths], batch_size=None)


def test_batches_that_cannot_be_joined_leave_the_first_one(caplog: pytest.LogCaptureFixture) -> None:
    callback, module, data = SpectralCollapseCallback(collapse=NEVER), Sequences(), sequences(5, 6, 7)
    copy = Sequences()
    copy.load_state_dict(module.state_dict())
    with caplog.at_level("INFO", "lightning_plasticity"):
        trainer(callback).fit(module, data)
    report = callback.history[0]
    expected = ggn_spectrum(copy, next(iter(data)), lambda model, batch: model.training_step(batch, 0))
    torch.testing.assert_close(report.spectrum.eigenvalues, expected.eigenvalues)
    assert report.metrics["probe_samples"] == 20
    (remark,) = report.remarks
    assert "samples of shapes (5, 4) and (6, 4) cannot be joined; the first batch was measured alone" in remark
    assert [record.message for record in caplog.records if "joined" in record.message] == [f"task 0: {remark}"]


def test_loss_that_fails_on_joined_batches_leaves_the_first_one() -> None:
    class Stateful(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]) + torch.zeros(20, 3), batch[1])

    callback = SpectralCollapseCallback()
    trainer(callback).fit(Stateful(), batches(20, 20, 20, 20))
    report = callback.history[0]
    assert report.metrics["probe_samples"] == 20
    assert report.errors == {}
    assert "could not be measured together" in report.remarks[0]


def test_training_is_bit_identical_while_samples_are_gathered() -> None:
    trained = []
    for callbacks in ([], [SpectralCollapseCallback(collapse=NEVER)]):
        torch.manual_seed(0)
        module = Normalized()
        for seed in range(2):
            trainer(*callbacks, max_epochs=2).fit(module, loader(batches=3, size=12, seed=seed))
        trained.append((state_of(module), torch.rand(3)))
    (one, after_one), (other, after_other) = trained
    assert torch.equal(after_one, after_other)
    assert all(torch.equal(one[name], other[name]) for name in one)


class Resumable:
    """Batches of 12 samples, whose position a checkpoint holds."""

    def __init__(self, wrap: Any) -> None:
        self.taken, self.wrap = 0, wrap

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[Any]:
        data = list(batches(*[12] * 8))
        while self.taken < 8:
            self.taken += 1
            yield self.wrap(data[self.taken - 1])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class SaveAfter(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("second_task", [False, True])
def test_resuming_goes_on_gathering(tmp_path: Path, second_task: bool) -> None:
    def make() -> SpectralCollapseCallback:
        detector = TaskDetector(every_n_steps=2) if second_task else None
        return SpectralCollapseCallback(
            GGNProbe(samples=20 if second_task else 64), collapse=NEVER, task_detector=detector
        )

    path, whole, resumed = tmp_path / "a.ckpt", make(), make()
    module = Normalized()
    trainer(whole, SaveAfter(path, 3)).fit(module, Resumable(tuple))
    assert torch.load(path, weights_only=True)["callbacks"]["SpectralCollapseCallback"]["gathering"] is not None
    trainer(resumed).fit(again := Normalized(), Resumable(tuple), ckpt_path=path)
    assert torch.equal(weights(module), weights(again))
    assert [report.metrics for report in resumed.history] == [report.metrics for report in whole.history]
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert torch.equal(one.spectrum.eigenvalues, other.spectrum.eigenvalues)


class Pair(tuple):
    """A batch of a class that a checkpoint does not restore."""

    __slots__ = ()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_unusual_batches_are_gathered_anew_after_a_resume(tmp_path: Path) -> None:
    path, module, callback = tmp_path / "a.ckpt", Normalized(), SpectralCollapseCallback(collapse=NEVER)
    first = state_of(module)
    trainer(SpectralCollapseCallback(collapse=NEVER), SaveAfter(path, 2)).fit(module, Resumable(Pair))
    trainer(callback).fit(Normalized(), Resumable(Pair), ckpt_path=path)
    samples = joined(batches(*[12] * 8), samples=96)
    assert_measured(callback, 0, first, [tensor[24:88] for tensor in samples])
    assert "others were gathered after the resume" in callback.history[0].remarks[0]


class Frozen(Normalized):
    """A network that never changes."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net.eval()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_network_that_never_changes_rings_no_alarm_whatever_the_batches() -> None:
    callback, module = SpectralCollapseCallback(collapse=Collapse("learnable_fraction")), Frozen()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlasticityWarning)
        for seed, sizes in enumerate(((64,), (4,), (4, 64), (64,), (10,), (4,), (64,))):
            trainer(callback).fit(module, batches(*sizes, seed=seed))
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, PlasticityWarning)]
    assert [report.collapsed for report in callback.history] == [False] * 7
    (message,) = messages
    assert message.startswith("task 1: learnable fraction was measured on 4 samples, fewer than the 8 that a verdict")
    assert "10 samples instead of 4" not in callback.history[4].remarks[0]
    assert "not comparable with any earlier task, for 10 samples instead of 64" in callback.history[4].remarks[0]
    assert callback.history[6].remarks == []


def test_unfreezing_rings_no_alarm() -> None:
    callback = SpectralCollapseCallback(GGNProbe(samples=32), collapse=Collapse("learnable_fraction", below=1.0))
    module, data = Classifier(lr=0.0), batches(32)
    for task in range(4):
        module.net[0].requires_grad_(task >= 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PlasticityWarning)
            trainer(callback).fit(module, data)
    assert "other parameters that are trained: it counts as a new first task" in callback.history[2].remarks[0]
    assert [len(report.remarks) for report in callback.history] == [0, 0, 1, 0]


def test_few_samples_warn_once() -> None:
    callback, module = SpectralCollapseCallback(GGNProbe(samples=12), collapse=NEVER), Classifier()
    with pytest.warns(PlasticityWarning, match=r"task 0 was measured on 12 samples: below 16.*probe_batch"):
        trainer(callback).fit(module, batches(12))
    trainer(callback).fit(module, batches(12))


def test_probe_batch_may_be_a_function() -> None:
    fixed = joined(batches(40, seed=9))

    def probe_batch(trainer: Any, module: Any) -> Any:
        torch.rand(3)
        return fixed

    callback, module = SpectralCollapseCallback(collapse=NEVER, probe_batch=probe_batch), Normalized()
    first = state_of(module)
    trainer(callback).fit(module, batches(8, 8))
    second = state_of(module)
    trainer(callback).fit(module, batches(8, 8))
    assert_measured(callback, 0, first, fixed)
    assert_measured(callback, 1, second, fixed)


def test_probe_batch_may_be_a_loader_that_shuffles() -> None:
    """It gives the same samples at every task, and the same training as without it, with the loader's own batches."""
    trained: list[Tensor] = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        data = loader(batches=8, size=16)
        data.generator = torch.Generator().manual_seed(3)
        callback = SpectralCollapseCallback(GGNProbe(samples=40), collapse=NEVER, probe_batch=data)
        module = Classifier(lr=0.0)
        for _ in range(2):
            trainer(*[callback] * with_callback).fit(module, data)
        trained += [torch.rand(1), data.generator.get_state()]
    assert torch.equal(trained[0], trained[2])
    assert torch.equal(trained[1], trained[3])
    assert [report.metrics["probe_samples"] for report in callback.history] == [40, 40]


def test_probe_batch_is_transferred_like_a_training_batch() -> None:
    class Scaling(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

    callback, module = SpectralCollapseCallback(collapse=NEVER, probe_batch=list(batches(64))), Scaling(lr=0.0)
    trainer(callback).fit(module, batches(8, seed=1))
    x, y = joined(batches(64))
    expected = ggn_spectrum(module, (2 * x, y), cross_entropy)
    assert torch.equal(callback.history[0].spectrum.eigenvalues, expected.eigenvalues)


@pytest.mark.parametrize(
    ("probe_batch", "message"),
    [(3, r"probe_batch=3 must be a function"), (iter([]), r"gives its batches only once: pass a DataLoader")],
)
def test_unusable_probe_batch_is_refused(probe_batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SpectralCollapseCallback(probe_batch=probe_batch)


@pytest.mark.parametrize("probe_batch", [[], [*sequences(5), *sequences(6)]])
def test_probe_batches_that_cannot_be_taken_are_refused(probe_batch: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"gives no batches|cannot be joined; give one batch of 64"):
        trainer(SpectralCollapseCallback(probe_batch=probe_batch)).fit(Sequences(), sequences(5))


def test_no_probe_measures_hidden_layers_alone() -> None:
    """Also where the curvature of the loss cannot be measured."""

    class Unknown(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(self.net, x, use_reentrant=True), batch[1])

    with pytest.raises(UnsupportedModelError, match="'effective_rank' needs no curvature: probe=None leaves it out"):
        trainer(SpectralCollapseCallback(collapse=Collapse("effective_rank"))).fit(Unknown(), batches(64))
    callback, module = SpectralCollapseCallback(None, collapse=Collapse("effective_rank")), Unknown()
    for _ in range(2):
        trainer(callback).fit(module, batches(32, 32))
    for report in callback.history:
        assert report.spectrum is None
        assert report.errors == {}
        assert report.metrics["probe_samples"] == 64
        assert {"effective_rank", "effective_rank_vs_initial", "dead_fraction"} <= report.metrics.keys()
        assert "learnable_fraction" not in report.metrics
    with torch.no_grad():
        module.net[0].weight.zero_()
    with pytest.warns(PlasticityWarning, match="task 2: effective rank of the features .* losing its plasticity"):
        trainer(callback).fit(module, batches(64))


def test_no_probe_needs_a_metric_of_the_monitor() -> None:
    callback = SpectralCollapseCallback(probe=None, collapse=Collapse("learnable_fraction"))
    with pytest.raises(MisconfigurationException, match=r"probe=None leaves out.*one of \['effective_rank'"):
        trainer(callback).fit(Classifier(), batches(64))
    with pytest.raises(ValueError, match="probe=None with fit_test=None and monitor=False: nothing would be measured"):
        SpectralCollapseCallback(probe=None, fit_test=None, monitor=False)
