"""Write numbers to loggers of any kind, and spectra, figures and text to those that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typing_extensions import override

from lightning_plasticity._compat import is_lightning
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.interventions import RepairReport
from lightning_plasticity.messages import is_rank_zero
from lightning_plasticity.reporting.names import LogGroups
from lightning_plasticity.reporting.plots import (
    LOG_EIGENVALUE_EDGES,
    log_eigenvalues,
    plot_history,
    plot_spectra,
    plot_units,
)
from lightning_plasticity.reporting.sentences import events, explanation_page
from lightning_plasticity.reports import TaskReport


class LogWriter:
    """Writes numbers to a logger. This is all for most kinds of loggers; others have a class of their own.

    Args:
        logger: The logger.
        groups: The prefixes of the names.
    """

    def __init__(self, logger: Logger, groups: LogGroups) -> None:
        self.logger = logger
        self.groups = groups

    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers under their names. The logger gets a dictionary of its own, because it may keep or change it."""
        self.logger.log_metrics(dict(values), step=step)

    def log_start(self) -> None:
        """Log what describes the numbers, before the first ones are logged in a fit."""

    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        """Log what there is of a task beside its numbers.

        Args:
            report: The report of the task.
            repairs: The repairs that have followed its verdict.
        """

    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        """Log the figures of all tasks.

        Args:
            history: The reports of all tasks.
            metric: The number that the module logs, to be shown beside the diagnostics.
        """


class TensorBoardWriter(LogWriter):
    """Writes to TensorBoard: numbers, spectra as histograms, alarms and repairs as text, charts and figures.

    TensorBoard sorts groups by their names, and opens the first two: an underscore puts the lead numbers first.
    """

    logger: TensorBoardLogger

    @override
    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        lead = self.groups.by_step
        super().log_numbers({f"_{n}" if n.startswith(lead) else n: value for n, value in values.items()}, step)

    @override
    def log_start(self) -> None:
        if not is_rank_zero():
            return
        writer = self.logger.experiment
        writer.add_custom_scalars(_charts())
        writer.add_text(f"{self.groups.by_step}meaning", explanation_page(self.groups.name), 0)

    @override
    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        if not is_rank_zero():
            return
        text = events(report, repairs)
        if text:
            self.logger.experiment.add_text(f"{self.groups.by_step}events", text, report.task)
        if report.spectrum is not None:
            self._log_histograms(report, report.spectrum)

    @override
    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        if not is_rank_zero():
            return
        self._log_figure("overview", plot_history(history, metric=metric)[0], history)
        if any(report.spectrum is not None for report in history):
            self._log_figure("spectrum", plot_spectra(history)[0], history)
        if any(name.startswith("dormant_fraction/") for report in history for name in report.metrics):
            self._log_figure("dormant_units", plot_units(history)[0], history)

    def _log_figure(self, name: str, figure: Figure, history: Sequence[TaskReport]) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = np.asarray(canvas.buffer_rgba())[..., :3]
        self.logger.experiment.add_image(self.groups.figures + name, image, history[-1].task, dataformats="HWC")

    def _log_histograms(self, report: TaskReport, spectrum: Spectrum) -> None:
        """Log the eigenvalues in the same bins for every task, which TensorBoard shows as a ridge plot over tasks."""
        for sign, negative in (("", False), ("negative_", True)):
            values, counts = log_eigenvalues(spectrum, negative=negative)
            if not len(values):
                continue
            self.logger.experiment.add_histogram_raw(
                f"{self.groups.by_task}log10_{report.matrix}_{sign}eigenvalues",
                min=values.min().item(),
                max=values.max().item(),
                num=round(counts.sum().item()),
                sum=(counts * values).sum().item(),
                sum_squares=(counts * values.square()).sum().item(),
                bucket_limits=LOG_EIGENVALUE_EDGES[1:].tolist(),
                bucket_counts=torch.histogram(values, LOG_EIGENVALUE_EDGES, weight=counts).hist.tolist(),
                global_step=report.task,
            )


def writer_of(logger: Logger, groups: LogGroups) -> LogWriter:
    """Return the writer for a logger."""
    kind = TensorBoardWriter if is_lightning(logger, TensorBoardLogger) else LogWriter
    return kind(logger, groups)


def _charts() -> dict[str, dict[str, list[object]]]:
    """Return the layout of TensorBoard's *Custom Scalars*: the network, a fresh one and alarms in one chart.

    TensorBoard reads one layout of a run, so it is the same for all callbacks, whatever their names.
    """
    network, fresh = r"^plasticity.*_by_task/", r"^plasticity.*_fresh_network/"
    charts: dict[str, list[object]] = {
        title: ["Multiline", [f"({network}|{fresh}){name}$", rf"{network}collapsed$"]]
        for title, name in (
            ("fit loss", "fit_loss"),
            ("learnable fraction", "learnable_fraction"),
            ("dormant fraction", "dormant_fraction"),
        )
    }
    charts["ε-rank"] = ["Multiline", [f"({network}|{fresh})(hessian_)?epsilon_rank$"]]
    charts["alarms and repairs so far"] = ["Multiline", [rf"{network}(alarms|repairs)$"]]
    return {"plasticity": charts}
