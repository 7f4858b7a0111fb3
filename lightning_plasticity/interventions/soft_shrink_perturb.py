"""Soft shrink and perturb: a little of shrink and perturb after every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints, check_seed
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.initial_distribution import constants, initial_values
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator
from lightning_plasticity.isolation.weights import named_tensors
from lightning_plasticity.layers import norm_parameters


class SoftShrinkPerturb(RemembersInitialWeights, StepIntervention):
    r"""Shrink all weights a little after each optimizer step, and add a little noise.

    .. math:: \theta \leftarrow \lambda\,\theta + \sigma\, s \odot \xi, \qquad \xi \sim \mathcal N(0, 1)

    with :math:`s` the standard deviation of the tensor's own initial entries. Entries that do not start at random, such
    as biases of zero and scales of one, get no noise, and go towards their initial value instead of zero. Without a
    gradient, the standard deviation of weights tends to :math:`\sigma / \sqrt{1 - \lambda^2}` times their initial one:
    0.0007 times with the defaults, 1 times with :math:`\sigma = \sqrt{1 - \lambda^2}`.

    Drawing normal numbers is slow: a step of a large linear network takes half as long again. With ``every_n_steps`` of
    :math:`n`, the effect of :math:`n` steps in a row is applied at once, with :math:`\lambda^n` and
    :math:`\sigma \sqrt{\sum_{i<n} \lambda^{2i}}`.

    Norm layers, buffers, frozen parameters and the optimizer state stay as they are. The noise comes from a separate
    generator on the CPU, so that it is the same on every device and in every process. In half precision, changes below
    the resolution are lost.

    Args:
        shrink: Share of the weights that stays, :math:`\lambda`, in [0, 1].
        noise: Size of the noise, as a share of the initial standard deviation, :math:`\sigma`, at least 0.
        every_n_steps: Number of steps that are applied at once, :math:`n`, at least 1.
        seed: Seed of the noise.
        initial: ``state_dict()`` of the model before training, whose scale the noise has. By default the weights that
            the callback has stored at its first batch, or those at :meth:`start`.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If ``shrink``, ``noise`` or ``every_n_steps`` is out of range; at the start, if a pattern
            matches nothing.

    References:
        Juliani and Ash 2024, arXiv 2405.19153, with the defaults; noise after each step also in Dohare et al. 2024,
        Nature 632:768. Shrink and perturb itself: Ash and Adams 2020, arXiv 1910.08475.

    Example:
        >>> model, intervention = nn.Linear(2, 1), SoftShrinkPerturb(shrink=0.5, noise=0)
        >>> intervention.start(model)
        >>> before = model.weight.detach().clone()
        >>> intervention.after_step(model)
        >>> bool((model.weight == 0.5 * before).all())
        True
    """

    runs_model = False

    acts_on = "parameter, apart from those of norm layers"

    def __init__(
        self,
        shrink: float = 1 - 1e-6,
        noise: float = 1e-6,
        every_n_steps: int = 1,
        seed: int = 0,
        *,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        super().__init__(include, exclude)
        self.remember_given(initial)
        check_number("[0, 1]", self.name, "the share of the weights that stays", shrink=shrink)
        check_number("[0, inf)", self.name, noise=noise)
        check_positive_ints(self.name, every_n_steps=every_n_steps)
        check_seed(seed, self.name)
        self.shrink, self.noise, self.every_n_steps, self.seed = shrink, noise, every_n_steps, seed
        self.steps = 0
        self.generator = PicklableGenerator()
        self.generator.manual_seed(seed)
        self.scales: dict[str, Tensor] = {}
        # The values that entries go towards, of tensors with any but zero.
        self.centers: dict[str, Tensor] = {}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        parameters = self._perturbed(model, context)
        new = {n: p for n, p in parameters.items() if n not in self.scales or self.scales[n].shape not in ((), p.shape)}
        given = context.initial if self.initial is None else self.initial
        values = initial_values(model, new, dict(named_tensors(model)) if given is None else given)
        for name, parameter in new.items():
            fixed = constants(values[parameter]) if values[parameter].shape == parameter.shape else None
            self.scales[name] = _scale(values[parameter], fixed)
            self.centers.pop(name, None)
            if fixed is not None and bool(values[parameter][fixed].any()):
                self.centers[name] = values[parameter].masked_fill(~fixed, 0)

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        parameters = self._perturbed(model, context)
        self._require_start(parameters, self.scales)
        self.steps += 1
        if self.steps % self.every_n_steps:
            return
        noise = self.noise * math.sqrt(sum(self.shrink ** (2 * i) for i in range(self.every_n_steps)))
        shrink = self.shrink**self.every_n_steps
        for name, parameter in parameters.items():
            parameter.mul_(shrink)
            if name in self.centers:
                parameter.add_(self.centers[name].to(parameter), alpha=1 - shrink)
            if noise:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                draw = torch.randn(parameter.shape, generator=self.generator, dtype=dtype)
                parameter.add_(draw.mul_(self.scales[name]).to(parameter.device), alpha=noise)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "scales": {name: scale.clone() for name, scale in self.scales.items()},
            "centers": {name: center.clone() for name, center in self.centers.items()},
            "generator": self.generator.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.scales = {name: scale.clone().cpu() for name, scale in state["scales"].items()}
        self.centers = {name: center.clone().cpu() for name, center in state["centers"].items()}
        self.generator.set_state(state["generator"].cpu())

    def _perturbed(self, model: nn.Module, context: InterventionContext) -> dict[str, nn.Parameter]:
        """Return the parameters to act on, all but those of norm layers, by name."""
        norms = norm_parameters(model)
        perturbed = {name: p for name, p in self.selected_parameters(model, context).items() if p not in norms}
        self.rest_without(perturbed, model, context)
        return perturbed


def _scale(initial: Tensor, fixed: Tensor | None) -> Tensor:
    """Compute the standard deviation of the entries that are not fixed: one for all, zero for fixed ones."""
    wide = initial.to(torch.promote_types(initial.dtype, torch.float32))
    if initial.numel() < 2 or (fixed is not None and bool(fixed.all())):
        return torch.zeros(())
    if fixed is None:
        return wide.std(correction=0)
    return torch.where(fixed, 0, wide[~fixed].std(correction=0))
