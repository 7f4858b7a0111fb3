"""How often were gradients added to since an optimizer's last step, and was there really a step?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class StepCounter:
    """Counts backward passes and optimizer steps as they are taken, by whomever."""

    def __init__(self) -> None:
        self.backward_passes = 0
        """How many there were in this fit."""
        self._seen: dict[torch.optim.Optimizer, int] = {}
        self._listens = self._needs_steps = False
        self._handles: dict[torch.optim.Optimizer, RemovableHandle] = {}
        self._announced = False
        self._steps = 0
        self._unannounced: torch.optim.Optimizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": {}, "_seen": {}, "_unannounced": None}  # the optimizers are of the fit

    def begin(self, optimizers: Sequence[torch.optim.Optimizer], *, listens: bool, needs_steps: bool) -> None:
        """A fit begins.

        Args:
            optimizers: Its optimizers.
            listens: Whether steps are to be counted, for which the optimizers get hooks until they are gone.
            needs_steps: Whether it is an error if one of them takes no hooks.

        Raises:
            MisconfigurationException: If it is.
        """
        self.backward_passes = self._steps = 0
        self._announced, self._unannounced = False, None
        self._listens, self._needs_steps = listens, needs_steps
        self.track(optimizers)

    def track(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """These are the optimizers now; of the others nothing is kept."""
        if [*self._seen] == optimizers:
            return
        for gone in self._handles.keys() - optimizers:
            self._handles.pop(gone).remove()
        for optimizer in optimizers:
            self._register_hook(optimizer)
        self._seen = {optimizer: self._seen.get(optimizer, self.backward_passes) for optimizer in optimizers}

    def before_backward(self) -> None:
        """Gradients are about to be added to. Passes whose gradients were dropped, without a step, do not count."""
        for optimizer in self._seen:
            if not any_grad(p for group in optimizer.param_groups for p in group["params"]):
                self._seen[optimizer] = self.backward_passes

    def after_backward(self) -> None:
        """Gradients were added to."""
        self.backward_passes += 1

    def before_step(self, optimizer: torch.optim.Optimizer) -> int:
        """Lightning is about to step an optimizer: how many backward passes there were since it did the last time."""
        self._register_hook(optimizer)
        self._announced = True
        # One that was made within this batch has seen all but its pass.
        passes = self.backward_passes - self._seen.get(optimizer, self.backward_passes - 1)
        self._seen[optimizer] = self.backward_passes
        return passes

    def pop_steps(self) -> tuple[int, torch.optim.Optimizer | None]:
        """How many steps there were since this was asked, and an optimizer that was stepped without Lightning."""
        taken = self._steps, self._unannounced
        self._steps, self._unannounced = 0, None
        return taken

    def _register_hook(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._listens or optimizer in self._handles:
            return
        try:
            self._handles[optimizer] = optimizer.register_step_post_hook(self._count)
        except AttributeError as error:
            if self._needs_steps:
                raise MisconfigurationException(
                    f"running remedies cannot tell when {type(optimizer).__name__} takes a step: its constructor does "
                    "not call that of torch.optim.Optimizer"
                ) from error

    def _count(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # Of a fused optimizer a GradScaler calls the step in any case, and tells it there to skip it.
        skipped: Any = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            self._steps += 1
        if not self._announced:
            self._unannounced = optimizer
        self._announced = False


def any_grad(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them has one."""
    return any(parameter.grad is not None for parameter in parameters)
