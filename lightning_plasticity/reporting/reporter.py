"""Tell people and other callbacks what was measured and done at each task."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_plasticity.distributed.agreement import broadcast_object, format_error
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.interventions import Intervention, RepairReport
from lightning_plasticity.reporting.loggers import LogWriter, writer_of
from lightning_plasticity.reporting.names import LogGroups, counts, logged_numbers, monitored_numbers, own_metric
from lightning_plasticity.reporting.sentences import (
    SINGLE_POINT,
    repair_sentence,
    verdict_in_short,
    why_nothing_was_done,
)
from lightning_plasticity.reporting.tables import task_rows
from lightning_plasticity.reports import TaskReport

_MAX_SHARE = 0.05
"""Largest share of the time of a run that its figures take: half a second each time, which may be more than a task."""

LogLevel = Literal["lead", "all", False]


class Reporter:
    """Writes the reports of tasks to loggers, ``trainer.callback_metrics``, the progress bar and the console.

    Args:
        name: The name of the callback.
        level: ``"lead"`` for the few numbers that tell whether plasticity is lost, ``"all"`` for all, ``False`` to
            write nothing to loggers.
        watched: The diagnostic that raises the alarm.
        interventions: The interventions of the callback.
        errors: Records the errors of loggers that fail.
    """

    def __init__(
        self, name: str | None, level: LogLevel, watched: str, interventions: Sequence[Intervention], errors: ErrorLog
    ) -> None:
        self.level = level
        self._prefix = "" if name is None else f"{name}: "
        self._groups = LogGroups(name)
        self._watched = watched
        self._interventions = interventions
        self._errors = errors
        self._said: set[str] = set()
        # The classes of loggers that have failed, and their errors: each is one warning, since a service may stay away.
        self._failures: set[tuple[str, str]] = set()
        # Where the loggers of the last fits write to.
        self._places: set[str] = set()
        self._has_noted_places = False
        # Those in which the numbers are described.
        self._described: set[str] = set()
        # When the figures were last drawn, by the clock, and how many seconds that took.
        self._drawn_at = -math.inf
        self._drawing_time = 0.0

    def begin_fit(self, trainer: Trainer, history: Sequence[TaskReport]) -> None:
        """Show the last verdict again, since a Trainer forgets at every fit what other callbacks may watch."""
        if history:
            self._show_verdict(trainer, history)

    def report_training(
        self, trainer: Trainer, values: Mapping[str, float], step: int, history: Sequence[TaskReport] = ()
    ) -> None:
        """Log what was measured or done in one training step.

        Args:
            trainer: The Trainer.
            values: The values by their names without prefix.
            step: Number of optimizer steps over all fits.
            history: The reports of all tasks, if a repair has run in this step.
        """
        named = {self._groups.in_training + name: value for name, value in values.items()}
        if history:
            named[f"{self._groups.by_step}repairs"] = counts(history)["repairs"]
        if named:
            self._for_each_logger(trainer, lambda writer: writer.log_numbers(named, step))

    def report_task(
        self, trainer: Trainer, history: Sequence[TaskReport], repairs: Sequence[RepairReport] = ()
    ) -> None:
        """Log the last task, and say what was done.

        Args:
            trainer: The Trainer.
            history: The reports of all tasks.
            repairs: The repairs that have followed the verdict of the last one.
        """
        report = history[-1]
        for repair in repairs:
            if not repair.undone and repair.step is not None:
                self.report_training(trainer, repair.numbers(), repair.step)
        everything = self.level == "all"
        by_step, by_task = logged_numbers(history, self._watched, self._groups, everything=everything)

        def log(writer: LogWriter) -> None:
            writer.log_numbers(by_step, report.step)
            writer.log_task_numbers(by_task, report.task)
            writer.log_task(report, repairs)

        self._for_each_logger(trainer, log)
        self._show_verdict(trainer, history)
        if repairs:
            self._say(repair_sentence(report, repairs))
        elif report.collapsed:
            self._say_once(why_nothing_was_done(self._interventions))
        if self.level is not False:
            self._compare_places(trainer, report.task)
        is_first_event = _has_event(report) and not any(map(_has_event, history[:-1]))
        if is_first_event or self._is_time_to_draw():
            self._draw(trainer, history)

    def end_task(self, trainer: Trainer, history: Sequence[TaskReport]) -> None:
        """Keep what the module has logged in the task that ends, to be shown beside the diagnostics.

        All ranks must call it. They keep the numbers of the first one.
        """
        if history:
            logged = {
                name: value.item()
                for name, value in trainer.callback_metrics.items()
                if not name.startswith("plasticity") and isinstance(value, Tensor) and value.numel() == 1
            }
            history[-1].logged |= broadcast_object(logged)

    def end_fit(self, trainer: Trainer, history: Sequence[TaskReport], new_tasks: int) -> None:
        """Draw the figures if the fit had several tasks, and say so if the first fit had a single one."""
        if new_tasks > 1:
            self._draw(trainer, history)
        elif new_tasks:
            self._log_table(trainer, history)
        if len(history) == new_tasks == 1:
            self._say_once(SINGLE_POINT)

    def _is_time_to_draw(self) -> bool:
        """Return whether the last figures took no more than their share of the time since then."""
        return _MAX_SHARE * (time.monotonic() - self._drawn_at) >= self._drawing_time

    def _draw(self, trainer: Trainer, history: Sequence[TaskReport]) -> None:
        start = time.monotonic()
        self._log_table(trainer, history)
        if any(report.metrics for report in history):
            self._for_each_logger(trainer, lambda writer: writer.log_figures(history, own_metric(history)))
        self._drawn_at = time.monotonic()
        self._drawing_time = self._drawn_at - start

    def _log_table(self, trainer: Trainer, history: Sequence[TaskReport]) -> None:
        rows = task_rows(history, self._watched)
        self._for_each_logger(trainer, lambda writer: writer.log_table(rows))

    def _show_verdict(self, trainer: Trainer, history: Sequence[TaskReport]) -> None:
        """Give the last numbers to callbacks such as ``EarlyStopping``, and the last verdict to the progress bar."""
        for name, value in monitored_numbers(history, self._watched).items():
            trainer.callback_metrics[self._groups.by_step + name] = torch.tensor(value)
        shown: dict[str, Any] = trainer.progress_bar_metrics
        shown[self._groups.by_step.rstrip("/")] = verdict_in_short(history[-1], self._watched)

    def _compare_places(self, trainer: Trainer, task: int) -> None:
        """Say at a task if its curves are not continued where those of the earlier ones are."""
        # The properties of a logger may fail, as its methods may.
        with contextlib.suppress(Exception):
            places = {_place(logger) for logger in trainer.loggers}
            if self._places and places and not places & self._places and not self._has_noted_places:
                self._has_noted_places = True
                self._say(
                    f"task {task} is logged as {', '.join(sorted(places))}, and earlier ones as "
                    f"{', '.join(sorted(self._places))}: pass one logger, such as logger=TensorBoardLogger('logs', "
                    "version=0), to the Trainers of all tasks, and they become one curve"
                )
            self._places |= places

    def _for_each_logger(self, trainer: Trainer, log: Callable[[LogWriter], None]) -> None:
        if self.level is False:
            return
        for logger in trainer.loggers:
            try:
                log(self._writer_of(logger))
            except Exception as error:
                # An error of a logger must not end the run.
                name, text = type(logger).__name__, format_error(error)
                if (name, text) in self._failures:
                    self._errors.keep(name, text)
                else:
                    self._failures.add((name, text))
                    self._errors.record(name, f"{name} could not log the plasticity of the network", text)

    def _writer_of(self, logger: Logger) -> LogWriter:
        """Return the writer for a logger, which first describes the numbers in a place that it has not written to."""
        writer, place = writer_of(logger, self._groups), _place(logger)
        if place not in self._described:
            self._described.add(place)
            writer.log_start()
        return writer

    def _say(self, sentence: str) -> None:
        rank_zero_info(f"{self._prefix}{sentence}")

    def _say_once(self, sentence: str | None) -> None:
        if sentence is not None and sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


def _place(logger: Logger) -> str:
    return f"{logger.name}/{logger.version}"


def _has_event(report: TaskReport) -> bool:
    return report.collapsed or bool(report.repairs)
