"""Add the gradients of regularizers to those of the loss, before an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_or_none
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters, sharded_like
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.isolation.state import device_of


@dataclass(eq=False)
class PenaltyGradients:
    """The penalties of several regularizers and the sum of their gradients.

    Args:
        gradients: The sum of the gradients for each parameter; ``None`` where no penalty depends on it.
        penalties: The value of each penalty, by its regularizer.
        errors: The regularizers that failed, with their errors; they are not in the sum.
    """

    gradients: list[Tensor | None]
    penalties: list[tuple[Regularizer, Tensor]] = field(default_factory=list)
    errors: list[tuple[Regularizer, Exception]] = field(default_factory=list)


def penalty_gradients(
    model: nn.Module, parameters: Sequence[Tensor], regularizers: Sequence[Regularizer]
) -> PenaltyGradients:
    """Differentiate the penalties of regularizers with respect to parameters, sharded ones included.

    Each regularizer succeeds on all ranks or is left out on all ranks.

    Args:
        model: The model.
        parameters: The parameters, as the optimizer holds them.
        regularizers: The regularizers.
    """
    result = PenaltyGradients([None] * len(parameters))
    try:
        with gather_full_parameters(model) as full_parameters:
            full = [full_parameters.get(parameter, parameter) for parameter in parameters]
            for regularizer in regularizers:
                try:
                    with all_or_none():
                        penalty, gradients = differentiate_penalty(regularizer, model, full)
                except Exception as error:
                    result.errors.append((regularizer, error))
                    continue
                result.penalties.append((regularizer, penalty.detach()))
                result.gradients = [_add(*pair) for pair in zip(result.gradients, gradients, strict=True)]
    except Exception as error:
        # Sharded parameters could not be gathered.
        result.errors = [(regularizer, error) for regularizer in regularizers]
    return result


def differentiate_penalty(
    regularizer: Regularizer, model: nn.Module, parameters: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the penalty of a regularizer and its gradients; ``None`` where it does not depend on a parameter.

    Raises:
        TypeError: If ``penalty`` does not return a scalar tensor.
        ValueError: If a gradient is not finite.
    """
    with torch.enable_grad(), torch.autocast(device_of(model).type, enabled=False):
        penalty: object = regularizer.penalty(model)
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            received = f"one of shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise TypeError(f"{regularizer.name}.penalty must return a scalar tensor, not {received}")
        # All parameters that the penalty depends on may be frozen.
        if not penalty.requires_grad:
            return penalty, [None] * len(parameters)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(penalty, parameters, allow_unused=True)
    if any(gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients):
        raise ValueError("a gradient is not finite")
    return penalty, gradients


def accumulate(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: float) -> None:
    """Add gradients, times a factor, to ``.grad`` of parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        shard = sharded_like(parameter, gradient.detach())
        if parameter.grad is None:
            parameter.grad = (factor * shard).to(parameter.dtype)
        elif parameter.grad.is_sparse:
            # nn.Embedding(sparse=True): a dense tensor cannot be added to a sparse one in place.
            parameter.grad = (factor * shard + parameter.grad).to(parameter.dtype)
        else:
            parameter.grad.add_(shard, alpha=factor)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
