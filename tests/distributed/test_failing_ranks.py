"""Tests of failures on one of two ranks.

The failed work is undone on both ranks, rank 0 warns of it, and the reports of both hold it.
"""

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
from lightning_plasticity import context as probe_context
from lightning_plasticity.distributed import agreement
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
    """Shrinks one tensor after the other, by a factor that depends on the number of steps."""

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


class FailingHalfway(InPlace):
    """Raises in its fourth step."""

    def shrink(self, parameter: Tensor) -> None:
        if self.steps == 3:
            raise ArithmeticError("halfway")
        super().shrink(parameter)


class WithDeepcopy(SpectralRegularizer):
    """Implements its own ``__deepcopy__``."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Regularizer:
        return SpectralRegularizer(self.coefficient)


class NeverDrifting:
    """A drift detector that never detects a drift, with the mean of the inputs as its statistic."""

    drift_detected = False

    def update(self, x: float) -> None:
        pass

    def statistic(self, batch: Any) -> float:
        return float(batch[0].mean())


class DriftingPeriodically(NeverDrifting):
    """A drift detector that detects a drift at every fifth number."""

    numbers = 0

    def update(self, x: float) -> None:
        self.numbers += 1

    @property
    def drift_detected(self) -> bool:  # type: ignore[override]
        return self.numbers % 5 == 0


class TaskKeys:
    """Counts batches; every second one starts a task."""

    def __init__(self) -> None:
        self.batches = 0

    def every_other_step(self, *_: object) -> int:
        self.batches += 1
        return self.batches // 2


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("cannot pickle this")


@contextmanager
def failing(owner: Any, name: str, number: int, after: bool = False) -> Iterator[None]:
    """Let the ``number``-th call of a function on rank 1 fail, before or ``after`` its work."""
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
    """Run a few fits on one of two ranks. Rank 1 has a logger too."""
    torch.manual_seed(0)
    net, logger = Classifier(), MemoryLogger()
    callback = SpectralCollapseCallback(
        GGNProbe(samples=6),
        collapse=Collapse(above=1e9),
        interventions=interventions,
        task_detector=detector,
        monitor_every_n_steps=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(FITS):
            strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False)
            data = DataLoader(loader(batches=2 * STEPS, size=4, seed=number).dataset, batch_size=4)
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
    """A call that fails on rank 1.

    Args:
        call: The arguments of :func:`failing`.
        intervention: Makes the intervention of the fits.
        source: The key of the error in reports.
        detector: Makes the task detector of the fits.
    """

    call: tuple[Any, ...]
    intervention: Callable[[], Intervention] | None = None
    source: str | None = None
    detector: Callable[[], TaskDetector] | None = None

    def fit(self) -> dict[str, Any]:
        with failing(*self.call):
            interventions = [] if self.intervention is None else [self.intervention()]
            return fit(*interventions, detector=None if self.detector is None else self.detector())


def monitor_inputs(drift_detector: NeverDrifting) -> TaskDetector:
    return TaskDetector(drift_detector=drift_detector, drift_statistic=drift_detector.statistic)


CASES = {
    "computing a repair": Case((ShrinkPerturb, "plan", 2), shrink, "ShrinkPerturb"),
    "applying a repair": Case((updates, "reset_state", 1, True), shrink, "ShrinkPerturb"),
    "before an all-reduce": Case((ReDo, "scores", 2), lambda: ReDo(0.9, when="task"), "ReDo"),
    "copying the module for a repair": Case((sandbox, "copy_module", 3), lambda: ReDo(0.9, when=3), "ReDo"),
    "reducing unit statistics": Case((UnitStatistics, "reduce", 3), replace_units, "ContinualBackprop"),
    "replacing units": Case((updates, "reset_state", 3), replace_units, "ContinualBackprop"),
    "starting an intervention": Case((ContinualBackprop, "prepare", 2), replace_units, "ContinualBackprop"),
    "halfway through an in-place change": Case((InPlace, "shrink", 14), InPlace, "InPlace"),
    "rank of features": Case((effective_rank, "_mean_rank", 2), raise_ranks, "EffectiveRankRegularizer"),
    "storing a batch": Case((effective_rank, "bind_closure", 1), raise_ranks, "EffectiveRankRegularizer"),
    "before a penalty": Case(
        (regularizer_gradients, "differentiate_penalty", 4), SpectralRegularizer, "SpectralRegularizer"
    ),
    "after its gradient": Case(
        (regularizer_gradients, "differentiate_penalty", 4, True), SpectralRegularizer, "SpectralRegularizer"
    ),
    "start of the probe": Case((GGNProbe, "measure", 2), lambda: ReDo(0.9, when="task"), "probe"),
    "end of the probe": Case((GGNProbe, "measure", 3, True), None, "probe"),
    "monitor of the probe": Case((monitoring, "probe_mode", 2), None, "monitor"),
    "monitor during training": Case((PlasticityMonitor, "attach", 6, True), None, "monitor"),
    "values of the monitor": Case((monitoring, "values_of", 6), None, "monitor"),
    "a logger": Case((MemoryLogger, "log_metrics", 12), None, "MemoryLogger"),
    "a drift statistic": Case(
        (NeverDrifting, "statistic", 6), None, "task_detector", lambda: monitor_inputs(NeverDrifting())
    ),
    "gathering batches": Case((probe_context, "all_gather_batch", 2)),
    "copying a regularizer": Case((WithDeepcopy, "__deepcopy__", 1), WithDeepcopy),
}

DETECTORS = {
    "losses": Case(
        (DriftingPeriodically, "update", 6), detector=lambda: TaskDetector(drift_detector=DriftingPeriodically())
    ),
    "statistic": Case(
        (DriftingPeriodically, "update", 6),
        detector=lambda: monitor_inputs(DriftingPeriodically()),
    ),
    "key": Case(
        (TaskKeys, "every_other_step", 2 * STEPS, True), detector=lambda: TaskDetector(TaskKeys().every_other_step)
    ),
}

FIRST_TASK = {
    "probe": Case((GGNProbe, "measure", 1), replace_units),
    "key": Case((TaskKeys, "every_other_step", 1), detector=lambda: TaskDetector(TaskKeys().every_other_step)),
    "intervention": Case((ContinualBackprop, "prepare", 1), replace_units),
    "trial of a regularizer": Case((intervention_runner, "differentiate_penalty", 1), SpectralRegularizer),
}


def run_all(rank: int) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512", WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
    results: dict[str, Any] = {name: case.fit() for name, case in CASES.items()}
    results |= {f"detector: {name}": case.fit() for name, case in DETECTORS.items()}
    results["no failure"], results["no failure, repaired"] = fit(), fit(shrink())
    results |= {f"first task: {name}": error_of(case.fit) for name, case in FIRST_TASK.items()}
    results["state after a failure"] = error_of(Case((FailingHalfway, "state_dict", 1), FailingHalfway).fit)
    results["unpicklable"] = error_of(lambda: gather_in_block(Unpicklable() if rank else None))
    results["another sum"] = error_of(lambda: sum_in_block("other" if rank else "net"))
    results["a missing sum"] = error_of(lambda: sum_in_block("net", *["more"] * (1 - rank)))
    return results


def sum_in_block(*names: str) -> None:
    """Sum one tensor per name; the names differ if a model takes another path on each rank."""
    with agreement.all_or_none():
        for name in names:
            agreement.all_reduce_sum(torch.ones(2), name)


def gather_in_block(value: object) -> None:
    with agreement.all_or_none():
        agreement.all_gather_object(value)


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises(Exception, match=r"no more|cannot pickle|different") as caught:
        work()
    return f"{caught.type.__name__}: {caught.value}"


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Any]]:
    one, other = in_two_processes(run_all)
    return {name: [one[name], other[name]] for name in one}


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_weights_and_reports(name: str, runs: dict[str, list[Any]]) -> None:
    one, other = runs[name]
    assert torch.equal(one["weights"], other["weights"])
    assert one["history"] == other["history"]
    assert one["state"] == other["state"]
    assert len(one["errors"]) == FITS


@pytest.mark.parametrize(("name", "source"), [(name, case.source) for name, case in CASES.items() if case.source])
def test_rank_0_reports_the_error_of_rank_1(name: str, source: str, runs: dict[str, list[Any]]) -> None:
    ((reported_source, message),) = [error for errors in runs[name][0]["errors"] for error in errors.items()]
    assert reported_source == source
    assert message.startswith("on rank 1: MemoryError: no more")
    assert sum(message in warning for warning in runs[name][0]["warnings"]) == 1


def test_repair_that_fails_on_one_rank_is_done_on_neither(runs: dict[str, list[Any]]) -> None:
    assert [run["repairs"] for run in runs["no failure, repaired"]] == [[[], ["ShrinkPerturb"], ["ShrinkPerturb"]]] * 2
    for name in ("computing a repair", "applying a repair"):
        assert [run["repairs"] for run in runs[name]] == [[[], [], ["ShrinkPerturb"]]] * 2, (
            "the repair of the next task succeeds"
        )
    assert torch.equal(runs["computing a repair"][0]["weights"], runs["applying a repair"][0]["weights"])
    assert [run["repairs"] for run in runs["before an all-reduce"]] == [[[], [], ["ReDo"]]] * 2
    assert [run["repairs"] for run in runs["copying the module for a repair"]] == [[[], ["ReDo"], ["ReDo", "ReDo"]]] * 2


def test_probe_that_fails_on_one_rank_has_no_spectrum(runs: dict[str, list[Any]]) -> None:
    for name in ("start of the probe", "end of the probe"):
        assert [run["probed"] for run in runs[name]] == [[True, False, True]] * 2
    assert [run["repairs"] for run in runs["start of the probe"]] == [[[], ["ReDo"], ["ReDo"]]] * 2, "at every task"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.intervention is None])
def test_failed_measurement_leaves_training_unchanged(name: str, runs: dict[str, list[Any]]) -> None:
    assert runs["no failure"][0]["errors"] == [{}] * FITS
    assert torch.equal(runs[name][0]["weights"], runs["no failure"][0]["weights"])


@pytest.mark.parametrize("name", DETECTORS)
def test_tasks_agree_although_a_detector_failed_on_one_rank(name: str, runs: dict[str, list[Any]]) -> None:
    one, other = runs[f"detector: {name}"]
    assert torch.equal(one["weights"], other["weights"])
    assert one["history"] == other["history"]
    assert len(one["errors"]) > FITS
    (error,) = [message for errors in one["errors"] for message in errors.values()]
    assert error == "on rank 1: MemoryError: no more"


@pytest.mark.parametrize("name", FIRST_TASK)
def test_failure_at_the_first_task_raises_on_both_ranks(name: str, runs: dict[str, list[Any]]) -> None:
    expected = ["PeerFailedError: on rank 1: MemoryError: no more", "MemoryError: no more"]
    assert runs[f"first task: {name}"] == expected


def test_state_that_cannot_be_synchronised_raises_on_both_ranks(runs: dict[str, list[Any]]) -> None:
    """After a failed step, ranks take over the state of rank 0; here ``state_dict`` fails too."""
    assert runs["state after a failure"] == ["PeerFailedError: on rank 1: MemoryError: no more"] * 2


def test_unpicklable_object_raises_on_both_ranks(runs: dict[str, list[Any]]) -> None:
    assert runs["unpicklable"] == ["PeerFailedError: on rank 1: TypeError: cannot pickle this"] * 2


def test_different_synchronisation_points_raise_on_both_ranks(runs: dict[str, list[Any]]) -> None:
    beginning = "PeerFailedError: ranks reached different synchronisation points: a sum of "
    assert runs["another sum"] == [f"{beginning}net of shape (2,) and a sum of other of shape (2,)"] * 2
    assert runs["a missing sum"] == [f"{beginning}more of shape (2,) and the end"] * 2


def suppress_exceptions() -> None:
    with suppress(Exception), agreement.all_or_none():
        pass


def test_communication_errors_are_not_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(agreement, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "all_reduce", broken)
    with pytest.raises(agreement.CommunicationError, match="cannot reach each other: connection closed by peer"):
        suppress_exceptions()


def test_errors_pass_unchanged_without_a_process_group() -> None:
    with pytest.raises(KeyError), agreement.all_or_none():
        raise KeyError
