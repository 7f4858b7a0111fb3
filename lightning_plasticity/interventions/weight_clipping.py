"""Weight clipping: keep every weight within reach of its initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from typing_extensions import override

from lightning_plasticity._validation import as_float
from lightning_plasticity.interventions.base import StepIntervention
from lightning_plasticity.interventions.weights.linear_layers import linear_parameters


class WeightClipping(StepIntervention):
    r"""Clips weights and biases after each optimizer step.

    .. math:: \theta \leftarrow \mathrm{clamp}\Bigl(\theta, -\frac{\kappa}{\sqrt{\mathrm{fan\_in}}},
        \frac{\kappa}{\sqrt{\mathrm{fan\_in}}}\Bigr)

    in linear, convolution, attention and recurrent layers, the last layer's too; a bias has the bound of its weight.
    :math:`1/\sqrt{\mathrm{fan\_in}}` is the bound of torch's own initialisation of linear and convolution layers.

    Norm layers stay as they are: a gain starts at 1, which says nothing of a fan-in, and the bound of the layer before
    it would silence it. So do embeddings, which have no fan-in, layers of other kinds and frozen parameters. What is
    not a number stays so, infinite weights become finite. What the optimizer remembers stays as it is. Nothing is
    remembered of the model: :meth:`start` need not be called.

    Args:
        kappa: :math:`\kappa`, greater than 0. The paper chooses it per problem, from 1 to 5.

    Raises:
        ValueError: If ``kappa`` is not greater than 0 and finite.

    References:
        Elsayed et al. 2024, arXiv 2407.01704.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[-3.0, 0.5, 1.5, 0.0]]))
        >>> WeightClipping(kappa=2).after_step(model)
        >>> model.weight.data
        tensor([[-1.0000,  0.5000,  1.0000,  0.0000]])
    """

    def __init__(self, kappa: float = 2.0) -> None:
        if not 0 < as_float(kappa) < math.inf:
            raise ValueError(f"WeightClipping(kappa={kappa!r}) must be a finite number, greater than 0")
        self.kappa = kappa

    @override
    @torch.no_grad()
    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        for part in linear_parameters(model).values():
            bound = self.kappa / math.sqrt(part.fan_in)
            part.parameter.clamp_(-bound, bound)
