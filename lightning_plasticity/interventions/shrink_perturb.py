"""Shrink and perturb: move all weights part of the way to freshly drawn ones."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import override

from lightning_plasticity._validation import check_number
from lightning_plasticity.interventions.base import InterventionContext, Repair, When
from lightning_plasticity.interventions.weights.initialization import fresh_values
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.layers import NORM_LAYERS


class ShrinkPerturb(Repair):
    r"""Shrink and perturb: :math:`\theta \leftarrow (1 - s)\,\theta + s\,\theta_{\mathrm{fresh}}`.

    :math:`\theta_{\mathrm{fresh}}` is drawn by each layer's own ``reset_parameters``, so that the noise has the scale
    of that layer's initialisation. Norm layers, buffers and frozen parameters are left as they are.

    Args:
        s: Interpolation weight of the fresh values, in (0, 1]; 1 is a reset.
        when: When the callback runs it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.

    Raises:
        ValueError: If ``s`` is outside (0, 1].

    References:
        Ash and Adams 2020, arXiv 1910.08475.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> ShrinkPerturb(s=0.5).repair(model).num_parameters_changed
        10
    """

    def __init__(self, s: float = 0.8, when: When = "collapse") -> None:
        super().__init__(when)
        check_number("(0, 1]", self.name, "the share of the way to fresh weights", s=s)
        self.s = s

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        modules = {name: module for name, module in model.named_modules() if not isinstance(module, NORM_LAYERS)}
        return WeightUpdate(
            {
                old: fresh if self.s == 1 else torch.lerp(old.detach(), fresh.to(old), self.s)
                for old, fresh in fresh_values(model, modules, context.generator).items()
                if isinstance(old, nn.Parameter)
            }
        )
