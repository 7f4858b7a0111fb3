"""Count backward passes and optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_plasticity.interventions.weights.optimizer_hooks import was_skipped
from lightning_plasticity.messages import MisconfigurationError


class StepCounter:
    """Counts backward passes and the optimizer steps that were not skipped, also with manual optimization.

    A step without any gradient counts as skipped: Lightning takes one if ``training_step`` returns ``None``.
    """

    def __init__(self) -> None:
        self.backward_passes = 0
        """Number of backward passes in this fit."""
        # The number of backward passes at the last step of each optimizer.
        self._at_last_step: dict[torch.optim.Optimizer, int] = {}
        self._uses_hooks = self._needs_steps = False
        self._handles: dict[torch.optim.Optimizer, RemovableHandle] = {}
        self._is_announced = False
        self._steps = 0
        self._unannounced: torch.optim.Optimizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers belong to the fit.
        return {**vars(self), "_handles": {}, "_at_last_step": {}, "_unannounced": None}

    def begin(self, optimizers: Sequence[torch.optim.Optimizer], *, uses_hooks: bool, needs_steps: bool) -> None:
        """Start counting for a fit.

        Args:
            optimizers: The optimizers of the fit.
            uses_hooks: Whether to count steps, by hooks that stay on the optimizers until they are no longer tracked.
            needs_steps: Whether an optimizer that takes no hooks is an error.

        Raises:
            MisconfigurationError: If ``needs_steps`` and an optimizer takes no hooks.
        """
        self.backward_passes = self._steps = 0
        self._is_announced, self._unannounced = False, None
        self._uses_hooks, self._needs_steps = uses_hooks, needs_steps
        self.track(optimizers)

    def track(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Count for these optimizers from now on, and drop the counts and hooks of all others."""
        if [*self._at_last_step] == optimizers:
            return
        for untracked in self._handles.keys() - optimizers:
            self._handles.pop(untracked).remove()
        for optimizer in optimizers:
            self._register_hook(optimizer)
        self._at_last_step = {o: self._at_last_step.get(o, self.backward_passes) for o in optimizers}

    def before_backward(self) -> None:
        """Discard the passes of optimizers whose gradients were cleared without a step."""
        for optimizer in self._at_last_step:
            if not any_grad(parameters_of(optimizer)):
                self._at_last_step[optimizer] = self.backward_passes

    def after_backward(self) -> None:
        """Count a backward pass."""
        self.backward_passes += 1

    def before_step(self, optimizer: torch.optim.Optimizer) -> int:
        """Return the number of backward passes since the last step of an optimizer that is about to take one."""
        self._register_hook(optimizer)
        self._is_announced = True
        # An optimizer that was created in this batch has only the pass of this batch.
        passes = self.backward_passes - self._at_last_step.get(optimizer, self.backward_passes - 1)
        self._at_last_step[optimizer] = self.backward_passes
        return passes

    def pop_steps(self) -> tuple[int, torch.optim.Optimizer | None]:
        """Return the number of steps since the last call, and an optimizer stepped without :meth:`before_step`."""
        steps = self._steps, self._unannounced
        self._steps, self._unannounced = 0, None
        return steps

    def _register_hook(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._uses_hooks or optimizer in self._handles:
            return
        try:
            self._handles[optimizer] = optimizer.register_step_post_hook(self._count)
        except AttributeError as error:
            if self._needs_steps:
                raise MisconfigurationError(
                    f"step interventions and decoupled regularizers cannot detect when {type(optimizer).__name__} "
                    "takes a step: its constructor does not call that of torch.optim.Optimizer"
                ) from error

    def _count(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if any_grad(parameters_of(optimizer)) and not was_skipped(optimizer):
            self._steps += 1
        if not self._is_announced:
            self._unannounced = optimizer
        self._is_announced = False


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters that an optimizer holds."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def any_grad(parameters: Iterable[Tensor]) -> bool:
    """Return whether any of the parameters has a gradient."""
    return any(parameter.grad is not None for parameter in parameters)
