"""Plot the spectra and the first diagnostic of all tasks."""

from __future__ import annotations

import math
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
"""Bin edges for log10 of an eigenvalue. Values outside are counted in the first or the last bin."""

_MAX_RIDGES = 50
"""Maximum number of ridges: more could not be distinguished, and would make the figure slow to draw."""


def log_eigenvalues(spectrum: Spectrum, *, negative: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log10 of the magnitudes of the eigenvalues, clamped to the range of the bins, and their multiplicities.

    Args:
        spectrum: The spectrum.
        negative: Select the negative eigenvalues instead of the others.

    Returns:
        Logarithms and multiplicities, both of shape ``(k,)``.
    """
    values, weights = spectrum.undeflated
    counts = spectrum.num_parameters * weights
    selected = (values < 0) == negative
    if spectrum.exact:
        # One entry stands for all eigenvalues that are zero because the Gram matrix has fewer rows than there are
        # parameters. It is left out, because it would dwarf the others.
        selected &= counts < 1.5
    low, high = LOG_EIGENVALUE_EDGES[0].item(), LOG_EIGENVALUE_EDGES[-1].item()
    return values[selected].abs().clamp(min=10.0**low).log10().clamp(low, high), counts[selected]


def plot_history(history: Sequence[TaskReport]) -> Figure:
    """Plot the spectra at the start of the tasks as ridges, and the first diagnostic beside them as a curve.

    The height of a ridge is the number of eigenvalues in a bin, or its logarithm if the spectrum is an estimate, since
    nearly all eigenvalues are in the bulk. In a long history only every n-th task has a ridge, the last one included.
    Without any spectrum, there are no ridges.

    Args:
        history: The reports of a run, one per task.

    Returns:
        A figure that is not registered with pyplot, so it need not be closed.
    """
    figure = Figure(figsize=(9, 4.5))
    # An automatic layout would draw the figure twice.
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.12, top=0.92, wspace=0.2)
    with_spectrum = [report for report in history if report.spectrum is not None]
    axes = figure.subplots(1, 2 if with_spectrum else 1, squeeze=False)[0]
    if with_spectrum:
        stride = math.ceil(len(with_spectrum) / _MAX_RIDGES)
        # The slice starts from the end, so that the last task has a ridge.
        _draw_ridges(axes[0], with_spectrum[::-stride][::-1])
    _draw_curve(axes[-1], [report for report in history if report.metrics])
    return figure


def _draw_ridges(axes: Axes, probed: Sequence[TaskReport]) -> None:
    edges = LOG_EIGENVALUE_EDGES.numpy()
    centers = (edges[1:] + edges[:-1]) / 2
    for negative in (False, True):
        counts = {report.task: _heights(report, negative=negative) for report in probed}
        if negative and not any(count.any() for count in counts.values()):
            continue
        # A ridge is at most three tasks high. The first bin does not count, since in a collapse it holds nearly all
        # eigenvalues and would flatten the rest.
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
    # With a fixed y, matplotlib does not search for a free position, which takes time.
    axes.set_title("spectrum at task start", y=1.0)
    axes.legend(loc="upper right")
    axes.yaxis.set_major_locator(_integer_ticks())


def _integer_ticks() -> MaxNLocator:
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _heights(report: TaskReport, *, negative: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    assert report.spectrum is not None
    values, counts = log_eigenvalues(report.spectrum, negative=negative)
    heights: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = torch.histogram(
        values, LOG_EIGENVALUE_EDGES, weight=counts
    ).hist.numpy()
    return heights if report.spectrum.exact else np.log10(1 + heights)


def _draw_curve(axes: Axes, measured: Sequence[TaskReport]) -> None:
    """Draw the first diagnostic, in the order of ``DIAGNOSTICS``, that was measured for any task."""
    name = next((name for name in DIAGNOSTICS if any(name in report.metrics for report in measured)), None)
    if name is None:
        return
    tasks = [report.task for report in measured]
    values = {report.task: report.metrics.get(name, float("nan")) for report in measured}
    relative = [report.metrics.get(f"{name}_vs_initial", float("nan")) for report in measured]
    axes.plot(tasks, list(values.values()), "o-", markersize=3, label="the network")
    if DIAGNOSTICS[name].is_fraction:
        # A fraction and the ratio of two fractions are of the same order of magnitude.
        axes.plot(tasks, relative, "--", color="gray", label="relative to its initial weights")
    collapsed = [report.task for report in measured if report.collapsed]
    axes.plot(collapsed, [values[task] for task in collapsed], "rv", label="collapse")
    axes.set(xlabel="task", ylabel=DIAGNOSTICS[name].title, ylim=(0, None))
    axes.set_title("can it still learn?", y=1.0)
    axes.legend(loc="lower left")
    axes.xaxis.set_major_locator(_integer_ticks())
