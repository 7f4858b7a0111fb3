"""Self-normalized resets: reset units that are inactive for longer than they usually are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.groups import UnitGroup
from lightning_plasticity.interventions.units.layer_statistics import LayerStatistics, other_dims
from lightning_plasticity.interventions.units.unit_replacement import Record, UnitReplacement

_BUCKETS_PER_OCTAVE = 8
"""Silences below 14 samples have a bucket each; beyond, a bucket spans a factor of less than 2^(1/8), or 9 %."""


class SelfNormalizedReset(UnitReplacement):
    r"""Reset units whose silence is longer than all but a share :math:`\eta` of their own past silences.

    .. math:: \frac{1 + \#\{\text{past silences} \ge \text{the present one}\}}{1 + \#\{\text{past silences}\}} \le \eta

    A unit *fires* in a step if a layer that reads it reads a value above zero, of any sample at any position (after
    activation, norm and pooling). Its *silence* is the number of samples in the steps since then, of all ranks and
    micro-batches; it becomes a past silence when the unit fires again. This is the test :math:`P(A \ge a) \le \eta` of
    the paper, with the present silence counted among the unit's own, so that the probability of resetting a unit whose
    behaviour does not change is at most :math:`\eta` for each of its silences. The test needs :math:`1/\eta - 1` past
    silences; until then, and in any case, a silence of ``cap`` samples is enough. A reset unit has incoming weights
    from the initial entries of the same tensor, outgoing weights of zero and no past silences; the optimizer state of
    those entries is reset. Dead units are reset without changing any bit of the output.
    :func:`~lightning_plasticity.interventions.describe_units` lists the layers with units.

    The rule is made for ReLU: units that are never exactly zero, such as those of GELU, hardly ever meet it.

    Where the paper leaves a choice, or its public code differs: steps at which a unit fires again at once are no
    silences (as in the code; else a unit that fires in nearly all steps would be reset at its first pause); a unit is
    reset when it *exceeds* the percentile (as in the paper; in the code, when it reaches it); the percentile is
    up to date at every step (in the code, after every 16 tasks); a reset unit begins without past silences (in the
    code, with those of its predecessor). Silences are counted in buckets, exact below 14 samples and 9 % wide beyond,
    in which all count as at least as long as the present one: 97 counts of 32 bits for each unit with the default
    ``cap``.

    All micro-batches since the last :meth:`after_step` count as one step, even those whose step was skipped: call it
    once after each optimizer step that was not skipped. A layer that was not called in between, or is frozen, stays as
    it is. All ranks choose the same units.

    Args:
        rejection: Level of the test, :math:`\eta`, in (0, 1): the smaller, the more unusual a silence must be.
        cap: Silence, in samples, after which a unit is reset in any case.
        seed: Seed of the random numbers that new weights are drawn with.
        initial: ``state_dict()`` of the model before training, to draw from. By default the weights that the callback
            has stored at its first batch, or those at :meth:`start`.
        include: Names of the layers whose units are replaced, with wildcards; by default all.
        exclude: Names of layers whose units stay as they are.

    Raises:
        ValueError: If an argument is out of range; at the start, if ``forward`` is not given.
        RuntimeError: If :meth:`after_step` comes before :meth:`start`, or the hooks record nothing of layers that are
            trained: in evaluation mode, or in code that was compiled before the start.

    Warns:
        PlasticityWarning: At the start, if the model has no units, with the reasons; it rests then.

    References:
        Farias and Jozefiak 2024, arXiv 2410.20098.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0]))  # the second never fires
        >>> x = torch.rand(16, 4)
        >>> intervention = SelfNormalizedReset(cap=32)
        >>> intervention.start(model, forward=lambda model: model(x))
        >>> for _ in range(2):
        ...     _ = model(x)  # and a step of an optimizer
        ...     report = intervention.after_step(model)
        >>> report.units
        {'0': tensor([1])}
        >>> intervention.stop()
    """

    def __init__(
        self,
        rejection: float = 0.02,
        cap: int = 20_000,
        *,
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        super().__init__(_firings, seed, initial, include, exclude)
        check_number("(0, 1)", self.name, "a share of a unit's silences", rejection=rejection)
        check_positive_ints(self.name, cap=cap)
        self.rejection = rejection
        self.cap = cap
        self._buckets = _buckets(cap)

    @override
    def new_record(self, group: UnitGroup) -> Record:
        return {
            "silence": torch.zeros(group.num_units, dtype=torch.long),
            "past silences": torch.zeros(group.num_units, len(self._buckets), dtype=torch.int32),
            "longest silence": torch.full((group.num_units,), self.cap),
        }

    @override
    def update_records(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        records: Mapping[str, Record],
        statistics: Mapping[str, LayerStatistics],
    ) -> tuple[dict[str, Record], dict[str, Tensor]]:
        pooled = self.pool(groups, statistics)
        before = [records[group.layer] for group in groups]
        fired = pooled.by_unit([statistics[name].sums[0] for name in pooled.consumers]) > 0
        silences_before = torch.cat([record["silence"] for record in before])
        samples = [
            max(int(statistics[name].num_samples) for name in group.consumers if name in statistics) for group in groups
        ]
        # Mostly the samples of one batch.
        passed = samples[0] if len({*samples}) == 1 else torch.tensor(samples)[pooled.layer_index]
        silences = (silences_before + passed).masked_fill(fired, 0)
        pools = {"silence": silences}
        ended = (fired & (silences_before > 0)).nonzero().flatten()
        longest = torch.cat([record["longest silence"] for record in before])
        if len(ended):
            past = torch.cat([record["past silences"] for record in before])
            longest[ended] = self._add_silences(past, ended, silences_before[ended])
            pools |= {"past silences": past, "longest silence": longest}
        new = {group.layer: dict(record) for group, record in zip(groups, before, strict=True)}
        for key, values in pools.items():
            for group, of_layer in zip(groups, values.split(pooled.sizes), strict=True):
                new[group.layer][key] = of_layer
        is_due = silences >= longest
        chosen = {}
        if is_due.any():
            for group, units in zip(groups, is_due.split(pooled.sizes), strict=True):
                chosen[group.layer] = units.nonzero().flatten()
        return new, chosen

    @override
    def restart_record(self, group: UnitGroup, record: Record, units: Tensor) -> Record:
        new = self.new_record(group)
        return {key: value.index_copy(0, units, new[key][units]) for key, value in record.items()}

    def _add_silences(self, past: Tensor, units: Tensor, silences: Tensor) -> Tensor:
        """Count silences of units that have ended, in place, and return how long the next ones may be."""
        past[units, torch.searchsorted(self._buckets, silences, right=True) - 1] += 1
        counts = past[units]
        totals = counts.sum(1, keepdim=True)
        num_longer = totals - counts.cumsum(1) + counts
        is_usual = 1 + num_longer > self.rejection * (1 + totals)
        # The number of longer silences falls from bucket to bucket, so the usual ones come first.
        return torch.cat([self._buckets, torch.tensor([self.cap])])[is_usual.sum(1)]


def _firings(x: Tensor, dim: int) -> Tensor:
    peaks = x.amax(other_dims(x, dim))
    # NaN and infinite activations are errors, not silences: zero times them is NaN.
    return ((peaks > 0) + 0 * peaks)[None]


def _buckets(cap: int) -> Tensor:
    """Return the shortest silence of each bucket."""
    octaves = range(_BUCKETS_PER_OCTAVE * cap.bit_length())
    starts = {int(2 ** (k / _BUCKETS_PER_OCTAVE)) for k in octaves}
    return torch.tensor(sorted(start for start in starts if start <= cap))
