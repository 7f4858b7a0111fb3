"""Check that a module, its loss and its Trainer fit the callback, before the first step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity._compat import spawns_processes, takes_dataloader_iter, weight_averages
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.interventions import HareTortoise
from lightning_plasticity.messages import MisconfigurationError, rank_zero_warn


def check_training_step(module: LightningModule, *, has_loss_fn: bool) -> None:
    """Check that a batch and a loss can be had of a module.

    Args:
        module: The module.
        has_loss_fn: Whether the loss is given by a function instead of ``training_step``.

    Raises:
        MisconfigurationError: If ``training_step`` fetches its batches itself, or optimizes manually without a loss
            function.
    """
    if takes_dataloader_iter(module.training_step):
        raise MisconfigurationError(
            f"{type(module).__name__}.training_step(dataloader_iter) fetches its batches itself, so that there "
            "is none to probe on: write training_step(batch, batch_idx)"
        )
    if not has_loss_fn and not module.automatic_optimization:
        raise MisconfigurationError(
            f"{type(module).__name__} optimizes manually, so its training_step cannot be asked for a loss "
            "without training it: pass SpectralCollapseCallback(loss_fn=...), loss_fn(module, batch) -> mean loss"
        )


def warn_of_lost_state(trainer: Trainer) -> None:
    """Warn if the strategy trains in processes of its own, whose callbacks end with the fit."""
    if spawns_processes(trainer.strategy):
        rank_zero_warn(
            "this strategy trains in processes that are started for each fit: history, and all that "
            "SpectralCollapseCallback remembers for the next fit, such as the initial weights, end with them (logs "
            "and checkpoints do not). Use strategy='ddp' to have them"
        )


def warn_of_weight_averages(trainer: Trainer, runner: InterventionRunner) -> None:
    """Warn if an average of the weights over training steps will keep a share of weights that are replaced."""
    repairs = [runner.name_of(repair) for repair in runner.repairs]
    replacing = repairs + [runner.name_of(intervention) for intervention in runner.step_interventions]
    averages = dict.fromkeys(weight_averages(trainer), replacing)
    averages |= {i.name: repairs for i in runner.step_interventions if isinstance(i, HareTortoise)}
    for average, names in averages.items():
        if names:
            rank_zero_warn(
                f"{average} averages weights over training steps, and {' and '.join(names)} changes weights "
                "between two of them: what is replaced while it averages keeps a share in the average, which the "
                "module is given later. Leave out one of the two"
            )
