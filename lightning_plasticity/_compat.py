"""Every name of Lightning's that is not public, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

__all__ = ["DummyLogger", "SingleDeviceStrategy", "compiled_methods", "fit_datamodule", "is_restoring_for_finder"]


def fit_datamodule(trainer: Trainer) -> LightningDataModule | None:
    """The data module that the running fit takes its data from, if any.

    ``trainer.datamodule`` keeps the data module of an earlier fit when the next one is given plain loaders.
    """
    source: Any = trainer.fit_loop._data_source.instance
    return source if isinstance(source, LightningDataModule) else None


def is_restoring_for_finder(trainer: Trainer) -> bool:
    """Whether the checkpoint being loaded is the one by which a learning rate or batch size finder undoes its run."""
    return Path(trainer.ckpt_path or "").name.startswith((".lr_find_", ".scale_batch_size_"))


def compiled_methods(module: nn.Module) -> dict[str, Any]:
    """The methods that the Trainer stored on the instance when it unwrapped a compiled module.

    On a copy they would still be bound to the original.
    """
    if getattr(module, "_compiler_ctx", None) is None:
        return {}
    names = ("forward", "training_step", "validation_step", "test_step", "predict_step")
    return {name: module.__dict__[name] for name in names if name in module.__dict__}
