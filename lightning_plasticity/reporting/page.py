"""Write the reports of saved runs as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

from matplotlib.figure import Figure

from lightning_plasticity.reporting.history import History
from lightning_plasticity.reporting.names import LOGGED_NUMBERS, counts, own_metric
from lightning_plasticity.reporting.plots import plot_history, plot_spectra, plot_units
from lightning_plasticity.reporting.saved_runs import SavedRun

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Plasticity of $title</title>
<style>
body { font: 16px/1.5 sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid #ddd; }
tr.alarm td { background: #fbe9df; }
figure { display: inline-block; vertical-align: top; margin: 0 1.5rem 1.5rem 0; max-width: 100%; }
figure img { max-width: 100%; }
figcaption { font-size: 0.9rem; max-width: 26rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")

_INTRO = (
    "At the start of every task, copies of the network and of its initial weights (a fresh network) are trained for a "
    "few steps. An alarm means that the fresh network would learn the task better."
)

_CAPTIONS = {
    "overview": "The network beside a fresh one, with alarms and the numbers after repairs.",
    "spectra": "Eigenvalues of the curvature at the start of the tasks, a ridge each.",
    "units": "Share of dormant units in each hidden layer.",
}


def report_page(runs: Sequence[SavedRun]) -> str:
    """Return the HTML page about the callbacks of a run: figures, tables, what was done, and what the numbers mean.

    Args:
        runs: What each callback has saved.
    """
    parts = ["<h1>Plasticity</h1>", f"<p>{escape(_INTRO)}</p>"]
    for run in runs:
        parts += _section(run)
    return _PAGE.substitute(title=escape(", ".join(dict.fromkeys(run.source for run in runs))), body="\n".join(parts))


def summary(history: History) -> str:
    """Return how many tasks, alarms and repairs there were, in a sentence.

    Example:
        >>> from lightning_plasticity import TaskReport
        >>> summary(History([TaskReport(0, None, 0), TaskReport(1, None, 200, collapsed=True)]))
        '2 tasks, 1 alarm (the first at task 1), 0 repairs.'
    """
    number = counts(history)
    first = next((f" (the first at task {report.task})" for report in history if report.collapsed), "")
    tasks, alarms, repairs = (
        f"{n:.0f} {noun}{'s' * (n != 1)}"
        for n, noun in ((len(history), "task"), (number["alarms"], "alarm"), (number["repairs"], "repair"))
    )
    return f"{tasks}, {alarms}{first}, {repairs}."


def _section(run: SavedRun) -> list[str]:
    history = run.history
    parts = [f"<h2>{'Summary' if run.name is None else escape(run.name)}</h2>", f"<p>{summary(history)}</p>"]
    parts.append(f"<p>Source: {escape(run.source)}.</p>")
    if not history:
        return parts
    parts += [_image(name, figure) for name, figure in _figures(history)]
    columns, rows = history.to_table()
    kinds = ["alarm" if report.collapsed else "" for report in history]
    parts += ["<h3>Tasks</h3>", _table(columns, rows, kinds)]
    parts += ["<h3>Alarms and repairs</h3>", *map(_from_markdown, run.events)]
    parts += [] if run.events else ["<p>None.</p>"]
    notes = [
        [str(report.task), place, text]
        for report in history
        for place, text in [*report.errors.items(), *(("remark", remark) for remark in report.remarks)]
    ]
    parts.append("<h3>Errors and remarks</h3>")
    parts.append(_table(["task", "error of", "what happened"], notes) if notes else "<p>None.</p>")
    parts += ["<h3>What the numbers mean</h3>", "<p>Values are those of the last task that was measured.</p>"]
    parts.append(_table(["name", "value", "fresh network", "meaning"], _meanings(history)))
    return parts


def _figures(history: History) -> Iterable[tuple[str, Figure]]:
    """Yield the figures that the history has values for, by name."""
    if any(report.metrics for report in history):
        yield "overview", plot_history(history, metric=own_metric(history))[0]
    if any(report.spectrum is not None for report in history):
        yield "spectra", plot_spectra(history)[0]
    if any(name.startswith("dormant_fraction/") for report in history for name in report.metrics):
        yield "units", plot_units(history)[0]


def _meanings(history: History) -> list[list[str]]:
    """Return the name, value, value of a fresh network and meaning of each number of the whole network."""
    last = next((report for report in reversed(history) if report.metrics), history[-1])
    values = {"alarms": counts(history)["alarms"], "repairs": counts(history)["repairs"], **last.metrics}
    return [
        [name, f"{values[name]:.4g}", f"{last.fresh[name]:.4g}" if name in last.fresh else "", number.meaning]
        for name, number in LOGGED_NUMBERS.items()
        if name in values
    ]


def _image(name: str, figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    data = base64.b64encode(file.getvalue()).decode()
    width = round(100 * figure.get_figwidth())
    caption = _CAPTIONS[name]
    return (
        f'<figure><img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] | None = None) -> str:
    """Return an HTML table.

    Args:
        columns: The titles of the columns.
        rows: The cells of each row.
        kinds: The class of each row, for its style.
    """
    lines = ["<table>", f"<tr>{''.join(f'<th>{escape(title)}</th>' for title in columns)}</tr>"]
    for row, kind in zip(rows, kinds or [""] * len(rows), strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _from_markdown(text: str) -> str:
    """Return the HTML of a paragraph and a list, which is all that the Markdown of an event has."""
    heading, _, items = text.partition("\n\n")
    lines = [f"<li>{_bold(item.removeprefix('- '))}</li>" for item in items.splitlines()]
    if "**Repair**" not in items:
        lines.append("<li>Nothing was repaired.</li>")
    return "\n".join([f"<p>{_bold(heading)}</p>", "<ul>", *lines, "</ul>"])


def _bold(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
