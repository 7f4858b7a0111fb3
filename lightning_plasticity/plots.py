"""Pictures of a history of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from lightning_plasticity.diagnostics import DIAGNOSTICS, EPSILON
from lightning_plasticity.reports import TaskReport

LOG_EIGENVALUE_EDGES = torch.linspace(-8.0, 4.0, 61, dtype=torch.float64)
"""Bins of log10 of an eigenvalue; what lies outside is counted in the first or last bin."""


def log_eigenvalues(report: TaskReport) -> torch.Tensor:
    """log10 of the eigenvalues of the probe's Gram matrix, between the ends of the bins, shape ``(k,)``.

    The Gauss-Newton matrix has far more eigenvalues, all of them zero, which are left out.
    """
    assert report.spectrum is not None
    values = report.spectrum.eigenvalues
    structural = report.spectrum.weights > 1.5 / report.spectrum.num_parameters  # one entry stands for many zeros
    low, high = LOG_EIGENVALUE_EDGES[0].item(), LOG_EIGENVALUE_EDGES[-1].item()
    return values[~structural].clamp(min=10.0**low).log10().clamp(low, high)


def plot_history(history: Sequence[TaskReport]) -> Figure:
    """The spectrum at the start of every task as a ridge plot, and the learnable fraction beside it.

    Args:
        history: The reports of a run, one a task.

    Returns:
        A figure that belongs to nobody: not to pyplot's list of figures.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ridges, curve = figure.subplots(1, 2)
    probed = [report for report in history if report.spectrum is not None]
    edges = LOG_EIGENVALUE_EDGES.numpy()
    centers = (edges[1:] + edges[:-1]) / 2
    # Ridges are three tasks high at most, whatever lies in the first bin: in a collapse nearly everything does.
    counts = {report.task: np.histogram(log_eigenvalues(report).numpy(), edges)[0] for report in probed}
    tallest = max((count[1:].max() for count in counts.values()), default=0) or 1
    for report in reversed(probed):
        outline = report.task + 3.0 * np.minimum(counts[report.task] / tallest, 1)
        color = "tab:red" if report.collapsed else "tab:blue"
        ridges.fill_between(centers, report.task, outline, color=color, alpha=0.35, linewidth=0, zorder=-report.task)
        ridges.plot(centers, outline, color=color, linewidth=0.8, zorder=-report.task)
    ridges.axvline(np.log10(EPSILON), color="black", linestyle=":", linewidth=0.8, label=f"ε = {EPSILON:g}")
    ridges.set(xlabel="log10 eigenvalue of the Gauss-Newton matrix", ylabel="task", title="spectrum at task start")
    ridges.legend(loc="upper right")

    tasks = [report.task for report in probed]
    name = "learnable_fraction"
    values = [report.metrics[name] for report in probed]
    relative = [report.metrics.get(f"{name}_vs_initial", float("nan")) for report in probed]
    curve.plot(tasks, values, "o-", markersize=3, label="the network")
    curve.plot(tasks, relative, "--", color="gray", label="relative to its initial weights")
    alarms = [report for report in probed if report.collapsed]
    curve.plot([report.task for report in alarms], [report.metrics[name] for report in alarms], "rv", label="collapse")
    curve.set(xlabel="task", ylabel=DIAGNOSTICS[name].title, title="can it still learn?", ylim=(0, None))
    curve.legend(loc="lower left")
    return figure
