"""ReDo and ReGraMa: recycle the units that do nothing, by what they say or by what they could learn."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import as_float
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.interventions.base import Repair, Request, When
from lightning_plasticity.interventions.units.dependency_graph import describe_units
from lightning_plasticity.interventions.units.groups import UnitGroup, Units
from lightning_plasticity.interventions.units.layer_statistics import by_unit, recorded_inputs
from lightning_plasticity.interventions.units.unit_reset import plan_reset
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import input_channel_dim, weight_by_output


class _ThresholdReset(Repair):
    """Recycles the units whose score is at most ``threshold`` times the mean score of their layer."""

    def __init__(self, threshold: float, initial: Mapping[str, Tensor] | None, when: When) -> None:
        super().__init__(when)
        if not as_float(threshold) >= 0:
            raise ValueError(f"{self.name}(threshold={threshold!r}) must be at least 0: a share of the mean")
        if initial is not None and not isinstance(initial, Mapping):
            raise ValueError(f"{self.name}(initial={initial!r}) must be a state_dict(), or None")
        self.threshold = threshold
        # A state_dict() shares its tensors with the model, which is going to be trained.
        self.initial = (
            None if initial is None else {key: value.detach().cpu().clone() for key, value in initial.items()}
        )

    @override
    def changes(self, model: nn.Module, request: Request) -> WeightUpdate:
        if request.forward is None:
            raise ValueError(
                f"{self.name} needs to see the model run: repair(model, forward=lambda model: model(inputs))"
            )
        units = describe_units(model, request.forward)
        scores = {layer: all_reduce_mean(s, layer) for layer, s in self.scores(model, units, request).items()}
        chosen = {layer: self._dormant(layer, score) for layer, score in scores.items()}
        return plan_reset(model, units, chosen, request.generator, self.initial)

    @abstractmethod
    def scores(self, model: nn.Module, units: Units, request: Request) -> dict[str, Tensor]:
        """How much each unit does, at least 0, shape ``(units,)`` in float64, by layer."""

    def _dormant(self, layer: str, score: Tensor) -> Tensor:
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{self.name}: the units of {layer!r} give values that are not finite")
        if not bool(score.any()):
            warnings.warn(f"{self.name}: all units of {layer!r} are dormant", stacklevel=2)
        return (score <= self.threshold * score.mean()).nonzero().flatten()


class ReDo(_ThresholdReset):
    r"""Recycles dormant units: those whose mean absolute activation is small beside that of their layer.

    .. math:: s_i = \frac{\mathrm E|h_i|}{\mathrm{mean}_k\,\mathrm E|h_k|} \le \tau

    :math:`h_i` is what the consumers of a unit read (after activation, norm and pooling, averaged over samples and
    positions; the largest where several layers read it), in evaluation mode. In a layer whose units are all silent all
    count as dormant. Dormant units get incoming weights from their layer's own initialisation and outgoing weights of
    zero, and the optimizers forget those entries. If they were dead, the output of the network stays the same, to the
    last bit. Which layers have units that can be recycled is told by
    :func:`~lightning_plasticity.interventions.describe_units`.

    Args:
        threshold: :math:`\tau`, as a share of the layer's mean.
        initial: ``state_dict()`` of the model before training: incoming weights are drawn from the distribution of the
            initial weights of the same tensor. By default from the layer's ``reset_parameters``, which knows nothing of
            an initialisation applied by hand.
        when: When the callback does it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.

    Raises:
        ValueError: If ``threshold`` is negative; at the repair, if ``forward`` is not given or activations are not
            finite.

    References:
        Sokar et al. 2023, arXiv 2302.12902.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0]))  # the second never fires again
        >>> x = torch.rand(16, 4)
        >>> ReDo(threshold=0).repair(model, forward=lambda model: model(x)).units
        {'0': tensor([1])}
    """

    def __init__(
        self, threshold: float = 0.025, initial: Mapping[str, Tensor] | None = None, when: When = "collapse"
    ) -> None:
        super().__init__(threshold, initial, when)

    @override
    def scores(self, model: nn.Module, units: Units, request: Request) -> dict[str, Tensor]:
        assert request.forward is not None
        consumers = [name for site in units.groups.values() for name in site.consumers]
        with probe_mode(model), torch.no_grad(), recorded_inputs(model, consumers) as inputs:
            request.forward(model)
        return {layer: _activity(model, site, inputs) for layer, site in units.groups.items()}


class ReGraMa(_ThresholdReset):
    r"""Recycles units that have stopped learning: those whose incoming weights have small gradients.

    .. math:: s_i = \frac{\mathrm{mean}|\partial L/\partial w_{\mathrm{in},i}|}{\mathrm{mean}_k\,
        \mathrm{mean}|\partial L/\partial w_{\mathrm{in},k}|} \le \tau

    As :class:`ReDo` otherwise. The score has a meaning for activations that are never silent, such as GELU, and for
    residual networks. The gradient is taken in evaluation mode; ``.grad`` is not touched.

    Args:
        threshold: :math:`\tau`, as a share of the layer's mean.
        initial: ``state_dict()`` of the model before training, to draw from the distribution of, as for :class:`ReDo`.
        when: When the callback does it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.

    Raises:
        ValueError: If ``threshold`` is negative; at the repair, if ``loss`` is not given or gradients are not finite.

    References:
        Liu et al. 2025, arXiv 2505.24061.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = model[2].weight.fill_(1)
        ...     model[2].weight[:, 1] = 0  # nobody listens to it
        >>> x = torch.rand(16, 4)
        >>> ReGraMa().repair(model, loss=lambda model: model(x).square().mean(), forward=lambda model: model(x)).units
        {'0': tensor([1])}
    """

    def __init__(
        self, threshold: float = 0.01, initial: Mapping[str, Tensor] | None = None, when: When = "collapse"
    ) -> None:
        super().__init__(threshold, initial, when)

    @override
    def changes(self, model: nn.Module, request: Request) -> WeightUpdate:
        if request.loss is None:
            raise ValueError(
                "ReGraMa needs gradients: repair(model, loss=lambda model: loss_fn(model(inputs), targets))"
            )
        forward = request.forward if request.forward is not None else request.loss
        return super().changes(model, replace(request, forward=forward))

    @override
    def scores(self, model: nn.Module, units: Units, request: Request) -> dict[str, Tensor]:
        assert request.loss is not None
        weights = {layer: model.get_parameter(f"{layer}.weight" if layer else "weight") for layer in units.groups}
        if not weights:
            return {}
        with probe_mode(model):
            gradients = torch.autograd.grad(request.loss(model), list(weights.values()), materialize_grads=True)
        return {
            layer: _by_unit(weight_by_output(model.get_submodule(layer), gradient))
            for layer, gradient in zip(units.groups, gradients, strict=True)
        }


def _activity(model: nn.Module, site: UnitGroup, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean absolute value of each unit where it is heard, the largest over the layers that hear it."""
    heard = []
    for name, owner in site.consumers.items():
        dim = input_channel_dim(model.get_submodule(name))
        x = inputs[name].detach().double().abs().movedim(dim, 0).flatten(1).mean(1).cpu()
        heard.append(by_unit(x, owner, site.num_units) / owner[owner >= 0].bincount(minlength=site.num_units))
    return torch.stack(heard).amax(0)


def _by_unit(gradient: Tensor) -> Tensor:
    """Return the mean absolute gradient of the incoming weights of each unit, the first dimension."""
    return gradient.detach().double().abs().flatten(1).mean(1).cpu()
