"""Call functions right before and right after the steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

OptimizerHook = Callable[[torch.optim.Optimizer], None]


class OptimizerHooks:
    """Calls functions right before and right after each step of some optimizers.

    Gradients are complete after the step only: a step with a closure, as in a Trainer, computes them itself.

    Args:
        owner: The intervention whose hooks these are, for the message.
        after: Called after each step that was not skipped.
        before: Called before each step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> weight.grad, optimizer = torch.ones(1), torch.optim.SGD([weight], lr=0.25)
        >>> hooks = OptimizerHooks("UPGD", after=lambda _: print(weight.item()))
        >>> hooks.follow([optimizer])
        >>> optimizer.step()
        0.75
        >>> hooks.follow([])
        >>> optimizer.step()
    """

    def __init__(self, owner: str, *, after: OptimizerHook, before: OptimizerHook | None = None) -> None:
        self._owner = owner
        self._after = after
        self._before = before
        self._handles: dict[torch.optim.Optimizer, list[RemovableHandle]] = {}

    def follow(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Call the functions for these optimizers from now on, and for no others.

        Raises:
            ValueError: If an optimizer takes no hooks.
        """
        for dropped in self._handles.keys() - optimizers:
            for handle in self._handles.pop(dropped):
                handle.remove()
        for optimizer in optimizers:
            if optimizer not in self._handles:
                self._handles[optimizer] = self._register(optimizer)

    def _register(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        try:
            handles = [optimizer.register_step_post_hook(self._call_after)]
        except AttributeError as error:
            raise ValueError(
                f"{self._owner} cannot follow the steps of {type(optimizer).__name__}: its constructor does not call "
                "that of torch.optim.Optimizer"
            ) from error
        if self._before is not None:
            handles.append(optimizer.register_step_pre_hook(self._call_before))
        return handles

    def _call_before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self._before is not None
        self._before(optimizer)

    def _call_after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not was_skipped(optimizer):
            self._after(optimizer)


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step that an optimizer has just taken did nothing.

    A gradient scaler always calls the step of a fused optimizer, which skips the update if ``found_inf`` is set.
    """
    skipped: Any = getattr(optimizer, "found_inf", None)
    return skipped is not None and bool(skipped)
