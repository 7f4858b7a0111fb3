"""Continual backpropagation: all the time, replace a few of the units that contribute least."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import as_float
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import LayerStatistics, by_unit, other_dims
from lightning_plasticity.interventions.units.unit_replacement import Record, UnitReplacement
from lightning_plasticity.interventions.weights.updates import SparseUpdate, WeightUpdate
from lightning_plasticity.layers import TRANSPOSED_CONVOLUTIONS, weight_by_output

_ROWS = 100
"""Rows of a weight at a time: 400 kB where there are 1000 columns. Measured: 20 to 250 differ little."""


class ContinualBackprop(UnitReplacement):
    r"""Replaces a small share of the mature units after every optimizer step: those of the lowest utility.

    .. math:: u_i \leftarrow \eta\,u_i + (1 - \eta)\,\mathrm{mean}|h_i| \sum_k |w_{\mathrm{out},ik}|, \qquad
        \hat u_i = \frac{u_i}{1 - \eta^{a_i}}

    :math:`h_i` is what the consumers of a unit read in the forward passes of the step (after activation, norm, pooling
    and dropout, averaged over samples and positions), :math:`w_{\mathrm{out}}` are the outgoing weights after the step,
    and :math:`a_i` is the age of the unit in steps. Where a unit has several columns (behind a flatten) or several
    consumers, their terms add up. Each step and layer, ``replacement_rate`` times the number of units older than
    ``maturity_threshold`` is added to a counter; for every whole number in it, the mature unit of the lowest
    :math:`\hat u` is replaced: incoming weights from its layer's own initialisation, outgoing weights zero, utility and
    age zero, and the optimizers forget those entries. Dead units are replaced without changing any bit of the output.
    Which layers have units is told by :func:`~lightning_plasticity.interventions.describe_units`.

    All micro-batches since the last :meth:`after_step` count as one batch, whatever became of them: call it after an
    optimizer step that was really taken, and once. A layer that was not called in between stays as it is, and grows no
    older. Processes that train together choose the same units.

    Args:
        replacement_rate: Share of the mature units that is replaced at each step, :math:`\rho`.
        maturity_threshold: Steps during which a new unit is safe.
        decay: Share of the old utility that stays at each step, :math:`\eta`, in [0, 1).
        transfer_bias: Adds the mean of what a replaced unit said, by its outgoing weights, to the biases of its
            consumers, so that these do not miss it. Off, as in the published results: there the mean was cleared
            before it was used. Consumers without bias get nothing.
        seed: Of the random numbers that new weights are drawn with.
        initial: ``state_dict()`` of the model before training, to draw from the distribution of; by default each
            layer's ``reset_parameters``.

    Raises:
        ValueError: If an argument is out of range; at the start, if ``forward`` is not given or the model has no units.
        RuntimeError: If :meth:`after_step` comes before :meth:`start`, or nothing is heard of layers that are trained:
            in evaluation mode, or in code that was compiled before the start.

    References:
        Dohare et al. 2024, Nature 632, arXiv 2306.13812.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with torch.no_grad():
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]))  # nobody hears the second
        ...     _ = model[0].bias.fill_(1)
        >>> x = torch.rand(16, 4)
        >>> remedy = ContinualBackprop(replacement_rate=1 / 3, maturity_threshold=0)
        >>> remedy.start(model, forward=lambda model: model(x))
        >>> model(x).square().mean().backward()
        >>> optimizer.step()
        >>> remedy.after_step(model, optimizers=[optimizer]).units
        {'0': tensor([1])}
        >>> remedy.stop()
    """

    def __init__(
        self,
        replacement_rate: float = 1e-4,
        maturity_threshold: int = 100,
        decay: float = 0.99,
        *,
        transfer_bias: bool = False,
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._check_switch(transfer_bias=transfer_bias)
        super().__init__(_sums_with_signs if transfer_bias else _sums, seed, initial)
        if not 0 <= as_float(replacement_rate) <= 1:
            raise ValueError(
                f"{self.name}(replacement_rate={replacement_rate!r}) must be in [0, 1]: a share of the units"
            )
        if not as_float(maturity_threshold) >= 0:
            raise ValueError(
                f"{self.name}(maturity_threshold={maturity_threshold!r}) must be at least 0: a number of steps"
            )
        if not 0 <= as_float(decay) < 1:
            raise ValueError(f"{self.name}(decay={decay!r}) must be in [0, 1)")
        self.replacement_rate = replacement_rate
        self.maturity_threshold = maturity_threshold
        self.decay = decay
        self.transfer_bias = transfer_bias

    @override
    def new_record(self, site: UnitGroup) -> Record:
        record = {
            "utility": torch.zeros(site.num_units, dtype=torch.float64),
            "age": torch.zeros(site.num_units, dtype=torch.long),
            "counter": torch.zeros((), dtype=torch.float64),
        }
        if self.transfer_bias:
            record |= {
                f"mean read by {name}": torch.zeros(len(owner), dtype=torch.float64)
                for name, owner in site.consumers.items()
            }
        return record

    @override
    def updated(
        self, model: nn.Module, site: UnitGroup, record: Record, heard: Mapping[str, LayerStatistics]
    ) -> tuple[Record, Tensor]:
        contribution = torch.zeros(site.num_units, dtype=torch.float64)
        new = dict(record)
        for name, one in heard.items():
            means = one.sums / one.num_values
            terms = means[0] * _outgoing_weights(model.get_submodule(name)).cpu().double()
            contribution += by_unit(terms, site.consumers[name], site.num_units)
            if self.transfer_bias:
                new[f"mean read by {name}"] = self._averaged(record[f"mean read by {name}"], means[1])
        new["utility"] = self._averaged(record["utility"], contribution)
        new["age"] = record["age"] + 1
        mature = new["age"] > self.maturity_threshold
        counter = record["counter"] + self.replacement_rate * int(mature.count_nonzero())
        count = int(counter)
        new["counter"] = counter - count
        if not count:
            return new, torch.tensor([], dtype=torch.long)
        utility = (new["utility"] / self._correction(new)).masked_fill(~mature, torch.inf)
        return new, utility.argsort(stable=True)[:count].sort().values

    @override
    def restarted(self, site: UnitGroup, record: Record, units: Tensor) -> Record:
        new = dict(record)
        for key in ("utility", "age"):
            new[key] = record[key].index_fill(0, units, 0)
        if self.transfer_bias:
            for name, owner in site.consumers.items():
                key = f"mean read by {name}"
                new[key] = record[key].masked_fill(torch.isin(owner, units), 0)
        return new

    @override
    def changes(
        self, model: nn.Module, units: Units, records: Mapping[str, Record], chosen: Mapping[str, Tensor]
    ) -> WeightUpdate:
        changes = super().changes(model, units, records, chosen)
        if self.transfer_bias:
            gains: dict[nn.Parameter, Tensor] = {}
            for layer, some in chosen.items():
                for bias, gain in self._gains(model, units.groups[layer], records[layer], some).items():
                    gains[bias] = gains.get(bias, 0) + gain
            for bias, gain in gains.items():
                changes.parts[bias] = _raised(bias, gain, changes.parts.get(bias))
        return changes

    def _averaged(self, before: Tensor, now: Tensor) -> Tensor:
        return self.decay * before + (1 - self.decay) * now

    def _correction(self, record: Record) -> Tensor:
        return 1 - self.decay ** record["age"].double()

    def _gains(self, model: nn.Module, site: UnitGroup, record: Record, units: Tensor) -> dict[nn.Parameter, Tensor]:
        """What the consumers' biases gain when units go, by the outgoing weights of before."""
        correction = self._correction(record)
        gains = {}
        for name, owner in site.consumers.items():
            consumer = model.get_submodule(name)
            if isinstance(consumer.bias, nn.Parameter) and consumer.bias.requires_grad:
                said = record[f"mean read by {name}"] / correction[owner.clamp(min=0)]
                gains[consumer.bias] = _response(consumer, torch.where(torch.isin(owner, units), said, 0.0))
        return gains


def _raised(bias: nn.Parameter, gain: Tensor, fresh: SparseUpdate | None) -> SparseUpdate:
    """A bias after its gain; entries that are drawn anew gain nothing."""
    values, renewed = bias.detach().cpu().double() + gain, torch.zeros(len(bias), dtype=torch.bool)
    if fresh is not None:
        values[fresh.positions] = fresh.values.double()
        renewed[fresh.positions] = True
    return SparseUpdate(torch.arange(len(bias)), values, renewed)


def _sums(x: Tensor, dim: int) -> Tensor:
    return x.abs().sum(other_dims(x, dim), dtype=torch.promote_types(x.dtype, torch.float32))[None]


def _sums_with_signs(x: Tensor, dim: int) -> Tensor:
    return torch.cat(
        [_sums(x, dim), x.sum(other_dims(x, dim), dtype=torch.promote_types(x.dtype, torch.float32))[None]]
    )


def _outgoing_weights(consumer: nn.Module) -> Tensor:
    """Sum of the absolute weights of each input channel of a linear or convolution layer, ``(channels,)``."""
    assert isinstance(consumer.weight, Tensor)
    weight, dtype = consumer.weight.detach(), torch.promote_types(consumer.weight.dtype, torch.float32)
    # A transposed convolution has one row for each input channel.
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS):
        return weight.abs().flatten(1).sum(1, dtype=dtype)
    groups: int = getattr(consumer, "groups", 1)
    groups_of_rows = weight.unflatten(0, (groups, -1))
    columns = torch.cat([_sum_of_magnitudes(rows, dtype) for rows in groups_of_rows])
    return columns.flatten(1).sum(1) if columns.ndim > 1 else columns


def _sum_of_magnitudes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows.abs().sum(0)``, on the CPU with few rows at a time, which stay in its cache: twice as fast."""
    if rows.device.type != "cpu":
        return rows.abs().sum(0, dtype=dtype)
    buffer, total = torch.empty_like(rows[:_ROWS]), rows.new_zeros(rows.shape[1:], dtype=dtype)
    for some in rows.split(_ROWS):
        total += torch.abs(some, out=buffer[: len(some)]).sum(0, dtype=dtype)
    return total


def _response(consumer: nn.Module, inputs: Tensor) -> Tensor:
    """What a linear or convolution layer adds to its bias, on average, at inputs of this mean; margins left aside."""
    assert isinstance(consumer.weight, Tensor)
    groups: int = getattr(consumer, "groups", 1)
    dtype = torch.promote_types(consumer.weight.dtype, torch.float32)
    weight: Tensor = consumer.weight.detach().to(dtype)
    weight = weight.flatten(2).sum(-1) if weight.ndim > 2 else weight
    weight = weight_by_output(consumer, weight).unflatten(0, (groups, -1))
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS):
        weight = weight / math.prod(consumer.stride)
    return (weight @ inputs.to(weight).view(groups, -1, 1)).flatten().cpu().double()
