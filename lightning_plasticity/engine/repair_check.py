"""Measure a network once more after its repairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_plasticity.collapse import MIN_SAMPLES, Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import Estimate
from lightning_plasticity.diagnostics import DIAGNOSTICS, to_log_dict
from lightning_plasticity.distributed.agreement import all_or_none, broadcast_object
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.fits_at_hand import FitsAtHand
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.measurements import Measurement, Measurements, compared, plan_of
from lightning_plasticity.engine.verdicts import Verdicts
from lightning_plasticity.fit_curve import FitCurve
from lightning_plasticity.messages import rank_zero_info
from lightning_plasticity.reports import TaskReport


@dataclass(frozen=True)
class Fresh:
    """What a network is compared with at a task.

    Args:
        measurement: The initial weights on the samples of the task.
        best_rank: The result of :func:`~lightning_plasticity.engine.measurements.best_rank`.
    """

    measurement: Measurement
    best_rank: float


class RepairCheck:
    """The numbers of a network before and after the repairs at the start of a task.

    Args:
        measurements: What is measured.
        initial_weights: The weights of a fresh network.
        verdicts: Holds the rule, and enters remarks in reports.
        errors: Where errors are recorded.
    """

    def __init__(
        self, measurements: Measurements, initial_weights: InitialWeights, *, verdicts: Verdicts, errors: ErrorLog
    ) -> None:
        self.fresh: Fresh | None = None
        """The fresh network on the samples of the last task; ``None`` if nothing was measured."""
        self._measurements = measurements
        self._initial_weights = initial_weights
        self._verdicts = verdicts
        self._errors = errors
        self._fits_at_hand: FitsAtHand | None = None

    def measure_before(self, context: ProbeContext, report: TaskReport) -> None:
        """Fit copies of the model to the batch at hand, if its fit test is live: a repaired one is compared with them.

        Args:
            context: The model and the batch, the same on all ranks.
            report: The report of the task.
        """
        self._fits_at_hand = None
        if not self._measurements.is_live:
            return
        size = context.batch_size
        if size is not None and size < MIN_SAMPLES:
            self._verdicts.remark(
                report,
                f"the repaired network is not measured: the batch at hand holds {size} samples, fewer than "
                f"{MIN_SAMPLES}",
            )
            return
        whole = replace(context, whole_batch=report.coupled)
        try:
            with all_or_none(), context.preserve_training_state():
                fits = FitsAtHand(self._measurements, whole, self._initial_weights.values)
            report.before = broadcast_object(fits.before)
        except Exception as error:
            self._errors.record("fit_test", "the network could not be measured before its repairs", error)
            return
        finally:
            context.discard_copy()
        self._verdicts.remark(report, *filter(None, [fits.remark]))
        self._fits_at_hand = fits

    def measure_after(self, context: ProbeContext, report: TaskReport, repairs: Sequence[str]) -> bool:
        """Measure a repaired model on the samples of its task, and enter the numbers in the report.

        Args:
            context: The context of the repairs.
            report: The report of the task.
            repairs: The names of the repairs.

        Returns:
            Whether the number that the verdict depends on is worse than before. After a live fit test, whether the
            handicap on the batch at hand is, and a fresh network is better there, too: a network that has trained on
            the task always loses something by a repair.
        """
        fits = self._fits_at_hand
        if fits is None and (self._measurements.is_live or self.fresh is None or not report.metrics):
            return False
        try:
            with gather_full_parameters(context.model), all_or_none(), context.preserve_training_state():
                report.after = self._measure_again(context, report) if fits is None else fits.measure(context)
        except Exception as error:
            self._errors.record("probe", "the repaired network could not be measured", error)
            return False
        finally:
            context.discard_copy()
        report.after = broadcast_object(report.after)
        # A number that is logged in training is not among those of the batch at hand.
        rule = self._verdicts.collapse if fits is None or self._verdicts.collapse.metric in fits.before else Collapse()
        before, noise = report.before or report.metrics, report.after.get(f"{rule.metric}_standard_error", 0.0)
        after = Estimate(report.after.get(rule.metric, math.nan), standard_error=noise)
        is_worse = rule.is_worse(after, before.get(rule.metric, math.nan))
        if fits is not None and is_worse:
            handicap = Estimate(report.after.get("handicap", math.nan), standard_error=noise)
            is_worse = Collapse().evaluate(handicap, earlier=[], initial=math.nan).collapsed
        fresh = FitCurve(report.fresh_fit_curve) if report.fresh_fit_curve else None
        changes = _changes(before, report.after, rule.metric, fresh if fits is None else fits.fresh)
        where = "" if fits is None else "on the batch at hand, "
        report.effect = f"{where}{changes}{': worse than before' if is_worse else ''}"
        message = f"task {report.task}: after {' and '.join(repairs)}, {report.effect}"
        # A repair of a healthy network, as at every task, costs something.
        (self._errors.warn if is_worse and report.collapsed else rank_zero_info)(message)
        return is_worse

    def _measure_again(self, context: ProbeContext, report: TaskReport) -> dict[str, float]:
        """Return the numbers of a repaired model on the samples of its task."""
        assert self.fresh is not None
        samples = report.metrics.get("probe_samples")
        same = replace(context, max_samples=None if samples is None else int(samples), whole_batch=report.coupled)
        plan = plan_of(same, report)
        measured = self._measurements.measure(same, "probing the repaired network", plan, may_lack_fit=True)
        return to_log_dict(compared(measured, self.fresh.measurement, self.fresh.best_rank), {})


def _changes(before: Mapping[str, float], after: Mapping[str, float], metric: str, fresh: FitCurve | None) -> str:
    """Return how the numbers of a task have changed by its repairs."""
    names = dict.fromkeys(name for name in (metric, "fit_loss") if name in before and name in after)
    changes = [f"{DIAGNOSTICS[n].title} {before[n]:.3g} → {after[n]:.3g}" for n in names]
    if fresh is not None:
        changes.append(f"fit loss of a fresh network {fresh.mean:.3g}")
    return ", ".join(changes)
