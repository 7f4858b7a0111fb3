"""Make the optimizers of a module once more, for a copy of it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity._compat import configured_optimizers
from lightning_plasticity.context import set_initial_rates


def optimizers_as_configured(module: LightningModule, trained: Collection[str]) -> list[torch.optim.Optimizer] | None:
    """Return the optimizers that ``configure_optimizers`` makes for a copy of a module, at rates before any schedule.

    Args:
        module: The copy.
        trained: Names of the parameters that are trained.

    Returns:
        The optimizers; ``None`` if they hold other parameters than are trained, as after a callback has added some.
    """
    optimizers = configured_optimizers(module)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in held and parameter.requires_grad}
    if names != set(trained):
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
