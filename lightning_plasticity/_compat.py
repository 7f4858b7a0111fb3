"""Every name of Lightning's and of FSDP's that is not public, in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
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
    "is_fsdp_internal",
    "is_lightning",
    "is_logging_step",
    "is_model_parallel",
    "is_restoring_for_finder",
    "schedulers",
    "spawns_processes",
    "takes_batch_index",
    "takes_dataloader_iter",
    "training_description",
    "weight_averages",
]

Kind = TypeVar("Kind")

_WEIGHT_AVERAGES = {
    "lightning.pytorch.callbacks.stochastic_weight_avg.StochasticWeightAveraging",
    "lightning.pytorch.callbacks.weight_averaging.WeightAveraging",  # since 2.6; of which EMAWeightAveraging is a kind
}


def is_lightning(value: object, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """``isinstance``, also for what is of the same name in ``pytorch_lightning``.

    That package has the same code as ``lightning.pytorch``, and none of its classes is one of ``lightning.pytorch``.
    """
    kind: Any = type(value)
    return isinstance(value, kinds) or _is_twin(kind, kinds)


@lru_cache(maxsize=256)  # asked for every batch
def _is_twin(kind: type, kinds: tuple[type, ...]) -> bool:
    return not _names(kind).isdisjoint(_name(other) for other in kinds)


def weight_averages(trainer: Trainer) -> list[str]:
    """The kinds of callbacks, among those of a Trainer, that average weights over training steps."""
    callbacks: Sequence[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = [type(callback) for callback in callbacks]
    return [kind.__name__ for kind in kinds if not _names(kind).isdisjoint(_WEIGHT_AVERAGES)]


def _names(kind: type) -> set[str]:
    return {_name(base) for base in kind.__mro__}


def _name(kind: type) -> str:
    module = kind.__module__
    if module.startswith("pytorch_lightning."):
        module = module.replace("pytorch_lightning", "lightning.pytorch", 1)
    return f"{module}.{kind.__qualname__}"


def fit_datamodule(trainer: Trainer) -> LightningDataModule | None:
    """The data module that the running fit takes its data from, if any.

    ``trainer.datamodule`` keeps the data module of an earlier fit when the next one is given plain loaders.
    """
    source: Any = trainer.fit_loop._data_source.instance
    return source if is_lightning(source, LightningDataModule) else None


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the step at hand is one that ``log_every_n_steps`` has logged."""
    return trainer._logger_connector.should_update_logs


def is_restoring_for_finder(trainer: Trainer) -> bool:
    """Whether the checkpoint being loaded is the one by which a learning rate or batch size finder undoes its run."""
    return Path(trainer.ckpt_path or "").name.startswith((".lr_find_", ".scale_batch_size_"))


def takes_batch_index(training_step: Callable[..., Any]) -> bool:
    """Whether the Trainer calls it with the index of the batch too."""
    return is_param_in_hook_signature(training_step, "batch_idx", min_args=2)


def takes_dataloader_iter(training_step: Callable[..., Any]) -> bool:
    """Whether it is given the iterator over the batches, rather than a batch."""
    return is_param_in_hook_signature(training_step, "dataloader_iter", explicit=True)


def schedulers(trainer: Trainer) -> list[Any]:
    """The learning rate schedulers of the running fit."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def gradient_scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """By what gradients are still multiplied in ``on_before_optimizer_step``.

    Fused optimizers undo the scaling of a GradScaler themselves, in their step; for all others it was undone before.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    scale: float = scaler.get_scale()
    return scale


def has_full_weights(strategy: object) -> bool:
    """Whether the weights are whole on every device, and gradients what they are called."""
    exceptions = is_lightning(strategy, DeepSpeedStrategy, SingleDeviceXLAStrategy, XLAStrategy)
    return is_lightning(strategy, SingleDeviceStrategy, DDPStrategy) and not exceptions


def spawns_processes(strategy: object) -> bool:
    """Whether each fit is in processes with copies of the callbacks, of which nothing comes back (``ddp_spawn``)."""
    return getattr(strategy, "_start_method", "popen") != "popen"


def is_model_parallel(strategy: object) -> TypeGuard[ModelParallelStrategy]:
    """Whether the module's ``configure_model`` may have sharded its weights by ``fully_shard`` (FSDP2)."""
    return is_lightning(strategy, ModelParallelStrategy)


def is_fsdp_internal(value: object) -> bool:
    """Whether ``fully_shard``, or what follows it, has put this into a module: a hook, a method or its own state.

    What is public of FSDP, such as a policy that a module keeps, says that it is of ``torch.distributed.fsdp`` itself.
    """
    code: Any = getattr(value, "__globals__", {})  # a wrapped method says that it is of the module of what it wraps
    homes = (getattr(value, "__module__", None), code.get("__name__"))
    return any(isinstance(home, str) and home.startswith("torch.distributed.fsdp._fully_shard.") for home in homes)


def compiled_methods(module: nn.Module) -> dict[str, Any]:
    """The methods that the Trainer stored on the instance when it unwrapped a compiled module.

    On a copy they would still be bound to the original.
    """
    if getattr(module, "_compiler_ctx", None) is None:
        return {}
    names = ("forward", "training_step", "validation_step", "test_step", "predict_step")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


@dataclass(frozen=True)
class Description:
    """The text beside a progress bar.

    Args:
        show: Shows another text.
        restore: Shows the one that was there at first.
    """

    show: Callable[[str], None]
    restore: Callable[[], None]


def training_description(trainer: Trainer) -> Description | None:
    """The text beside the training bar; ``None`` if there is none to be seen, or it is not one of Lightning's own."""
    bars: Any = trainer.progress_bar_callback
    if is_lightning(bars, TQDMProgressBar) and not bars.train_progress_bar.disable:
        bar: Any = bars.train_progress_bar
        return Description(bar.set_description, partial(bar.set_description_str, bar.desc))  # which ends in a colon
    if is_lightning(bars, RichProgressBar) and bars.progress is not None and bars.train_progress_bar_id is not None:
        update = partial(bars.progress.update, bars.train_progress_bar_id, refresh=True)
        before = bars.train_progress_bar.description
        return Description(lambda text: update(description=text), lambda: update(description=before))
    return None
