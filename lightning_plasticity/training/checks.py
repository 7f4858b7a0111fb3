"""Check, before the first step, that the callback supports a module, its loss, the Trainer and its strategy."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_plasticity._compat import (
    has_full_weights,
    is_model_parallel,
    spawns_processes,
    takes_dataloader_iter,
    weight_averages,
)
from lightning_plasticity.distributed.sharded_weights import unsupported_parameters
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.interventions import HareTortoise, Intervention, Repair, StepIntervention
from lightning_plasticity.messages import MisconfigurationError, rank_zero_warn


def check_training_step(module: LightningModule, *, has_loss_fn: bool) -> None:
    """Check that the training step of a module receives batches and can return a loss.

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
            f"{type(module).__name__} optimizes manually, so its training_step cannot compute a loss without "
            "training: pass SpectralCollapseCallback(loss_fn=...), loss_fn(module, batch) -> mean loss"
        )


def check_live(trainer: Trainer) -> None:
    """Check that a fresh network can be trained beside the network.

    Raises:
        MisconfigurationError: If weights are sharded.
    """
    if is_model_parallel(trainer.strategy):
        raise MisconfigurationError(
            f"FitTest(live=True) does not support {type(trainer.strategy).__name__}, which shards weights: use "
            "Trainer(strategy='ddp'), or leave out live=True"
        )


def warn_of_lost_state(trainer: Trainer) -> None:
    """Warn if the strategy starts new processes for each fit: the state of their callbacks is lost with them."""
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
                "between two of them: replaced weights keep a share in the average, which the module gets later. "
                "Leave out one of the two"
            )


def check_strategy(strategy: Strategy, interventions: Sequence[Intervention]) -> None:
    """Check that the callback and its interventions work with a strategy.

    Raises:
        MisconfigurationError: If they do not.
    """
    if has_full_weights(strategy):
        return
    name = type(strategy).__name__
    if not is_model_parallel(strategy):
        raise MisconfigurationError(
            "SpectralCollapseCallback works where every device holds all weights, and where fully_shard (FSDP2) shards "
            f"them, not with {name}: use Trainer(devices=1) or Trainer(strategy='ddp'), or, to shard weights, "
            "ModelParallelStrategy(tensor_parallel_size=1) and fully_shard in configure_model"
        )
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationError(
            f"SpectralCollapseCallback does not work with {name}(tensor_parallel_size={size}): use "
            "tensor_parallel_size=1, and fully_shard in configure_model"
        )
    unsupported = [i.name for i in interventions if isinstance(i, Repair | StepIntervention)]
    if unsupported:
        raise MisconfigurationError(
            f"{' and '.join(unsupported)} cannot change weights that {name} shards: measurements work with it, and "
            "regularizers such as SpectralRegularizer. Use Trainer(devices=1) or Trainer(strategy='ddp') for the others"
        )


def check_sharding(module: nn.Module) -> None:
    """Check that all trainable parameters of a module are sharded by ``fully_shard``, and in no other way.

    Raises:
        MisconfigurationError: If they are not.
    """
    names = unsupported_parameters(module)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise MisconfigurationError(
            "SpectralCollapseCallback works with ModelParallelStrategy if configure_model shards all trainable "
            "parameters by torch.distributed.fsdp.fully_shard over the data-parallel mesh, without tensor parallelism "
            f"or CPU offload: not satisfied by {', '.join(names[:3])}{more}"
        )
