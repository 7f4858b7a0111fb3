"""Whatever goes wrong beside the training, training goes on, and the report says what was missed."""

import contextlib
import dataclasses
import errno
import math
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from torch import Tensor, nn

from lightning_plasticity import (
    Collapse,
    GGNProbe,
    PlasticityMonitor,
    PlasticityWarning,
    SpectralCollapseCallback,
    TaskDetector,
)
from lightning_plasticity.interventions import (
    L2ER,
    ContinualBackprop,
    EffectiveRankRegularizer,
    L2Init,
    ReDo,
    Regularizer,
    Reset,
    SelfNormalizedReset,
    ShrinkPerturb,
    SpectralRegularizer,
    StepIntervention,
)
from lightning_plasticity.reports import TaskReport
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_another_process

NEVER = Collapse(below=1e-9)
ALWAYS = Collapse(below=1, relative_to=None)


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


class Sometimes:
    """A loss function that fails when it is told to."""

    def __init__(self, error: Exception, fails: bool = False) -> None:
        self.error, self.fails = error, fails

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        if self.fails:
            raise self.error
        return cross_entropy(module, batch)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OutOfMemoryError: CUDA out of"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RuntimeError: DefaultCPUAllocator: can't"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_out_of_memory_in_the_probe_leaves_training_as_it_would_be(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    ends = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module, loss_fn, logger = Classifier(), Sometimes(error), MemoryLogger()
        callback = SpectralCollapseCallback(collapse=NEVER, loss_fn=loss_fn)
        for fit in range(3):
            loss_fn.fails = fit == 1
            one = trainer(*[callback] * with_callback, logger=logger)
            if with_callback and fit == 1:
                with pytest.warns(PlasticityWarning, match=f"task 1: plasticity could not be measured.*{reason}"):
                    one.fit(module, loader(seed=fit))
            else:
                one.fit(module, loader(seed=fit))
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert [report.spectrum is None for report in callback.history] == [False, True, False]
    assert [list(report.errors) for report in callback.history] == [[], ["probe"], []]
    assert callback.history[1].errors["probe"].startswith(reason)
    assert logger.values("plasticity_by_task/probe_failed") == {0: 0, 1: 1, 2: 0}
    one.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["SpectralCollapseCallback"]
    kept = [TaskReport.from_dict(report) for report in state["history"]]
    assert [report.errors for report in kept] == [report.errors for report in callback.history]


def short_of_memory() -> tuple[list[tuple[bool, dict[str, str]]], bool]:
    """Runs out of memory in the probe of the second of three tasks, really."""
    warnings.simplefilter("ignore")
    callback, module = SpectralCollapseCallback(GGNProbe(samples=2048, max_rows=2**14), collapse=NEVER), Classifier()
    trainer(callback).fit(module, loader())
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100 * 2**20  # a Gram matrix of 6144 rows takes 300 MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = weights(module)
    trainer(callback).fit(module, loader(batches=3, size=2048))
    moved = not torch.equal(weights(module), before)
    trainer(callback).fit(module, loader())
    return [(report.spectrum is None, report.errors) for report in callback.history], moved


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs to know how much memory it has taken")
def test_a_process_that_really_runs_out_of_memory_trains_on() -> None:
    history, moved = in_another_process(short_of_memory)
    assert [failed for failed, _ in history] == [False, True, False]
    assert "can't allocate memory" in history[1][1]["probe"]
    assert moved


class Poisoned(Classifier):
    """Its loss is NaN from one batch on, as after a step that was too large: the weights are."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 2 else loss


@pytest.mark.filterwarnings("ignore:ContinualBackprop. '.*' is passed over, values are not finite:UserWarning")
def test_after_a_loss_that_is_not_a_number_everything_says_so_and_training_goes_on() -> None:
    logger, module = MemoryLogger(), Poisoned()
    callback = SpectralCollapseCallback(
        collapse=NEVER,
        monitor_every_n_steps=1,
        interventions=[
            ReDo(when=4),
            ContinualBackprop(0.5, 0),
            SpectralRegularizer(),
            EffectiveRankRegularizer(0.1, 4),
        ],
    )
    trainers = [trainer(callback, logger=logger) for _ in range(2)]
    with pytest.warns(PlasticityWarning):
        trainers[0].fit(module, loader(batches=6))
    with pytest.warns(PlasticityWarning) as caught:
        trainers[1].fit(module, loader(batches=6))
    assert [one.global_step for one in trainers] == [6, 6]
    assert bool(weights(module).isnan().any()), "it is a network that nothing can be said of"
    first, second = callback.history
    reasons = {
        "ReDo": "ValueError: ReDo: the units of 'net.0' give values that are not finite",
        "SpectralRegularizer": "ValueError: a gradient is not finite",
        "EffectiveRankRegularizer": "ValueError: the features of 'net.0' hold NaN or infinite numbers",
    }
    assert first.errors.keys() == reasons.keys()
    assert all(first.errors[who].startswith(reason) for who, reason in reasons.items())
    assert second.spectrum is None
    assert "the loss on the probe batch is nan" in second.errors["probe"]
    assert not second.collapsed
    assert logger.values("plasticity_by_task/probe_failed") == {0: 0, 1: 1}
    assert math.isnan(logger.values("plasticity_training/feature_norm")[5]), "it is not averaged away"
    assert sum("task 1: plasticity could not be measured" in str(warning.message) for warning in caught) == 1


def test_a_drift_detector_is_not_told_of_losses_that_are_not_numbers() -> None:
    class Seeing:
        drift_detected = False

        def __init__(self) -> None:
            self.seen: list[float] = []

        def update(self, x: float) -> None:
            self.seen.append(x)

    detector = Seeing()
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=TaskDetector(drift_detector=detector))
    trainer(callback).fit(Poisoned(), loader(batches=6))
    assert len(detector.seen) == 2
    assert all(map(math.isfinite, detector.seen))


class Drifting:
    """A drift detector that takes so many numbers, and a statistic, the name of a task, and a label, as often."""

    drift_detected = False

    def __init__(self, times: int) -> None:
        self.times = times

    def update(self, x: Any) -> None:
        self.ask()

    def ask(self, *_: Any) -> int:
        self.times -= 1
        if self.times < 0:
            raise ZeroDivisionError("no more")
        return 7


def detectors(times: int) -> dict[str, TaskDetector]:
    """Each fails after so many times."""
    failing, lasting = Drifting(times), Drifting(99)
    return {
        "detector of the loss": TaskDetector(drift_detector=failing),
        "detector of the inputs": TaskDetector(drift_detector=failing, drift_statistic=lasting.ask),
        "statistic": TaskDetector(drift_detector=lasting, drift_statistic=failing.ask),
        "task key": TaskDetector(task_key=failing.ask),
    }


@pytest.mark.parametrize("which", detectors(0))
def test_a_task_detector_that_fails_later_does_not_end_training(which: str) -> None:
    ends = []
    for detector in (detectors(2)[which], detectors(99)[which]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, task_detector=detector)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callback).fit(module, loader(batches=4))
        assert module.trainer.global_step == 4
        (report,) = callback.history
        ends.append((weights(module), report.errors, [w for w in caught if issubclass(w.category, PlasticityWarning)]))
    (ours, errors, said), (theirs, no_errors, nothing) = ends
    assert torch.equal(ours, theirs)
    assert errors == {"task_detector": "ZeroDivisionError: no more"}
    assert [str(warning.message) for warning in said] == [
        "whether a task is new could not be told, training goes on: no more"
    ] * 2
    assert (no_errors, nothing) == ({}, [])


def test_nor_does_a_task_id_that_is_misconfigured_later() -> None:
    class Named(Classifier):
        @property
        def task_id(self) -> int:
            if self.trainer.global_step == 2:
                raise MisconfigurationException("not known now")
            return 0

    callback = SpectralCollapseCallback(collapse=NEVER)
    with pytest.warns(PlasticityWarning, match="whether a task is new could not be told.*not known now"):
        trainer(callback).fit(Named(), loader(batches=4))
    assert [report.errors for report in callback.history] == [
        {"task_detector": "MisconfigurationException: not known now"}
    ]


@pytest.mark.parametrize("which", detectors(0))
def test_a_task_detector_that_fails_at_once_is_an_error(which: str) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=detectors(0)[which])
    with pytest.raises((ZeroDivisionError, MisconfigurationException), match="no more"):
        trainer(callback).fit(Classifier(), loader(batches=4))


class Broken(MemoryLogger):
    """Cannot write what the callback has to say from one step on."""

    def __init__(self, error: Exception, from_step: int = 0) -> None:
        super().__init__()
        self.error, self.from_step = error, from_step

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step is not None and step >= self.from_step and any("plasticity" in name for name in metrics):
            raise self.error
        super().log_metrics(metrics, step)


class Logging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "OSError: [Errno 28] No space left on device"),
        (PermissionError(errno.EROFS, os.strerror(errno.EROFS)), "PermissionError: [Errno 30] Read-only file system"),
        (ConnectionError("no route to the tracking server"), "ConnectionError: no route to the tracking server"),
        (KeyError(), "KeyError"),
    ],
    ids=["full", "read-only", "offline", "bug"],
)
@pytest.mark.parametrize("from_step", [0, 2], ids=["from the start", "later"])
def test_a_logger_that_fails_leaves_the_others_and_training_alone(
    error: Exception, reason: str, from_step: int
) -> None:
    ends = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module, broken, sound = Logging(), Broken(error, from_step), MemoryLogger()
        callback = SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1, interventions=[Still()])
        one = trainer(*[callback] * with_callback, logger=[broken, sound])
        if with_callback:
            with pytest.warns(PlasticityWarning, match="Broken could not log the plasticity of the network"):
                one.fit(module, loader(batches=4))
        else:
            one.fit(module, loader(batches=4))
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert callback.history[0].errors == {"Broken": reason}
    assert list(sound.values("plasticity_training/feature_norm")) == [0, 1, 2, 3]
    assert list(sound.values("plasticity_training/Still/penalty")) == [0, 1, 2, 3]
    assert list(sound.values("plasticity_by_task/learnable_fraction")) == [0]
    assert list(broken.values("loss")) == list(sound.values("loss")) == [0, 1, 2, 3], "the user's own numbers are there"
    assert list(broken.values("plasticity_training/feature_norm")) == list(range(from_step))


class Still(Regularizer):
    """A term without any effect."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def penalty(self, model: nn.Module) -> Tensor:
        return self.coefficient * torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


def test_a_logger_without_a_directory_is_as_good_as_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger, callback = MemoryLogger(), SpectralCollapseCallback(collapse=NEVER)
    assert logger.save_dir is None
    trainer(callback, logger=logger).fit(Classifier(), loader())
    assert callback.history[0].errors == {}
    assert list(logger.values("plasticity/learnable_fraction")) == [0]
    assert list(tmp_path.iterdir()) == [], "nor does the callback make one"


def fill(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))  # no file may grow: as on a full disk


def forbid(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:  # whom no mode stops
        os.seteuid(65534)


def remove(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file where the directory was")


def two_tasks(folder: Path, happens: Callable[[Path], None]) -> tuple[bool, list[int], list[dict[str, str]]]:
    """Trains with and without the callback; between the tasks something happens to the directory of the loggers."""
    warnings.simplefilter("ignore")
    loggers = [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="table", flush_logs_every_n_steps=1)]
    callback = SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1)
    ends, steps = [], []
    for callbacks, options in (([], {}), ([callback], {"logger": loggers})):
        torch.manual_seed(0)
        module = Classifier()
        trainer(*callbacks, **options).fit(module, loader())
        if callbacks:
            happens(folder)
        one = trainer(*callbacks, **options)
        with contextlib.suppress(OSError):  # Lightning closes its loggers when training is over: beyond our reach
            one.fit(module, loader(seed=1))
        ends.append(weights(module))
        steps.append(one.global_step)
    return torch.equal(*ends), steps, [report.errors for report in callback.history]


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.1"),
    reason="before 2.5.1 CSVLogger writes hyperparameters anew when a fit begins, which ends it",
)
@pytest.mark.parametrize(
    ("happens", "reason"),
    [(fill, "File too large"), (forbid, "Permission denied"), (remove, "Not a directory")],
    ids=["full", "read-only", "gone"],
)
def test_files_that_cannot_be_written_are_told_of_and_training_goes_on(
    tmp_path: Path, happens: Callable[[Path], None], reason: str
) -> None:
    tmp_path.chmod(0o755)
    same, steps, (before, after) = in_another_process(two_tasks, tmp_path / "logs", happens)
    assert same
    assert steps == [3, 3]
    assert before == {}
    assert after.keys() == {"TensorBoardLogger", "CSVLogger"}
    assert all(reason in error for error in after.values())


class NoUnits(Classifier):
    """One layer: there is no unit that could be recycled, and no hidden feature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3))


class NotFinite(Still):
    def penalty(self, model: nn.Module) -> Tensor:
        return super().penalty(model) * math.nan


class Failing(Still):
    def penalty(self, model: nn.Module) -> Tensor:
        raise KeyError("encoder.weight")


class Number(Still):
    def penalty(self, model: nn.Module) -> Any:
        return super().penalty(model).item()


class Vector(Still):
    def penalty(self, model: nn.Module) -> Tensor:
        return torch.stack([parameter.square().sum() for parameter in model.parameters()])


class Counted(Reset):
    def repair(self, model: nn.Module, **_: Any) -> Any:
        return 5


@pytest.mark.filterwarnings("ignore:task 0. learnable fraction")  # the collapse that would be repaired
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interventions": [ShrinkPerturb(), Reset(layers=["encoder"])]}, "'encoder' matches no module"),
        ({"interventions": [ShrinkPerturb(), ContinualBackprop()]}, "ContinualBackprop: NoUnits has no units"),
        ({"interventions": [ShrinkPerturb(), SelfNormalizedReset()]}, "SelfNormalizedReset: NoUnits has no units"),
        ({"interventions": [ShrinkPerturb(), EffectiveRankRegularizer()]}, "there are no hidden features"),
        ({"interventions": [ShrinkPerturb(), L2ER()]}, "there are no hidden features"),
        ({"interventions": [ShrinkPerturb(), NotFinite()]}, "a gradient is not finite"),
        ({"interventions": [ShrinkPerturb(), Failing()]}, "encoder.weight"),
        ({"interventions": [ShrinkPerturb(), Number()]}, "Number.penalty must return a scalar tensor, not float"),
        ({"interventions": [Vector()]}, r"Vector.penalty must return a scalar tensor, not one of shape \(2,\)"),
        ({"interventions": [ShrinkPerturb(), Counted()]}, "Counted.repair must return a RepairReport, not int"),
        ({"interventions": [ShrinkPerturb()], "loss_fn": Sometimes(ValueError("no luck"), fails=True)}, "no luck"),
        (
            {"interventions": [ShrinkPerturb()], "monitor": PlasticityMonitor(layers=["encoder"])},
            "'encoder'. can match nothing in NoUnits",
        ),
    ],
)
def test_what_cannot_work_is_an_error_at_the_first_probe_before_any_weight_has_changed(
    arguments: dict[str, Any], message: str
) -> None:
    callback, module = SpectralCollapseCallback(**{"collapse": ALWAYS, **arguments}), NoUnits()
    before = weights(module)
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        trainer(callback).fit(module, loader())
    assert torch.equal(weights(module), before), "not even by the repair that could work"
    assert callback.history == []


class TwoNumbers:
    """No drift detector: takes two numbers."""

    drift_detected = False

    def update(self, x: Any, y: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:task 0. learnable fraction")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor_every_n_steps": 1}, r"monitor_every_n_steps: PlasticityMonitor cannot look into compiled modules"),
        ({"task_detector": TaskDetector(drift_detector=TwoNumbers())}, r"drift_detector=.* cannot take a number"),
    ],
)
def test_nor_has_anything_been_trained_repaired_or_logged(arguments: dict[str, Any], message: str) -> None:
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


def test_what_can_no_longer_work_is_told_of_at_a_later_task_and_training_goes_on() -> None:
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
    assert messages[0].startswith("ContinualBackprop could not get ready for this task and rests, training goes on: ")
    assert all("EffectiveRankRegularizer failed and changed nothing" in message for message in messages[1:])
    assert not torch.equal(weights(module), before)
    first, second = callback.history
    assert first.errors == {}
    assert second.errors.keys() == {"ContinualBackprop", "EffectiveRankRegularizer"}
    assert "has no units to recycle" in second.errors["ContinualBackprop"]
    assert second.spectrum is not None


class Flaky(Regularizer):
    """Adds nothing, and fails at one step."""

    calls = 0

    def penalty(self, model: nn.Module) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ArithmeticError("out of range")
        return 0.0 * torch.stack([parameter.sum() for parameter in model.parameters()]).sum()


def test_a_regularizer_that_fails_leaves_the_others_in_the_step() -> None:
    ends = []
    for others in ([], [Flaky(1.0)]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, interventions=[*others, L2Init(0.3)])
        said = "Flaky failed and was left out of this step, training goes on: out of range"
        with pytest.warns(PlasticityWarning, match=said) if others else contextlib.nullcontext():
            trainer(callback).fit(module, loader(batches=4))
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert callback.history[0].errors == {"Flaky": "ArithmeticError: out of range"}


@pytest.mark.parametrize("returned", [3, True, {"units": 1}], ids=["int", "bool", "dict"])
def test_a_running_remedy_that_returns_no_report_does_not_end_training(returned: object) -> None:
    class Wrong(StepIntervention):
        def after_step(self, *_: Any, **__: Any) -> Any:
            return returned

    ends = []
    for interventions in ([], [Wrong()]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        said = f"Wrong.after_step must return a RepairReport or None, not {type(returned).__name__}"
        with pytest.warns(PlasticityWarning, match=said) if interventions else contextlib.nullcontext():
            trainer(callback).fit(module, loader())
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert callback.history[0].errors == {"Wrong": f"TypeError: {said}"}


def test_a_running_remedy_that_cannot_be_called_is_refused() -> None:
    class Narrow(StepIntervention):
        def after_step(self, model: nn.Module, optimizers: Any) -> None: ...  # type: ignore[override]

    with pytest.raises(TypeError, match=r"Narrow.after_step\(model.* must take \(model, optimizers, \*, forw"):
        SpectralCollapseCallback(interventions=[Narrow()])


def test_regularizers_that_are_equal_or_without_a_hash_are_told_apart() -> None:
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

    ends = []
    for others in ([], [Term(0.0, fails=True)]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, interventions=[*others, Term()])
        with pytest.warns(PlasticityWarning, match="Term failed and was") if others else contextlib.nullcontext():
            trainer(callback).fit(module, loader(batches=4))
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_a_regularizer_of_what_is_frozen_adds_nothing_as_a_term_in_the_loss() -> None:
    class OfTheFirstLayer(Regularizer):
        def penalty(self, model: nn.Module) -> Tensor:
            return self.coefficient * model.net[0].weight.square().sum()

    ends = []
    for interventions in ([], [OfTheFirstLayer(1.0)]):
        torch.manual_seed(0)
        module = Classifier()
        module.net[0].requires_grad_(False)
        callback = SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        trainer(callback).fit(module, loader())
        ends.append(weights(module))
        assert callback.history[0].errors == {}
    assert torch.equal(*ends)


class Stuck(Still):
    def stop(self) -> None:
        raise RuntimeError("stuck")


@pytest.mark.parametrize("error", [None, KeyError("of the training")])
def test_what_cannot_be_stopped_neither_ends_training_nor_hides_why_it_ends(error: Exception | None) -> None:
    class Ending(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if error is not None:
                raise error

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Stuck(), L2Init(0.1)])
    expected = contextlib.nullcontext() if error is None else pytest.raises(KeyError, match="of the training")
    with expected, pytest.warns(PlasticityWarning, match="Stuck could not be stopped, training goes on: stuck"):
        trainer(callback).fit(Ending(), loader())
    assert callback.history[-1].errors == {"Stuck": "RuntimeError: stuck"}
