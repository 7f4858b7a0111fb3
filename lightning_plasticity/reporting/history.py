"""Hold the reports of all tasks, and give them as a table, as rows and as files."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.interventions import RepairReport
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.reporting.names import COMPARISONS, EXPLAINING
from lightning_plasticity.reporting.tables import to_csv
from lightning_plasticity.reports import TaskReport

if TYPE_CHECKING:
    from rich.table import Table

Plain = bool | int | float | str | None
"""A value of a row."""

STATE_VERSION = 1
"""The number of the layout of the callback's state in checkpoints."""

_SHOWN = (*COMPARISONS, "fit_loss", *EXPLAINING)
"""The diagnostics in the table, as far as they were measured."""


class History(list[TaskReport]):
    """The reports of all tasks, in order.

    ``print`` shows them as a table: the lead numbers, in brackets those of a fresh network. The ``repr`` has one line
    per task.

    Example:
        >>> history = History([TaskReport(0, None, 0), TaskReport(1, None, 200, metrics={"handicap": 2.3})])
        >>> history.append(TaskReport(2, None, 400, metrics={"handicap": 2.9}, collapsed=True))
        >>> print(history)
        task  step  verdict       handicap
        0     0     not measured
        1     200   no alarm      2.3
        2     400   alarm         2.9
        >>> history[:2]
        [TaskReport(task=0, step=0), TaskReport(task=1, step=200, handicap=2.3)]
    """

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> History:
        """Return the reports in the state of a callback.

        Args:
            state: What :meth:`SpectralCollapseCallback.state_dict` returned.

        Raises:
            MisconfigurationError: If another release has written it in another layout.
        """
        if state.get("version") != STATE_VERSION:
            raise MisconfigurationError(
                f"the checkpoint holds state of SpectralCollapseCallback in version {state.get('version')!r}, and this "
                f"release reads version {STATE_VERSION}: resume with the release that wrote it, or without the callback"
            )
        return cls(TaskReport.from_dict(report) for report in state["history"])

    @override
    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no task yet"

    @override
    def __str__(self) -> str:
        """Return the table: of the width of the terminal if it goes there and rich is installed, else plain lines."""
        if not self:
            return "no task yet"
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from rich.console import Console

            file = io.StringIO()
            # Without colours: the text may be written to a file as well.
            Console(file=file, width=shutil.get_terminal_size().columns).print(self.__rich__())
            return file.getvalue().rstrip()
        return plain_table(*self.to_table())

    def __rich__(self) -> Table:
        """Return the table for :func:`rich.print`, with alarms in red."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        columns, rows = self.to_table()
        table = Table(*columns, box=SIMPLE_HEAD)
        for report, row in zip(self, rows, strict=True):
            # As text, since square brackets would be read as markup.
            table.add_row(*map(Text, row), style="red" if report.collapsed else "")
        return table

    def to_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles of the columns and the cells of each row of the table, without columns that are empty."""
        names = [name for name in _SHOWN if any(name in report.metrics for report in self)]
        titles = {name: DIAGNOSTICS[name].title for name in names}
        titles |= {name: f"{titles[name]} (fresh)" for name in names if any(name in r.fresh for r in self)}
        columns = ["task", "name", "step", "verdict", *titles.values(), "repairs", "errors"]
        rows = [
            [
                str(report.task),
                "" if report.task_id is None else str(report.task_id),
                str(report.step),
                "not measured" if not report.metrics else "alarm" if report.collapsed else "no alarm",
                *(_beside_fresh(report, name) for name in names),
                summarize(report.repairs),
                ", ".join(report.errors),
            ]
            for report in self
        ]
        filled = [any(cells) for cells in zip(*rows, strict=True)] or [True] * len(columns)
        kept = [place for place, is_filled in enumerate(filled) if is_filled]
        return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]

    def to_rows(self) -> list[dict[str, Plain]]:
        """Return a dictionary of plain values for each task, all with the same keys.

        Diagnostics have their own names, and ``fresh_<name>`` is that of the initial weights,
        ``<name>_before_repair`` and ``<name>_after_repair`` as in :class:`~lightning_plasticity.TaskReport`,
        ``logged/<name>`` what the module itself had logged. Repairs, errors and remarks are texts, with semicolons
        between them. What a task lacks is ``None``.

        Example:
            >>> reports = [TaskReport(0, "cats", 0, metrics={"handicap": 1.0}), TaskReport(1, "dogs", 200)]
            >>> [(row["task_id"], row["collapsed"], row["handicap"]) for row in History(reports).to_rows()]
            [('cats', False, 1.0), ('dogs', False, None)]
        """
        rows = [_row(report) for report in self]
        keys = dict.fromkeys(key for row in rows for key in row)
        return [{key: row.get(key) for key in keys} for row in rows]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_rows` as comma-separated values with a header; what a task lacks is empty.

        Args:
            path: The file, which is overwritten.
        """
        Path(path).write_text(to_csv(self.to_rows()), encoding="utf-8", newline="")

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_rows` as a JSON array of objects; infinities and NaN, which JSON lacks, are ``null``.

        Args:
            path: The file, which is overwritten.
        """
        rows = [{key: _or_null(value) for key, value in row.items()} for row in self.to_rows()]
        Path(path).write_text(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")

    def to_pandas(self) -> Any:
        """Return :meth:`to_rows` as a :class:`pandas.DataFrame`.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "History.to_pandas() needs pandas: install it by `pip install pandas`, or use to_rows() or to_csv()"
            ) from error
        return pandas.DataFrame(self.to_rows())


def plain_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as lines with aligned columns.

    Args:
        columns: The titles of the columns.
        rows: The cells of each row.

    Example:
        >>> print(plain_table(["task", "verdict"], [["0", "no alarm"], ["1", "alarm"]]))
        task  verdict
        0     no alarm
        1     alarm
    """
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def summarize(repairs: Iterable[RepairReport]) -> str:
    """Return what repairs have changed in all, by intervention.

    Example:
        >>> summarize([RepairReport("FIRE", {}, 8970), RepairReport("FIRE", {}, 8970, undone=True)])
        'FIRE: 8970 parameters, FIRE: 8970 parameters, undone'
    """
    groups: dict[tuple[str, bool], list[RepairReport]] = {}
    for repair in repairs:
        groups.setdefault((repair.name, repair.undone), []).append(repair)
    return ", ".join(
        f"{_changed(group)}{f' in {len(group)} repairs' if len(group) > 1 else ''}{', undone' if undone else ''}"
        for (_, undone), group in groups.items()
    )


def _changed(group: list[RepairReport]) -> str:
    """Return what repairs by one intervention have changed, such as ``ReDo: 85 units``."""
    totals: dict[str, float] = {}
    for repair in group:
        for name, number in repair.numbers().items():
            totals[name] = totals.get(name, 0) + number
    return ", ".join(f"{name.replace('/', f': {number:.0f} ')}" for name, number in totals.items())


def _beside_fresh(report: TaskReport, name: str) -> str:
    if name not in report.metrics:
        return ""
    fresh = f" ({report.fresh[name]:.3g})" if name in report.fresh else ""
    return f"{report.metrics[name]:.3g}{fresh}"


def _row(report: TaskReport) -> dict[str, Plain]:
    return {
        "task": report.task,
        "task_id": report.task_id,
        "step": report.step,
        "collapsed": report.collapsed,
        "verdict": report.verdict,
        "repaired_by": "; ".join(f"{repair}, undone" if repair.undone else str(repair) for repair in report.repairs),
        "effect": report.effect,
        "errors": "; ".join(f"{name}: {error}" for name, error in report.errors.items()),
        "remarks": "; ".join(report.remarks),
        "matrix": report.matrix,
        "outputs": report.outputs,
        "expected_steps": report.expected_steps,
        "limited": report.limited,
        "coupled": report.coupled,
        **_numbers(report.metrics),
        **_numbers(report.fresh, prefix="fresh_"),
        **_numbers(report.before, suffix="_before_repair"),
        **_numbers(report.after, suffix="_after_repair"),
        **_numbers(report.logged, prefix="logged/"),
    }


def _numbers(values: Mapping[str, float], prefix: str = "", suffix: str = "") -> dict[str, Plain]:
    return {f"{prefix}{name}{suffix}": float(value) for name, value in values.items()}


def _or_null(value: Plain) -> Plain:
    return None if isinstance(value, float) and not math.isfinite(value) else value
