"""Compare a network with a fresh one that trains beside it on the first batches of a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.diagnostics import DIAGNOSTICS, to_log_dict
from lightning_plasticity.distributed.agreement import all_or_none, broadcast_object
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.shadow_run import ShadowRun
from lightning_plasticity.engine.verdicts import Verdicts
from lightning_plasticity.fit_test import MIN_BATCHES, FitTest
from lightning_plasticity.messages import SkippedBatchError
from lightning_plasticity.reports import TaskReport

_WAITING = "there is no verdict yet"


class LiveComparison:
    """The fresh network of a live fit test. The first task begins with a fresh network, and needs no other.

    Args:
        fit_test: The fit test; without effect if it is ``None`` or not live.
        initial_weights: The weights that the fresh network begins with.
        runner: Holds the regularizers.
        verdicts: Enters the verdict and remarks in reports.
        errors: Where errors are recorded.
    """

    def __init__(
        self,
        fit_test: FitTest | None,
        initial_weights: InitialWeights,
        *,
        runner: InterventionRunner,
        verdicts: Verdicts,
        errors: ErrorLog,
    ) -> None:
        self._fit_test = fit_test
        self._initial_weights = initial_weights
        self._runner = runner
        self._verdicts = verdicts
        self._errors = errors
        self._shadow: ShadowRun | None = None

    @property
    def is_running(self) -> bool:
        """Whether the verdict of the last task waits for the comparison."""
        return self._shadow is not None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing for the verdict."""
        return self._shadow is None or self._shadow.is_complete

    def begin_fit(self) -> None:
        """Make the fresh network anew at the next batch."""
        # A copy that an interrupted fit has left belongs to its Trainer.
        self.load_state_dict(self.state_dict())

    def cancel(self) -> None:
        """Drop the fresh network."""
        self._shadow = None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state for checkpoints; ``None`` if there is no fresh network."""
        return None if self._shadow is None else self._shadow.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the result of :meth:`state_dict`."""
        self._shadow = None
        if self._fit_test is not None and state is not None:
            self._shadow = ShadowRun(self._fit_test, {})
            self._shadow.load_state_dict(state)

    def begin(self, report: TaskReport, context: ProbeContext, *, window: int, ends_window: bool) -> None:
        """Let a fresh network train on the first batch of a task, unless the network is fresh itself.

        Args:
            report: The report of the task.
            context: The network and the batch.
            window: As in :meth:`train`.
            ends_window: As in :meth:`train`.
        """
        self._shadow = None
        fit_test = self._fit_test
        if fit_test is None or not fit_test.live or not self._initial_weights.values:
            return
        steps = report.expected_steps
        # Every optimizer steps once in a window of batches.
        batches = fit_test.num_batches(None if steps is None else steps * window / max(len(context.optimizers), 1))
        if fit_test.share is not None and steps is None:
            self._verdicts.remark(
                report,
                f"the length of the task is not known: the fit test compares {batches} batches, not a share of "
                f"{fit_test.share:g}",
            )
        self._initial_weights.store(context.model)
        self._shadow = ShadowRun(fit_test, self._initial_weights.values, batches)
        self.train(context, window=window, ends_window=ends_window)

    def train(self, context: ProbeContext, *, window: int = 1, ends_window: bool = True) -> None:
        """Let the fresh network train on a batch, unless it has seen enough. An error ends the comparison only.

        Args:
            context: The network and the batch, before the network is trained on it.
            window: Number of batches over which gradients are accumulated.
            ends_window: Whether the optimizers step after this batch.
        """
        assert self._shadow is not None
        if self._shadow.is_complete:
            return
        regularizers = self._runner.regularizers
        try:
            with all_or_none():
                self._shadow.train(context, regularizers=regularizers, window=window, ends_window=ends_window)
        except SkippedBatchError:
            # The network is not trained on this batch either.
            return
        except Exception as error:
            self._shadow = None
            self._errors.record("fit_test", "a fresh network could not be trained beside this one: no verdict", error)

    def announce(self, report: TaskReport) -> None:
        """Say in the report that the verdict comes later."""
        if self._shadow is not None:
            batches = self._shadow.num_batches
            self._verdicts.remark(
                report,
                f"{_WAITING}: a fresh network trains beside this one on the first {batches} batches of the task",
            )

    def compare(self, report: TaskReport, history: Sequence[TaskReport]) -> None:
        """Compare the network with the fresh one on the batches so far, and enter the verdict in the report.

        Args:
            report: The report of the task, which holds all other numbers.
            history: The reports of all earlier tasks.
        """
        report.remarks = [remark for remark in report.remarks if not remark.startswith(_WAITING)]
        if self._shadow is None:
            return
        shadow, self._shadow = self._shadow, None
        shadow.stop()
        batches = len(shadow.losses)
        if not shadow.is_complete:
            self._verdicts.remark(
                report, f"the task ended after {batches} of the {shadow.num_batches} batches of the fit test"
            )
        if batches < MIN_BATCHES:
            self._verdicts.remark(report, f"there is no verdict on fewer than {MIN_BATCHES} batches")
            return
        report.fit_curve, report.fresh_fit_curve = tuple(shadow.losses), tuple(shadow.fresh_losses)
        values, references = shadow.compare()
        known = {name: report.metrics[name] for name in DIAGNOSTICS if name in report.metrics}
        report.metrics = {**to_log_dict(values, references), **report.metrics}
        report.fresh |= {name: float(value) for name, value in references.items()}
        # A number that is not defined, such as the ratio of two zeros, gives no verdict.
        values = {**known, self._verdicts.collapse.metric: math.nan, **values}
        message = self._verdicts.enter(report, values, report.fresh, history, None)
        # Losses may differ by rounding where ranks are of several kinds, but decisions must not.
        state, message = broadcast_object((report.to_dict(), message))
        vars(report).update(vars(TaskReport.from_dict(state)))
        if message is not None:
            self._errors.warn(message)

    def is_dead(self, context: ProbeContext) -> bool:
        """Train a fresh network on one batch, and return whether no gradient reaches it."""
        assert self._fit_test is not None
        shadow = ShadowRun(self._fit_test, self._initial_weights.values)
        try:
            shadow.train(context, regularizers=self._runner.regularizers)
            return shadow.fresh_is_dead
        finally:
            shadow.stop()
