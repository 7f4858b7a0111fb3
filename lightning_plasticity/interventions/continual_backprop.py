"""Continual backpropagation: continually replace a few of the units that contribute least."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_choice, check_number
from lightning_plasticity.distributed.agreement import is_distributed
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import LayerStatistics, PooledUnits, other_dims
from lightning_plasticity.interventions.units.unit_replacement import Record, UnitReplacement
from lightning_plasticity.interventions.weights.updates import RepairReport, SparseUpdate, WeightUpdate
from lightning_plasticity.layers import TRANSPOSED_CONVOLUTIONS, is_conv1d, weight_by_output

_ROWS_PER_CHUNK = 100
"""Rows of a weight that are summed at a time: 400 kB for 1000 columns. Measured: 20 to 250 differ little."""


_MAX_WAITING = 64
"""Number of steps that are kept before the utilities are updated by all of them at once."""


@dataclass(frozen=True)
class _RecordedStep:
    """What the utilities need of a step.

    Args:
        inputs: The sum of the absolute inputs of each channel, ``(1, channels)``, and their number, by consumer.
        outgoing: The sums of the absolute outgoing weights after the step, ``(channels,)``, by consumer.
    """

    inputs: dict[str, tuple[Tensor, int]]
    outgoing: dict[str, Tensor]


class ContinualBackprop(UnitReplacement):
    r"""Replace a small share of the mature units after every optimizer step: those of the lowest utility.

    .. math:: u_i \leftarrow \eta\,u_i + (1 - \eta)\,\mathrm{mean}|h_i| \sum_k |w_{\mathrm{out},ik}|, \qquad
        \hat u_i = \frac{u_i}{1 - \eta^{a_i}}

    :math:`h_i` is the input that a unit gives to its consumers, the layers that read it, in the forward passes of the
    step (after activation, norm, pooling and dropout, averaged over samples and positions), :math:`w_{\mathrm{out}}`
    are the outgoing weights after the step, and :math:`a_i` is the age of the unit in steps. Where a unit has several
    columns (behind a flatten) or several consumers, their terms add up. In each step and layer, ``replacement_rate``
    times the number of units older than ``maturity_threshold`` is added to a counter; for every whole number in it, the
    mature unit of the lowest :math:`\hat u` is replaced: incoming weights drawn from the initial entries of the same
    tensor, outgoing weights zero, utility and age zero, and the optimizer state of those entries is reset. Dead units
    are replaced without changing any bit of the output. :func:`~lightning_plasticity.interventions.describe_units`
    lists the layers with units.

    With ``utility="gradient"`` the contribution is, instead of the formula above, the first-order cost of a reset, GXD
    (Elisii, Beauchemin and Jamshed 2026): gradient times difference from a reference, which is 0 here, since a unit
    that is reset has outgoing weights of zero,

    .. math:: c_i = \sum \Big|\frac{\partial L}{\partial h_i}\,h_i\Big|, \qquad
        u_i \leftarrow \eta\,u_i + (1 - \eta)\,\frac{c_i}{\mathrm{mean}_k\,c_k}

    summed over samples, positions, columns and consumers. The gradients are those of the training step, by hooks. The
    share of the layer's mean depends neither on the scale of the loss nor on that of mixed precision. Only the abstract
    of that paper could be had; absolute values are a choice, since with its sign the sum over samples is
    :math:`w_{\mathrm{out}} \cdot \partial L / \partial w_{\mathrm{out}}`, which is zero for every unit at a minimum.

    All micro-batches since the last :meth:`after_step` count as one batch, even those whose step was skipped: call it
    once after each optimizer step that was not skipped. A layer that was not called in between, or is frozen, stays as
    it is, and its units do not age. All ranks choose the same units.

    Args:
        replacement_rate: Share of the mature units that is replaced at each step, :math:`\rho`.
        maturity_threshold: Number of steps during which a new unit is not replaced.
        decay: Decay of the utility, :math:`\eta`, in [0, 1).
        transfer_bias: Add the mean activation of a replaced unit, times its outgoing weights, to the biases of its
            consumers, so that their mean inputs stay the same. Off, as in the published results: there the mean was
            cleared before it was used. Consumers without bias are not corrected.
        utility: What a unit is rated by: its ``"contribution"``, or the ``"gradient"`` times activation.
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
        Dohare et al. 2024, Nature 632, arXiv 2306.13812. Elisii, Beauchemin and Jamshed 2026, arXiv 2605.06834.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with torch.no_grad():
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]))  # the second has no effect
        ...     _ = model[0].bias.fill_(1)
        >>> x = torch.rand(16, 4)
        >>> intervention = ContinualBackprop(replacement_rate=1 / 3, maturity_threshold=0)
        >>> intervention.start(model, forward=lambda model: model(x))
        >>> model(x).square().mean().backward()
        >>> optimizer.step()
        >>> intervention.after_step(model, optimizers=[optimizer]).units
        {'0': tensor([1])}
        >>> intervention.stop()
    """

    def __init__(
        self,
        replacement_rate: float = 1e-4,
        maturity_threshold: int = 100,
        decay: float = 0.99,
        *,
        transfer_bias: bool = False,
        utility: str = "contribution",
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        check_choice((True, False), self.name, transfer_bias=transfer_bias)
        check_choice(("contribution", "gradient"), self.name, utility=utility)
        statistic = _absolute_and_signed_sums if transfer_bias else _absolute_sums
        super().__init__(statistic, seed, initial, include, exclude, with_gradients=utility == "gradient")
        check_number("[0, 1]", self.name, "a share of the units", replacement_rate=replacement_rate)
        check_number("[0, inf]", self.name, "a number of steps", maturity_threshold=maturity_threshold)
        check_number("[0, 1)", self.name, decay=decay)
        self.replacement_rate = replacement_rate
        self.maturity_threshold = maturity_threshold
        self.decay = decay
        self.transfer_bias = transfer_bias
        self.utility = utility
        # What the steps since the last update of the records have recorded, and how many may be kept.
        self._waiting: list[_RecordedStep] = []
        self._patience = 0

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self._update_waiting()
        super().prepare(model, context)

    @override
    def stop(self) -> None:
        self._update_waiting()
        super().stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._update_waiting()
        return super().state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        super().load_state_dict(state)

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._update_waiting()
        return super().__getstate__()

    @override
    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        """Record the step; update the utilities only if a unit may be due, which saves most of the time."""
        hooked = self._hooked
        waits = self.utility == "contribution" and not self.transfer_bias and not is_distributed()
        waits = waits and hooked is not None and hooked.model() is model and bool(hooked.units.groups)
        if waits and hooked is not None and not hooked.frozen_layers(model):
            if not self._waiting:
                self._patience = min(self._steps_until_due(self._records[layer]) for layer in hooked.units.groups) - 1
            inputs = hooked.statistics.take() if len(self._waiting) < self._patience else None
            if inputs is not None:
                outgoing = {name: _outgoing_weights(model.get_submodule(name)) for name in inputs}
                self._waiting.append(_RecordedStep(inputs, outgoing))
                return None
        self._update_waiting()
        return super().step(model, context)

    @override
    def new_record(self, group: UnitGroup) -> Record:
        record = {
            "utility": torch.zeros(group.num_units, dtype=torch.float64),
            "age": torch.zeros(group.num_units, dtype=torch.long),
            "counter": torch.zeros((), dtype=torch.float64),
        }
        if self.transfer_bias:
            record |= {
                _mean_input_key(name): torch.zeros(len(unit_index), dtype=torch.float64)
                for name, unit_index in group.consumers.items()
            }
        return record

    @override
    def update_records(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        records: Mapping[str, Record],
        statistics: Mapping[str, LayerStatistics],
    ) -> tuple[dict[str, Record], dict[str, Tensor]]:
        pooled = self.pool(groups, statistics)
        called = [(model.get_submodule(name), statistics[name]) for name in pooled.consumers]
        if self.utility == "gradient":
            costs = pooled.by_unit([x.sums[0] for _, x in called]).split(pooled.sizes)
            contributions = torch.cat([cost / cost.mean() if cost.any() else cost for cost in costs])
        else:
            contributions = pooled.by_unit(
                [_outgoing_weights(layer).cpu() * (x.sums[0] / x.num_values) for layer, x in called]
            )
        counted = torch.ones(1, len(groups), dtype=torch.bool)
        new = self._add_steps(groups, pooled, records, contributions[None], counted)
        if self.transfer_bias:
            for group in groups:
                new[group.layer] |= self._mean_inputs(group, records[group.layer], statistics)
        chosen = {}
        for layer, record in new.items():
            count = int(record["counter"])
            if count:
                record["counter"] = record["counter"] - count
                corrected = record["utility"] / self._bias_correction(record["age"])
                corrected = corrected.masked_fill(record["age"] <= self.maturity_threshold, torch.inf)
                chosen[layer] = corrected.argsort(stable=True)[:count].sort().values
        return new, chosen

    def _steps_until_due(self, record: Record) -> int:
        """Return the number of steps until a unit of the layer is replaced, at least, or one more than may wait."""
        # The threshold may be infinite.
        steps_left = (math.floor(min(self.maturity_threshold, 2**40)) - record["age"]).clamp(0, _MAX_WAITING)
        mature = steps_left.bincount(minlength=_MAX_WAITING + 1).cumsum(0)
        counters = torch.cat([record["counter"][None], self.replacement_rate * mature.double()]).cumsum(0)[1:]
        return min(int((counters < 1).sum()), _MAX_WAITING) + 1

    def _update_waiting(self) -> None:
        """Update the records by the steps that wait. No unit is due in them."""
        if not self._waiting or self._hooked is None:
            return
        groups = list(self._hooked.units.groups.values())
        steps, self._waiting = self._waiting, []
        pooled = self.pool(groups, steps[0].inputs)
        inputs = {name: torch.cat([step.inputs[name][0] for step in steps]).cpu().double() for name in steps[0].inputs}
        values = {name: torch.tensor([[step.inputs[name][1]] for step in steps]) for name in inputs}
        outgoing = {name: torch.stack([step.outgoing[name] for step in steps]).cpu() for name in inputs}
        contributions = pooled.by_unit([outgoing[name] * (inputs[name] / values[name]) for name in pooled.consumers])
        finite = {name: x.isfinite().all(1) for name, x in inputs.items()}
        counted = torch.stack([torch.stack([finite[n] for n in group.consumers]).all(0) for group in groups], dim=1)
        for _, layer in (~counted).nonzero().tolist():
            warnings.warn(f"{self.name}: {groups[layer].layer!r} is skipped, values are not finite", stacklevel=4)
        self._records |= self._add_steps(groups, pooled, self._records, contributions, counted)

    def _add_steps(
        self,
        groups: Sequence[UnitGroup],
        pooled: PooledUnits,
        records: Mapping[str, Record],
        contributions: Tensor,
        counted: Tensor,
    ) -> dict[str, Record]:
        """Return the records after some steps, with the units that are due in their counters.

        Args:
            groups: The layers.
            pooled: Their units.
            records: The records before, by name of the layer.
            contributions: The contribution of each unit, ``(steps, units)``.
            counted: Whether a step counts for a layer, ``(steps, layers)``.
        """
        before = [records[group.layer] for group in groups]
        utility = torch.cat([record["utility"] for record in before])
        for contribution, is_counted in zip(contributions, counted, strict=True):
            updated = self._moving_average(utility, contribution)
            utility = updated if is_counted.all() else torch.where(is_counted[pooled.layer_index], updated, utility)
        ages = torch.cat([record["age"] for record in before]) + counted.long().cumsum(0)[:, pooled.layer_index]
        mature = pooled.by_layer((ages > self.maturity_threshold) & counted[:, pooled.layer_index])
        counters = torch.stack([record["counter"] for record in before])
        counters = torch.cat([counters[None], self.replacement_rate * mature]).cumsum(0)[-1]
        by_layer = zip(
            groups, before, utility.split(pooled.sizes), ages[-1].split(pooled.sizes), counters.unbind(), strict=True
        )
        return {
            group.layer: {**record, "utility": utility, "age": age, "counter": counter}
            for group, record, utility, age, counter in by_layer
        }

    @override
    def restart_record(self, group: UnitGroup, record: Record, units: Tensor) -> Record:
        new = dict(record)
        for key in ("utility", "age"):
            new[key] = record[key].index_fill(0, units, 0)
        if self.transfer_bias:
            for name, unit_index in group.consumers.items():
                key = _mean_input_key(name)
                new[key] = record[key].masked_fill(torch.isin(unit_index, units), 0)
        return new

    @override
    def plan_replacement(
        self,
        model: nn.Module,
        units: Units,
        records: Mapping[str, Record],
        chosen: Mapping[str, Tensor],
        initial: Mapping[str, Tensor] | None,
    ) -> WeightUpdate:
        update = super().plan_replacement(model, units, records, chosen, initial)
        if self.transfer_bias:
            totals: dict[nn.Parameter, Tensor] = {}
            for layer, replaced in chosen.items():
                corrections = self._bias_transfers(model, units.groups[layer], records[layer], replaced)
                for bias, correction in corrections.items():
                    totals[bias] = totals.get(bias, 0) + correction
            for bias, total in totals.items():
                update.parts[bias] = _add_to_bias(bias, total, update.parts.get(bias))
        return update

    def _moving_average(self, before: Tensor, now: Tensor) -> Tensor:
        return self.decay * before + (1 - self.decay) * now

    def _bias_correction(self, age: Tensor) -> Tensor:
        """Compute the factor by which averages that start at zero are too small, as in Adam."""
        return 1 - self.decay ** age.double()

    def _mean_inputs(self, group: UnitGroup, record: Record, statistics: Mapping[str, LayerStatistics]) -> Record:
        """Return the moving averages of what the consumers that were called read."""
        called = {name: statistics[name] for name in group.consumers if name in statistics}
        return {
            _mean_input_key(name): self._moving_average(record[_mean_input_key(name)], x.sums[1] / x.num_values)
            for name, x in called.items()
        }

    def _bias_transfers(
        self, model: nn.Module, group: UnitGroup, record: Record, units: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        """Compute the mean contribution of units to each consumer, which its bias takes over."""
        correction = self._bias_correction(record["age"])
        transfers = {}
        for name, unit_index in group.consumers.items():
            consumer = model.get_submodule(name)
            if isinstance(consumer.bias, nn.Parameter) and consumer.bias.requires_grad:
                means = record[_mean_input_key(name)] / correction[unit_index.clamp(min=0)]
                of_units = torch.where(torch.isin(unit_index, units), means, 0.0)
                transfers[consumer.bias] = _mean_response(consumer, of_units)
        return transfers


def _mean_input_key(consumer: str) -> str:
    return f"mean read by {consumer}"


def _add_to_bias(bias: nn.Parameter, addend: Tensor, fresh: SparseUpdate | None) -> SparseUpdate:
    """Return the update that adds to a bias, apart from its re-initialised entries."""
    values, reset_state_mask = bias.detach().cpu().double() + addend, torch.zeros(len(bias), dtype=torch.bool)
    if fresh is not None:
        values[fresh.positions] = fresh.values.double()
        reset_state_mask[fresh.positions] = True
    return SparseUpdate(torch.arange(len(bias)), values, reset_state_mask)


def _absolute_sums(x: Tensor, dim: int, gradient: Tensor | None = None) -> Tensor:
    values = x if gradient is None else gradient.to(torch.promote_types(x.dtype, torch.float32)) * x
    return values.abs().sum(other_dims(x, dim), dtype=torch.promote_types(x.dtype, torch.float32))[None]


def _absolute_and_signed_sums(x: Tensor, dim: int, gradient: Tensor | None = None) -> Tensor:
    signed = x.sum(other_dims(x, dim), dtype=torch.promote_types(x.dtype, torch.float32))[None]
    return torch.cat([_absolute_sums(x, dim, gradient), signed])


def _outgoing_weights(consumer: nn.Module) -> Tensor:
    """Sum the absolute weights of each input channel of a linear or convolution layer, ``(channels,)``."""
    assert isinstance(consumer.weight, Tensor)
    weight, dtype = consumer.weight.detach(), torch.promote_types(consumer.weight.dtype, torch.float32)
    # They have one row for each input channel.
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS) or is_conv1d(consumer):
        return weight.abs().flatten(1).sum(1, dtype=dtype)
    groups: int = getattr(consumer, "groups", 1)
    if groups == 1:
        columns = _sum_of_absolute_rows(weight, dtype)
    else:
        columns = torch.cat([_sum_of_absolute_rows(rows, dtype) for rows in weight.chunk(groups)])
    return columns.flatten(1).sum(1) if columns.ndim > 1 else columns


def _sum_of_absolute_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``rows.abs().sum(0)``, on the CPU in chunks that stay in its cache, which is up to twice as fast."""
    if rows.device.type != "cpu" or len(rows) <= 2 * _ROWS_PER_CHUNK:
        return rows.abs().sum(0, dtype=dtype)
    buffer, total = torch.empty_like(rows[:_ROWS_PER_CHUNK]), rows.new_zeros(rows.shape[1:], dtype=dtype)
    for chunk in rows.split(_ROWS_PER_CHUNK):
        total += torch.abs(chunk, out=buffer[: len(chunk)]).sum(0, dtype=dtype)
    return total


def _mean_response(consumer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the mean output of a linear or convolution layer without bias from its mean inputs, padding ignored."""
    assert isinstance(consumer.weight, Tensor)
    groups: int = getattr(consumer, "groups", 1)
    dtype = torch.promote_types(consumer.weight.dtype, torch.float32)
    weight: Tensor = consumer.weight.detach().to(dtype)
    weight = weight.flatten(2).sum(-1) if weight.ndim > 2 else weight
    weight = weight_by_output(consumer, weight).unflatten(0, (groups, -1))
    if isinstance(consumer, TRANSPOSED_CONVOLUTIONS):
        weight = weight / math.prod(consumer.stride)
    return (weight @ inputs.to(weight).view(groups, -1, 1)).flatten().cpu().double()
