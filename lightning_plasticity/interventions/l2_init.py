"""L2 Init: weight decay toward the initial parameters instead of zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

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

    @override
    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        norms = norm_parameters(model)
        return {name: parameter for name, parameter in super().parameters(model).items() if parameter not in norms}

    @override
    def distance(self, parameter: Tensor, initial: Tensor) -> Tensor:
        # One pass over memory, without a tensor for the difference.
        return 0.5 * F.mse_loss(parameter, initial, reduction="sum")

    @override
    def closed_form(self, model: nn.Module, *, with_value: bool) -> ClosedForm:
        pairs = self.pairs(model)
        self.rest_without(pairs, model)
        value = self.penalty(model) if with_value else None
        # No tensor for the difference, which would be two more passes over the memory of all parameters; but in half
        # precision the difference of two large sums would be rounded away.
        terms: dict[float, dict[Tensor, Tensor]] = {self.coefficient: {}, -self.coefficient: {}}
        for parameter, initial in pairs:
            wide = at_least_float32(parameter.detach())
            if wide.dtype == parameter.dtype:
                terms[self.coefficient][parameter] = wide
                terms[-self.coefficient][parameter] = initial
            else:
                terms[self.coefficient][parameter] = (wide - initial.to(wide)).to(parameter)
        return ClosedForm(value, list(terms.items()))
