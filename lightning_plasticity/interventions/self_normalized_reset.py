"""Self-normalized resets: recycle the units that are silent for longer than they use to be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import as_float, is_int
from lightning_plasticity.interventions.units.groups import UnitGroup
from lightning_plasticity.interventions.units.layer_statistics import LayerStatistics, by_unit, other_dims
from lightning_plasticity.interventions.units.unit_replacement import Record, UnitReplacement

_BUCKETS_PER_OCTAVE = 8
"""Silences below 14 samples have a bucket each; longer ones share it with others, less than 2^(1/8) = 9 % longer."""


class SelfNormalizedReset(UnitReplacement):
    r"""Recycles units whose silence is longer than all but a share :math:`\eta` of their own silences before.

    .. math:: \frac{1 + \#\{\text{past silences} \ge \text{the present one}\}}{1 + \#\{\text{past silences}\}} \le \eta

    A unit *fires* in a step if a layer that reads it reads a value above zero, of any sample at any position (after
    activation, norm and pooling). Its *silence* is the number of samples in the steps since then, of all processes and
    micro-batches; it becomes a past silence when the unit fires again. This is the test :math:`P(A \ge a) \le \eta` of
    the paper, with the present silence counted among the unit's own, so that the chance to recycle a unit that goes on
    as before is at most :math:`\eta` for each of its silences. It takes :math:`1/\eta - 1` past silences; until then,
    and in any case, a silence of ``cap`` samples is enough. Recycling means incoming weights from the layer's own
    initialisation, outgoing weights zero, no past silences; the optimizers forget those entries. Dead units are
    recycled without changing any bit of the output. Which layers have units is told by
    :func:`~lightning_plasticity.interventions.describe_units`.

    The rule is made for ReLU: units that are never quite silent, such as those of GELU, hardly ever meet it.

    Where the paper leaves a choice, or its public code differs: steps at which a unit fires again at once are no
    silences (as in the code; else a unit that fires in nearly all steps would be recycled at its first pause); a unit
    is recycled when it *exceeds* the percentile (as in the paper; in the code, when it reaches it); the percentile is
    known at every step (in the code, after every 16 tasks); a recycled unit begins without a past (in the code, with
    that of its predecessor). Silences are counted in buckets, exact below 14 samples and 9 % wide beyond, in which all
    count as at least as long as the present one: 97 counts of 32 bits for each unit with the default ``cap``.

    All micro-batches since the last :meth:`after_step` count as one step, whatever became of them: call it after an
    optimizer step that was really taken, and once. A layer that was not called in between stays as it is. Processes
    that train together choose the same units.

    Args:
        rejection: How unusual a silence must be for a reset, :math:`\eta`, in (0, 1).
        cap: Silence after which a unit is recycled whatever its past, in samples.
        seed: Of the random numbers that new weights are drawn with.
        initial: ``state_dict()`` of the model before training, to draw from the distribution of; by default each
            layer's ``reset_parameters``.

    Raises:
        ValueError: If an argument is out of range; at the start, if ``forward`` is not given or the model has no units.
        RuntimeError: If :meth:`after_step` comes before :meth:`start`, or nothing is heard of layers that are trained:
            in evaluation mode, or in code that was compiled before the start.

    References:
        Farias and Jozefiak 2024, arXiv 2410.20098.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0]))  # the second never fires
        >>> x = torch.rand(16, 4)
        >>> remedy = SelfNormalizedReset(cap=32)
        >>> remedy.start(model, forward=lambda model: model(x))
        >>> for _ in range(2):
        ...     _ = model(x)  # and a step of an optimizer
        ...     report = remedy.after_step(model)
        >>> report.units
        {'0': tensor([1])}
        >>> remedy.stop()
    """

    def __init__(
        self,
        rejection: float = 0.02,
        cap: int = 20_000,
        *,
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(_firings, seed, initial)
        if not 0 < as_float(rejection) < 1:
            raise ValueError(f"{self.name}(rejection={rejection!r}) must be in (0, 1): a share of a unit's silences")
        if not is_int(cap) or cap < 1:
            raise ValueError(f"{self.name}(cap={cap}) must be at least 1, and whole: a number of samples")
        self.rejection = rejection
        self.cap = cap
        self._buckets = _buckets(cap)

    @override
    def new_record(self, site: UnitGroup) -> Record:
        return {
            "silence": torch.zeros(site.num_units, dtype=torch.long),
            "past silences": torch.zeros(site.num_units, len(self._buckets), dtype=torch.int32),
        }

    @override
    def updated(
        self, model: nn.Module, site: UnitGroup, record: Record, heard: Mapping[str, LayerStatistics]
    ) -> tuple[Record, Tensor]:
        firings = [by_unit(one.sums[0], site.consumers[name], site.num_units) for name, one in heard.items()]
        fired = torch.stack(firings).sum(0) > 0
        samples = int(max(one.num_samples for one in heard.values()))
        before, past = record["silence"], record["past silences"].clone()
        ended = (fired & (before > 0)).nonzero().flatten()
        past[ended, self._bucket(before[ended])] += 1
        silence = torch.where(fired, 0, before + samples)
        silent = (silence > 0).nonzero().flatten()
        own, bucket = past[silent], self._bucket(silence[silent])
        longer = own.masked_fill(torch.arange(own.shape[1]) < bucket[:, None], 0).sum(1)
        unusual = (1 + longer) <= self.rejection * (1 + own.sum(1))
        return (
            {"silence": silence, "past silences": past},
            silent[unusual | (silence[silent] >= self.cap)],
        )

    @override
    def restarted(self, site: UnitGroup, record: Record, units: Tensor) -> Record:
        return {key: value.index_fill(0, units, 0) for key, value in record.items()}

    def _bucket(self, silence: Tensor) -> Tensor:
        return torch.searchsorted(self._buckets, silence, right=True) - 1


def _firings(x: Tensor, dim: int) -> Tensor:
    peaks = x.amax(other_dims(x, dim))
    return torch.where(peaks.isfinite(), (peaks > 0).float(), torch.nan)[None]  # a broken unit is not a silent one


def _buckets(cap: int) -> Tensor:
    """The shortest silence of each bucket."""
    octaves = range(_BUCKETS_PER_OCTAVE * cap.bit_length())
    starts = {int(2 ** (k / _BUCKETS_PER_OCTAVE)) for k in octaves}
    return torch.tensor(sorted(start for start in starts if start <= cap))
