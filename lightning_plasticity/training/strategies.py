"""Check that the callback supports the strategy of a Trainer."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plasticity._compat import has_full_weights, is_model_parallel
from lightning_plasticity.distributed.sharded_weights import unsupported_parameters
from lightning_plasticity.interventions import Intervention, Repair, StepIntervention


def check_strategy(strategy: Strategy, interventions: Sequence[Intervention]) -> None:
    """Check that the callback and its interventions work with a strategy.

    Raises:
        MisconfigurationException: If they do not.
    """
    if has_full_weights(strategy):
        return
    name = type(strategy).__name__
    if not is_model_parallel(strategy):
        raise MisconfigurationException(
            "SpectralCollapseCallback works where every device holds all weights, and where fully_shard (FSDP2) shards "
            f"them, not with {name}: use Trainer(devices=1) or Trainer(strategy='ddp'), or, to shard weights, "
            "ModelParallelStrategy(tensor_parallel_size=1) and fully_shard in configure_model"
        )
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationException(
            f"SpectralCollapseCallback does not work with {name}(tensor_parallel_size={size}): use "
            "tensor_parallel_size=1, and fully_shard in configure_model"
        )
    unsupported = [i.name for i in interventions if isinstance(i, Repair | StepIntervention)]
    if unsupported:
        raise MisconfigurationException(
            f"{' and '.join(unsupported)} cannot change weights that {name} shards: measurements work with it, and "
            "regularizers such as SpectralRegularizer. Use Trainer(devices=1) or Trainer(strategy='ddp') for the others"
        )


def check_sharding(module: nn.Module) -> None:
    """Check that all trainable parameters of a module are sharded by ``fully_shard``, and in no other way.

    Raises:
        MisconfigurationException: If they are not.
    """
    names = unsupported_parameters(module)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise MisconfigurationException(
            "SpectralCollapseCallback works with ModelParallelStrategy if configure_model shards all trainable "
            "parameters by torch.distributed.fsdp.fully_shard over the data-parallel mesh, without tensor parallelism "
            f"or CPU offload: not satisfied by {', '.join(names[:3])}{more}"
        )
