"""Enter the verdict about a task in its report, and what is to be said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_plasticity.collapse import MIN_SAMPLES, Collapse
from lightning_plasticity.diagnostics import DIAGNOSTICS, resolved_value
from lightning_plasticity.engine.explanation import explain
from lightning_plasticity.messages import MisconfigurationError, rank_zero_info
from lightning_plasticity.reports import TaskReport

_FEW_SAMPLES = 16
"""Number of samples below which a warning says that they are few."""

_ADVICE_ON_SAMPLES = "take larger batches, or pass SpectralCollapseCallback(probe_batch=...)"


class Verdicts:
    """The verdicts and remarks of a run.

    Args:
        collapse: The rule.
    """

    def __init__(self, collapse: Collapse) -> None:
        self.collapse = collapse
        self._warned_of_few_samples = False
        self._logged_remarks: set[str] = set()

    def enter(
        self,
        report: TaskReport,
        values: Mapping[str, float],
        references: Mapping[str, float],
        history: Sequence[TaskReport],
        samples: int | None,
    ) -> str | None:
        """Enter the verdict in a report that holds all numbers, and return the text of a warning, if any.

        Args:
            report: The report.
            values: The diagnostics of the network.
            references: Those of its initial weights.
            history: The reports of all earlier tasks.
            samples: Number of samples that were measured; ``None`` if it does not matter.

        Raises:
            MisconfigurationError: If the number that the rule watches has never been measured.
        """
        metric = self.collapse.metric
        measured = [earlier for earlier in history if earlier.metrics]
        # A fit test may run and yet define no number, as where both copies diverge.
        if metric not in values and not measured and DIAGNOSTICS[metric].source != "fit":
            raise MisconfigurationError(
                f"Collapse(metric={metric!r}) watches what could not be measured ({'; '.join(report.remarks)}): choose "
                f"one of {[name for name in values if name != metric]}"
            )
        compared = measured if self.collapse.compares_tasks else []
        differences = [report.differences(earlier) for earlier in compared]
        verdict = self.collapse.evaluate(
            values.get(metric, math.nan),
            earlier=[
                None if report.differences(earlier) else resolved_value(earlier.metrics, metric) for earlier in history
            ],
            initial=references.get(metric, math.nan),
            samples=samples,
            differences=" and ".join(differences[-1]) if differences and all(differences) else "",
            explanation=explain(values, references, history),
        )
        report.collapsed, report.verdict = verdict.collapsed, verdict.message
        is_first_of_few = samples is not None and samples < _FEW_SAMPLES and not self._warned_of_few_samples
        self._warned_of_few_samples |= is_first_of_few
        if verdict.inconclusive or (differences and all(differences)):
            self.remark(report, verdict.message)
        if samples is not None and samples < MIN_SAMPLES:
            return f"{verdict.message}: {_ADVICE_ON_SAMPLES}" if is_first_of_few else None
        messages = [verdict.message] if verdict.collapsed or verdict.inconclusive else []
        if is_first_of_few:
            messages.append(
                f"task {report.task} was measured on {samples} samples: below {_FEW_SAMPLES}, the numbers depend on "
                f"which samples were drawn, and an alarm may be false: {_ADVICE_ON_SAMPLES}"
            )
        return "; ".join(messages) or None

    def remark(self, report: TaskReport, *remarks: str) -> None:
        """Add remarks to the report, and to the log on rank 0 if they are new."""
        for remark in remarks:
            report.remarks.append(remark)
            if remark not in self._logged_remarks:
                self._logged_remarks.add(remark)
                rank_zero_info(remark if remark.startswith("task ") else f"task {report.task}: {remark}")
