"""Test that a failing task detector is an error at the first batch, and only a warning later."""

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, TaskDetector
from tests.helpers.faults import NaNLossClassifier
from tests.helpers.modules import NEVER, Classifier, loader, trainer, weights


def test_drift_detector_receives_no_nan_losses() -> None:
    class RecordingDetector:
        drift_detected = False

        def __init__(self) -> None:
            self.losses: list[float] = []

        def update(self, x: float) -> None:
            self.losses.append(x)

    detector = RecordingDetector()
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=TaskDetector(drift_detector=detector))
    trainer(callback).fit(NaNLossClassifier(), loader(batches=6))
    assert len(detector.losses) == 2
    assert all(map(math.isfinite, detector.losses))


class LimitedCalls:
    """A drift detector, drift statistic and task key that raises after a number of calls."""

    drift_detected = False

    def __init__(self, calls_left: int) -> None:
        self.calls_left = calls_left

    def update(self, x: Any) -> None:
        self.call()

    def call(self, *_: Any) -> int:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise ZeroDivisionError("no more")
        return 7


def make_detectors(calls: int) -> dict[str, TaskDetector]:
    """Return task detectors of all kinds that fail after ``calls`` calls."""
    failing, lasting = LimitedCalls(calls), LimitedCalls(99)
    return {
        "detector of the loss": TaskDetector(drift_detector=failing),
        "detector of the inputs": TaskDetector(drift_detector=failing, drift_statistic=lasting.call),
        "statistic": TaskDetector(drift_detector=lasting, drift_statistic=failing.call),
        "task key": TaskDetector(task_key=failing.call),
    }


@pytest.mark.parametrize("kind", make_detectors(0))
def test_later_task_detector_failure_only_warns(kind: str) -> None:
    results = []
    for detector in (make_detectors(2)[kind], make_detectors(99)[kind]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, task_detector=detector)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callback).fit(module, loader(batches=4))
        assert module.trainer.global_step == 4
        (report,) = callback.history
        messages = [str(w.message) for w in caught if issubclass(w.category, PlasticityWarning)]
        results.append((weights(module), report.errors, messages))
    (failing_weights, errors, messages), (lasting_weights, no_errors, no_messages) = results
    assert torch.equal(failing_weights, lasting_weights)
    assert errors == {"task_detector": "ZeroDivisionError: no more"}
    assert messages == ["new tasks could not be detected, training goes on: no more"] * 2
    assert (no_errors, no_messages) == ({}, [])


def test_later_task_id_failure_only_warns() -> None:
    class FailingTaskId(Classifier):
        @property
        def task_id(self) -> int:
            if self.trainer.global_step == 2:
                raise MisconfigurationException("not known now")
            return 0

    callback = SpectralCollapseCallback(collapse=NEVER)
    with pytest.warns(PlasticityWarning, match="new tasks could not be detected.*not known now"):
        trainer(callback).fit(FailingTaskId(), loader(batches=4))
    assert [report.errors for report in callback.history] == [
        {"task_detector": "MisconfigurationException: not known now"}
    ]


@pytest.mark.parametrize("kind", make_detectors(0))
def test_task_detector_failure_at_the_first_batch_is_an_error(kind: str) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, task_detector=make_detectors(0)[kind])
    with pytest.raises((ZeroDivisionError, MisconfigurationException), match="no more"):
        trainer(callback).fit(Classifier(), loader(batches=4))
