"""Make the optimizers of a module once more, for a copy of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity._compat import configured_optimizers
from lightning_plasticity.context import set_initial_rates
from lightning_plasticity.messages import MisconfigurationError


def optimizers_as_configured(
    module: LightningModule, trained: Collection[str], groups: Sequence[int]
) -> list[torch.optim.Optimizer] | None:
    """Return the optimizers that ``configure_optimizers`` makes for a copy of a module, at rates before any schedule.

    Args:
        module: The copy.
        trained: Names of the parameters that are trained.
        groups: Number of parameter groups of each optimizer of the run.

    Returns:
        The optimizers; ``None`` if they hold other parameters than are trained, or in other groups, as after a callback
        has added some.

    Raises:
        MisconfigurationError: If it makes none.
    """
    optimizers = configured_optimizers(module)
    if not optimizers:
        raise MisconfigurationError(
            f"{type(module).__name__}.configure_optimizers makes no optimizer to train a copy with: pass "
            "SpectralCollapseCallback(fit_test=None, collapse=Collapse('learnable_fraction'))"
        )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in held and parameter.requires_grad}
    if names != set(trained) or [len(optimizer.param_groups) for optimizer in optimizers] != list(groups):
        return None
    set_initial_rates(optimizers)
    return optimizers


def clip_gradients(module: LightningModule, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients of a copy of a module by its own hook, with the settings of the Trainer."""
    module.configure_gradient_clipping(
        optimizer,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
    )
