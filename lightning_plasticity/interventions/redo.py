"""ReDo and ReGraMa: reset dormant units, rated by their activations, by gradients, or by both."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_choice, check_number
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.interventions.base import InterventionContext, Loss, Repair, When
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.discovery import describe_units
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import by_unit, other_dims, recorded_inputs
from lightning_plasticity.interventions.units.selected_units import select_units
from lightning_plasticity.interventions.units.unit_reset import plan_reset
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import has_units, input_channel_dim, weight_by_output


class _ThresholdReset(RemembersInitialWeights, Repair):
    """Reset the units whose score is at most ``threshold`` times the mean score of their layer."""

    def __init__(
        self,
        threshold: float,
        initial: Mapping[str, Tensor] | None,
        when: When,
        include: Patterns,
        exclude: Patterns,
        also: Mapping[str, str] | None,
    ) -> None:
        Repair.__init__(self, when, include=include, exclude=exclude, also=also)
        self.remember_given(initial)
        check_number("[0, inf]", self.name, "a share of the mean", threshold=threshold)
        self.threshold = threshold

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        units = describe_units(model, context.require_forward(self.name, "repair"))
        units = select_units(self, units, model, context)
        scores = {layer: all_reduce_mean(s, layer) for layer, s in self.scores(model, units, context).items()}
        dormant = {layer: self._dormant_units(layer, score) for layer, score in scores.items()}
        return plan_reset(model, units, dormant, context.generator, self.initial_weights(context))

    @abstractmethod
    def scores(self, model: nn.Module, units: Units, context: InterventionContext) -> dict[str, Tensor]:
        """Rate each unit: by layer, scores of at least 0, shape ``(units,)``, in float64."""

    def _dormant_units(self, layer: str, score: Tensor) -> Tensor:
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{self.name}: the units of {layer!r} give values that are not finite")
        if not bool(score.any()):
            warnings.warn(f"{self.name}: all units of {layer!r} are dormant", stacklevel=2)
        return (score <= self.threshold * score.mean()).nonzero().flatten()


class ReDo(_ThresholdReset):
    r"""ReDo, "recycling dormant neurons": reset units whose mean absolute activation is small for their layer.

    .. math:: s_i = \frac{\mathrm E|h_i|}{\mathrm{mean}_k\,\mathrm E|h_k|} \le \tau

    :math:`h_i` is the input that a unit gives to its consumers, the layers that read it (after activation, norm and
    pooling, averaged over samples and positions; the largest where several layers read it), in evaluation mode. In a
    layer whose activations are all zero all units count as dormant. Dormant units get incoming weights drawn from the
    initial entries of the same tensor and outgoing weights of zero, and the optimizer state of those entries is reset.
    If they were dead, the output of the network stays the same, to the last bit.
    :func:`~lightning_plasticity.interventions.describe_units` lists the units of a model that can be reset.

    With ``utility="gradient"`` a unit is rated by the first-order cost of its reset instead, GXD (Elisii, Beauchemin
    and Jamshed 2026): gradient times difference from a reference, which is 0 here, since a unit that is reset has
    outgoing weights of zero,

    .. math:: s_i = \frac{c_i}{\mathrm{mean}_k\,c_k} \le \tau, \qquad
        c_i = \sum \Big|\frac{\partial L}{\partial h_i}\,h_i\Big|

    summed over samples, positions and consumers. Only the abstract of that paper could be had; for the absolute values
    see :class:`~lightning_plasticity.interventions.ContinualBackprop`. ``.grad`` is not touched.

    Args:
        threshold: :math:`\tau`, as a share of the layer's mean.
        initial: ``state_dict()`` of the model before training, to draw from. By default the weights that the callback
            has stored at its first batch, or those at :meth:`start`; without either, ``reset_parameters`` draws.
        when: When the callback runs it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.
        utility: What a unit is rated by: its mean ``"activation"``, or the ``"gradient"`` times activation.
        include: Names of the layers whose units are reset to act on, with wildcards; by default all.
        exclude: Names of layers whose units stay as they are.
        also: Modules to copy others to after a repair, such as ``{"target": "online"}``.

    Raises:
        ValueError: If ``threshold`` is negative; at the repair, if ``forward`` (for gradients ``loss``) is not given,
            or activations or gradients are not finite.

    References:
        Sokar et al. 2023, arXiv 2302.12902. Elisii, Beauchemin and Jamshed 2026, arXiv 2605.06834.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0]))  # the second unit is dead
        >>> x = torch.rand(16, 4)
        >>> ReDo(threshold=0).repair(model, forward=lambda model: model(x)).units
        {'0': tensor([1])}
    """

    def __init__(
        self,
        threshold: float = 0.025,
        initial: Mapping[str, Tensor] | None = None,
        when: When = "collapse",
        *,
        utility: str = "activation",
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(threshold, initial, when, include, exclude, also)
        check_choice(("activation", "gradient"), self.name, utility=utility)
        self.utility = utility

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        return super().plan(model, _with_forward(self, context) if self.utility == "gradient" else context)

    @override
    def scores(self, model: nn.Module, units: Units, context: InterventionContext) -> dict[str, Tensor]:
        consumers = [name for group in units.groups.values() for name in group.consumers]
        if self.utility == "gradient":
            costs = _first_order_costs(model, consumers, context.require_mean_loss(self.name))
            return {layer: _sum_over_consumers(group, costs) for layer, group in units.groups.items()}
        forward = context.require_forward(self.name, "repair")
        with probe_mode(model), torch.no_grad(), recorded_inputs(model, consumers) as inputs:
            forward(model)
        return {layer: _mean_activations(model, group, inputs) for layer, group in units.groups.items()}


class ReGraMa(_ThresholdReset):
    r"""ReGraMa: reset units that have stopped learning, those whose incoming weights have small gradients.

    .. math:: s_i = \frac{\mathrm{mean}|\partial L/\partial w_{\mathrm{in},i}|}{\mathrm{mean}_k\,
        \mathrm{mean}|\partial L/\partial w_{\mathrm{in},k}|} \le \tau

    Otherwise as :class:`ReDo`. The score is also meaningful for activations that are never exactly zero, such as GELU,
    and for residual networks. The gradient is taken in evaluation mode; ``.grad`` is not touched.

    Args:
        threshold: :math:`\tau`, as a share of the layer's mean.
        initial: ``state_dict()`` of the model before training, to draw new weights from, as for :class:`ReDo`.
        when: When the callback runs it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.
        include: Names of the layers whose units are reset to act on, with wildcards; by default all.
        exclude: Names of layers whose units stay as they are.
        also: Modules to copy others to after a repair, such as ``{"target": "online"}``.

    Raises:
        ValueError: If ``threshold`` is negative; at the repair, if ``loss`` is not given or gradients are not finite.

    References:
        Liu et al. 2025, arXiv 2505.24061.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[2].weight.fill_(1)
        ...     model[2].weight[:, 1] = 0  # no layer uses the second unit
        >>> x = torch.rand(16, 4)
        >>> ReGraMa().repair(model, loss=lambda model: model(x).square().mean(), forward=lambda model: model(x)).units
        {'0': tensor([1])}
    """

    def __init__(
        self,
        threshold: float = 0.01,
        initial: Mapping[str, Tensor] | None = None,
        when: When = "collapse",
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(threshold, initial, when, include, exclude, also)

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        return super().plan(model, _with_forward(self, context))

    @override
    def scores(self, model: nn.Module, units: Units, context: InterventionContext) -> dict[str, Tensor]:
        loss = context.require_mean_loss(self.name)
        names = [name for group in units.groups.values() for name in _weights(model, group)]
        if not names:
            return {}
        with probe_mode(model):
            values = torch.autograd.grad(loss(model), list(map(model.get_parameter, names)), materialize_grads=True)
        gradients = dict(zip(names, values, strict=True))
        return {layer: _mean_gradients(model, group, gradients) for layer, group in units.groups.items()}


def _with_forward(repair: Repair, context: InterventionContext) -> InterventionContext:
    """Return a context whose forward pass is the loss, unless it has another; raises if it has no loss."""
    loss = context.require_mean_loss(repair.name)
    return context if context.forward is not None else replace(context, forward=loss)


def _first_order_costs(model: nn.Module, layers: Iterable[str], loss: Loss) -> dict[str, Tensor]:
    """Sum ``|∂L/∂h · h|`` for each input channel of the given layers."""
    with probe_mode(model), recorded_inputs(model, layers, differentiable=True) as inputs:
        value = loss(model)
        calls = [(name, x) for name, of_layer in inputs.items() for x in of_layer]
        gradients = torch.autograd.grad(value, [x for _, x in calls], materialize_grads=True) if calls else ()
    costs: dict[str, Tensor] = {}
    for (name, x), gradient in zip(calls, gradients, strict=True):
        dim = input_channel_dim(model.get_submodule(name))
        values = gradient.double() * x.detach()
        # A layer may be called several times.
        costs[name] = costs.get(name, 0) + values.abs().sum(other_dims(x, dim)).cpu()
    return costs


def _sum_over_consumers(group: UnitGroup, costs: Mapping[str, Tensor]) -> Tensor:
    terms = [by_unit(costs[name], unit_index, group.num_units) for name, unit_index in group.consumers.items()]
    return torch.stack(terms).sum(0)


def _weights(model: nn.Module, group: UnitGroup) -> list[str]:
    """Return the names of the weights of the layers that compute the units."""
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in group.incoming}
    return [name for name, layer in layers.items() if name.rpartition(".")[2] == "weight" and has_units(layer)]


def _mean_gradients(model: nn.Module, group: UnitGroup, gradients: Mapping[str, Tensor]) -> Tensor:
    """Compute the mean absolute gradient of each unit's incoming weights."""
    sums = torch.zeros(group.num_units, dtype=torch.float64)
    counts = torch.zeros(group.num_units, dtype=torch.float64)
    for name in _weights(model, group):
        rows = weight_by_output(model.get_submodule(name.rpartition(".")[0]), gradients[name]).flatten(1)
        sums += by_unit(rows.double().abs().sum(1).cpu(), group.incoming[name].flatten(), group.num_units)
        counts += by_unit(sums.new_full((len(rows),), rows.shape[1]), group.incoming[name].flatten(), group.num_units)
    return sums / counts


def _mean_activations(model: nn.Module, group: UnitGroup, inputs: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """Compute the mean absolute activation of each unit, the largest over the layers that read it."""
    by_consumer = []
    for name, unit_index in group.consumers.items():
        dim = input_channel_dim(model.get_submodule(name))
        # A layer may be called several times.
        values = torch.cat([x.detach().movedim(dim, 0).reshape(x.shape[dim], -1) for x in inputs[name]], dim=1)
        channels_per_unit = unit_index[unit_index >= 0].bincount(minlength=group.num_units)
        means = values.double().abs().mean(1).cpu()
        by_consumer.append(by_unit(means, unit_index, group.num_units) / channels_per_unit)
    return torch.stack(by_consumer).amax(0)
