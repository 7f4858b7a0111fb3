"""Write the results of runs as tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.evidence.ranking import FALSE_ALARMS, Told, rank_correlation, told
from benchmarks.evidence.results import TaskOfRun

# Streams on whose tasks no alarm is right.
ALIKE = ("same-digits", "label-swap", "slow-drift")
# Methods that measure something else than the default verdict.
OTHER_MEASUREMENTS = ("live", "hessian")
SHOWN_BY_STREAM = (
    *("handicap", "fit_loss_vs_initial", "fit_gap", "learnable_fraction_1000", "learnable_fraction / best"),
    *("remaining_residual_vs_initial", "ntk_effective_rank / best", "epsilon_rank / best", "dormant_fraction"),
)
MOST_NUMBERS = 15


def trained(tasks: Iterable[TaskOfRun]) -> list[TaskOfRun]:
    """Return the tasks of all methods, each once: other measurements train the same network again."""
    return [task for task in tasks if task.method not in OTHER_MEASUREMENTS]


def verdicts(tasks: Iterable[TaskOfRun], *, repaired: bool = True) -> list[TaskOfRun]:
    """Return the tasks with a default verdict, of all methods or only of runs without an intervention."""
    return [task for task in trained(tasks) if task.scores and (repaired or task.method == "none")]


def by_stream(tasks: Iterable[TaskOfRun]) -> dict[str, list[TaskOfRun]]:
    """Return the tasks of each stream."""
    streams: dict[str, list[TaskOfRun]] = {}
    for task in tasks:
        streams.setdefault(task.stream, []).append(task)
    return streams


def ringing(tasks: Sequence[TaskOfRun]) -> float:
    """Return the share of the tasks at which the alarm rings; NaN without tasks."""
    return float(np.mean([task.collapsed for task in tasks])) if tasks else math.nan


def tables(tasks: Sequence[TaskOfRun]) -> str:
    """Return the tables of the default verdict and of the numbers as Markdown."""
    numbers = numbers_by_auc(verdicts(tasks))
    return "\n\n".join(
        [
            table_of_goals(tasks),
            table_of_verdicts(verdicts(tasks, repaired=False)),
            table_of_numbers(numbers),
            table_by_stream(numbers),
            table_of_methods(trained(tasks)),
        ]
    )


FIRST_NEW_SEED = 3
"""The seeds from here on have served for no choice of the rule."""


def table_of_goals(tasks: Sequence[TaskOfRun]) -> str:
    """Return the goals and results of the verdict: without an intervention, on new seeds of it, with all methods."""
    live = [task for task in tasks if task.method == "live"]
    columns, plain = [], verdicts(tasks, repaired=False)
    for group in (plain, [task for task in plain if task.seed >= FIRST_NEW_SEED], verdicts(tasks)):
        handicap = told(group, "handicap")
        of_streams = [area for area, _ in handicap.by_stream.values() if not math.isnan(area)]
        columns.append(
            [
                f"{handicap.auc:.3f}",
                f"{min(of_streams, default=math.nan):.3f}",
                percent(ringing([task for task in group if task.healthy])),
                percent(ringing([task for task in group if task.bad])),
                f"{sum(task.collapsed for task in group if task.stream in ALIKE)} of "
                f"{sum(task.stream in ALIKE for task in group)}",
            ]
        )
    rows = [
        ("AUC of the handicap, all streams", "at least .95"),
        ("the same, lowest of the streams that have both kinds", "at least .85"),
        ("healthy tasks that ring", "at most 3 %"),
        ("bad tasks that ring", "at least 80 %"),
        (f"alarms on {', '.join(ALIKE)}", "none"),
    ]
    lines = ["| | goal | no intervention | of these the new seeds | all methods |", "|---|---|---|---|---|"]
    lines += [
        f"| {what} | {goal} | {' | '.join(column[i] for column in columns)} |" for i, (what, goal) in enumerate(rows)
    ]
    for what, name, goal in (
        ("a logged accuracy", "live_metric_gap", "at least .98"),
        ("the loss", "handicap", "at least .95"),
    ):
        lines.append(f"| AUC of the live fit test by {what} | {goal} | {told(live, name).auc:.3f} | | |")
    return "\n".join(lines)


def numbers_by_auc(tasks: Sequence[TaskOfRun]) -> dict[str, Told]:
    """Return how well each number tells, the best first."""
    names = dict.fromkeys(name for task in tasks for name in task.scores)
    all_told = {name: told(tasks, name) for name in names}
    return dict(sorted(all_told.items(), key=lambda item: -np.nan_to_num(item[1].auc, nan=-1.0)))


def table_of_numbers(numbers: Mapping[str, Told]) -> str:
    """Return how well each number tells on all tasks."""
    lines = [
        f"| number at the task's start | AUC | interval | found at {FALSE_ALARMS:.0%} | rank correlation | tasks |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in numbers.items():
        cells = f"{decimal(each.auc)} | {between(each.interval)} | {decimal(each.found)} | {decimal(each.correlation)}"
        lines.append(f"| {name} | {cells} | {each.tasks} |")
    return "\n".join(lines)


def table_by_stream(numbers: Mapping[str, Told]) -> str:
    """Return AUC and rank correlation of some numbers on each stream."""
    shown = [name for name in SHOWN_BY_STREAM if name in numbers]
    streams = list(dict.fromkeys(stream for name in shown for stream in numbers[name].by_stream))
    lines = [f"| stream | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for stream in streams:
        cells = [" ".join(map(decimal, numbers[name].by_stream.get(stream, (math.nan,) * 2))) for name in shown]
        lines.append(f"| {stream} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_intervals(tasks: Sequence[TaskOfRun], name: str) -> str:
    """Return AUC and rank correlation of a number on each stream, with intervals over seeds."""
    lines = [f"| stream | AUC of {name} | interval | rank correlation | of each seed |", "|---|---|---|---|---|"]
    for stream, group in by_stream(tasks).items():
        each = told(group, name)
        of_seeds = []
        for seed in sorted({task.seed for task in group}):
            known = [task for task in group if task.seed == seed and name in task.scores]
            scores, lack = (np.array(values) for values in zip(*((t.scores[name], t.lack) for t in known), strict=True))
            of_seeds.append(rank_correlation(scores, lack))
        cells = f"{decimal(each.auc)} | {between(each.interval)} | {decimal(each.correlation)}"
        lines.append(f"| {stream} | {cells} | {', '.join(map(decimal, of_seeds))} |")
    return "\n".join(lines)


def table_of_verdicts(tasks: Sequence[TaskOfRun]) -> str:
    """Return the alarms on each stream."""
    lines = [
        "| stream | tasks | bad | of these ring | healthy | of these ring | between | of these ring | lead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stream, group in (by_stream(tasks) | {"all": list(tasks)}).items():
        cells = []
        for kind in (
            [task for task in group if task.bad],
            [task for task in group if task.healthy],
            [task for task in group if not task.bad and not task.healthy],
        ):
            cells += [str(len(kind)), decimal(ringing(kind))]
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


def table_of_live(tasks: Sequence[TaskOfRun]) -> str:
    """Return how well the live fit test tells on each stream."""
    names = ("live_metric_gap", "handicap")
    lines = [
        "| stream | tasks | AUC by accuracy | AUC by loss | bad | of these ring | healthy | of these ring |",
        "|---" * 8 + "|",
    ]
    for stream, group in (by_stream(tasks) | {"all": list(tasks)}).items():
        areas = " | ".join(decimal(told(group, name).auc) for name in names)
        kinds = [[task for task in group if task.bad], [task for task in group if task.healthy]]
        rings = " | ".join(f"{len(kind)} | {decimal(ringing(kind))}" for kind in kinds)
        lines.append(f"| {stream} | {len(group)} | {areas} | {rings} |")
    return "\n".join(lines)


def last_tenth(tasks: Sequence[TaskOfRun]) -> list[TaskOfRun]:
    """Return the last tenth of the tasks of runs of equal length, at least one of each."""
    count = max(task.task for task in tasks)
    return [task for task in tasks if task.task > count - max(count // 10, 1)]


def first_tenth(tasks: Sequence[TaskOfRun]) -> list[TaskOfRun]:
    """Return the first tenth of the tasks, at least one of each run, without the first task."""
    return [task for task in tasks if task.task <= max(max(task.task for task in tasks) // 10, 1)]


def outcomes(tasks: Sequence[TaskOfRun]) -> dict[tuple[str, str], list[TaskOfRun]]:
    """Return the tasks of each pair of a method and a stream."""
    pairs: dict[tuple[str, str], list[TaskOfRun]] = {}
    for task in tasks:
        pairs.setdefault((task.method, task.stream), []).append(task)
    return pairs


def lack_at_end(tasks: Sequence[TaskOfRun]) -> float:
    """Return the mean lack of the networks, repairs included, on the last tenth of the tasks."""
    return float(np.mean([task.lack_repaired for task in last_tenth(tasks)]))


def change(tasks: Sequence[TaskOfRun]) -> float:
    """Return how much better the last tenth was learned than the first; regressions by the logarithm of the loss."""
    first, last = (np.array([task.accuracy for task in part(tasks)]) for part in (first_tenth, last_tenth))
    return float(np.log(first.mean() / last.mean()) if tasks[0].regression else last.mean() - first.mean())


def methods_by_lack(tasks: Sequence[TaskOfRun]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Return methods, the best ones first, streams, and the lack at the end of each pair that was run."""
    lacks = {pair: lack_at_end(of_pair) for pair, of_pair in outcomes(tasks).items()}
    streams = list(dict.fromkeys(stream for _, stream in lacks))
    plain = {stream: lacks.get(("none", stream), math.nan) for stream in streams}

    def order(method: str) -> float:
        # Beside no intervention on the same streams, since not all methods have run on all of them.
        gains = [lacks[method, s] - plain[s] for s in streams if (method, s) in lacks and not math.isnan(plain[s])]
        return float(np.mean(np.clip(gains, -1, 1))) if gains else math.inf

    return sorted(dict.fromkeys(method for method, _ in lacks), key=order), streams, lacks


def table_of_methods(tasks: Sequence[TaskOfRun]) -> str:
    """Return the lack of each method at the end of each stream, the change since the beginning, and the cost."""
    methods, streams, lacks = methods_by_lack(tasks)
    pairs = outcomes(tasks)
    lines = [f"| method | {' | '.join(streams)} | seconds |", "|---" * (len(streams) + 2) + "|"]
    for method in methods:
        cells = [
            f"{decimal(lacks[method, stream])} ({decimal(change(pairs[method, stream]))})"
            if (method, stream) in lacks
            else ""
            for stream in streams
        ]
        seconds = np.mean([task.seconds for task in tasks if task.method == method])
        lines.append(f"| {method} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


def table_of_hessian(tasks: Sequence[TaskOfRun]) -> str:
    """Return how the rank of the Hessian precedes bad tasks, beside the handicap."""
    names = sorted({name for task in tasks for name in task.scores if "@" in name and "/" not in name})
    lines = [
        "| stream | number | AUC | rank correlation | first task below half of the best | first bad task |",
        "|---" * 6 + "|",
    ]
    for stream, group in by_stream(tasks).items():
        bad = min((task.task for task in group if task.bad), default=None)
        for name in (*names, "hessian_effective_rank", "handicap"):
            each = told(group, name)
            fallen = [task.task for task in group if task.scores.get(f"{name} / best", -1.0) > -0.5]
            first = "" if name == "handicap" else min(fallen, default="never")
            shown = f"{decimal(each.auc)} | {decimal(each.correlation)} | {first} | {'never' if bad is None else bad}"
            lines.append(f"| {stream} | {name} | {shown} |")
    return "\n".join(lines)


def between(interval: tuple[float, float] | None) -> str:
    """Return an interval in words."""
    return "–" if interval is None else " to ".join(map(decimal, interval))


def percent(value: float) -> str:
    """Return a share in percent, with a decimal, and a dash for what is not known."""
    return "–" if math.isnan(value) else f"{100 * value:.1f} %"


def decimal(value: float) -> str:
    """Return two decimals without a leading zero, and a dash for what is not known."""
    if math.isnan(value):
        return "–"
    # Adding 0 turns -0 into 0.
    shown = f"{round(value, 2) + 0.0:.2f}"
    return shown.replace("0.", ".", 1) if shown.lstrip("-").startswith("0.") else shown
