"""Arrange the reports of all tasks in a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from lightning_plasticity.reporting.names import COMPARED, counts, lead_diagnostics
from lightning_plasticity.reports import TaskReport

Row = dict[str, float | str]
"""What is known of a task, by the names of columns."""


def task_rows(history: Sequence[TaskReport], watched: str) -> list[Row]:
    """Return a row for each task: its numbers and those of a fresh network, the verdict, and what was repaired.

    ``alarms`` and ``repairs`` count up to the start of the next task. Numbers that were not measured are left out.

    Args:
        history: The reports of all tasks.
        watched: The diagnostic that raises the alarm.

    Example:
        >>> first = TaskReport(0, None, 0, metrics={"handicap": 1.0}, fresh={"fit_loss": 0.7})
        >>> second = TaskReport(1, "cats", 600, metrics={"handicap": 2.31}, collapsed=True, verdict="task 1: too high")
        >>> for row in task_rows([first, second], "handicap"):
        ...     print(row)
        {'task': 0, 'task_id': '', 'step': 0, 'collapsed': 0.0, 'handicap': 1.0, 'fresh_fit_loss': 0.7,
         'alarms': 0.0, 'repairs': 0.0, 'verdict': '', 'repaired_by': '', 'effect': ''}
        {'task': 1, 'task_id': 'cats', 'step': 600, 'collapsed': 1.0, 'handicap': 2.31,
         'alarms': 1.0, 'repairs': 0.0, 'verdict': 'task 1: too high', 'repaired_by': '', 'effect': ''}
    """
    names = dict.fromkeys([*lead_diagnostics(watched), "fit_loss"])
    so_far = {"alarms": 0.0, "repairs": 0.0}
    rows: list[Row] = []
    for report in history:
        so_far = {name: so_far[name] + number for name, number in counts([report]).items()}
        row: Row = {
            "task": report.task,
            "task_id": "" if report.task_id is None else str(report.task_id),
            "step": report.step,
            "collapsed": float(report.collapsed),
        }
        row |= {name: report.metrics[name] for name in names if name in report.metrics}
        row |= {f"fresh_{name}": report.fresh[name] for name in COMPARED if name in report.fresh}
        row |= so_far
        row |= {"verdict": report.verdict, "repaired_by": "; ".join(map(str, report.repairs)), "effect": report.effect}
        rows.append(row)
    return rows


def columns_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names of all columns, in the order of the row that has most of them.

    Example:
        >>> columns_of([{"task": 0, "step": 0}, {"task": 1, "handicap": 1.0, "step": 9}])
        ['task', 'handicap', 'step']
    """
    fullest: Mapping[str, object] = max(rows, key=len, default={})
    return list(dict.fromkeys([*fullest, *(name for row in rows for name in row)]))


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a table as comma-separated values, with a header; what a row lacks is empty.

    Example:
        >>> to_csv([{"task": 0, "step": 0}, {"task": 1, "handicap": 1.5, "step": 9}]).splitlines()
        ['task,handicap,step', '0,,0', '1,1.5,9']
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
