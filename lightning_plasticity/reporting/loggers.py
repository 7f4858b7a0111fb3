"""Write numbers to loggers of any kind, and tables, spectra, figures and text to those that take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from typing_extensions import override

from lightning_plasticity._compat import is_lightning, write_text
from lightning_plasticity.curvature.plotting import LOG_EIGENVALUE_EDGES, eigenvalues_by_bin, log_eigenvalues
from lightning_plasticity.interventions import RepairReport
from lightning_plasticity.messages import is_rank_zero
from lightning_plasticity.reporting.names import LogGroups
from lightning_plasticity.reporting.plots import plot_history, plot_spectra, plot_units
from lightning_plasticity.reporting.sentences import events, explanation_page
from lightning_plasticity.reporting.tables import Row, columns_of, to_csv
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
        """Log numbers under their names. The logger gets a dictionary of its own, because it may keep or change it.

        Args:
            values: The numbers by their names.
            step: Number of optimizer steps over all fits.
        """
        self.logger.log_metrics(dict(values), step=step)

    def log_task_numbers(self, values: Mapping[str, float], task: int) -> None:
        """Log numbers of a task, in place of the step with the number of the task.

        Args:
            values: The numbers by their names.
            task: The number of the task.
        """
        self.log_numbers(values, task)

    def log_start(self) -> None:
        """Log what describes the numbers, before the first ones are logged in a fit."""

    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        """Log what there is of a task beside its numbers.

        Args:
            report: The report of the task.
            repairs: The repairs that have followed its verdict.
        """

    def log_table(self, rows: Sequence[Row]) -> None:
        """Log a table of all tasks, which takes the place of the last one.

        Args:
            rows: One row for each task.
        """

    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        """Log the figures of all tasks.

        Args:
            history: The reports of all tasks.
            metric: The number that the module logs, to be shown beside the diagnostics.
        """


class CSVWriter(LogWriter):
    """Writes to CSV files: numbers by step to ``metrics.csv``, and a table of tasks to a file beside it.

    ``metrics.csv`` has one column ``step`` for all numbers, which would mix optimizer steps with tasks.
    """

    logger: CSVLogger

    @override
    def log_task_numbers(self, values: Mapping[str, float], task: int) -> None:
        """Leave the numbers out, since they are in the table."""

    @override
    def log_table(self, rows: Sequence[Row]) -> None:
        # The directory is that of the experiment, which would warn if it found files there when it is made.
        write_text(f"{self.logger.experiment.log_dir}/{self.groups.table}.csv", to_csv(rows))


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
        writer = self.logger.experiment
        writer.add_custom_scalars(_charts())
        writer.add_text(f"{self.groups.by_step}meaning", explanation_page(self.groups.name), 0)

    @override
    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        text = events(report, repairs)
        if text:
            self.logger.experiment.add_text(f"{self.groups.by_step}events", text, report.task)
        for name, values, counts in _eigenvalues(report):
            # The same bins for every task, which TensorBoard shows as a ridge plot over tasks.
            self.logger.experiment.add_histogram_raw(
                self.groups.by_task + name,
                min=values.min().item(),
                max=values.max().item(),
                num=round(counts.sum().item()),
                sum=(counts * values).sum().item(),
                sum_squares=(counts * values.square()).sum().item(),
                bucket_limits=LOG_EIGENVALUE_EDGES[1:].tolist(),
                bucket_counts=eigenvalues_by_bin(values, counts).tolist(),
                global_step=report.task,
            )

    @override
    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        for name, figure in _figures(history, metric):
            image, task = _pixels(figure), history[-1].task
            self.logger.experiment.add_image(self.groups.figures + name, image, task, dataformats="HWC")


class WandbWriter(LogWriter):
    """Writes to Weights & Biases: numbers, spectra as histograms, figures, and a table of tasks with its events.

    Numbers of tasks are shown against the number of the task, and not against the optimizer steps of the Trainer. Under
    a ``prefix`` of the logger, W&B does not find that axis, and shows them against its default.
    """

    logger: WandbLogger

    @override
    def log_start(self) -> None:
        groups = self.groups
        self.logger.experiment.define_metric(self._axis)
        for group in (groups.by_task, groups.fresh, groups.figures):
            self.logger.experiment.define_metric(f"{group}*", step_metric=self._axis)

    @override
    def log_task_numbers(self, values: Mapping[str, float], task: int) -> None:
        self._log(values, task)

    @override
    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        from wandb import Histogram

        histograms = {
            self.groups.by_task + name: Histogram(
                np_histogram=(eigenvalues_by_bin(values, counts), LOG_EIGENVALUE_EDGES.numpy())
            )
            for name, values, counts in _eigenvalues(report)
        }
        self._log(histograms, report.task)

    @override
    def log_table(self, rows: Sequence[Row]) -> None:
        from wandb import Table

        columns = columns_of(rows)
        table = Table(columns, [[row.get(name) for name in columns] for row in rows])
        self.logger.log_metrics({self.groups.table: table})

    @override
    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        from wandb import Image

        images = {self.groups.figures + name: Image(_pixels(figure)) for name, figure in _figures(history, metric)}
        self._log(images, history[-1].task)

    @property
    def _axis(self) -> str:
        return f"{self.groups.by_task}task"

    def _log(self, values: Mapping[str, Any], task: int) -> None:
        if values:
            self.logger.log_metrics({**values, self._axis: task})


class MLFlowWriter(LogWriter):
    """Writes to MLflow: numbers, and as artifacts figures, a table of tasks, and a page of text for each event."""

    logger: MLFlowLogger

    @override
    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        text = events(report, repairs)
        if text:
            self._log_text(text, f"{self.groups.events}/task_{report.task}.md")

    @override
    def log_table(self, rows: Sequence[Row]) -> None:
        self._log_text(to_csv(rows), f"{self.groups.table}.csv")

    @override
    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        for name, figure in _figures(history, metric):
            self.logger.experiment.log_figure(self.logger.run_id, figure, f"{self.groups.figures}{name}.png")

    def _log_text(self, text: str, file: str) -> None:
        self.logger.experiment.log_text(self.logger.run_id, text, file)


class CometWriter(LogWriter):
    """Writes to Comet: numbers, spectra as histograms, figures, a table of tasks, and events as text."""

    logger: CometLogger

    @override
    def log_task(self, report: TaskReport, repairs: Sequence[RepairReport]) -> None:
        from comet_ml import Histogram

        experiment = self.logger.experiment
        centers = (LOG_EIGENVALUE_EDGES[1:] + LOG_EIGENVALUE_EDGES[:-1]).numpy() / 2
        text = events(report, repairs)
        if text:
            experiment.log_text(text, step=report.task)
        for name, values, counts in _eigenvalues(report):
            histogram = Histogram()
            histogram.add(centers, counts=eigenvalues_by_bin(values, counts))
            experiment.log_histogram_3d(histogram, name=self.groups.by_task + name, step=report.task)

    @override
    def log_table(self, rows: Sequence[Row]) -> None:
        self.logger.experiment.log_asset_data(to_csv(rows), name=f"{self.groups.table}.csv", overwrite=True)

    @override
    def log_figures(self, history: Sequence[TaskReport], metric: str | None = None) -> None:
        for name, figure in _figures(history, metric):
            self.logger.experiment.log_image(_pixels(figure), name=self.groups.figures + name, step=history[-1].task)


WRITERS: dict[type[Logger], type[LogWriter]] = {
    TensorBoardLogger: TensorBoardWriter,
    CSVLogger: CSVWriter,
    WandbLogger: WandbWriter,
    MLFlowLogger: MLFlowWriter,
    CometLogger: CometWriter,
}
"""The kinds of loggers that take more than numbers, and what writes to them."""


def writer_of(logger: Logger, groups: LogGroups) -> LogWriter:
    """Return the writer for a logger. On all ranks but the first it logs numbers alone, which most loggers ignore."""
    kinds = (writer for kind, writer in WRITERS.items() if is_rank_zero() and is_lightning(logger, kind))
    return next(kinds, LogWriter)(logger, groups)


def _eigenvalues(report: TaskReport) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the name, the logarithms and the multiplicities of the eigenvalues of each sign that has any."""
    for sign, negative in (("", False), ("negative_", True)):
        if report.spectrum is not None:
            values, counts = log_eigenvalues(report.spectrum, negative=negative)
            if len(values):
                yield f"log10_{report.matrix}_{sign}eigenvalues", values, counts


def _figures(history: Sequence[TaskReport], metric: str | None) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of all that can be drawn."""
    yield "overview", plot_history(history, metric=metric)[0]
    if any(report.spectrum is not None for report in history):
        yield "spectrum", plot_spectra(history)[0]
    if any(name.startswith("dormant_fraction/") for report in history for name in report.metrics):
        yield "dormant_units", plot_units(history)[0]


def _pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a figure as an image of shape ``(height, width, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


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
