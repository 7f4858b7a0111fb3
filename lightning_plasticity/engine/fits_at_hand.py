"""Fit copies of a network to the batch at hand, before and after its repairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.diagnostics import to_log_dict
from lightning_plasticity.engine.measurements import Measurements
from lightning_plasticity.fit_curve import FitCurve, compare_fits
from lightning_plasticity.fit_test import FitTest


class FitsAtHand:
    """Fits of copies of a network and of its initial weights to the batch at which a live fit test gives its verdict.

    The batches of the verdict are gone then, and the losses on them are no measure of a network that is repaired after
    them. So both the network and the repaired one are fitted to the present batch, by a fit test that is not live.

    Args:
        measurements: Holds the live fit test, and the regularizers of the run.
        context: The network before its repairs, and the batch, the same on all ranks.
        initial: The initial weights: parameters and buffers by name.
    """

    def __init__(self, measurements: Measurements, context: ProbeContext, initial: Mapping[str, Tensor]) -> None:
        size = context.batch_size
        self._measurements, self._whole_batch = measurements, context.whole_batch
        self._fit_test = (
            FitTest() if measurements.fit_test is None else FitTest(batch_size=measurements.fit_test.batch_size)
        )
        self._samples = None if size is None else min(size, measurements.samples)
        self.fresh = self._fit(context.with_weights(initial))
        """The losses of the initial weights."""
        self.remark = self.fresh.remark
        """What was done otherwise than asked, if anything."""
        self.before = self.measure(context)
        """The numbers of the network before its repairs."""

    def measure(self, context: ProbeContext) -> dict[str, float]:
        """Return the numbers of the network as it is now, by name, as for a report."""
        curve = self._fit(context)
        return to_log_dict({**compare_fits(curve, self.fresh), "fit_loss": curve.mean}, {"fit_loss": self.fresh.mean})

    def _fit(self, context: ProbeContext) -> FitCurve:
        return self._measurements.fit(self._fit_test, replace(context, whole_batch=self._whole_batch), self._samples)
