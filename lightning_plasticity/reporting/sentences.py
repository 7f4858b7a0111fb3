"""Say in sentences what happened at a task."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.interventions import Intervention, Repair, RepairReport
from lightning_plasticity.reporting.names import EXPLAINING, LOGGED_NUMBERS
from lightning_plasticity.reports import TaskReport

SINGLE_POINT = (
    "one task so far, and a single point is no curve: fit again with this callback for the next task, or let tasks "
    "start within a fit by SpectralCollapseCallback(task_detector=TaskDetector(every_n_epochs=...))"
)
"""What is said after a first fit that was one task."""


def repair_sentence(report: TaskReport, repairs: Sequence[RepairReport]) -> str:
    """Return what the repairs at the start of a task did, and the numbers before and after.

    Args:
        report: The report of the task.
        repairs: The repairs that have followed its verdict.

    Example:
        >>> repair = RepairReport("ShrinkPerturb", num_parameters_changed=8970)
        >>> print(repair_sentence(TaskReport(12, None, 600, effect="handicap 2.31 → 0.97"), [repair]))
        task 12: ShrinkPerturb: 8970 parameters changed; handicap 2.31 → 0.97
    """
    acts = [f"{repair}, undone" if repair.undone else str(repair) for repair in repairs]
    return f"task {report.task}: {'; '.join([*acts, *filter(None, [report.effect])])}"


def why_nothing_was_done(interventions: Sequence[Intervention]) -> str | None:
    """Return why no repair follows any alarm; ``None`` if one can, and has failed with a message of its own.

    Args:
        interventions: The interventions of the callback.

    Example:
        >>> print(why_nothing_was_done([]))
        nothing is repaired at an alarm, since the callback has no interventions: write
        SpectralCollapseCallback(interventions=[ShrinkPerturb()])
    """
    if not interventions:
        return (
            "nothing is repaired at an alarm, since the callback has no interventions: write "
            "SpectralCollapseCallback(interventions=[ShrinkPerturb()])"
        )
    if not any(isinstance(each, Repair) and isinstance(each.when, str) for each in interventions):
        names = ", ".join(intervention.name for intervention in interventions)
        return f"nothing is repaired at an alarm, since {names} run at other times: when='collapse' lets a repair do so"
    return None


def verdict_in_short(report: TaskReport, watched: str) -> str:
    """Return the verdict about a task for a progress bar.

    Example:
        >>> verdict_in_short(TaskReport(12, None, 600, metrics={"handicap": 2.312}, collapsed=True), "handicap")
        'alarm, handicap 2.31'
    """
    verdict = "alarm" if report.collapsed else "no alarm"
    value = report.metrics.get(watched)
    return verdict if value is None else f"{verdict}, {DIAGNOSTICS[watched].title} {value:.3g}"


def events(report: TaskReport, repairs: Sequence[RepairReport]) -> str:
    """Return the alarm and the repairs of a task as lines of Markdown; empty if there was none.

    Args:
        report: The report of the task.
        repairs: The repairs that have followed its verdict.

    Example:
        >>> print(events(TaskReport(12, "cats", 600, collapsed=True, verdict="task 12: handicap 2.31, above 1.25"), []))
        **Task 12** (cats), step 600
        <BLANKLINE>
        - **Alarm** ▼ handicap 2.31, above 1.25
    """
    prefix = f"task {report.task}: "
    lines = [f"- **Alarm** ▼ {report.verdict.removeprefix(prefix)}"] if report.collapsed else []
    if repairs:
        lines.append(f"- **Repair** ▲ {repair_sentence(report, repairs).removeprefix(prefix)}")
    name = "" if report.task_id is None else f" ({report.task_id})"
    return "\n".join([f"**Task {report.task}**{name}, step {report.step}", "", *lines]) if lines else ""


def explanation_page(name: str | None = None) -> str:
    """Return what the quantities in TensorBoard mean, as Markdown.

    Args:
        name: The name of the callback.
    """
    shown = ["handicap", "live_metric_gap", *EXPLAINING, "fit_loss", "alarms", "repairs", "collapsed"]
    rows = [f"- **{number}**: {LOGGED_NUMBERS[number].meaning}" for number in shown]
    intro = (
        "At the start of every task copies of the network and of its initial weights are trained for a few steps. An "
        "alarm ▼ means that the initial weights would learn the task better. Compare each number with that of the "
        "fresh network, and with its first tasks."
    )
    title = "Plasticity" if name is None else f"Plasticity of {name}"
    return "\n".join([f"### {title}", "", intro, "", *rows])
