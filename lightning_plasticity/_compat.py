"""Access the names of Lightning that are not public, in one place; no other module uses any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

__all__ = [
    "DummyLogger",
    "compiled_methods",
    "fit_datamodule",
    "gradient_scale",
    "has_full_weights",
    "is_fetching_ahead",
    "is_lightning",
    "is_logging_step",
    "is_model_parallel",
    "is_restoring_for_finder",
    "schedulers",
    "spawns_processes",
    "steps_after_batch",
    "takes_batch_index",
    "takes_dataloader_iter",
    "training_description",
    "trains",
    "transfer_batch",
    "weight_averages",
    "write_text",
]

Kind = TypeVar("Kind")

_WEIGHT_AVERAGES = {
    "lightning.pytorch.callbacks.stochastic_weight_avg.StochasticWeightAveraging",
    # Since Lightning 2.6; EMAWeightAveraging is a subclass.
    "lightning.pytorch.callbacks.weight_averaging.WeightAveraging",
}


def is_lightning(value: object, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Return whether the value is an instance of one of these Lightning classes, in either of Lightning's packages.

    ``pytorch_lightning`` has the same code as ``lightning.pytorch``, but its own classes, which ``isinstance`` does not
    relate to those of the other package. They are compared by name.
    """
    kind: Any = type(value)
    return isinstance(value, kinds) or _is_subclass_by_name(kind, kinds)


# The training loop calls it for every batch.
@lru_cache(maxsize=256)
def _is_subclass_by_name(kind: type, kinds: tuple[type, ...]) -> bool:
    return not _base_names(kind).isdisjoint(_qualified_name(other) for other in kinds)


def write_text(path: str, text: str) -> None:
    """Write a file to wherever Lightning writes logs to: a path of this machine, or a URL."""
    with get_filesystem(path).open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def weight_averages(trainer: Trainer) -> list[str]:
    """Return the class names of a Trainer's callbacks that average weights over training steps."""
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = [type(callback) for callback in callbacks]
    return [kind.__name__ for kind in kinds if not _base_names(kind).isdisjoint(_WEIGHT_AVERAGES)]


def _base_names(kind: type) -> set[str]:
    return {_qualified_name(base) for base in kind.__mro__}


def _qualified_name(kind: type) -> str:
    """Return module and name of a class, with ``lightning.pytorch`` for ``pytorch_lightning``."""
    module = kind.__module__
    if module.startswith("pytorch_lightning."):
        module = module.replace("pytorch_lightning", "lightning.pytorch", 1)
    return f"{module}.{kind.__qualname__}"


def fit_datamodule(trainer: Trainer) -> LightningDataModule | None:
    """Return the data module that the running fit takes its data from, if any.

    ``trainer.datamodule`` is still that of an earlier fit if the running one takes plain loaders.
    """
    source: Any = trainer.fit_loop._data_source.instance
    return source if is_lightning(source, LightningDataModule) else None


def is_fetching_ahead(trainer: Trainer) -> bool:
    """Return whether the Trainer is fetching the training batch that follows the next one.

    Without the length of the data, it fetches one batch ahead, to know which one is the last. The batch in ``batches``
    is then taken out, and trained on after the next one is fetched.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None or fetcher.length is not None:
        return False
    return fetcher.fetched > 0 and not (fetcher.batches or fetcher.done)


def trains(trainer: Trainer) -> bool:
    """Return whether the running epoch of a fit trains on its batches.

    ``StochasticWeightAveraging`` appends one that only runs the module forward, for the statistics of BatchNorm.
    """
    skips_backward: bool = trainer.fit_loop._skip_backward
    return not (skips_backward and trainer.lightning_module.automatic_optimization)


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether Lightning logs at the current step (``log_every_n_steps``)."""
    return trainer._logger_connector.should_update_logs


def steps_after_batch(trainer: Trainer) -> bool:
    """Return whether optimizers step after the current batch, rather than accumulate gradients over further ones."""
    return not trainer.fit_loop._should_accumulate()


def is_restoring_for_finder(trainer: Trainer) -> bool:
    """Return whether a learning rate or batch size finder is loading its own checkpoint, to undo its run."""
    return Path(trainer.ckpt_path or "").name.startswith((".lr_find_", ".scale_batch_size_"))


def takes_batch_index(training_step: Callable[..., Any]) -> bool:
    """Return whether the Trainer passes the index of the batch to ``training_step``."""
    return is_param_in_hook_signature(training_step, "batch_idx", min_args=2)


def takes_dataloader_iter(training_step: Callable[..., Any]) -> bool:
    """Return whether the Trainer passes the iterator over batches to ``training_step``, rather than a batch."""
    return is_param_in_hook_signature(training_step, "dataloader_iter", explicit=True)


def transfer_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Return a batch on the device of the module, as the training loop passes it on, after the hooks for transfers."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def schedulers(trainer: Trainer) -> list[Any]:
    """Return the learning rate schedulers of the running fit."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def configured_optimizers(module: LightningModule) -> list[torch.optim.Optimizer]:
    """Call ``configure_optimizers`` of a module and return the optimizers, in whatever form it returns them."""
    configuration: Any = module.configure_optimizers()
    return [] if configuration is None else _configure_optimizers(configuration)[0]


def grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the object that scales losses in half precision, if there is one."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler


def gradient_scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Return the factor that gradients are scaled by in ``on_before_optimizer_step``.

    Fused optimizers undo the scaling of a GradScaler in their step. For all others, Lightning undoes it before.
    """
    scaler = grad_scaler(trainer)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale: float = scaler.get_scale()
    return scale


def has_full_weights(strategy: object) -> bool:
    """Return whether every device holds all weights, and their gradients in ``.grad``."""
    exceptions = is_lightning(strategy, DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy)
    return is_lightning(strategy, SingleDeviceStrategy, DDPStrategy) and not exceptions


def spawns_processes(strategy: object) -> bool:
    """Return whether each fit runs in new processes (``ddp_spawn``).

    They train with copies of the callbacks, whose state is lost when they end.
    """
    return getattr(strategy, "_start_method", "popen") != "popen"


def is_model_parallel(strategy: object) -> TypeGuard[ModelParallelStrategy]:
    """Return whether the module's ``configure_model`` may have sharded its weights by ``fully_shard`` (FSDP2)."""
    return is_lightning(strategy, ModelParallelStrategy)


def compiled_methods(module: nn.Module) -> dict[str, Any]:
    """Return the methods that the Trainer stores on a module when it unwraps it from ``torch.compile``.

    On a copy of the module they remain bound to the original.
    """
    if getattr(module, "_compiler_ctx", None) is None:
        return {}
    names = ("forward", "training_step", "validation_step", "test_step", "predict_step")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


@dataclass(frozen=True)
class Description:
    """The text beside a progress bar.

    Args:
        show: Replaces the text.
        restore: Restores the original text.
    """

    show: Callable[[str], None]
    restore: Callable[[], None]


def training_description(trainer: Trainer) -> Description | None:
    """Return the text beside the training bar; ``None`` without a visible progress bar of one of Lightning's kinds."""
    bars: Any = trainer.progress_bar_callback
    if is_lightning(bars, TQDMProgressBar) and not bars.train_progress_bar.disable:
        bar: Any = bars.train_progress_bar
        # bar.desc ends in a colon already, to which set_description would append another.
        return Description(bar.set_description, partial(bar.set_description_str, bar.desc))
    if is_lightning(bars, RichProgressBar) and bars.progress is not None and bars.train_progress_bar_id is not None:
        update = partial(bars.progress.update, bars.train_progress_bar_id, refresh=True)
        original = bars.train_progress_bar.description
        return Description(lambda text: update(description=text), lambda: update(description=original))
    return None
