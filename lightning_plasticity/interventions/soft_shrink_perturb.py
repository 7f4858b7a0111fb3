"""Soft shrink and perturb: a little of shrink and perturb after every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints, check_seed
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator, fresh_values
from lightning_plasticity.layers import NORM_LAYERS

_DRAWS = 8
"""Number of fresh draws from which the standard deviation is estimated: a bias has few entries."""


class SoftShrinkPerturb(StepIntervention):
    r"""Shrink all weights a little after each optimizer step, and add a little noise.

    .. math:: \theta \leftarrow \lambda\,\theta + \sigma\, s \odot \xi, \qquad \xi \sim \mathcal N(0, 1)

    with :math:`s` the standard deviation of the tensor's own initialisation, estimated at the start from draws of its
    layer's ``reset_parameters``: tensors that start as a constant, such as zero biases, get no noise. Without a
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

    Raises:
        ValueError: If ``shrink``, ``noise`` or ``every_n_steps`` is out of range; at the start, if a module with
            trainable parameters has no ``reset_parameters``.

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

    def __init__(self, shrink: float = 1 - 1e-6, noise: float = 1e-6, every_n_steps: int = 1, seed: int = 0) -> None:
        check_number("[0, 1]", self.name, "the share of the weights that stays", shrink=shrink)
        check_number("[0, inf)", self.name, noise=noise)
        check_positive_ints(self.name, every_n_steps=every_n_steps)
        check_seed(seed, self.name)
        self.shrink, self.noise, self.every_n_steps, self.seed = shrink, noise, every_n_steps, seed
        self.steps = 0
        self.generator = PicklableGenerator()
        self.generator.manual_seed(seed)
        self.scales: dict[str, Tensor] = {}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        parameters = _perturbed(model)
        new = {n: p for n, p in parameters.items() if n not in self.scales or self.scales[n].shape not in ((), p.shape)}
        if not new:
            return
        modules = {name: module for name, module in model.named_modules() if not isinstance(module, NORM_LAYERS)}
        generator = torch.Generator().manual_seed(self.seed)
        draws = [fresh_values(model, modules, generator) for _ in range(_DRAWS)]
        self.scales |= {name: _scale(torch.stack([draw[p] for draw in draws])) for name, p in new.items()}

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        parameters = _perturbed(model)
        self._require_start(parameters, self.scales)
        self.steps += 1
        if self.steps % self.every_n_steps:
            return
        noise = self.noise * math.sqrt(sum(self.shrink ** (2 * i) for i in range(self.every_n_steps)))
        for name, parameter in parameters.items():
            parameter.mul_(self.shrink**self.every_n_steps)
            if noise:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                draw = torch.randn(parameter.shape, generator=self.generator, dtype=dtype)
                parameter.add_(draw.mul_(self.scales[name]).to(parameter.device), alpha=noise)

    @override
    def state_dict(self) -> dict[str, Any]:
        scales = {name: scale.clone() for name, scale in self.scales.items()}
        return {"steps": self.steps, "scales": scales, "generator": self.generator.get_state()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.scales = {name: scale.clone().cpu() for name, scale in state["scales"].items()}
        self.generator.set_state(state["generator"].cpu())


def _perturbed(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of all but norm layers, by name."""
    norms = {id(p) for m in model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in norms}


def _scale(draws: Tensor) -> Tensor:
    """Compute the standard deviation of fresh values, ``(draws, ...)``: one for all entries, zero for constant ones."""
    draws = draws.to(torch.promote_types(draws.dtype, torch.float32))
    constant = (draws == draws[0]).all(0)
    if bool(constant.all()):
        return torch.zeros(())
    std = draws[:, ~constant].std(correction=0)
    return torch.where(constant, 0, std) if bool(constant.any()) else std
