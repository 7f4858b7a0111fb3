"""Define the names of all logged numbers, with their meanings and the groups that they are logged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.reports import TaskReport

EXPLAINING = ("learnable_fraction", "epsilon_rank", "hessian_epsilon_rank", "dormant_fraction")
"""The lead diagnostics beside the one that raises the alarm, where they are measured."""

COMPARED = ("fit_loss", *EXPLAINING)
"""The diagnostics that are logged of a fresh network, too."""

COMPARISONS = ("handicap", "live_metric_gap")
"""The lead diagnostics that compare a network with a fresh one: by default one of them raises the alarm."""

_RATIO = "_vs_initial"


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
        """Prefix of the lead numbers of a task, against the number of optimizer steps over all fits."""
        return f"{self._base}/"

    @property
    def by_task(self) -> str:
        """Prefix of the lead numbers of a task, against the number of the task."""
        return f"{self._base}_by_task/"

    @property
    def fresh(self) -> str:
        """Prefix of numbers of the initial weights, against the number of the task."""
        return f"{self._base}_fresh_network/"

    @property
    def parts(self) -> str:
        """Prefix of the lead numbers of parts of the network, against the number of optimizer steps over all fits."""
        return f"{self._base}_parts/"

    @property
    def details(self) -> str:
        """Prefix of all other numbers of a task, against the number of optimizer steps over all fits."""
        return f"{self._base}_details/"

    @property
    def layers(self) -> str:
        """Prefix of numbers of single layers, against the number of optimizer steps over all fits."""
        return f"{self._base}_layers/"

    @property
    def in_training(self) -> str:
        """Prefix of numbers measured during training, against the number of optimizer steps over all fits."""
        return f"{self._base}_training/"

    @property
    def figures(self) -> str:
        """Prefix of figures, against the number of the task."""
        return f"{self._base}_figures/"

    @property
    def events(self) -> str:
        """Name of the texts about alarms and repairs, where texts are files."""
        return f"{self._base}_events"

    @property
    def table(self) -> str:
        """Name of the table of tasks."""
        return f"{self._base}_tasks"

    @property
    def _base(self) -> str:
        return "plasticity" if self.name is None else f"plasticity_{self.name}"


@dataclass(frozen=True)
class LoggedNumber:
    """A number that is logged.

    Args:
        name: Its name without the group.
        meaning: Its definition in one line.
        groups: The attributes of :class:`LogGroups` that are its groups.
    """

    name: str
    meaning: str
    groups: tuple[str, ...]


def _groups_of(diagnostic: str) -> tuple[str, ...]:
    if diagnostic in (*COMPARISONS, *EXPLAINING):
        groups: tuple[str, ...] = ("by_step", "by_task")
    else:
        groups = ("by_task", "details") if diagnostic == "fit_loss" else ("details",)
    return (*groups, "fresh") if diagnostic in COMPARED else groups


LOGGED_NUMBERS: dict[str, LoggedNumber] = {
    number.name: number
    for number in (
        LoggedNumber("alarms", "number of tasks so far with an alarm", ("by_step", "by_task")),
        LoggedNumber(
            "repairs",
            "number of repairs so far that changed a weight and were not undone",
            ("by_step", "by_task"),
        ),
        LoggedNumber("collapsed", "1 if the verdict was a collapse, which is an alarm, else 0", ("by_task",)),
        *(LoggedNumber(name, DIAGNOSTICS[name].meaning, _groups_of(name)) for name in DIAGNOSTICS),
        LoggedNumber(
            "<name>_vs_initial",
            "of the numbers that are logged by default, and of the fit loss: divided by that of the initial weights on "
            "the same samples, where that one is known and not zero",
            ("details",),
        ),
        LoggedNumber(
            "<name>_standard_error",
            "of the numbers that are means over batches or start vectors",
            ("details",),
        ),
        LoggedNumber(
            "<name>_lo",
            "lower end of the bracket of a number of the tangent kernel, where it was measured by products or its "
            "matrix was not diagonalised",
            ("details",),
        ),
        LoggedNumber("<name>_hi", "upper end of that bracket", ("details",)),
        LoggedNumber(
            "<name>_resolved",
            "of the Hessian's ε-ranks and of a bracket: 1 if the number is known to 10 %, else 0",
            ("details",),
        ),
        LoggedNumber(
            "<name>_before_repair",
            "after the verdict of a live fit test: on the batch at hand, before the repairs of the task",
            ("details",),
        ),
        LoggedNumber("<name>_after_repair", "after the repairs of the task, on the same samples", ("details",)),
        LoggedNumber("probe_loss", "the loss on the probe's samples", ("details",)),
        LoggedNumber("probe_samples", "number of samples that were measured", ("details",)),
        LoggedNumber(
            "probe_failed", "1 if the probe failed, with the reason in `errors` of the `TaskReport`", ("details",)
        ),
        LoggedNumber("<name>/<layer>", "a number of the hidden activations, of one layer", ("layers", "in_training")),
        LoggedNumber(
            "<name>/<part>", "a number of a part of the network, with `GGNProbe(parts=...)`", ("parts", "details")
        ),
        LoggedNumber(
            "<Intervention>/penalty",
            "the value of a regularizer's term; of several of one class, `<Intervention>_2` and so on",
            ("in_training",),
        ),
        LoggedNumber(
            "<Intervention>/units", "number of units that an intervention has reset at this step", ("in_training",)
        ),
        LoggedNumber(
            "<Intervention>/parameters",
            "number of weights that an intervention which does not work by units has changed at this step",
            ("in_training",),
        ),
    )
}
"""All logged numbers, in the order of the table in docs/numbers.md."""


def counts(history: Sequence[TaskReport]) -> dict[str, float]:
    """Return the number of alarms and of repairs so far.

    Example:
        >>> counts([TaskReport(0, None, 0), TaskReport(1, None, 200, collapsed=True)])
        {'alarms': 1.0, 'repairs': 0.0}
    """
    repairs = [repair for report in history for repair in report.repairs]
    return {
        "alarms": float(sum(report.collapsed for report in history)),
        "repairs": float(sum(repair.num_parameters_changed > 0 and not repair.undone for repair in repairs)),
    }


def lead_diagnostics(watched: str) -> list[str]:
    """Return the names of the lead diagnostics: one that compares the network with a fresh one, and a few that explain.

    Args:
        watched: The diagnostic that raises the alarm.

    Example:
        >>> lead_diagnostics("live_metric_gap")
        ['live_metric_gap', 'learnable_fraction', 'epsilon_rank', 'hessian_epsilon_rank', 'dormant_fraction']
    """
    comparison = [] if DIAGNOSTICS[watched].source == "fit" else ["handicap"]
    return list(dict.fromkeys([watched, *comparison, *EXPLAINING]))


def lead_numbers(history: Sequence[TaskReport], watched: str) -> dict[str, float]:
    """Return the lead numbers of the last task: the few that tell whether plasticity is lost, and the counts.

    Args:
        history: The reports of all tasks.
        watched: The diagnostic that raises the alarm.
    """
    metrics = history[-1].metrics
    return {**{name: metrics[name] for name in lead_diagnostics(watched) if name in metrics}, **counts(history)}


def monitored_numbers(history: Sequence[TaskReport], watched: str) -> dict[str, float]:
    """Return what ``trainer.callback_metrics`` holds of the last task: the lead numbers, their ratios and the verdict.

    Args:
        history: The reports of all tasks.
        watched: The diagnostic that raises the alarm.
    """
    metrics = history[-1].metrics
    names = ["fit_loss", *COMPARISONS, *lead_diagnostics(watched)]
    return {
        **lead_numbers(history, watched),
        **{name: metrics[name] for name in (*names, *(name + _RATIO for name in names)) if name in metrics},
        "collapsed": float(history[-1].collapsed),
    }


def own_metric(history: Sequence[TaskReport]) -> str | None:
    """Return the number that the module logs that tells most of its success: the first that is not a loss, if any."""
    names = list(dict.fromkeys(name for report in history for name in report.logged))
    return next((name for name in names if "loss" not in name), next(iter(names), None))


def logged_numbers(
    history: Sequence[TaskReport], watched: str, groups: LogGroups = LogGroups(), *, everything: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers of the last task under their logged names.

    Args:
        history: The reports of all tasks.
        watched: The diagnostic that raises the alarm.
        groups: The prefixes of the names.
        everything: Whether to return the groups of details and layers as well.

    Returns:
        The numbers by optimizer step, and those by task.
    """
    report, lead = history[-1], lead_numbers(history, watched)
    by_step = _prefixed(groups.by_step, lead)
    by_task = _prefixed(groups.by_task, lead)
    by_task |= _prefixed(groups.by_task, {n: report.metrics[n] for n in ("fit_loss",) if n in report.metrics})
    by_task[groups.by_task + "collapsed"] = float(report.collapsed)
    by_task |= _prefixed(groups.fresh, {name: report.fresh[name] for name in COMPARED if name in report.fresh})
    by_step |= _prefixed(groups.parts, {name: v for name, v in report.metrics.items() if _is_of_part(name)})
    if everything:
        by_step |= _prefixed(groups.layers, {name: v for name, v in report.metrics.items() if _is_of_layer(name)})
        by_step |= _prefixed(groups.details, _details(report, lead))
    return by_step, by_task


def _details(report: TaskReport, lead: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers that have no other group by optimizer step."""
    known = {
        **report.metrics,
        **{f"{name}_before_repair": value for name, value in report.before.items()},
        **{f"{name}_after_repair": value for name, value in report.after.items()},
    }
    with_ratio = ("fit_loss", *lead)
    details = {
        name: value
        for name, value in known.items()
        if not (name in lead or _is_of_layer(name) or _is_of_part(name))
        and (_RATIO not in name or name.partition(_RATIO)[0] in with_ratio)
    }
    return {**details, "probe_failed": float(not report.metrics)}


def _is_of_layer(name: str) -> bool:
    measure, slash, _ = name.partition("/")
    return bool(slash) and measure in DIAGNOSTICS and DIAGNOSTICS[measure].source == "features"


def _is_of_part(name: str) -> bool:
    """Return whether this is a lead number of a part of the network."""
    return "/" in name and name.partition("/")[0] in EXPLAINING and not _is_of_layer(name)


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in values.items()}
