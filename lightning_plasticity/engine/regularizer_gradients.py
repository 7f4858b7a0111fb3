"""Add the gradients of regularizers to those of the loss, before an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_or_none
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.interventions.penalty_gradients import Terms, differentiate_penalty


@dataclass(eq=False)
class PenaltyGradients:
    """The penalties of several regularizers and the sum of their gradients.

    Args:
        terms: The sum of the gradients.
        decoupled: The same of the regularizers that are decoupled, which ``terms`` leaves out.
        penalties: The value of each penalty, by its regularizer, as far as it is known.
        errors: The regularizers that failed, with their errors; they are not in the sums.
    """

    terms: Terms = field(default_factory=list)
    decoupled: Terms = field(default_factory=list)
    penalties: list[tuple[Regularizer, Tensor]] = field(default_factory=list)
    errors: list[tuple[Regularizer, Exception]] = field(default_factory=list)


def penalty_gradients(
    model: nn.Module, parameters: Sequence[Tensor], regularizers: Sequence[Regularizer], *, with_values: bool
) -> PenaltyGradients:
    """Differentiate the penalties of regularizers with respect to parameters, sharded ones included.

    Each regularizer succeeds on all ranks or is left out on all ranks.

    Args:
        model: The model.
        parameters: The parameters, as the optimizer holds them.
        regularizers: The regularizers.
        with_values: Whether the values of all penalties are needed.
    """
    result = PenaltyGradients()
    try:
        with gather_full_parameters(model) as full_parameters:
            full = [full_parameters.get(parameter, parameter) for parameter in parameters]
            for regularizer in regularizers:
                try:
                    with all_or_none():
                        gradient = differentiate_penalty(regularizer, model, full, with_value=with_values)
                except Exception as error:
                    result.errors.append((regularizer, error))
                    continue
                (result.decoupled if regularizer.decoupled else result.terms).extend(gradient.terms)
                if gradient.penalty is not None:
                    result.penalties.append((regularizer, gradient.penalty))
    except Exception as error:
        # Sharded parameters could not be gathered.
        result.errors = [(regularizer, error) for regularizer in regularizers]
    return result
