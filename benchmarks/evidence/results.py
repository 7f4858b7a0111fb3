"""Read the tasks of runs: how much worse than a fresh network each one was, and the numbers that preceded it.

``lack`` is the online accuracy of the fresh network minus that of the network; in regressions the logarithm of the
ratio of the network's mean loss to the fresh one's. A task is *bad* if lack > 0.05 (regression: 0.2) and *healthy* if
lack < 0.02 (regression: 0). The first task of a run, whose network is the fresh one, does not count, nor do numbers of
single layers.

Every number is turned such that a high one means bad: numbers of ``DIAGNOSTICS`` as they say, others, which are losses,
as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_plasticity.diagnostics import DIAGNOSTICS

# The limits of lack for a bad and a healthy task.
LIMITS, LIMITS_OF_REGRESSION = (0.05, 0.02), (0.2, 0.0)
# What is no measure of health: the certainty of a number, and how it was measured.
NO_MEASURES = ("_resolved", "_lo", "_hi", "_standard_error", "probe_samples")


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
        fresh: The same of the fresh network.
        repairs: Number of repairs at the start of the task.
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
    fresh: float = math.nan
    repairs: int = 0
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
    outcome = "loss" if regression else "accuracy"
    # Without a fit test, nothing but dormant units was measured.
    measured = [each["metrics"] if "handicap" in each["metrics"] else {} for each in run["tasks"]]
    return [
        TaskOfRun(
            *(run["stream"], run["method"], run["seed"], number),
            lack=lack_of(each["unrepaired"], each["fresh"], regression),
            lack_repaired=lack_of(each["network"], each["fresh"], regression),
            regression=regression,
            collapsed=each["collapsed"],
            scores=scores(measured[: number + 1]),
            accuracy=each["network"][outcome],
            fresh=each["fresh"][outcome],
            repairs=len(each["repairs"]),
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
        # A rank at another threshold is named such as hessian_epsilon_rank@0.1.
        diagnostic = DIAGNOSTICS.get(number.partition("@")[0])
        high_is_good = diagnostic is not None and diagnostic.higher_is_better
        turned[name] = -value if high_is_good else value
        if name == number and (diagnostic is None or not diagnostic.can_be_negative):
            so_far = [metrics[name] for metrics in measured if not math.isnan(metrics.get(name, math.nan))]
            best = (max if high_is_good else min)(so_far, default=math.nan)
            ratio = value / best if best else (0.0 if high_is_good else math.inf * value if value else 1.0)
            turned[f"{name} / best"] = -ratio if high_is_good else ratio
    return turned
