"""Hold every number against the truth: is the network worse than a fresh one on the task that the number precedes?

``lack`` is the online accuracy of the fresh network minus that of the network; in regressions the logarithm of the
ratio of the network's mean loss to the fresh one's. A task is *bad* if lack > 0.05 (regression: 0.2) and *healthy* if
lack < 0.02 (regression: 0). The first task of a run, whose network is the fresh one, does not count, nor do numbers of
single layers.

Every number is turned such that a high one means bad: numbers of ``DIAGNOSTICS`` as they say, others, which are losses,
as they are. AUC is the probability that the bad one of a bad and a healthy task has the higher number, "found" the
share of bad tasks above a threshold that at most 5 % of the healthy ones exceed, and rank correlation is Spearman's,
with lack.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from lightning_plasticity.diagnostics import DIAGNOSTICS

# The limits of lack for a bad and a healthy task.
LIMITS, LIMITS_OF_REGRESSION = (0.05, 0.02), (0.2, 0.0)
FALSE_ALARMS = 0.05
# What is no measure of health: the certainty of a number, and how it was measured.
NO_MEASURES = ("_resolved", "_lo", "_hi", "_standard_error", "probe_samples")
DRAWS = 200

Array = NDArray[Any]


@dataclass(frozen=True)
class TaskOfRun:
    """One task of a run.

    Args:
        stream: Name of the stream.
        method: Name of the method.
        seed: Seed of the run.
        task: Number of the task, from 0.
        lack: How much worse than the fresh network the network would do without a repair at the start of the task.
        lack_repaired: The same of the network as it was trained.
        regression: Whether the stream is a regression.
        collapsed: The default verdict.
        scores: The numbers, each turned such that a high one means bad.
        accuracy: The online accuracy, or loss in regressions, of the network as it was trained.
        seconds: Time in the callback, mean over the tasks of the run.
    """

    stream: str
    method: str
    seed: int
    task: int
    lack: float
    regression: bool = False
    collapsed: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    lack_repaired: float = math.nan
    accuracy: float = math.nan
    seconds: float = math.nan

    @property
    def bad(self) -> bool:
        """Whether a fresh network learns the task better."""
        return self.lack > (LIMITS_OF_REGRESSION if self.regression else LIMITS)[0]

    @property
    def healthy(self) -> bool:
        """Whether a fresh network learns the task no better, or hardly."""
        return self.lack < (LIMITS_OF_REGRESSION if self.regression else LIMITS)[1]


def read_tasks(directory: Path) -> list[TaskOfRun]:
    """Return all tasks of all runs in a directory but the first of each run.

    Raises:
        FileNotFoundError: If it holds none.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{directory} holds no runs: write them with --small --out {directory}")
    return [task for path in paths for task in tasks_of(json.loads(path.read_text()))]


def tasks_of(run: dict[str, Any]) -> list[TaskOfRun]:
    """Return the tasks of a run but the first."""
    regression = run["regression"]
    measured = [each["metrics"] for each in run["tasks"]]
    return [
        TaskOfRun(
            *(run["stream"], run["method"], run["seed"], number),
            lack=lack_of(each["unrepaired"], each["fresh"], regression),
            lack_repaired=lack_of(each["network"], each["fresh"], regression),
            regression=regression,
            collapsed=each["collapsed"],
            scores=scores(measured[: number + 1]),
            accuracy=each["network"]["loss" if regression else "accuracy"],
            seconds=run["seconds_in_callback"] / len(measured),
        )
        for number, each in enumerate(run["tasks"])
        if number
    ]


def lack_of(network: dict[str, float], fresh: dict[str, float], regression: bool) -> float:
    """Return how much worse than the fresh network another did; a diverged one is infinitely worse."""
    lack = math.log(network["loss"] / fresh["loss"]) if regression else float(fresh["accuracy"] - network["accuracy"])
    return math.inf if math.isnan(lack) else lack


def scores(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the numbers of the last task, and each as a ratio to its best so far; high ones mean bad."""
    turned = {}
    for name, value in measured[-1].items():
        if "/" in name or name.endswith(NO_MEASURES):
            continue
        number = name.removesuffix("_vs_initial")
        high_is_good = number in DIAGNOSTICS and DIAGNOSTICS[number].higher_is_better
        turned[name] = -value if high_is_good else value
        if name == number and (number not in DIAGNOSTICS or not DIAGNOSTICS[number].can_be_negative):
            so_far = [metrics[name] for metrics in measured if not math.isnan(metrics.get(name, math.nan))]
            best = (max if high_is_good else min)(so_far, default=math.nan)
            ratio = value / best if best else (0.0 if high_is_good else math.inf * value if value else 1.0)
            turned[f"{name} / best"] = -ratio if high_is_good else ratio
    return turned


def auc(score: Array, bad: Array, healthy: Array) -> float:
    """Return the probability that the bad one of a bad and a healthy task has the higher score, ties counting half.

    Args:
        score: The score of each task.
        bad: How often each task counts as a bad one, such as True or False.
        healthy: How often it counts as a healthy one.

    Returns:
        Σ_s B(s) [H(<s) + H(s) / 2] / (Σ B · Σ H), with B(s) and H(s) the numbers of bad and healthy tasks of score s;
        NaN without either kind.

    Example:
        >>> auc(np.array([3.0, 1.0, 0.0, 1.0]), np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1]))
        0.875
    """
    if not bad.any() or not healthy.any():
        return math.nan
    _, level = np.unique(score, return_inverse=True)
    return auc_of_levels(level, bad, healthy)


def auc_of_levels(level: NDArray[np.intp], bad: Array, healthy: Array) -> float:
    """Return the AUC of scores that are given by their place in the order of all scores, from 0."""
    bad_at, healthy_at = np.bincount(level, bad), np.bincount(level, healthy)
    with np.errstate(invalid="ignore"):
        pairs = bad_at @ (np.cumsum(healthy_at) - healthy_at / 2)
        return float(pairs / (bad_at.sum() * healthy_at.sum()))


def found(bad: Array, healthy: Array, false_alarms: float = FALSE_ALARMS) -> float:
    """Return the share of the bad above a threshold that at most this share of the healthy exceed.

    Example:
        >>> found(np.array([1.0, 30.0, 40.0]), np.arange(20.0), 0.05)
        0.6666666666666666
    """
    if not len(bad) or not len(healthy):
        return math.nan
    threshold = np.sort(healthy)[-1 - math.floor(false_alarms * len(healthy))]
    return float((bad > threshold).mean())


def rank_correlation(scores: Array, lack: Array) -> float:
    """Return Spearman's rank correlation; NaN if one of them is constant.

    Example:
        >>> rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.3, 0.2]))
        0.5
    """
    if len(scores) < 3 or np.ptp(rankdata(scores)) == 0 or np.ptp(rankdata(lack)) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(scores), rankdata(lack))[0, 1].round(12))


@dataclass(frozen=True)
class Told:
    """How well one number tells, on some tasks.

    Args:
        tasks: Number of tasks that have it.
        auc: AUC.
        interval: Its 95 % interval; ``None`` if there is only one seed of each stream.
        found: Share of the bad tasks found.
        correlation: Rank correlation with lack, the mean over streams.
        by_stream: AUC and rank correlation of each stream.
    """

    tasks: int
    auc: float
    interval: tuple[float, float] | None
    found: float
    correlation: float
    by_stream: dict[str, tuple[float, float]]


def told(tasks: Iterable[TaskOfRun], name: str) -> Told:
    """Return how well a number tells."""
    known = [task for task in tasks if not math.isnan(task.scores.get(name, math.nan))]
    score, lack = np.array([task.scores[name] for task in known]), np.array([task.lack for task in known])
    bad, healthy = np.array([task.bad for task in known], bool), np.array([task.healthy for task in known], bool)
    stream = np.array([task.stream for task in known])
    by_stream = {
        each: (auc(score[at], bad[at], healthy[at]), rank_correlation(score[at], lack[at]))
        for each in dict.fromkeys(stream.tolist())
        for at in [stream == each]
    }
    correlations = [correlation for _, correlation in by_stream.values() if not math.isnan(correlation)]
    return Told(
        len(known),
        auc(score, bad, healthy),
        interval(score, bad, healthy, [(task.stream, task.seed) for task in known]),
        found(score[bad], score[healthy]),
        float(np.mean(correlations)) if correlations else math.nan,
        by_stream,
    )


def interval(score: Array, bad: Array, healthy: Array, seeds: Sequence[tuple[str, int]]) -> tuple[float, float] | None:
    """Return the 95 % interval of the AUC by a bootstrap over the seeds of each stream.

    Args:
        score: The score of each task.
        bad: Whether each task is bad.
        healthy: Whether it is healthy.
        seeds: Stream and seed of each task. In each draw a stream has as many seeds as it has, chosen with replacement.

    Returns:
        The ends; ``None`` with one seed of each stream, or without either kind of tasks.
    """
    places = {seed: place for place, seed in enumerate(dict.fromkeys(seeds))}
    streams = [[place for (of, _), place in places.items() if of == stream] for stream in {of for of, _ in places}]
    if len(places) == len(streams):
        return None
    rng, place = np.random.default_rng(0), np.array([places[seed] for seed in seeds])
    _, level = np.unique(score, return_inverse=True)
    times, drawn = np.zeros(len(places)), []
    for _ in range(DRAWS):
        for of_stream in streams:
            times[of_stream] = rng.multinomial(len(of_stream), [1 / len(of_stream)] * len(of_stream))
        drawn.append(auc_of_levels(level, bad * times[place], healthy * times[place]))
    known = [value for value in drawn if not math.isnan(value)]
    if not known:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


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
