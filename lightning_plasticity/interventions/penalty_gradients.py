"""Differentiate the penalty of a regularizer, and add gradients to those of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.sharded_weights import sharded_like
from lightning_plasticity.isolation.state import device_of

if TYPE_CHECKING:
    from lightning_plasticity.interventions.base import Regularizer

Terms = list[tuple[float, Sequence[Tensor | None]]]
"""A gradient as a sum: factors, and for each parameter a tensor, or ``None`` for zeros."""


@dataclass(frozen=True)
class ClosedForm:
    """The penalty of a regularizer, and its gradient as a sum of tensors times factors.

    Args:
        value: The penalty, if it was asked for.
        terms: Factors, with a tensor for each parameter that the penalty depends on.
    """

    value: Tensor | None
    terms: Sequence[tuple[float, Mapping[Tensor, Tensor]]]


@dataclass(frozen=True)
class PenaltyGradient:
    """The penalty of a regularizer and its gradient.

    Args:
        penalty: The penalty; ``None`` if it has a closed form and its value was not asked for.
        terms: The gradient, for each of the parameters that it was asked for.
    """

    penalty: Tensor | None
    terms: Terms


def differentiate_penalty(
    regularizer: Regularizer, model: nn.Module, parameters: Sequence[Tensor], *, with_value: bool = False
) -> PenaltyGradient:
    """Return the penalty of a regularizer and its gradient.

    Args:
        regularizer: The regularizer.
        model: The model.
        parameters: The parameters to differentiate by.
        with_value: Whether the penalty is needed even if the gradient has a closed form.

    Raises:
        TypeError: If ``penalty`` does not return a scalar tensor.
        ValueError: If a gradient that autograd computed is not finite.
    """
    with torch.autocast(device_of(model).type, enabled=False):
        if "closed_form" in vars(type(regularizer)):
            with torch.no_grad():
                closed = regularizer.closed_form(model, with_value=with_value)
            if closed is not None:
                terms: Terms = [(factor, [term.get(p) for p in parameters]) for factor, term in closed.terms]
                return PenaltyGradient(closed.value, terms)
        with torch.enable_grad():
            penalty: object = regularizer.penalty(model)
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            received = f"one of shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise TypeError(f"{regularizer.name}.penalty must return a scalar tensor, not {received}")
        # All parameters that the penalty depends on may be frozen.
        if not penalty.requires_grad:
            return PenaltyGradient(penalty, [])
        gradients: Sequence[Tensor | None] = torch.autograd.grad(penalty, parameters, allow_unused=True)
    check_finite(gradients)
    return PenaltyGradient(penalty.detach(), [(1.0, gradients)])


def gradients_of_parameters(
    model: nn.Module, tensors: Sequence[Tensor], gradients: Sequence[Tensor]
) -> dict[Tensor, Tensor]:
    """Return the gradients of parameters, given those of tensors that are parameters or were computed from some.

    Args:
        model: The model with the parameters.
        tensors: Some of its parameters, and tensors with a graph.
        gradients: The gradient with respect to each of these tensors.
    """
    pairs = list(zip(tensors, gradients, strict=True))
    result = {tensor: gradient for tensor, gradient in pairs if tensor.is_leaf}
    computed = [(tensor, gradient) for tensor, gradient in pairs if not tensor.is_leaf]
    if not computed:
        return result
    outputs, output_gradients = zip(*computed, strict=True)
    # Through views, parametrizations and casts.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = torch.autograd.grad(outputs, parameters, output_gradients, allow_unused=True)
    for parameter, addend in zip(parameters, sums, strict=True):
        if addend is not None:
            result[parameter] = result[parameter] + addend if parameter in result else addend
    return result


def sum_terms(terms: Terms, count: int) -> list[Tensor | None]:
    """Return the gradient of each of ``count`` parameters; ``None`` for zeros."""
    sums: list[Tensor | None] = [None] * count
    for factor, gradients in terms:
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                before = sums[place]
                sums[place] = factor * gradient if before is None else before + factor * gradient
    return sums


def check_finite(gradients: Sequence[Tensor | None]) -> None:
    """Raise a ``ValueError`` if an entry of a gradient is not finite."""
    dense = [gradient for gradient in gradients if gradient is not None]
    norms = torch._foreach_norm(dense) if dense else []
    # A norm can overflow where no entry does.
    if not math.isfinite(sum(norm.item() for norm in norms)) and not all(bool(g.isfinite().all()) for g in dense):
        raise ValueError("a gradient is not finite")


def accumulate(parameters: Sequence[Tensor], terms: Terms, factor: float) -> None:
    """Add a gradient, times a factor, to ``.grad`` of parameters."""
    for weight, gradients in terms:
        sums, addends = [], []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            shard = sharded_like(parameter, gradient.detach())
            if parameter.grad is None:
                # In the layout of the parameter, which fused optimizers assume.
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad.is_sparse:
                # nn.Embedding(sparse=True): a dense tensor cannot be added to a sparse one in place.
                parameter.grad = (weight * factor * shard + parameter.grad).to(parameter.dtype)
            else:
                sums.append(parameter.grad)
                addends.append(shard)
        if sums:
            torch._foreach_add_(sums, addends, alpha=weight * factor)
