"""Hare and Tortoise: periodically reset the network to its own moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.selection import Patterns, selected_tensors
from lightning_plasticity.interventions.weights.updates import (
    RepairReport,
    WeightUpdate,
    apply_update,
    keep_optimizer_state,
)
from lightning_plasticity.layers import NORM_LAYERS


class HareTortoise(StepIntervention):
    r"""Reset the network (the hare) to its exponential moving average (the tortoise) every so many steps.

    .. math:: \bar\theta \leftarrow \beta\,\bar\theta + (1 - \beta)\,\theta \ \text{after each step}, \qquad
        \theta \leftarrow \bar\theta \ \text{after every $k$-th}

    for all trainable parameters and the running statistics of norm layers. Counters, other buffers (masks, caches) and
    frozen parameters stay as they are. The network gets a *copy* of the average, which continues independently. The
    optimizer state stays as it is, as in the authors' code. NaN enters the average, too.

    ``start(model)`` initialises the average with the current weights. It is kept in float32 where weights are in half
    precision, and takes as much memory as the weights.

    Args:
        decay: Decay of the average, :math:`\beta`, in [0, 1).
        every_n_steps: Steps from one reset to the next, :math:`k`. The paper resets every ten epochs; 2000 steps are
            ten epochs of its CIFAR-10, in batches of 256.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If ``decay`` or ``every_n_steps`` is out of range.

    References:
        Lee et al. 2024, arXiv 2406.02596.

    Example:
        >>> model, intervention = nn.Linear(1, 1, bias=False), HareTortoise(decay=0.75, every_n_steps=1)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(0)
        ...     intervention.start(model)
        ...     _ = model.weight.fill_(4)
        >>> intervention.after_step(model).num_parameters_changed, model.weight.item()
        (1, 1.0)
    """

    runs_model = False

    acts_on = "parameter in floating point"

    def __init__(
        self,
        decay: float = 0.999,
        every_n_steps: int = 2000,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        super().__init__(include, exclude)
        check_number("[0, 1)", self.name, "the share of the average that stays", decay=decay)
        check_positive_ints(self.name, every_n_steps=every_n_steps)
        self.decay, self.every_n_steps = decay, every_n_steps
        self.steps = 0
        self.tortoise: dict[str, Tensor] = {}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        for name, tensor in self._averaged_tensors(model, context).items():
            if name not in self.tortoise or self.tortoise[name].shape != tensor.shape:
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                self.tortoise[name] = tensor.detach().to(dtype, copy=True)

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        hare = self._averaged_tensors(model, context)
        same_shape = {n for n, x in hare.items() if n in self.tortoise and self.tortoise[n].shape == x.shape}
        self._require_start(hare, same_shape)
        for name, tensor in hare.items():
            slow = self.tortoise[name] = self.tortoise[name].to(tensor.device)
            slow.lerp_(tensor.to(slow.dtype), 1 - self.decay)
        self.steps += 1
        if self.steps % self.every_n_steps:
            return None
        values = {tensor: self.tortoise[name] for name, tensor in hare.items()}
        return apply_update(self.name, WeightUpdate(values, keep_optimizer_state(values)), context.optimizers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "tortoise": {name: slow.clone() for name, slow in self.tortoise.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.tortoise = {name: slow.clone() for name, slow in state["tortoise"].items()}

    def _averaged_tensors(self, model: nn.Module, context: InterventionContext) -> dict[str, Tensor]:
        """Return the parameters to act on and the running statistics of norm layers, by name."""
        selected = set(self.selected_parameters(model, context).values())
        buffers = selected_tensors(self.name, model, self.include, self.exclude)
        names: dict[Tensor, str] = {}
        for prefix, module in model.named_modules():
            parameters = dict(module.named_parameters(prefix, recurse=False))
            trainable = {name: parameter for name, parameter in parameters.items() if parameter in selected}
            if isinstance(module, NORM_LAYERS) and (trainable or not parameters):
                statistics = {n: b for n, b in module.named_buffers(prefix, recurse=False) if b in buffers}
            else:
                statistics = {}
            for name, tensor in {**trainable, **statistics}.items():
                if tensor.is_floating_point() or tensor.is_complex():
                    names.setdefault(tensor, name)
        self.rest_without(names, model, context)
        return {name: tensor for tensor, name in names.items()}
