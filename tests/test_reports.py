"""Reports and histories print as a line a task."""

import torch

from lightning_plasticity import TaskReport
from lightning_plasticity.interventions import RepairReport
from lightning_plasticity.reporting.history import History
from tests.helpers.modules import NEVER, Classifier, loader, trainer


def test_report_prints_as_one_line() -> None:
    report = TaskReport(task=3, task_id=None, step=600, metrics={"learnable_fraction": 0.2134}, collapsed=True)
    report.repairs = [
        RepairReport("ReDo", {"fc1": torch.arange(56), "fc2": torch.arange(29)}, 900),
        RepairReport("ShrinkPerturb", {}, 8970),
    ]
    report.errors = {"CSVLogger": "OSError: disk full"}
    assert repr(report) == (
        "TaskReport(task=3, step=600, learnable_fraction=0.213, collapsed, "
        "repairs=[ReDo: 85 units, ShrinkPerturb: 8970 parameters], errors=['CSVLogger'])"
    )


def test_history_prints_a_line_a_task() -> None:
    from lightning_plasticity import SpectralCollapseCallback

    module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER)
    for _ in range(3):
        trainer(callback).fit(module, loader())
    lines = repr(callback.history).splitlines()
    assert len(lines) == len(callback.history) == 3
    assert all(line.startswith(f"TaskReport(task={task}, step=") for task, line in enumerate(lines))
    assert all(len(line) < 200 for line in lines)


def test_history_is_a_list() -> None:
    assert History() == []
    assert repr(History()) == "no task yet"
