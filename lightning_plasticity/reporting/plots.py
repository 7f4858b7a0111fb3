"""Plot the diagnostics, the spectra and the dormant units of all tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_plasticity.curvature.plotting import (
    LOG_EIGENVALUE_EDGES,
    NEGATIVE,
    POSITIVE,
    eigenvalues_by_bin,
    log_eigenvalues,
    new_axes,
)
from lightning_plasticity.diagnostics import DIAGNOSTICS, EPSILON, MATRIX_TITLES
from lightning_plasticity.reports import TaskReport

_MAX_RIDGES = 50
"""Maximum number of ridges: more could not be distinguished, and would make the figure slow to draw."""

_MAX_LAYER_NAMES = 24
"""Maximum number of layers that are named beside the dormant units."""

_WIDTH = 4.2
"""Width of a figure in inches, of 100 pixels: about what TensorBoard shows."""

_LEGEND: dict[str, Any] = {"fontsize": 10, "frameon": False, "handlelength": 1.2, "handletextpad": 0.4}

# Okabe and Ito (2008): colours that can be told apart with any colour vision.
_NETWORK, _FRESH, _ALARM, _REPAIR, _OWN = POSITIVE, "#666666", "#D55E00", "#009E73", "#CC79A7"

_PANELS = (("fit_loss",), ("learnable_fraction",), ("epsilon_rank", "hessian_epsilon_rank"), ("dormant_fraction",))
"""The diagnostics of the overview; of several in one panel, the first that was measured."""


def plot_history(
    history: Sequence[TaskReport], ax: Axes | Sequence[Axes] | None = None, *, metric: str | None = None
) -> tuple[Figure, list[Axes]]:
    """Plot over the tasks what tells whether plasticity is lost: a panel each, with the values of a fresh network.

    The panels are the fit loss, the learnable fraction, the ε-rank and the dormant fraction, as far as they were
    measured, and a number that the module itself has logged at the end of each task. ▼ marks alarms, and ▲ the values
    after repairs.

    Args:
        history: The reports of a run, one per task.
        ax: The axes to draw into, one for each panel; by default those of a new figure.
        metric: The name under which the module logs its number; ``None`` shows none.

    Returns:
        The figure and its axes from top to bottom. A new one is not registered with pyplot, so it need not be closed.

    Raises:
        ValueError: If ``ax`` has not as many axes as there are panels.
    """
    measured = [report for report in history if report.metrics]
    panels = [next((n for n in names if any(n in r.metrics for r in measured)), None) for names in _PANELS]
    names = [name for name in panels if name is not None]
    rows = max(len(names) + (metric is not None), 1)
    figure, axes = _stacked_axes(rows) if ax is None else _given_axes(ax, rows)
    for axis, name in zip(axes, names, strict=False):
        _draw_diagnostic(axis, measured, name)
    if metric is not None:
        logged = [report for report in history if metric in report.logged]
        axes[-1].plot([r.task for r in logged], [r.logged[metric] for r in logged], "o-", color=_OWN, markersize=3)
        _title(axes[-1], f"{metric}, at the end of the task")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles and ax is None:
        figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=4, columnspacing=1.0, **_LEGEND)
    elif handles:
        axes[0].legend(handles.values(), handles.keys(), **_LEGEND)
    axes[-1].set_xlabel("task")
    axes[-1].xaxis.set_major_locator(_integer_ticks())
    return figure, axes


def _stacked_axes(rows: int) -> tuple[Figure, list[Axes]]:
    """Return a new figure with axes one below the other."""
    height = 0.9 + 1.2 * rows
    figure = Figure(figsize=(_WIDTH, height), dpi=100)
    # An automatic layout would draw the figure twice.
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.45 / height, top=1 - 0.5 / height, hspace=0.4)
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _given_axes(ax: Axes | Sequence[Axes], rows: int) -> tuple[Figure, list[Axes]]:
    """Return the figure of axes, which must be as many as there are rows."""
    axes = list(np.ravel(np.asarray(ax)))
    if len(axes) != rows:
        raise ValueError(f"ax has {len(axes)} axes, and this history has {rows} panels: pass one for each, or None")
    return axes[0].figure.figure, axes


def _draw_diagnostic(axis: Axes, measured: Sequence[TaskReport], name: str) -> None:
    """Draw a diagnostic of the network and of a fresh one, with alarms and repairs."""
    values = {report.task: report.metrics.get(name, math.nan) for report in measured}
    fresh = [report.fresh.get(name, math.nan) for report in measured]
    tasks = list(values)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    axis.plot(tasks, fresh, "--", color=_FRESH, label="fresh network")
    axis.plot(tasks, list(values.values()), "o-", color=_NETWORK, markersize=3, label="network")
    alarms = [report.task for report in measured if report.collapsed]
    if alarms:
        axis.plot(alarms, [values[task] for task in alarms], "v", color=_ALARM, markersize=8, label="alarm")
    repaired = [report for report in measured if any(not repair.undone for repair in report.repairs)]
    if repaired:
        after = [report.after.get(name, values[report.task]) for report in repaired]
        axis.plot([r.task for r in repaired], after, "^", color=_REPAIR, markersize=8, label="after repair")
    if DIAGNOSTICS[name].is_fraction:
        axis.set_ylim(-0.05, 1.05)
        axis.set_yticks([0, 0.5, 1])
    _title(axis, DIAGNOSTICS[name].title)


def _title(axis: Axes, text: str) -> None:
    # With a fixed y, matplotlib does not search for a free position, which takes time.
    axis.set_title(text, y=1.0, pad=3, fontsize=11, loc="left")


def plot_units(history: Sequence[TaskReport], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the dormant fraction of each hidden layer at the start of each task as a map of layers and tasks.

    Args:
        history: The reports of a run, one per task.
        ax: The axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.
    """
    prefix = "dormant_fraction/"
    measured = [report for report in history if report.metrics]
    layers = list(dict.fromkeys(n for report in reversed(measured) for n in report.metrics if n.startswith(prefix)))
    tasks = range(history[0].task, history[-1].task + 1)
    shares = np.full((len(layers), len(tasks)), np.nan)
    for report in measured:
        shares[:, report.task - tasks[0]] = [report.metrics.get(layer, math.nan) for layer in layers]
    figure, ax = new_axes(ax, (_WIDTH, 1.8 + 0.28 * min(len(layers), _MAX_LAYER_NAMES)), left=0.28, bottom=0.5, top=0.6)
    extent = (tasks[0] - 0.5, tasks[-1] + 0.5, len(layers) - 0.5, -0.5)
    image = ax.imshow(shares, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=1, extent=extent)
    figure.colorbar(image, ax=ax, pad=0.02)
    marks = (
        ("alarm", "v", _ALARM, -0.5, [report.task for report in history if report.collapsed]),
        ("repair", "^", _REPAIR, len(layers) - 0.5, [report.task for report in history if report.repairs]),
    )
    for label, marker, color, height, marked in marks:
        if marked:
            style: dict[str, Any] = {"color": color, "markersize": 8, "clip_on": False}
            ax.plot(marked, [height] * len(marked), marker, label=label, **style)
            ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, columnspacing=1.0, **_LEGEND)
    stride = math.ceil(len(layers) / _MAX_LAYER_NAMES)
    ax.set_yticks(range(0, len(layers), stride), [layer.removeprefix(prefix) for layer in layers[::stride]])
    ax.set_xlabel("task")
    ax.set_title("dormant fraction", y=1.0, pad=28, fontsize=11, loc="left")
    ax.xaxis.set_major_locator(_integer_ticks())
    return figure, ax


def plot_spectra(history: Sequence[TaskReport], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the spectra at the start of the tasks as ridges, one above the other; those of alarms have another colour.

    The height of a ridge is the number of eigenvalues in a bin, or its logarithm if the spectrum is an estimate, since
    nearly all eigenvalues are in the bulk. Eigenvalues below 1e-8 are zero and left out. In a long history only every
    n-th task has a ridge, the last one included.

    Args:
        history: The reports of a run, one per task.
        ax: The axes to draw into; by default those of a new figure.

    Returns:
        The figure and its axes.
    """
    probed = [report for report in history if report.spectrum is not None]
    stride = math.ceil(len(probed) / _MAX_RIDGES) or 1
    # The slice starts from the end, so that the last task has a ridge.
    probed = probed[::-stride][::-1]
    figure, ax = new_axes(ax, (_WIDTH, 4.2), left=0.12, bottom=0.5, top=0.3)
    _draw_ridges(ax, probed)
    return figure, ax


def _draw_ridges(axes: Axes, probed: Sequence[TaskReport]) -> None:
    edges = LOG_EIGENVALUE_EDGES.numpy()
    centers = (edges[1:] + edges[:-1]) / 2
    for negative in (False, True):
        counts = {report.task: _heights(report, negative=negative) for report in probed}
        if negative and not any(count.any() for count in counts.values()):
            continue
        # A ridge is at most three tasks high.
        tallest = max((count.max() for count in counts.values()), default=0) or 1
        label = "negative eigenvalues, by their size" if negative else None
        for report in reversed(probed):
            outline = report.task + 3.0 * counts[report.task] / tallest
            color = NEGATIVE if negative else _ALARM if report.collapsed else _NETWORK
            style: dict[str, Any] = {"color": color, "zorder": -report.task}
            axes.fill_between(centers, report.task, outline, alpha=0.1 if negative else 0.35, linewidth=0, **style)
            axes.plot(centers, outline, linewidth=0.8, linestyle="--" if negative else "-", label=label, **style)
            label = None
    axes.axvline(np.log10(EPSILON), color="black", linestyle=":", linewidth=0.8, label=f"ε = {EPSILON:g}")
    matrices = " or ".join(dict.fromkeys(MATRIX_TITLES[report.matrix] for report in probed))
    axes.set(xlabel=f"log10 eigenvalue of the {matrices}", ylabel="task")
    axes.set_title("spectrum at task start", y=1.0, pad=3, fontsize=11, loc="left")
    axes.legend(loc="upper right", fontsize=9, handlelength=1.2)
    axes.yaxis.set_major_locator(_integer_ticks())


def _integer_ticks() -> MaxNLocator:
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def _heights(report: TaskReport, *, negative: bool) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    assert report.spectrum is not None
    values, counts = log_eigenvalues(report.spectrum, negative=negative)
    heights = eigenvalues_by_bin(values, counts)
    return heights if report.spectrum.exact else np.log10(1 + heights)
