"""Subtract the gradients of decoupled regularizers after an optimizer step, outside of its moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.distributed.sharded_weights import sharded_like
from lightning_plasticity.interventions.weights.optimizer_hooks import was_skipped


class DecoupledSteps:
    r"""Subtracts gradients, times the learning rate of their group, once an optimizer has taken its next step.

    .. math:: \theta_{t+1} = \mathrm{step}(\theta_t) - \eta\,r_t

    :math:`r_t` is given before the step, at :math:`\theta_t`. It is not used if the step is skipped, as by a gradient
    scaler, and once if the optimizer evaluates its closure several times.
    """

    def __init__(self) -> None:
        self._pending: dict[torch.optim.Optimizer, list[tuple[Tensor, Tensor]]] = {}
        self._handles: dict[torch.optim.Optimizer, RemovableHandle] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers belong to the fit.
        return {"_pending": {}, "_handles": {}}

    def schedule(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Set what is subtracted after the next step, instead of what was set before.

        Args:
            optimizer: The optimizer, whose learning rates count.
            parameters: The parameters; those of other optimizers are left alone.
            gradients: The gradient of each parameter; ``None`` where there is none.
        """
        by_parameter = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        self._pending[optimizer] = [
            (parameter, group["lr"] * sharded_like(parameter, by_parameter[parameter].detach()))
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in by_parameter
        ]
        if self._pending[optimizer] and optimizer not in self._handles:
            self._handles[optimizer] = optimizer.register_step_post_hook(self._subtract)

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._pending, self._handles = {}, {}

    def _subtract(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        pending = self._pending.pop(optimizer, [])
        if not was_skipped(optimizer):
            with torch.no_grad():
                for parameter, change in pending:
                    parameter.sub_(change)
