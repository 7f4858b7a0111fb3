"""Weight clipping: keep every weight within a multiple of its initial bound."""

from __future__ import annotations

import math

import torch
from torch import nn
from typing_extensions import override

from lightning_plasticity._validation import check_number
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.selection import Patterns


class WeightClipping(StepIntervention):
    r"""Clip weights and biases after each optimizer step.

    .. math:: \theta \leftarrow \mathrm{clamp}\Bigl(\theta, -\frac{\kappa}{\sqrt{\mathrm{fan\_in}}},
        \frac{\kappa}{\sqrt{\mathrm{fan\_in}}}\Bigr)

    in linear, convolution, attention and recurrent layers, including the last layer; a bias has the bound of its
    weight. :math:`1/\sqrt{\mathrm{fan\_in}}` is the bound of torch's own initialisation of linear and convolution
    layers.

    Norm layers are not clipped: a scale starts at 1 whatever the fan-in, and the bound of the layer before it would
    suppress it. Embeddings, which have no fan-in, layers of other kinds, frozen parameters and the optimizer state stay
    as they are, too. NaN stays NaN, infinite weights become finite. No state is stored: :meth:`start` need not be
    called.

    Args:
        kappa: :math:`\kappa`, greater than 0. The paper tunes it for each problem, from 1 to 5.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

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

    runs_model = False

    acts_on = "weight or bias of a linear, convolution, attention or recurrent layer"
    acts_on_computed = False

    def __init__(self, kappa: float = 2.0, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(include, exclude)
        check_number("(0, inf)", self.name, kappa=kappa)
        self.kappa = kappa

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.rest_without(self.linear_parameters(model, context), model, context)

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        parts = self.linear_parameters(model, context)
        self.rest_without(parts, model, context)
        for part in parts.values():
            bound = self.kappa / math.sqrt(part.fan_in)
            part.parameter.clamp_(-bound, bound)
