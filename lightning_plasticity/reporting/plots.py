"""Pictures of a history of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.diagnostics import DIAGNOSTICS, EPSILON, MATRIX_TITLES
from lightning_plasticity.reports import TaskReport

LOG_EIGENVALUE_EDGES = torch.linspace(-8.0, 4.0, 61, dtype=torch.float64)
"""Bins of log10 of an eigenvalue; what lies outside is counted in the first or last bin."""

_RIDGES = 50
"""More could not be told apart, and would make the picture of a long history slow to draw."""


def log_eigenvalues(spectrum: Spectrum, *, negative: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """log10 of the sizes of eigenvalues, between the ends of the bins, and how many eigenvalues each stands for.

    An exact Gauss-Newton spectrum has one entry for the eigenvalues that are zero because the Gram matrix has fewer
    rows than there are parameters, which is left out.

    Args:
        spectrum: The spectrum.
        negative: Of the negative eigenvalues, rather than of those that are not.

    Returns:
        Two tensors of shape ``(k,)``.
    """
    values, weights = spectrum.undeflated
    counts = spectrum.num_parameters * weights
    chosen = (values < 0) == negative
    if spectrum.exact:
        chosen &= counts < 1.5
    low, high = LOG_EIGENVALUE_EDGES[0].item(), LOG_EIGENVALUE_EDGES[-1].item()
    return values[chosen].abs().clamp(min=10.0**low).log10().clamp(low, high), counts[chosen]


def plot_history(history: Sequence[TaskReport]) -> Figure:
    """The spectrum at the start of every task as a ridge plot, and a curve of what matters most beside it.

    Heights are numbers of eigenvalues; of an estimate, their logarithms, since nearly all eigenvalues are in the bulk.
    Of a long history every so many tasks have a ridge, the last one among them.

    Args:
        history: The reports of a run, one a task.

    Returns:
        A figure that belongs to nobody: not to pyplot's list of figures.
    """
    figure = Figure(figsize=(9, 4.5))
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.92, wspace=0.2)  # an automatic layout draws twice
    ridges, curve = figure.subplots(1, 2)
    probed = [report for report in history if report.spectrum is not None]
    every = -(-len(probed) // _RIDGES) or 1
    _draw_ridges(ridges, probed[::-every][::-1])
    _draw_curve(curve, probed)
    return figure


def _draw_ridges(axes: Axes, probed: Sequence[TaskReport]) -> None:
    edges = LOG_EIGENVALUE_EDGES.numpy()
    centers = (edges[1:] + edges[:-1]) / 2
    for negative in (False, True):
        counts = {report.task: _heights(report, negative=negative) for report in probed}
        if negative and not any(count.any() for count in counts.values()):
            continue
        # Ridges are three tasks high at most, whatever lies in the first bin: in a collapse nearly everything does.
        tallest = max((count[1:].max() for count in counts.values()), default=0) or 1
        label = "negative eigenvalues, by their size" if negative else None
        for report in reversed(probed):
            outline = report.task + 3.0 * np.minimum(counts[report.task] / tallest, 1)
            color = "tab:orange" if negative else "tab:red" if report.collapsed else "tab:blue"
            style: dict[str, Any] = {"color": color, "zorder": -report.task}
            axes.fill_between(centers, report.task, outline, alpha=0.1 if negative else 0.35, linewidth=0, **style)
            axes.plot(centers, outline, linewidth=0.8, linestyle="--" if negative else "-", label=label, **style)
            label = None
    axes.axvline(np.log10(EPSILON), color="black", linestyle=":", linewidth=0.8, label=f"ε = {EPSILON:g}")
    matrices = " or ".join(dict.fromkeys(MATRIX_TITLES[report.matrix] for report in probed))
    axes.set(xlabel=f"log10 eigenvalue of the {matrices}", ylabel="task")
    axes.set_title("spectrum at task start", y=1.0)  # a place of its own: looking for a free one takes time
    axes.legend(loc="upper right")
    axes.yaxis.set_major_locator(_whole_tasks())


def _whole_tasks() -> MaxNLocator:
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _heights(report: TaskReport, *, negative: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    assert report.spectrum is not None
    values, counts = log_eigenvalues(report.spectrum, negative=negative)
    heights: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = torch.histogram(
        values, LOG_EIGENVALUE_EDGES, weight=counts
    ).hist.numpy()
    return heights if report.spectrum.exact else np.log10(1 + heights)


def _draw_curve(axes: Axes, probed: Sequence[TaskReport]) -> None:
    """The first diagnostic of the table that was measured."""
    name = next((name for name in DIAGNOSTICS if any(name in report.metrics for report in probed)), None)
    if name is None:
        return
    tasks = [report.task for report in probed]
    values = {report.task: report.metrics.get(name, float("nan")) for report in probed}
    relative = [report.metrics.get(f"{name}_vs_initial", float("nan")) for report in probed]
    axes.plot(tasks, list(values.values()), "o-", markersize=3, label="the network")
    if DIAGNOSTICS[name].is_fraction:  # of the same size
        axes.plot(tasks, relative, "--", color="gray", label="relative to its initial weights")
    alarms = [report.task for report in probed if report.collapsed]
    axes.plot(alarms, [values[task] for task in alarms], "rv", label="collapse")
    axes.set(xlabel="task", ylabel=DIAGNOSTICS[name].title, ylim=(0, None))
    axes.set_title("can it still learn?", y=1.0)
    axes.legend(loc="lower left")
    axes.xaxis.set_major_locator(_whole_tasks())
