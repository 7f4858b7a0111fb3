"""UPGD: protect useful weights from the optimizer's steps, and perturb the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_seed
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator
from lightning_plasticity.interventions.weights.optimizer_hooks import OptimizerHooks


class UPGD(StepIntervention):
    r"""Utility-based perturbed gradient descent: scale every step of an optimizer, and noise, by the lack of utility.

    .. math:: u \leftarrow \beta\,u - (1 - \beta)\,g\,\theta, \qquad \hat u = \frac{u}{1 - \beta^t}, \qquad
        \theta \leftarrow (1 - \alpha\rho)\,\theta - \alpha\,(s + \sigma\,\xi)\,
        \Bigl(1 - \phi\bigl(\hat u / \max \hat u\bigr)\Bigr), \qquad \xi \sim \mathcal N(0, 1)

    for each weight :math:`\theta`, with its gradient :math:`g`, the learning rate :math:`\alpha` and weight decay
    :math:`\rho` of its optimizer, the logistic function :math:`\phi`, and the maximum over all weights. The utility
    :math:`-g\,\theta` is, to first order, by how much the loss would rise without the weight. :math:`-\alpha s` is the
    step that the optimizer takes: :math:`s = g` with SGD, which is the rule of the paper, and
    :math:`s = \hat m / (\sqrt{\hat v} + \epsilon)` with Adam and AdamW.

    It works with any optimizer. It replaces each step at once, inside of ``optimizer.step()``: what changes the weights
    between steps is left alone. All optimizers count for the maximum. Weight decay is left alone where it is apart from
    the rest of the step: in AdamW, other optimizers of torch with ``decoupled_weight_decay``, and SGD without momentum;
    elsewhere it is a part of :math:`s`. The gradient is that of the step: accumulated, clipped, with the terms of
    regularizers; with LBFGS that of the last evaluation. A step that a gradient scaler skips does not count, and a
    parameter without a gradient stays as it is. :meth:`after_step` follows new optimizers, from their next step on.

    Where no utility is positive, the ratio to the maximum would favour the least useful weights: utilities are divided
    by the largest absolute one then. Utilities are kept in float32 at least. They and the weights before a step take as
    much memory as two copies of the weights.

    Differences to the authors' public code: it divides :math:`\hat u` by the maximum of :math:`u`, which is not
    corrected, so that the first steps are scaled by nearly 0 or 1. Its example takes twice the step, so that a weight
    without utility moves by all of it; here this is twice the learning rate. Its variant with Adam divides by the norm
    of each row instead of the maximum. The text of the paper on reinforcement learning, and the optimizer of its
    experiments there, were not at hand.

    Args:
        decay: Decay of the utilities, :math:`\beta`, in [0, 1).
        noise: Standard deviation of the noise, :math:`\sigma`, relative to the learning rate.
        seed: Seed of the noise.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay under the optimizer alone.

    Raises:
        ValueError: If ``decay`` or ``noise`` is out of range; at the start, without optimizers, or if one has no
            learning rate ``lr`` or takes no hooks.

    References:
        Elsayed and Mahmood 2024, arXiv 2404.00781, with the defaults of the public code.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD([torch.nn.init.ones_(model.weight)], lr=1.0)
        >>> intervention = UPGD(noise=0)
        >>> intervention.start(model, optimizers=[optimizer])
        >>> model(torch.tensor([-1.0, 0.5])).backward()  # the first weight is useful: the loss would rise without it
        >>> optimizer.step()  # by 1 and -0.5
        >>> intervention.after_step(model, optimizers=[optimizer])
        >>> model.weight.data
        tensor([[1.2689, 0.6888]])
        >>> intervention.stop()
    """

    runs_model = False

    def __init__(
        self,
        decay: float = 0.999,
        noise: float = 1e-3,
        *,
        seed: int = 0,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        super().__init__(include, exclude)
        check_number("[0, 1)", self.name, "the share of the average that stays", decay=decay)
        check_number("[0, inf)", self.name, noise=noise)
        check_seed(seed, self.name)
        self.decay, self.noise, self.seed = decay, noise, seed
        self.utilities: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self.generator = PicklableGenerator()
        self.generator.manual_seed(seed)
        self._names: dict[Tensor, str] = {}
        self._before: dict[str, Tensor] = {}
        self._hooks: OptimizerHooks | None = None

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.stop()
        for optimizer in context.require_optimizers(self.name):
            if any("lr" not in group for group in optimizer.param_groups):
                raise ValueError(f"{self.name} needs a learning rate, and {type(optimizer).__name__} has no 'lr'")
        parameters = self._gated(model, context)
        for name, parameter in parameters.items():
            if not self._fits(name, parameter):
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.utilities[name], self.steps[name] = torch.zeros_like(parameter, dtype=dtype), 0
        self.rest_without(parameters, model, context)
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._hooks = OptimizerHooks(self.name, before=self._keep_weights, after=self._gate_step)
        self._hooks.follow(context.optimizers)

    @override
    def stop(self) -> None:
        if self._hooks is not None:
            self._hooks.follow([])
        self._hooks, self._names, self._before = None, {}, {}

    @override
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        parameters = self._gated(model, context)
        self._require_start(parameters, {name for name, parameter in parameters.items() if self._fits(name, parameter)})
        if self._hooks is None:
            raise RuntimeError(
                f"{self.name} has not followed the step: call start(model, optimizers=[optimizer]) before training, "
                "and again after stop()"
            )
        if context.optimizers:
            self._hooks.follow(context.optimizers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": dict(self.steps),
            "utilities": {name: utility.clone() for name, utility in self.utilities.items()},
            "generator": self.generator.get_state(),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = dict(state["steps"])
        self.utilities = {name: utility.clone() for name, utility in state["utilities"].items()}
        self.generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the hooks and what they refer to from copies: these follow no optimizers."""
        return {**vars(self), "_hooks": None, "_names": {}, "_before": {}}

    def _gated(self, model: nn.Module, context: InterventionContext) -> dict[str, nn.Parameter]:
        """Return the parameters to act on, by name."""
        return {n: p for n, p in self.selected_parameters(model, context).items() if p.is_floating_point()}

    def _fits(self, name: str, parameter: Tensor) -> bool:
        return name in self.utilities and self.utilities[name].shape == parameter.shape

    def _held(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Yield the parameters to act on that an optimizer holds: name, parameter and group."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._names:
                    yield self._names[parameter], parameter, group

    @torch.no_grad()
    def _keep_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the weights before a step."""
        for name, parameter, _ in self._held(optimizer):
            kept = self._before.get(name)
            # Memory that is used again is faster than new one.
            if kept is None or _layout(kept) != _layout(parameter):
                kept = self._before[name] = torch.empty_like(parameter)
            kept.copy_(parameter)

    @torch.no_grad()
    def _gate_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the utilities, and replace a step by the part of it that they leave."""
        stepped = []
        for name, parameter, group in self._held(optimizer):
            if parameter.grad is not None:
                self._update_utility(name, parameter.grad, sign=1 if group.get("maximize") else -1)
                stepped.append((name, parameter, group))
        scale = self._scale()
        for name, parameter, group in stepped:
            if self.noise:
                draw = torch.randn(parameter.shape, generator=self.generator, dtype=self.utilities[name].dtype)
                parameter.sub_(draw.to(parameter.device), alpha=float(group["lr"]) * self.noise)
            useful = self.utilities[name] / (self._bias_correction(name) * scale.to(parameter.device))
            decayed = self._before[name].mul_(1 - _decay_apart(optimizer, group))
            parameter.lerp_(decayed, useful.sigmoid_().to(parameter.dtype))

    def _update_utility(self, name: str, gradient: Tensor, sign: int) -> None:
        """Add the utility at a step, of a sign times gradient and weights before the step, to the average."""
        utility = self.utilities[name] = self.utilities[name].to(gradient.device)
        now, weights = gradient.to_dense().to(utility), self._before[name].to(utility)
        utility.mul_(self.decay).addcmul_(now, weights, value=sign * (1 - self.decay))
        self.steps[name] += 1

    def _scale(self) -> Tensor:
        """Return what utilities are divided by: the largest, or the largest absolute one if none is positive."""
        names = [name for name in self._names.values() if self.steps[name] and self.utilities[name].numel()]
        if not names:
            return torch.ones(())
        bounds = [torch.stack(self.utilities[name].aminmax()) / self._bias_correction(name) for name in names]
        lows, highs = torch.stack([bound.to(bounds[0].device) for bound in bounds]).unbind(1)
        low, high = lows.min(), highs.max()
        return torch.where(high > 0, high, torch.where(low < 0, -low, 1))

    def _bias_correction(self, name: str) -> float:
        """Compute the factor by which an average that starts at zero is too small, as in Adam."""
        return float(1 - self.decay ** self.steps[name])


def _layout(tensor: Tensor) -> object:
    return tensor.shape, tensor.dtype, tensor.device


def _decay_apart(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
    """Return the share of the weights that a step subtracts apart from the rest of it."""
    is_apart = group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW)
    if isinstance(optimizer, torch.optim.SGD):
        is_apart = not group["momentum"]
    return float(group["lr"]) * float(group["weight_decay"]) if is_apart else 0.0
