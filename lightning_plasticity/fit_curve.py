"""Compare the losses of two networks over the first steps on a task."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from lightning_plasticity.curvature import Estimate

_RANK_EXPONENT = 0.3
"""Weight of the rank of the tangent kernel in the logarithm of the handicap; see docs/evidence.md."""


@dataclass(frozen=True)
class FitCurve:
    r"""The losses of copies of a network while each is trained on a small batch of its own.

    Args:
        losses: The mean over the batches of the loss before each step and after the last one, :math:`L_0, \dots, L_K`;
            infinite after divergence.
        has_gradient: Whether a parameter had a gradient at the last step.
        batches: The losses on each batch; by default there is one.
        remark: What was done otherwise than asked, if anything.
        churn: How far the first step on the first batch moves the outputs on the second, relative to those on the
            first; ``nan`` if it was not measured.

    Example:
        >>> curve = FitCurve((4.0, 2.0, 1.0))
        >>> curve.mean, curve.gain
        (3.0, 1.0)
    """

    losses: tuple[float, ...]
    has_gradient: bool = True
    batches: tuple[tuple[float, ...], ...] = ()
    remark: str = ""
    churn: float = math.nan

    @classmethod
    def of(cls, curves: Sequence[FitCurve]) -> FitCurve:
        """Create the curve of several batches from the curve of each."""
        batches = tuple(curve.losses for curve in curves)
        losses = tuple(math.fsum(values) / len(values) for values in zip(*batches, strict=True))
        return cls(losses, any(curve.has_gradient for curve in curves), batches, churn=curves[0].churn)

    @property
    def by_batch(self) -> list[FitCurve]:
        """The curve of each batch."""
        return [FitCurve(losses) for losses in self.batches or (self.losses,)]

    @property
    def mean(self) -> float:
        r"""The mean loss over the steps, :math:`\bar L = \frac1K \sum_{k<K} L_k`."""
        return math.fsum(self.losses[:-1]) / (len(self.losses) - 1)

    @property
    def gain(self) -> float:
        r"""What training has gained in the mean, :math:`L_0 - \bar L`."""
        return self.losses[0] - self.mean

    @property
    def is_dead(self) -> bool:
        """Whether no gradient reaches the parameters although there is a loss, so that no step changes it."""
        return not self.has_gradient and len(set(self.losses)) == 1 and self.losses[0] != 0

    def gap_to(self, fresh: FitCurve) -> float:
        r"""Return how much worse than a fresh network this one fits, as a share of what the fresh one gains.

        .. math:: \frac{\bar L - \bar L^\text{fresh}}{L_0^\text{fresh} - \bar L^\text{fresh}}

        It is right for losses of either sign. It is 0 if both fit equally well, and 1 if this network is in the mean
        where the fresh one has begun.

        Args:
            fresh: The curve of the initial weights on the same samples.

        Returns:
            The gap; ``nan`` if the fresh network gains nothing, or both diverge.

        Example:
            >>> FitCurve((4.0, 3.0, 3.0)).gap_to(FitCurve((4.0, 2.0, 1.0)))
            0.5
        """
        if self.mean == fresh.mean < math.inf:
            return 0.0
        return (self.mean - fresh.mean) / fresh.gain if fresh.gain > 0 else math.nan


@dataclass(frozen=True)
class LiveCurve(FitCurve):
    r"""The losses of a network on the successive batches of a task, each before the training step on it.

    Args:
        losses: The losses :math:`L_0, \dots, L_{K-1}`; infinite after divergence.
        has_gradient: Whether a parameter had a gradient on one of the batches.

    Example:
        >>> curve = LiveCurve((4.0, 3.0, 2.0, 1.0))
        >>> curve.mean, curve.gain
        (1.5, 2.5)
    """

    @property
    @override
    def mean(self) -> float:
        """The mean loss over the later half of the batches."""
        later = later_half(self.losses)
        return math.fsum(later) / len(later)

    @property
    @override
    def gain(self) -> float:
        """What training has gained: the mean loss over the first tenth of the batches, minus :attr:`mean`."""
        count = -(-len(self.losses) // 10)
        return math.fsum(self.losses[:count]) / count - self.mean

    @property
    @override
    def is_dead(self) -> bool:
        """Whether no gradient reaches the parameters although there is a loss."""
        return not self.has_gradient and any(self.losses)

    @property
    @override
    def by_batch(self) -> list[FitCurve]:
        """The later half in four parts, whose differences tell how far the result depends on the batches."""
        later = later_half(self.losses)
        bounds = [len(later) * part // 4 for part in range(5)]
        parts = [later[start:end] for start, end in itertools.pairwise(bounds) if end > start]
        return [FitCurve((*part, part[-1])) for part in parts]


def later_half(values: Sequence[float]) -> Sequence[float]:
    """Return the later half of a sequence, the larger half if its length is odd.

    Example:
        >>> later_half([5.0, 1.0, 3.0])
        [1.0, 3.0]
    """
    return values[len(values) // 2 :]


def compare_fits(curve: FitCurve, fresh: FitCurve, rank_share: float = 1.0) -> dict[str, float]:
    r"""Compute the diagnostics of a fit test that compare a network with its initial weights.

    The handicap is :math:`\min(\rho \, s^{-0.3}, 1 + \max(\text{gap}, 0))`. Here :math:`\rho` is the ratio of the mean
    losses, :math:`\bar L / \bar L^\text{fresh}`, as the geometric mean over the batches; :math:`s` is the share that is
    left of the rank of the tangent kernel, which sees what a few steps do not; and the gap is that of
    :meth:`FitCurve.gap_to`. It limits the ratio where the fresh network soon has hardly any loss, so that a small lag
    multiplies it. The standard error is that of the ratio, over the batches, as far as it can change the smaller of the
    two. Losses that are not positive are compared by the gap alone, and their standard error is that of the gap. A
    network that no gradient reaches, and that is no better than its initial weights, has an infinite handicap.

    Args:
        curve: The losses of the network.
        fresh: The losses of its initial weights.
        rank_share: The share :math:`s`, in (0, 1].

    Returns:
        ``handicap`` and ``fit_gap``, each if it is defined.

    Example:
        >>> comparison = compare_fits(FitCurve((4.0, 3.0, 3.0)), FitCurve((4.0, 2.0, 1.0)))
        >>> round(comparison["handicap"], 3), comparison["fit_gap"]
        (1.167, 0.5)
    """
    gap, ratio, factor = curve.gap_to(fresh), _ratio(curve, fresh), rank_share**-_RANK_EXPONENT
    limit = math.inf if math.isnan(gap) or math.isinf(ratio) else 1 + max(gap, 0.0)
    handicap = min(ratio * factor, limit)
    error = max(handicap - (ratio - ratio.standard_error) * factor, 0.0)
    values = {"handicap": Estimate(handicap, standard_error=error), "fit_gap": gap}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _ratio(curve: FitCurve, fresh: FitCurve) -> Estimate:
    """Return the ratio of the losses, or 1 plus the gap, with its standard error over the batches."""
    pairs = [(one.mean, other.mean) for one, other in zip(curve.by_batch, fresh.by_batch, strict=True)]
    if curve.is_dead and curve.mean >= fresh.mean:
        return Estimate(math.inf)
    if not all(mean > 0 and other > 0 for mean, other in pairs):
        gaps = [(mean - other) / fresh.gain for mean, other in pairs] if fresh.gain > 0 else []
        deviation = statistics.stdev(gaps) if len(gaps) > 1 and all(map(math.isfinite, gaps)) else 0.0
        return Estimate(1 + curve.gap_to(fresh), standard_error=deviation / math.sqrt(len(pairs)))
    if not all(math.isfinite(mean) and math.isfinite(other) for mean, other in pairs):
        return Estimate(curve.mean / fresh.mean)
    logarithms = [math.log(mean / other) for mean, other in pairs]
    ratio = math.exp(statistics.fmean(logarithms))
    deviation = statistics.stdev(logarithms) if len(logarithms) > 1 else 0.0
    return Estimate(ratio, standard_error=ratio * deviation / math.sqrt(len(logarithms)))
