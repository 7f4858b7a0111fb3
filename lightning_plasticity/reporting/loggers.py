"""Log the metrics to every logger, and spectra and a figure of the history to TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_plasticity._compat import is_lightning
from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.distributed.agreement import format_error
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.reporting.plots import LOG_EIGENVALUE_EDGES, log_eigenvalues, plot_history
from lightning_plasticity.reports import TaskReport


@dataclass(frozen=True)
class LogGroups:
    """Prefixes of logged names.

    Args:
        name: The name of the callback, which several callbacks of one Trainer need.

    Example:
        >>> LogGroups().by_step, LogGroups("actor").by_task
        ('plasticity/', 'plasticity_actor_by_task/')
    """

    name: str | None = None

    @property
    def by_step(self) -> str:
        """Prefix of metrics of a task, logged against the number of optimizer steps over all fits."""
        return f"{self._base}/"

    @property
    def by_task(self) -> str:
        """Prefix of metrics of a task, logged against the number of the task."""
        return f"{self._base}_by_task/"

    @property
    def in_training(self) -> str:
        """Prefix of metrics logged during training, against the number of optimizer steps over all fits."""
        return f"{self._base}_training/"

    @property
    def _base(self) -> str:
        return "plasticity" if self.name is None else f"plasticity_{self.name}"


def log_step(
    loggers: Iterable[Logger],
    values: Mapping[str, float],
    step: int,
    errors: ErrorLog,
    groups: LogGroups = LogGroups(),
) -> None:
    """Log the values measured during one training step.

    Args:
        loggers: The loggers of the Trainer.
        values: The values by their names without prefix.
        step: Number of optimizer steps over all fits.
        errors: Records the errors of loggers that fail.
        groups: The prefixes of the names.
    """

    def log(logger: Logger) -> None:
        # Every logger gets its own dictionary, because it may keep or change it.
        logger.log_metrics({groups.in_training + name: value for name, value in values.items()}, step=step)

    if values:
        _for_each(loggers, log, errors)


def log_task(
    loggers: Iterable[Logger],
    report: TaskReport,
    errors: ErrorLog,
    groups: LogGroups = LogGroups(),
) -> None:
    """Log the metrics of one task, and its spectrum as a histogram to TensorBoard.

    Args:
        loggers: The loggers of the Trainer.
        report: The report of the task.
        errors: Records the errors of loggers that fail.
        groups: The prefixes of the names.
    """
    before = {f"{name}_before_repair": value for name, value in report.before.items()}
    after = {f"{name}_after_repair": value for name, value in report.after.items()}
    values = {
        **report.metrics,
        **before,
        **after,
        "collapsed": float(report.collapsed),
        "probe_failed": float(not report.metrics),
    }

    def log(logger: Logger) -> None:
        logger.log_metrics({groups.by_step + name: value for name, value in values.items()}, step=report.step)
        logger.log_metrics({groups.by_task + name: value for name, value in values.items()}, step=report.task)
        if is_lightning(logger, TensorBoardLogger) and report.spectrum is not None:
            _log_histograms(logger, report, report.spectrum, groups.by_task)

    _for_each(loggers, log, errors)


def log_summary(
    loggers: Iterable[Logger],
    history: Sequence[TaskReport],
    errors: ErrorLog,
    groups: LogGroups = LogGroups(),
) -> None:
    """Log a figure of all tasks to TensorBoard.

    Args:
        loggers: The loggers of the Trainer.
        history: The reports of all tasks; if none was measured, nothing is logged.
        errors: Records the errors of loggers that fail.
        groups: The prefixes of the names.
    """

    def log(logger: Logger) -> None:
        if is_lightning(logger, TensorBoardLogger):
            image = _render(plot_history(history))
            logger.experiment.add_image(groups.by_task + "history", image, history[-1].task, dataformats="HWC")

    if any(report.metrics for report in history):
        _for_each(loggers, log, errors)


def _for_each(loggers: Iterable[Logger], log: Callable[[Logger], None], errors: ErrorLog) -> None:
    for logger in loggers:
        try:
            log(logger)
        except Exception as error:
            # An error of a logger must not end the run.
            name = type(logger).__name__
            errors.record(name, f"{name} could not log the plasticity of the network", format_error(error))


def _log_histograms(logger: TensorBoardLogger, report: TaskReport, spectrum: Spectrum, prefix: str) -> None:
    """Log the eigenvalues in the same bins for every task, which TensorBoard shows as a ridge plot over tasks."""
    for sign, negative in (("", False), ("negative_", True)):
        values, counts = log_eigenvalues(spectrum, negative=negative)
        if not len(values):
            continue
        logger.experiment.add_histogram_raw(
            f"{prefix}log10_{report.matrix}_{sign}eigenvalues",
            min=values.min().item(),
            max=values.max().item(),
            num=round(counts.sum().item()),
            sum=(counts * values).sum().item(),
            sum_squares=(counts * values.square()).sum().item(),
            bucket_limits=LOG_EIGENVALUE_EDGES[1:].tolist(),
            bucket_counts=torch.histogram(values, LOG_EIGENVALUE_EDGES, weight=counts).hist.tolist(),
            global_step=report.task,
        )


def _render(figure: Figure) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
