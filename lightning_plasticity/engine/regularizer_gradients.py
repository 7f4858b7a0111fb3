"""Add the gradients of regularizers to those of the loss, before an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_or_none
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.interventions.penalty_gradients import add_gradients, differentiate_penalty


@dataclass(eq=False)
class PenaltyGradients:
    """The penalties of several regularizers and the sum of their gradients.

    Args:
        gradients: The sum of the gradients for each parameter; ``None`` where no penalty depends on it.
        decoupled: The same of the regularizers that are decoupled, which ``gradients`` leaves out.
        penalties: The value of each penalty, by its regularizer.
        errors: The regularizers that failed, with their errors; they are not in the sums.
    """

    gradients: list[Tensor | None]
    decoupled: list[Tensor | None]
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
    result = PenaltyGradients([None] * len(parameters), [None] * len(parameters))
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
                if regularizer.decoupled:
                    result.decoupled = add_gradients(result.decoupled, gradients)
                else:
                    result.gradients = add_gradients(result.gradients, gradients)
    except Exception as error:
        # Sharded parameters could not be gathered.
        result.errors = [(regularizer, error) for regularizer in regularizers]
    return result
