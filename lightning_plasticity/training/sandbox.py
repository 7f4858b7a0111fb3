"""Run copies of a LightningModule without leaving a trace in its run."""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric
from typing_extensions import override

from lightning_plasticity._compat import DummyLogger, compiled_methods, grad_scaler, is_lightning
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature.problem import Progress
from lightning_plasticity.distributed.sharded_weights import is_device_mesh
from lightning_plasticity.isolation.module_copy import UncopyableError, copy_module
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.reporting.progress import shown_progress
from lightning_plasticity.training.loss import training_loss
from lightning_plasticity.training.optimizers import clip_gradients, optimizers_as_configured
from lightning_plasticity.training.schedulers import preserve_schedulers

_SHARED = (LightningDataModule, DataLoader, Dataset)
"""Kinds of attributes that a copy of a module shares with the original: they are large, or not the module's own."""


@dataclass(frozen=True, eq=False)
class TrainerContext(ProbeContext):
    """The module that a Trainer trains, the batch at hand and the loss.

    Args:
        model: The module.
        batch: The batch, on the device of the module.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss.
        optimizers: The optimizers of the Trainer.
        trainer: The Trainer.
        share_uncopyable: Share attributes of the module that cannot be copied, instead of raising. Only a loss function
            that does not reach them, other than ``training_step``, allows it.
    """

    model: LightningModule
    trainer: Trainer = field(kw_only=True)
    share_uncopyable: bool = field(default=False, kw_only=True)
    _loaders: list[DataLoader[Any]] = field(default_factory=list, kw_only=True, repr=False)

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        batch_idx: int,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ) -> TrainerContext:
        """Create the context of a training batch.

        Args:
            trainer: The Trainer.
            module: The module that it trains.
            batch: The batch, on the device of the module.
            batch_idx: The index of the batch, for ``training_step``.
            loss_fn: The loss of a module on a batch; by default the loss that ``training_step`` returns.
        """
        return cls(
            module,
            batch,
            partial(training_loss, batch_idx=batch_idx) if loss_fn is None else loss_fn,
            trainer.optimizers,
            trainer=trainer,
            share_uncopyable=loss_fn is not None,
        )

    @override
    def _copy_model(self, copied: list[Any]) -> LightningModule:
        return isolated_copy(
            self.model,
            self.trainer,
            share_uncopyable=self.share_uncopyable,
            loaders=self._loaders,
            copied=copied,
        )

    @override
    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        with preserve_generators(self._loaders):
            return super().training_loss(model, batch)

    @override
    def make_optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        groups = [len(optimizer.param_groups) for optimizer in self.optimizers]
        configured = optimizers_as_configured(cast("LightningModule", model), self.trained_parameters, groups)
        return super().make_optimizers(model) if configured is None else configured

    @override
    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        clip_gradients(cast("LightningModule", model), self.trainer, optimizer)

    @override
    def record_logged(self, model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[dict[str, float]]:
        return recorded_logs(model, name)

    @override
    def training_precision(self) -> contextlib.AbstractContextManager[None]:
        return self.trainer.precision_plugin.train_step_context()

    @override
    def make_scaler(self) -> torch.amp.GradScaler | None:
        return copy.deepcopy(grad_scaler(self.trainer))

    @override
    def preserve_training_state(self) -> contextlib.AbstractContextManager[None]:
        return preserve_schedulers(self.trainer)

    @override
    def show_progress(self, description: str) -> contextlib.AbstractContextManager[Progress | None]:
        return shown_progress(self.trainer, description)


def isolated_copy(
    module: LightningModule,
    trainer: Trainer,
    *,
    share_uncopyable: bool = False,
    loaders: list[DataLoader[Any]] | None = None,
    copied: list[Any] | None = None,
) -> LightningModule:
    """Return a copy of a module that can be run, trained and discarded without an effect on the run.

    Data modules, data sets, loaders and device meshes are shared rather than copied. ``log`` and loggers do nothing.

    Args:
        module: The module. It is not changed.
        trainer: Its Trainer.
        share_uncopyable: Share attributes that cannot be copied, instead of raising.
        loaders: The data loaders that the copy shares are appended to this list, if it is given.
        copied: As in :func:`~lightning_plasticity.isolation.module_copy.copy_module`.

    Raises:
        MisconfigurationError: If an attribute cannot be copied; the message names it.
    """
    quiet: Any = _QuietTrainer(trainer)
    compiled = [m for part in module.modules() for m in compiled_methods(part).values()]

    def replacement(value: Any) -> Any:
        if value is trainer:
            return quiet
        if is_lightning(value, Logger):  # type: ignore[type-abstract]
            return _QuietLogger(value)
        if loaders is not None and isinstance(value, DataLoader):
            loaders.append(value)
        if is_lightning(value, *_SHARED) or is_device_mesh(value) or any(value is method for method in compiled):
            return value
        return None

    try:
        result = copy_module(module, replacement, share_uncopyable=share_uncopyable, copied=copied)
    except UncopyableError as error:
        otherwise = ", or pass SpectralCollapseCallback(loss_fn=...), which shares it instead"
        raise MisconfigurationError(
            f"the probe works on a copy of {type(module).__name__}, but its {error}. Keep it outside of the module or "
            f"give it a __deepcopy__{otherwise if error.can_be_shared else ''}"
        ) from error
    quiet.module = weakref.ref(result)
    for part in result.modules():
        if is_lightning(part, LightningModule):
            for name in compiled_methods(part):
                del part.__dict__[name]
            part.trainer = quiet
            part.log = part.log_dict = _do_nothing  # type: ignore[method-assign]
    return result


class _QuietLogger(DummyLogger):
    """A logger with the name, version and directories of the original, which logs nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def __getattribute__(self, name: str) -> Any:
        if name in ("name", "version", "save_dir", "root_dir", "log_dir"):
            return getattr(self._logger, name)
        return super().__getattribute__(name)


class _QuietTrainer:
    """The Trainer of a copy: it reads attributes of the original, except loggers and module, and never changes it.

    ``module`` is a weak reference to the copy. A strong one would form a cycle, and the copy would occupy memory until
    the next garbage collection.
    """

    module: Callable[[], LightningModule | None]

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.loggers = [_QuietLogger(logger) for logger in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None

    @property
    def lightning_module(self) -> LightningModule | None:
        return self.module()

    model = lightning_module

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for special methods, which must not be those of the original.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._trainer, name)


@contextlib.contextmanager
def recorded_logs(model: nn.Module, name: str | None) -> Iterator[dict[str, float]]:
    """Yield the numbers that an isolated copy logs while it runs, each where it is logged first.

    Metrics of torchmetrics start anew, so that their value is that of the batch, on this rank.

    Args:
        model: The copy.
        name: The number that is needed; others are ``nan``.
    """
    logged: dict[str, float] = {}

    def log(key: str, value: Any, *_: object, **__: object) -> None:
        logged.setdefault(key, _number(value) if key == name else math.nan)

    def log_dict(dictionary: Mapping[str, Any], *_: object, **__: object) -> None:
        for key, value in dictionary.items():
            log(key, value)

    parts = [part for part in model.modules() if is_lightning(part, LightningModule)]
    for metric in model.modules():
        if isinstance(metric, Metric):
            metric.reset()
            metric.sync_on_compute = False
    for part in parts:
        part.log, part.log_dict = log, log_dict  # type: ignore[method-assign, assignment]
    try:
        yield logged
    finally:
        for part in parts:
            part.log = part.log_dict = _do_nothing  # type: ignore[method-assign]


def _number(value: Any) -> float:
    return float(value.compute() if isinstance(value, Metric) else value)


def _do_nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def preserve_generators(loaders: Sequence[DataLoader[Any]]) -> Iterator[None]:
    """Restore the random number generators of data loaders on exit."""
    states = [(generator, generator.get_state()) for loader in loaders for generator in _generators(loader)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: DataLoader[Any]) -> Iterator[torch.Generator]:
    inner = getattr(loader.batch_sampler, "sampler", None)
    for owner in (loader, loader.sampler, loader.batch_sampler, inner):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
