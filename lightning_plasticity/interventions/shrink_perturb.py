"""Shrink and perturb: move all weights part of the way to freshly drawn ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number
from lightning_plasticity.interventions.base import InterventionContext, Repair, When
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.layers import norm_parameters


class ShrinkPerturb(RemembersInitialWeights, Repair):
    r"""Shrink and perturb: :math:`\theta \leftarrow (1 - s)\,\theta + s\,\theta_{\mathrm{fresh}}`.

    :math:`\theta_{\mathrm{fresh}}` is a random permutation of the tensor's own initial entries, so that the noise has
    the scale of the network's initialisation, whatever it was. Entries that do not start at random, such as biases of
    zero and scales of one, move towards their initial value. Norm layers, buffers and frozen parameters are left as
    they are.

    Args:
        s: Interpolation weight of the fresh values, in (0, 1]; 1 is a reset.
        when: When the callback runs it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.
        initial: ``state_dict()`` of the model before training, to draw from. By default the weights that the callback
            has stored at its first batch, or those at :meth:`start`; without either, ``reset_parameters`` draws.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.
        also: Modules to copy others to after a repair, such as ``{"target": "online"}``.

    Raises:
        ValueError: If ``s`` is outside (0, 1]; at the repair, if a pattern matches nothing, or a parameter has neither
            an initial value nor a ``reset_parameters``.

    References:
        Ash and Adams 2020, arXiv 1910.08475.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> ShrinkPerturb(s=0.5).repair(model).num_parameters_changed
        10
    """

    acts_on = "parameter, apart from those of norm layers"

    def __init__(
        self,
        s: float = 0.8,
        when: When = "collapse",
        *,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        Repair.__init__(self, when, include=include, exclude=exclude, also=also)
        self.remember_given(initial)
        check_number("(0, 1]", self.name, "the share of the way to fresh weights", s=s)
        self.s = s

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        kept = norm_parameters(model)
        parameters = {n: p for n, p in self.selected_parameters(model, context).items() if p not in kept}
        fresh = self.fresh_values(model, parameters, context)
        return WeightUpdate(
            {old: new if self.s == 1 else torch.lerp(old.detach(), new.to(old), self.s) for old, new in fresh.items()}
        )
