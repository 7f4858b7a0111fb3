"""Read the reports of a run back from a checkpoint, or from what was logged to TensorBoard."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.interventions import RepairReport
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.reporting.history import History
from lightning_plasticity.reporting.names import LogGroups
from lightning_plasticity.reporting.sentences import events
from lightning_plasticity.reports import TaskReport

_EVENT_FILES = "events.out.tfevents.*"


class UnreadableRunError(ValueError):
    """Nothing of the callback can be read from a file or a directory."""


@dataclass(frozen=True)
class SavedRun:
    """The reports of one callback, as far as they were saved.

    Args:
        source: The file or directory that they come from, and what it lacks.
        name: The name of the callback; ``None`` if it has none.
        history: The reports of all tasks.
        events: The alarms and repairs of each task that had any, as Markdown.
    """

    source: str
    name: str | None
    history: History
    events: list[str]


def read_runs(path: Path, *, trust: bool = False) -> list[SavedRun]:
    """Return what each callback of a run has saved.

    Args:
        path: A checkpoint; or a directory, of which the newest checkpoint that holds state of the callback is read, or
            if there is none, what was logged to TensorBoard.
        trust: Whether to load objects other than tensors and plain Python, which can run code of the file.

    Raises:
        UnreadableRunError: If there is nothing to read.
    """
    if path.is_file():
        runs = _runs_of(path, read_checkpoint(path, trust=trust))
        if not runs:
            raise UnreadableRunError(
                f"{path} holds no state of SpectralCollapseCallback: pass a checkpoint of a Trainer with this callback"
            )
        return runs
    if not path.is_dir():
        raise UnreadableRunError(f"{path} does not exist: pass a checkpoint or a log directory")
    checkpoints = [file for file in path.rglob("*.ckpt") if file.is_file()]
    for file in sorted(checkpoints, key=lambda file: file.stat().st_mtime, reverse=True):
        runs = _runs_of(file, read_checkpoint(file, trust=trust))
        if runs:
            return runs
    runs = list(_logged_runs(path))
    if not runs:
        raise UnreadableRunError(
            f"{path} holds neither a checkpoint with state of SpectralCollapseCallback nor TensorBoard's event files "
            "with its numbers: pass the directory of the logger, or a checkpoint"
        )
    return runs


def read_checkpoint(path: Path, *, trust: bool = False) -> Mapping[str, Any]:
    """Return what a checkpoint holds, on the CPU.

    Args:
        path: The file.
        trust: Whether to load objects other than tensors and plain Python, which can run code of the file.

    Raises:
        UnreadableRunError: If the file is no checkpoint, or if it holds other objects and is not trusted.
    """
    if not path.is_file():
        raise UnreadableRunError(f"{path} is no file: pass a checkpoint that Lightning has saved")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise UnreadableRunError(f"{path} is no checkpoint: pass one that Lightning has saved") from error
        raise UnreadableRunError(
            f"{path} is no checkpoint, or holds more than tensors and plain Python, such as objects among its "
            "hyperparameters: if you trust the file, which can then run code, add --trust"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UnreadableRunError(f"{path} cannot be read as a checkpoint: {error}") from error
    return checkpoint if isinstance(checkpoint, Mapping) else {}


def _runs_of(path: Path, checkpoint: Mapping[str, Any]) -> list[SavedRun]:
    """Return the reports of each callback whose state a checkpoint holds."""
    runs = []
    for key, state in checkpoint.get("callbacks", {}).items():
        if not (isinstance(state, Mapping) and {"version", "history", "interventions"} <= state.keys()):
            continue
        try:
            history = History.from_state(state)
        except MisconfigurationError as error:
            raise UnreadableRunError(f"{path}: {error}") from error
        name = re.search(r"\[(.+)\]$", key)
        texts = [events(report, report.repairs) for report in history]
        runs.append(SavedRun(str(path), name and name[1], history, [text for text in texts if text]))
    return runs


def _logged_runs(path: Path) -> Iterator[SavedRun]:
    """Yield what each callback has logged to TensorBoard, in the newest run of a directory.

    The tasks of older runs are put before it, if each task had a Trainer and a directory of its own.
    """
    directories = {file.parent: file.stat().st_mtime for file in path.rglob(_EVENT_FILES)}
    found: dict[str | None, tuple[list[Path], dict[int, TaskReport], dict[int, str]]] = {}
    for directory in sorted(directories, key=lambda each: directories[each], reverse=True):
        reader = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        for name in _names(reader):
            groups = LogGroups(name)
            reports = _read_scalars(reader, groups)
            texts = _read_events(reader, groups, reports)
            used, later, later_texts = found.setdefault(name, ([], {}, {}))
            if not later or max(reports) < min(later):
                used.append(directory)
                later |= reports
                later_texts |= texts
    for name, (used, unsorted, texts) in found.items():
        places = ", ".join(map(str, reversed(used)))
        source = f"TensorBoard's files in {places}, which hold no spectra, no errors and no numbers of layers"
        history = History(unsorted[task] for task in sorted(unsorted))
        yield SavedRun(source, name, history, [texts[task] for task in sorted(texts)])


def _names(reader: Any) -> list[str | None]:
    """Return the names of the callbacks that have logged."""
    found = (re.fullmatch(r"plasticity(?:_(.+))?_by_task/collapsed", tag) for tag in reader.Tags()["scalars"])
    return [match[1] for match in found if match]


def _read_scalars(reader: Any, groups: LogGroups) -> dict[int, TaskReport]:
    """Return a report of each task with the numbers that were logged by task."""
    steps = [(event.wall_time, event.step) for event in reader.Scalars(f"_{groups.by_step}alarms")]
    reports = {}
    for event in reader.Scalars(f"{groups.by_task}collapsed"):
        # The number of steps was logged at the same moment.
        _, step = min(steps, key=lambda each: abs(each[0] - event.wall_time))
        reports[event.step] = TaskReport(event.step, None, step, collapsed=bool(event.value))
    for tag in reader.Tags()["scalars"]:
        for prefix in (groups.by_task, groups.fresh):
            name = tag.removeprefix(prefix)
            if name == tag or name in ("alarms", "repairs", "collapsed"):
                continue
            for event in reader.Scalars(tag):
                if event.step in reports:
                    report = reports[event.step]
                    of_network = report.metrics if name in DIAGNOSTICS else report.logged
                    (report.fresh if prefix == groups.fresh else of_network)[name] = event.value
    return reports


def _read_events(reader: Any, groups: LogGroups, reports: Mapping[int, TaskReport]) -> dict[int, str]:
    """Return the Markdown about each task with an alarm or a repair, and add what it tells to the reports."""
    tag = f"{groups.by_step}events/text_summary"
    if tag not in reader.Tags()["tensors"]:
        return {}
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in reader.Tensors(tag)}
    for task, text in texts.items():
        report = reports[task]
        name = re.search(r"^\*\*Task \d+\*\* \((.+)\), step \d+$", text, re.MULTILINE)
        report.task_id = name and name[1]
        alarm = re.search(r"^- \*\*Alarm\*\* ▼ (.+)$", text, re.MULTILINE)
        report.verdict = f"task {task}: {alarm[1]}" if alarm else ""
        repairs = re.search(r"^- \*\*Repair\*\* ▲ (.+)$", text, re.MULTILINE)
        for act in re.finditer(
            r"(\w+): (?:[^;]*, )?(\d+) parameters changed(.*?undone)?", repairs[1] if repairs else ""
        ):
            report.repairs.append(RepairReport(act[1], {}, int(act[2]), undone=act[3] is not None))
    return texts
