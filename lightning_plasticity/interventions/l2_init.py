"""L2 Init: weight decay toward the initial parameters instead of zero."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import InterventionContext, ParametersOf
from lightning_plasticity.interventions.initial_values import InitialValueRegularizer
from lightning_plasticity.interventions.penalty_gradients import ClosedForm
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.matrices import at_least_float32
from lightning_plasticity.layers import norm_parameters


class L2Init(InitialValueRegularizer):
    r"""L2 Init, or regenerative regularization: pull every parameter to its own initial value.

    .. math:: R = \frac{\lambda}{2} \lVert \theta - \theta_0 \rVert^2

    All trainable parameters count, apart from those of norm layers; of parametrized layers the parameters themselves,
    not the weight computed from them. :math:`\theta_0` are the values at :meth:`start`, kept in the state. Parameters
    that are added later, or get another shape, need another :meth:`start`, which keeps the other :math:`\theta_0`.

    Args:
        coefficient: Factor of the term, :math:`\lambda`. The gradient is :math:`\lambda (\theta - \theta_0)`.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If ``coefficient`` is negative.
        RuntimeError: At the call, if the model had no such parameter at the last :meth:`start`.

    References:
        Kumar et al. 2023, arXiv 2308.11958.

    Example:
        >>> import torch
        >>> model, regularizer = nn.Linear(3, 2), L2Init(coefficient=0.1)
        >>> regularizer.start(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> round(regularizer.penalty(model).item(), 6)  # 0.1 / 2 · 6
        0.3
    """

    acts_on = "parameter, apart from those of norm layers"

    def __init__(self, coefficient: float = 1e-2, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(coefficient, include=include, exclude=exclude)
        self._known_pairs: tuple[ParametersOf, list[tuple[nn.Parameter, Tensor]]] | None = None

    @override
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        norms = norm_parameters(model)
        return {name: parameter for name, parameter in super().parameters(model).items() if parameter not in norms}

    @override
    def distance(self, parameter: Tensor, initial: Tensor) -> Tensor:
        # One pass over memory, without a tensor for the difference.
        return 0.5 * F.mse_loss(parameter, initial, reduction="sum")

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self._known_pairs = None
        super().prepare(model, context)

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._known_pairs = None
        super().load_state_dict(state)

    @override
    def closed_form(self, model: nn.Module, *, with_value: bool) -> ClosedForm:
        value = self.penalty(model) if with_value else None
        parameters = ParametersOf(model, self._trained)
        if self._known_pairs is None or self._known_pairs[0] != parameters:
            pairs = self.pairs(model)
            self.rest_without(pairs, model)
            self._known_pairs = parameters, pairs
        own: dict[Tensor, Tensor] = {}
        initial: dict[Tensor, Tensor] = {}
        for parameter, value_at_start in self._known_pairs[1]:
            wide = at_least_float32(parameter)
            if wide is parameter:
                # No tensor for the difference, which would be two more passes over the memory of all parameters.
                own[parameter], initial[parameter] = parameter, value_at_start
            else:
                # In half precision, the difference of two large sums would be rounded away.
                own[parameter] = (wide - value_at_start.float()).to(parameter)
        return ClosedForm(value, [(self.coefficient, own), (-self.coefficient, initial)])

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known_pairs": None}
