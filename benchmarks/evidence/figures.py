"""Draw the results of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from benchmarks.evidence.ranking import Told
from benchmarks.evidence.results import TaskOfRun
from benchmarks.evidence.table import (
    MOST_NUMBERS,
    by_stream,
    decimal,
    methods_by_lack,
    numbers_by_auc,
    trained,
    verdicts,
)

# Streams that are long enough to see a course.
DRAWN = (
    *("random-labels", "permuted-digits", "permuted-mnist", "class-pairs", "class-pairs-zero-head", "bit-flipping"),
    *("same-digits", "texts", "pendulum"),
)
NETWORK, FRESH, ALARM = "tab:blue", "tab:gray", "tab:red"


def draw(tasks: Sequence[TaskOfRun], directory: Path) -> None:
    """Write all figures as ``evidence-*.png``."""
    directory.mkdir(exist_ok=True)
    figures = {
        "courses": courses(verdicts(tasks, repaired=False)),
        "methods": heat_map(trained(tasks)),
        "numbers": areas(numbers_by_auc(verdicts(tasks))),
    }
    for name, figure in figures.items():
        figure.savefig(directory / f"evidence-{name}.png", dpi=110)


def courses(tasks: Sequence[TaskOfRun]) -> Figure:
    """Return the performance of the network and of the fresh one on each stream, with the alarms, of one seed."""
    first = min(task.seed for task in tasks)
    streams = {name: group for name, group in by_stream(tasks).items() if name in DRAWN}
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(3, 3).flat
    for ax, name in zip(axes, (name for name in DRAWN if name in streams), strict=False):
        group = [task for task in streams[name] if task.seed == first]
        numbers = [task.task for task in group]
        for values, colour, label in (
            ([task.fresh for task in group], FRESH, "fresh network"),
            ([task.accuracy for task in group], NETWORK, "network"),
        ):
            ax.plot(numbers, values, color=colour, label=label)
        ringing = [task for task in group if task.collapsed]
        ax.plot(
            *([task.task for task in ringing], [task.accuracy for task in ringing]),
            *("o",),
            color=ALARM,
            markersize=4,
            label="alarm at the start of the task",
        )
        ax.set_title(name, fontsize=10)
        ax.set_ylabel(performance(group[0]), fontsize=8)
        ax.set_xlabel("task", fontsize=8)
        ax.tick_params(labelsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for ax in figure.axes:
        ax.set_visible(ax.has_data())
    return figure


def performance(task: TaskOfRun) -> str:
    """Return what is plotted of a task."""
    return "online loss" if task.regression else "mean reward" if task.stream == "pendulum" else "online accuracy"


def heat_map(tasks: Sequence[TaskOfRun]) -> Figure:
    """Return the lack of each method at the end of each stream."""
    methods, streams, lacks = methods_by_lack(tasks)
    table = np.array([[lacks.get((method, stream), math.nan) for stream in streams] for method in methods])
    figure = Figure(figsize=(11, 1.8 + 0.26 * len(methods)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(table, cmap="RdBu_r", norm=TwoSlopeNorm(0, -0.5, 0.5), aspect="auto")
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        shown, colour = "" if math.isnan(value) else decimal(value), "white" if abs(value) > 0.3 else "black"
        ax.text(column, row, shown, ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(len(streams)), streams, rotation=35, ha="right", fontsize=8)
    ax.set_yticks(range(len(methods)), methods, fontsize=8)
    figure.colorbar(image, ax=ax, extend="both", label="a fresh network is better by", fraction=0.03)
    return figure


def areas(numbers: dict[str, Told]) -> Figure:
    """Return the AUC of the best numbers, with intervals."""
    names = list(numbers)[:MOST_NUMBERS][::-1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for place, name in enumerate(names):
        low, high = numbers[name].interval or (numbers[name].auc,) * 2
        ax.plot([low, high], [place] * 2, color=NETWORK, linewidth=3)
        ax.plot(numbers[name].auc, place, "o", color=NETWORK)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlim(0.5, 1.0)
    ax.set_xlabel("AUC, and its 95 % interval over seeds")
    ax.grid(axis="x", alpha=0.3)
    return figure
