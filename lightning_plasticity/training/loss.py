"""Call ``training_step`` and return its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_plasticity._compat import takes_batch_index
from lightning_plasticity.messages import MisconfigurationError, SkippedBatchError


def training_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the loss that ``training_step`` returns, as a scalar with a graph.

    Args:
        module: The module.
        batch: The batch.
        batch_idx: The index of the batch, passed on to a ``training_step`` that takes one.

    Raises:
        MisconfigurationError: If ``training_step`` returns no loss.
        SkippedBatchError: If it returns ``None``.
    """
    arguments = [batch, batch_idx] if takes_batch_index(module.training_step) else [batch]
    output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    if isinstance(output, Mapping):
        returned = f"a dict without a tensor under 'loss' (keys: {sorted(map(str, output))})"
    else:
        returned = "None" if output is None else f"a {type(output).__name__}"
    kind = SkippedBatchError if output is None else MisconfigurationError
    raise kind(
        f"{type(module).__name__}.training_step returned {returned}, so the probe has no loss: return the loss or "
        "{'loss': loss}, or pass SpectralCollapseCallback(loss_fn=...) with loss_fn(module, batch) -> mean loss"
    )
