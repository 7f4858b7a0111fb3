"""Decide whether the value of a diagnostic at the start of a task is a collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_plasticity._validation import as_float
from lightning_plasticity.curvature import Estimate
from lightning_plasticity.diagnostics import DIAGNOSTICS, Diagnostic, is_resolved

Reference = Literal["best", "initial", "first"]

_HANDICAP = 1.25
"""Handicap above which a fresh network is better off."""

_METRIC_GAP = 0.05
"""Gap of a metric above which a fresh network is better off: 5 points of an accuracy."""

_SHARE = 0.8
"""Share of its reference below which any other diagnostic has collapsed."""

_COMPARISONS = ("handicap", "fit_gap", "live_metric_gap")
"""Diagnostics that compare a network with its initial weights."""

_LOSING = "the network is losing its plasticity"

MIN_SAMPLES = 8
"""Number of samples that a verdict needs: on fewer, most values depend on which samples were drawn."""


@dataclass(frozen=True)
class Verdict:
    """The decision of :class:`Collapse` at the start of one task.

    Args:
        collapsed: Whether the value is beyond the threshold.
        message: One sentence with the numbers.
        inconclusive: Whether there is no decision, because a number that it depends on is not resolved, or was measured
            on too few samples.
    """

    collapsed: bool
    message: str
    inconclusive: bool = False


@dataclass(frozen=True)
class Collapse:
    """The rule for an alarm: a diagnostic at the start of a task is beyond a threshold.

    By default the alarm means that a fresh network would learn the task better: the handicap of the network is above
    1.25 by more than its standard error. The threshold was chosen on some streams of tasks and confirmed on others; see
    docs/evidence.md.

    The verdict is inconclusive if the diagnostic is the rank of an estimated spectrum and is not resolved, if the
    threshold lies within the bracket of a learnable fraction, or if fewer than 8 samples were measured.

    Args:
        metric: Name of the diagnostic: a key of :data:`lightning_plasticity.diagnostics.DIAGNOSTICS` that is measured.
        below: The threshold of a diagnostic that falls in a collapse: a fraction of the reference, in (0, 1], by
            default 0.8. Without a reference, the value itself.
        above: The threshold of a diagnostic that rises in a collapse, such as ``"dormant_fraction"``: a multiple of the
            reference. Without a reference, the value itself. By default 1.25 for the handicap, and 0.05 for
            ``"live_metric_gap"``.
        relative_to: The reference: ``"best"``, the best value at the start of any task so far, this one included;
            ``"initial"``, the value of the network's initial weights on the same batch; ``"first"``, the value at the
            first task; ``None``, no reference, the only choice for diagnostics that can be negative. By default
            ``"best"`` for diagnostics that fall, and none for those that rise. Of earlier tasks only those count that
            were measured on as many samples, with as many outputs, and while the same parameters were trained.

    Raises:
        ValueError: If an argument has any other value.

    Example:
        >>> Collapse().evaluate(1.7, earlier=[1.0, 0.9, 1.2], initial=1.0).collapsed
        True
        >>> verdict = Collapse("learnable_fraction").evaluate(0.63, earlier=[0.80, 0.86, 0.95], initial=0.80)
        >>> print(verdict.message)
        task 3: learnable fraction 0.63, 66 % of its best (task 2) and 79 % of what the initial weights would have on
        this batch: the network is losing its plasticity
    """

    metric: str = "handicap"
    below: float | None = None
    above: float | None = None
    relative_to: Reference | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or self.metric not in DIAGNOSTICS:
            raise ValueError(f"Collapse(metric={self.metric!r}) is not a diagnostic; choose one of {list(DIAGNOSTICS)}")
        diagnostic = DIAGNOSTICS[self.metric]
        call = f"Collapse(metric={self.metric!r}"
        if diagnostic.higher_is_better and self.above is not None:
            raise ValueError(f"{call}, above={self.above!r}): it falls when a network collapses; write below=")
        if not diagnostic.higher_is_better and self.below is not None:
            raise ValueError(f"{call}, below={self.below!r}): it rises when a network collapses; write above=")
        if self.relative_to not in (*get_args(Reference), "auto", None):
            raise ValueError(
                f"Collapse(relative_to={self.relative_to!r}) is not a reference; choose one of "
                f"{[*get_args(Reference), None]}"
            )
        if self.metric in _COMPARISONS and self._reference == "initial":
            raise ValueError(
                f"{call}, relative_to='initial'): it is itself a comparison with the initial weights; write "
                "relative_to=None"
            )
        if diagnostic.can_be_negative and self._reference is not None:
            raise ValueError(
                f"{call}, relative_to={self._reference!r}): it can be negative, so a share of it is no threshold; "
                "write relative_to=None and the value itself"
            )
        self._check_threshold(diagnostic)

    def _check_threshold(self, diagnostic: Diagnostic) -> None:
        name = "below" if diagnostic.higher_is_better else "above"
        given = getattr(self, name)
        if given is None and self._default_threshold is None:
            raise ValueError(f"Collapse(metric={self.metric!r}) needs a threshold: write {name}=")
        threshold = as_float(self._threshold)
        if diagnostic.can_be_negative:
            allowed = "" if math.isfinite(threshold) else "a finite number"
        elif diagnostic.higher_is_better and (self._reference is not None or diagnostic.is_fraction):
            allowed = "" if 0 < threshold <= 1 else "in (0, 1]: a share, 0.8 for 80 %"
        else:
            allowed = "" if 0 < threshold < math.inf else "a positive number"
        if allowed:
            raise ValueError(f"Collapse({name}={given!r}) must be {allowed}")

    @property
    def _reference(self) -> Reference | None:
        if self.relative_to != "auto":
            return self.relative_to
        return "best" if DIAGNOSTICS[self.metric].higher_is_better else None

    @property
    def compares_tasks(self) -> bool:
        """Whether the threshold depends on earlier tasks."""
        return self._reference in ("best", "first")

    @property
    def _default_threshold(self) -> float | None:
        if self.metric == "handicap":
            return _HANDICAP
        if self.metric == "live_metric_gap":
            return _METRIC_GAP
        diagnostic = DIAGNOSTICS[self.metric]
        return _SHARE if diagnostic.higher_is_better and not diagnostic.can_be_negative else None

    @property
    def _threshold(self) -> Any:
        given = self.below if DIAGNOSTICS[self.metric].higher_is_better else self.above
        return self._default_threshold if given is None else given

    def is_worse(self, value: float, before: float) -> bool:
        """Return whether a value is worse than before by more than its noise; ``False`` if one of them is not a number.

        Example:
            >>> Collapse("learnable_fraction").is_worse(0.5, 0.6), Collapse("handicap").is_worse(1.1, 2.0)
            (True, False)
        """
        return (
            value < before if DIAGNOSTICS[self.metric].higher_is_better else value - _noise(self.metric, value) > before
        )

    def evaluate(
        self,
        value: float,
        *,
        earlier: Sequence[float | None],
        initial: float,
        samples: int | None = None,
        differences: str = "",
        explanation: str = "",
    ) -> Verdict:
        """Decide whether the value of the metric at the start of a task is a collapse.

        Args:
            value: The value at the start of this task.
            earlier: The values at the start of all earlier tasks, first task first; ``None`` where the probe failed,
                the value was not resolved, or it cannot be compared.
            initial: The value of the initial weights on the batch of this task.
            samples: Number of samples that were measured; ``None`` if it is not known.
            differences: What no earlier task has in common with this one, if none can be compared.
            explanation: What other numbers say about the task, for the message of an alarm.
        """
        task, diagnostic = len(earlier), DIAGNOSTICS[self.metric]
        reason = self._reason_inconclusive(value, initial, samples)
        if reason is not None:
            return Verdict(False, f"task {task}: {diagnostic.title} {reason}", inconclusive=True)
        # A bracket may tell on which side of the threshold a value is although it is too wide to be a reference.
        is_wide = not is_resolved(self.metric, value) and any(number is not None for number in earlier)
        values = enumerate([*earlier, None if is_wide else value])
        known = [(known, number) for number, known in values if known is not None and not math.isnan(known)]
        pick = max if diagnostic.higher_is_better else min
        first, best = known[0], pick(known, key=lambda pair: pair[0])
        references = {"best": best[0], "first": first[0], "initial": initial, None: 1.0}
        threshold = self._threshold * references[self._reference]
        # A network is as good as a fresh one until the difference exceeds its noise.
        noise = _noise(self.metric, value)
        collapsed = value < threshold if diagnostic.higher_is_better else value - noise > threshold
        if is_wide and isinstance(value, Estimate):
            collapsed = value.hi < threshold
            if value.lo < threshold <= value.hi:
                message = f"task {task}: {diagnostic.title} {_explain_unresolved(value, self.metric)}"
                return Verdict(False, message, inconclusive=True)

        comparisons = []
        if diagnostic.can_be_negative or (not diagnostic.higher_is_better and self._reference is None):
            side = "below" if diagnostic.higher_is_better else "above"
            comparisons.append(f"{side if collapsed else f'not {side}'} {self._threshold:g}")
        elif self._reference == "first":
            comparisons.append(_percentage(value, first[0], f"of its first (task {first[1]})"))
        else:
            comparisons.append(_percentage(value, best[0], f"of its best (task {best[1]})"))
        is_comparison = self.metric in _COMPARISONS
        if not diagnostic.can_be_negative and not is_comparison and is_resolved(self.metric, initial):
            comparisons.append(_percentage(value, initial, "of what the initial weights would have on this batch"))
        shown = f"{value:.2f}" if diagnostic.is_fraction else f"{value:.3g}"
        message = f"task {task}: {diagnostic.title} {shown}, " + " and ".join(comparisons)
        if differences:
            message += f" (not comparable with any earlier task, for {differences}: it counts as a new first task)"
        if collapsed:
            meaning = "a fresh network would learn this task better" if is_comparison else _LOSING
            message += f": {meaning}" + (f" ({explanation})" if explanation else "")
        return Verdict(collapsed, message)

    def _reason_inconclusive(self, value: float, initial: float, samples: int | None) -> str | None:
        """Return why there is no verdict on a value, or ``None`` if there is one."""
        if samples is not None and samples < MIN_SAMPLES:
            return (
                f"was measured on {samples} samples, fewer than the {MIN_SAMPLES} that a verdict needs, so it is "
                "unknown whether this is a collapse"
            )
        if math.isnan(value):
            return "is not a number, so it is unknown whether this is a collapse"
        if not is_resolved(self.metric, value) and DIAGNOSTICS[self.metric].source != "kernel":
            return _explain_unresolved(value, self.metric)
        if self._reference == "initial" and not is_resolved(self.metric, initial):
            return f"of the initial weights on this batch {_explain_unresolved(initial, self.metric)}"
        return None


def _noise(metric: str, value: float) -> float:
    """Return the standard error of a result of the fit test; 0 for other numbers, or if it is not known."""
    if DIAGNOSTICS[metric].source != "fit" or not isinstance(value, Estimate):
        return 0.0
    return value.standard_error if math.isfinite(value.standard_error) else 0.0


def _explain_unresolved(value: float, metric: str) -> str:
    interval, advice = "", "raise num_steps of the probe"
    if isinstance(value, Estimate):
        low, high = max(value.lo - value.half_width, 0.0), value.hi + value.half_width
        if math.isfinite(value.half_width):
            interval = f" (it is somewhere between {low:.3g} and {high:.3g})"
        # More start vectors help only if the standard error, not the bracket, is wide.
        if not value.half_width <= (value.hi - value.lo) / 2:
            advice = "raise num_probes of the probe"
    if DIAGNOSTICS[metric].source == "kernel":
        return f"is not resolved{interval}, so it is unknown whether this is a collapse: raise max_steps of the probe"
    return (
        f"is not resolved{interval}, so it is unknown whether this is a collapse: {advice}, or let Collapse watch a "
        "number that needs less of either, such as 'learnable_fraction' or 'hessian_effective_rank'"
    )


def _percentage(value: float, reference: float, of_what: str) -> str:
    return f"{value / reference:.0%}".replace("%", " %") + f" {of_what}" if reference > 0 else f"0 {of_what}"
