"""What fails in one of two processes alone is done in neither, told of by the first, and in the reports of both."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plasticity import (
    Collapse,
    GGNProbe,
    PlasticityMonitor,
    PlasticityWarning,
    SpectralCollapseCallback,
    TaskDetector,
)
from lightning_plasticity.distributed import agreement as processes
from lightning_plasticity.engine import context as probe_context
from lightning_plasticity.engine import intervention_runner, monitoring, regularizer_gradients
from lightning_plasticity.interventions import (
    ContinualBackprop,
    EffectiveRankRegularizer,
    Intervention,
    ReDo,
    Regularizer,
    ShrinkPerturb,
    SpectralRegularizer,
    StepIntervention,
    effective_rank,
)
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.units.layer_statistics import UnitStatistics
from lightning_plasticity.interventions.weights import updates
from lightning_plasticity.training import sandbox
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_two_processes

FITS, STEPS = 3, 4


class InPlace(StepIntervention):
    """Changes one tensor after the other, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, model: nn.Module, context: InterventionContext) -> None:
        for parameter in model.parameters():
            self.shrink(parameter)
        self.steps += 1

    def shrink(self, parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.mul_(0.9**self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Forgetful(InPlace):
    """Fails half way, and then cannot say where it was."""

    def shrink(self, parameter: Tensor) -> None:
        if self.steps == 3:
            raise ArithmeticError("half way")
        super().shrink(parameter)


class CopiedByItself(SpectralRegularizer):
    """Says by itself how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Regularizer:
        return SpectralRegularizer(self.coefficient)


class Detecting:
    """Sees no drift, watching the mean of the inputs."""

    drift_detected = False

    def update(self, x: float) -> None:
        pass

    def statistic(self, batch: Any) -> float:
        return float(batch[0].mean())


class Counting(Detecting):
    """Sees a drift in every fifth number."""

    numbers = 0

    def update(self, x: float) -> None:
        self.numbers += 1

    @property
    def drift_detected(self) -> bool:  # type: ignore[override]
        return self.numbers % 5 == 0


class Keys:
    """Names the tasks of one fit after the other."""

    def __init__(self) -> None:
        self.batches = 0

    def every_other_step(self, *_: object) -> int:
        self.batches += 1
        return self.batches // 2


class Unsendable:
    def __reduce__(self) -> str:
        raise TypeError("not to be sent")


@contextmanager
def failing(owner: Any, name: str, number: int, after: bool = False) -> Iterator[None]:
    """In the second process, the ``number``-th call of a function fails: at its beginning or ``after`` its work."""
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        fails = calls == number and os.environ["LOCAL_RANK"] == "1"
        result = function(*args, **kwargs) if after or not fails else None
        if fails:
            raise MemoryError("no more")
        return result

    with patch.object(owner, name, wrapper):
        yield


def fit(*interventions: Intervention, detector: TaskDetector | None = None) -> dict[str, Any]:
    """Some fits in one of two processes. The second process logs too."""
    torch.manual_seed(0)
    net, logger = Classifier(), MemoryLogger()
    callback = SpectralCollapseCallback(
        GGNProbe(samples=6),
        collapse=Collapse(below=1e-9),
        interventions=interventions,
        task_detector=detector,
        monitor_every_n_steps=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(FITS):
            strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
            data = DataLoader(loader(batches=2 * STEPS, seed=number).dataset, batch_size=4)
            trainer(callback, strategy=strategy, devices=2, logger=logger).fit(net, data)
    return {
        "weights": weights(net),
        "history": str([report.to_dict() for report in callback.history]),
        "errors": [report.errors for report in callback.history],
        "probed": [report.spectrum is not None for report in callback.history],
        "repairs": [[repair.name for repair in report.repairs] for report in callback.history],
        "state": str(callback.state_dict()["interventions"]),
        "warnings": [str(w.message) for w in caught if issubclass(w.category, PlasticityWarning)],
    }


def shrink() -> Intervention:
    return ShrinkPerturb(when="task")


def replace_units() -> Intervention:
    return ContinualBackprop(0.5, 0)


def raise_ranks() -> Intervention:
    return EffectiveRankRegularizer(0.1, every_n_samples=8)


@dataclass(frozen=True)
class Case:
    """Which call of what fails in the second process, in fits with which remedy, and who is said to have failed."""

    fails: tuple[Any, ...]
    remedy: Callable[[], Intervention] | None = None
    who: str | None = None
    detector: Callable[[], TaskDetector] | None = None

    def fit(self) -> dict[str, Any]:
        with failing(*self.fails):
            remedies = [] if self.remedy is None else [self.remedy()]
            return fit(*remedies, detector=None if self.detector is None else self.detector())


def watch_inputs() -> TaskDetector:
    return TaskDetector(drift_detector=(detecting := Detecting()), drift_statistic=detecting.statistic)


CASES = {
    "working a repair out": Case((ShrinkPerturb, "plan", 2), shrink, "ShrinkPerturb"),
    "applying a repair": Case((updates, "reset_state", 1, True), shrink, "ShrinkPerturb"),
    "before a sum": Case((ReDo, "scores", 2), lambda: ReDo(0.9, when="task"), "ReDo"),
    "the copy for a repair": Case((sandbox, "copy_module", 3), lambda: ReDo(0.9, when=3), "ReDo"),
    "hearing activity": Case((UnitStatistics, "reduce", 3), replace_units, "ContinualBackprop"),
    "replacing units": Case((updates, "reset_state", 3), replace_units, "ContinualBackprop"),
    "getting ready": Case((ContinualBackprop, "prepare", 2), replace_units, "ContinualBackprop"),
    "half way in place": Case((InPlace, "shrink", 14), InPlace, "InPlace"),
    "features": Case((effective_rank, "_mean_rank", 2), raise_ranks, "EffectiveRankRegularizer"),
    "a batch that waits": Case((effective_rank, "_bind_closure", 1), raise_ranks, "EffectiveRankRegularizer"),
    "a penalty": Case((regularizer_gradients, "differentiate_penalty", 4), SpectralRegularizer, "SpectralRegularizer"),
    "its gradient": Case(
        (regularizer_gradients, "differentiate_penalty", 4, True), SpectralRegularizer, "SpectralRegularizer"
    ),
    "the probe": Case((GGNProbe, "measure", 2), lambda: ReDo(0.9, when="task"), "probe"),
    "the end of the probe": Case((GGNProbe, "measure", 3, True), None, "probe"),
    "the monitor of the probe": Case((monitoring, "probe_mode", 2), None, "monitor"),
    "the monitor in flight": Case((PlasticityMonitor, "attach", 6, True), None, "monitor"),
    "what the monitor has seen": Case((monitoring, "values_of", 6), None, "monitor"),
    "a logger": Case((MemoryLogger, "log_metrics", 12), None, "MemoryLogger"),
    "a statistic": Case((Detecting, "statistic", 6), None, "task_detector", watch_inputs),
    "joining batches": Case((probe_context, "all_gather_batch", 2)),
    "copying a regularizer": Case((CopiedByItself, "__deepcopy__", 1), CopiedByItself),
}

DETECTORS = {
    "losses": Case((Counting, "update", 6), detector=lambda: TaskDetector(drift_detector=Counting())),
    "statistic": Case(
        (Counting, "update", 6),
        detector=lambda: TaskDetector(drift_detector=(counting := Counting()), drift_statistic=counting.statistic),
    ),
    "key": Case((Keys, "every_other_step", 2 * STEPS, True), detector=lambda: TaskDetector(Keys().every_other_step)),
}

FIRST = {
    "probe": Case((GGNProbe, "measure", 1), replace_units),
    "key": Case((Keys, "every_other_step", 1), detector=lambda: TaskDetector(Keys().every_other_step)),
    "remedy": Case((ContinualBackprop, "prepare", 1), replace_units),
    "trial of a regularizer": Case((intervention_runner, "differentiate_penalty", 1), SpectralRegularizer),
}


def in_process(rank: int) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512", WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
    results: dict[str, Any] = {name: case.fit() for name, case in CASES.items()}
    results |= {f"detector of {name}": case.fit() for name, case in DETECTORS.items()}
    results["no failure"], results["no failure, repaired"] = fit(), fit(shrink())
    results |= {f"first {what}": error_of(case.fit) for what, case in FIRST.items()}
    results["state after a failure"] = error_of(Case((Forgetful, "state_dict", 1), Forgetful).fit)
    results["unsendable"] = error_of(lambda: sent_together(Unsendable() if rank else None))
    results["another sum"] = error_of(lambda: summed_together("other" if rank else "net"))
    results["a sum less"] = error_of(lambda: summed_together("net", *["more"] * (1 - rank)))
    return results


def summed_together(*names: str) -> None:
    """As where a model takes another path in each process."""
    with processes.all_or_none():
        for name in names:
            processes.all_reduce_sum(torch.ones(2), name)


def sent_together(value: object) -> None:
    with processes.all_or_none():
        processes.all_gather_object(value)


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises(Exception, match="no") as caught:
        work()
    return f"{caught.type.__name__}: {caught.value}"


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Any]]:
    one, other = in_two_processes(in_process)
    return {name: [one[name], other[name]] for name in one}


@pytest.mark.parametrize("name", CASES)
def test_both_end_with_the_same_weights_reports_and_states(name: str, runs: dict[str, list[Any]]) -> None:
    one, other = runs[name]
    assert torch.equal(one["weights"], other["weights"])
    assert one["history"] == other["history"]
    assert one["state"] == other["state"]
    assert len(one["errors"]) == FITS


@pytest.mark.parametrize(("name", "who"), [(name, case.who) for name, case in CASES.items() if case.who])
def test_the_first_tells_of_what_failed_in_the_second(name: str, who: str, runs: dict[str, list[Any]]) -> None:
    ((culprit, words),) = [error for errors in runs[name][0]["errors"] for error in errors.items()]
    assert culprit == who
    assert words.startswith("in process 1: MemoryError: no more")
    (warning,) = runs[name][0]["warnings"]
    assert words in warning


def test_a_repair_that_fails_in_one_is_done_in_neither(runs: dict[str, list[Any]]) -> None:
    assert [run["repairs"] for run in runs["no failure, repaired"]] == [[[], ["ShrinkPerturb"], ["ShrinkPerturb"]]] * 2
    for name in ("working a repair out", "applying a repair"):
        assert [run["repairs"] for run in runs[name]] == [[[], [], ["ShrinkPerturb"]]] * 2, "the next one is done again"
    assert torch.equal(runs["working a repair out"][0]["weights"], runs["applying a repair"][0]["weights"])
    assert [run["repairs"] for run in runs["before a sum"]] == [[[], [], ["ReDo"]]] * 2
    assert [run["repairs"] for run in runs["the copy for a repair"]] == [[[], ["ReDo"], ["ReDo", "ReDo"]]] * 2


def test_a_probe_that_fails_in_one_has_seen_nothing(runs: dict[str, list[Any]]) -> None:
    for name in ("the probe", "the end of the probe"):
        assert [run["probed"] for run in runs[name]] == [[True, False, True]] * 2
    assert [run["repairs"] for run in runs["the probe"]] == [[[], ["ReDo"], ["ReDo"]]] * 2, "it was not on a collapse"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.remedy is None])
def test_training_goes_on_as_if_nothing_had_failed(name: str, runs: dict[str, list[Any]]) -> None:
    assert runs["no failure"][0]["errors"] == [{}] * FITS
    assert torch.equal(runs[name][0]["weights"], runs["no failure"][0]["weights"])


@pytest.mark.parametrize("name", DETECTORS)
def test_tasks_begin_in_both_although_a_detector_has_failed_in_one(name: str, runs: dict[str, list[Any]]) -> None:
    one, other = runs[f"detector of {name}"]
    assert torch.equal(one["weights"], other["weights"])
    assert one["history"] == other["history"]
    assert len(one["errors"]) > FITS
    (error,) = [words for errors in one["errors"] for words in errors.values()]
    assert error == "in process 1: MemoryError: no more"


@pytest.mark.parametrize("what", FIRST)
def test_what_fails_at_first_is_an_error_in_both(what: str, runs: dict[str, list[Any]]) -> None:
    assert runs[f"first {what}"] == ["PeerFailedError: in process 1: MemoryError: no more", "MemoryError: no more"]


def test_not_to_know_what_another_remembers_is_an_error_in_both(runs: dict[str, list[Any]]) -> None:
    assert runs["state after a failure"] == ["PeerFailedError: in process 1: MemoryError: no more"] * 2


def test_what_cannot_be_sent_is_an_error_in_both(runs: dict[str, list[Any]]) -> None:
    assert runs["unsendable"] == ["PeerFailedError: in process 1: TypeError: not to be sent"] * 2


def test_not_to_do_the_same_is_an_error_in_both(runs: dict[str, list[Any]]) -> None:
    differ = "PeerFailedError: the processes do not do the same, but come to a sum of "
    assert runs["another sum"] == [f"{differ}net of shape (2,) and a sum of other of shape (2,)"] * 2
    assert runs["a sum less"] == [f"{differ}more of shape (2,) and the end"] * 2


def survive_what_can_be_survived() -> None:
    with suppress(Exception), processes.all_or_none():
        pass


def test_not_to_know_of_the_others_is_not_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(processes.CommunicationError, match="cannot reach each other: connection closed by peer"):
        survive_what_can_be_survived()


def test_a_single_process_has_its_errors_as_they_are() -> None:
    with pytest.raises(KeyError), processes.all_or_none():
        raise KeyError
