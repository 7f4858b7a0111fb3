"""Measure how well a number tells bad tasks from healthy ones.

AUC is the probability that the bad one of a bad and a healthy task has the higher number, "found" the share of bad
tasks above a threshold that at most 5 % of the healthy ones exceed, and rank correlation is Spearman's, with lack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.evidence.results import TaskOfRun

FALSE_ALARMS = 0.05
DRAWS = 200

Array = NDArray[Any]


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
