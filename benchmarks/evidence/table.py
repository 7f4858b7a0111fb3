"""Write the results of runs as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.evidence.ranking import FALSE_ALARMS, Told, told
from benchmarks.evidence.results import TaskOfRun


def tables(tasks: Sequence[TaskOfRun]) -> str:
    """Return all tables as Markdown."""
    numbers = numbers_by_auc(tasks)
    return "\n\n".join(
        [
            table_of_verdicts(tasks),
            table_of_numbers(tasks, numbers),
            table_by_stream(numbers),
            table_of_methods(tasks),
        ]
    )


def numbers_by_auc(tasks: Sequence[TaskOfRun]) -> dict[str, Told]:
    """Return how well each number tells, the best first."""
    names = dict.fromkeys(name for task in tasks for name in task.scores)
    all_told = {name: told(tasks, name) for name in names}
    return dict(sorted(all_told.items(), key=lambda item: -np.nan_to_num(item[1].auc, nan=-1.0)))


def table_of_numbers(tasks: Sequence[TaskOfRun], numbers: dict[str, Told]) -> str:
    """Return how well each number tells on all tasks."""
    bad, healthy = sum(task.bad for task in tasks), sum(task.healthy for task in tasks)
    lines = [
        f"{len(tasks)} tasks of {len({task.stream for task in tasks})} streams, {bad} bad and {healthy} healthy ones. "
        "Interval: 95 %, over seeds.",
        "",
        f"| number at the task's start | AUC | interval | found at {FALSE_ALARMS:.0%} | rank correlation | tasks |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in numbers.items():
        shown = "–" if each.interval is None else " to ".join(map(decimal, each.interval))
        cells = f"{decimal(each.auc)} | {shown} | {decimal(each.found)} | {decimal(each.correlation)}"
        lines.append(f"| {name} | {cells} | {each.tasks} |")
    return "\n".join(lines)


def table_by_stream(numbers: dict[str, Told]) -> str:
    """Return AUC and rank correlation of each number on each stream."""
    streams = list(dict.fromkeys(stream for each in numbers.values() for stream in each.by_stream))
    lines = [
        "AUC and rank correlation by stream; there is no AUC where all tasks are of one kind.",
        "",
        f"| number | {' | '.join(streams)} |",
        "|---" * (len(streams) + 1) + "|",
    ]
    for name, each in numbers.items():
        cells = [" ".join(map(decimal, each.by_stream.get(stream, (math.nan,) * 2))) for stream in streams]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_verdicts(tasks: Sequence[TaskOfRun]) -> str:
    """Return the alarms of the default verdict on each stream."""
    lines = [
        "Alarms of the default verdict: of the bad tasks, of the healthy ones, and of those between. Lead: the number "
        "of tasks from the first alarm of a run to its first bad task, the median of the runs that have one.",
        "",
        "| stream | tasks | bad | of these ring | healthy | of these ring | between | of these ring | lead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    streams = list(dict.fromkeys(task.stream for task in tasks))
    groups = {stream: [task for task in tasks if task.stream == stream] for stream in streams} | {"all": list(tasks)}
    for stream, group in groups.items():
        cells = []
        for kind in (
            [task for task in group if task.bad],
            [task for task in group if task.healthy],
            [task for task in group if not task.bad and not task.healthy],
        ):
            ringing = float(np.mean([task.collapsed for task in kind])) if kind else math.nan
            cells += [str(len(kind)), decimal(ringing)]
        leads = lead_times(group)
        cells.append("–" if not leads else "never" if np.median(leads) == -math.inf else f"{np.median(leads):g}")
        lines.append(f"| {stream} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lead_times(tasks: Iterable[TaskOfRun]) -> list[float]:
    """Return by how many tasks the first alarm precedes the first bad task in each run that has one; −inf for never."""
    runs: dict[tuple[str, str, int], list[TaskOfRun]] = {}
    for task in tasks:
        runs.setdefault((task.stream, task.method, task.seed), []).append(task)
    return [
        min(task.task for task in run if task.bad)
        - min((task.task for task in run if task.collapsed), default=math.inf)
        for run in runs.values()
        if any(task.bad for task in run)
    ]


def table_of_methods(tasks: Sequence[TaskOfRun]) -> str:
    """Return how each method does on each stream at the beginning and the end, and beside a fresh network."""
    lines = [
        "Methods: mean online accuracy (regressions: loss) of the first and the last tenth of the tasks, lack of the "
        "last tenth, and seconds of CPU time in the callback a task.",
        "",
        "| stream | method | first tenth | last tenth | lack | seconds |",
        "|---|---|---|---|---|---|",
    ]
    runs: dict[tuple[str, str], list[TaskOfRun]] = {}
    for task in tasks:
        runs.setdefault((task.stream, task.method), []).append(task)
    for (stream, method), of_method in runs.items():
        count = max(task.task for task in of_method)
        tenth = max(count // 10, 1)
        first = [task for task in of_method if task.task <= tenth]
        last = [task for task in of_method if task.task > count - tenth]
        cells = [
            f"{np.mean([task.accuracy for task in first]):.3g}",
            f"{np.mean([task.accuracy for task in last]):.3g}",
            f"{np.mean([task.lack_repaired for task in last]):.3f}",
            f"{np.mean([task.seconds for task in of_method]):.2f}",
        ]
        lines.append(f"| {stream} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def decimal(value: float) -> str:
    """Return two decimals without a leading zero, and a dash for what is not known."""
    if math.isnan(value):
        return "–"
    # Adding 0 turns -0 into 0.
    shown = f"{round(value, 2) + 0.0:.2f}"
    return shown.replace("0.", ".", 1) if shown.lstrip("-").startswith("0.") else shown
