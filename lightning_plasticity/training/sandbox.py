"""What is the loss here, as a graph, without touching the run? A copy of the module is asked."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_plasticity._compat import DummyLogger, compiled_methods, is_lightning, schedulers, takes_batch_index
from lightning_plasticity.curvature.problem import HALF
from lightning_plasticity.distributed.agreement import (
    PeerFailedError,
    all_gather_batch,
    all_or_none,
    broadcast_object,
    is_distributed,
)
from lightning_plasticity.distributed.sharded_weights import is_device_mesh
from lightning_plasticity.isolation.batches import clone_batch, slice_batch, to_device
from lightning_plasticity.isolation.module_copy import UncopyableError, copy_module
from lightning_plasticity.isolation.state import default_dtype

LossFunction = Callable[[LightningModule, Any], Tensor]
"""``loss_fn(module, batch)`` returns the mean loss of the data, a scalar with a graph."""

_SHARED = (LightningDataModule, DataLoader, Dataset)
"""Kinds of attributes that a copy of a module shares with the original: large, or not the module's own."""


def training_loss(module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The loss that ``training_step`` returns.

    Args:
        module: The module.
        batch: The batch.
        batch_idx: Its index, for a ``training_step`` that takes one.

    Raises:
        MisconfigurationException: If it returns none.
    """
    arguments = [batch, batch_idx] if takes_batch_index(module.training_step) else [batch]
    output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    if isinstance(output, Mapping):
        found = f"a dict without a tensor under 'loss' (keys: {sorted(map(str, output))})"
    else:
        found = "None" if output is None else f"a {type(output).__name__}"
    raise MisconfigurationException(
        f"{type(module).__name__}.training_step returned {found}, so the probe has no loss: return the loss or "
        "{'loss': loss}, or pass SpectralCollapseCallback(loss_fn=...) with loss_fn(module, batch) -> mean loss"
    )


class _QuietLogger(DummyLogger):
    """A logger as a probed copy sees it: it tells where it writes, and writes nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def __getattribute__(self, name: str) -> Any:
        if name in ("name", "version", "save_dir", "root_dir", "log_dir"):
            return getattr(self._logger, name)
        return super().__getattribute__(name)


class _QuietTrainer:
    """The Trainer as a probed copy sees it: everything but loggers and module; what is set on it is forgotten."""

    module: Callable[[], LightningModule | None]
    """The copy, not kept alive: it would be until Python looks for cycles, on a GPU maybe too late."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.loggers = [_QuietLogger(logger) for logger in trainer.loggers]
        self.logger = self.loggers[0] if self.loggers else None

    @property
    def lightning_module(self) -> LightningModule | None:
        return self.module()

    model = lightning_module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for what is not there
            raise AttributeError(name)
        return getattr(self._trainer, name)


def isolated_copy(module: LightningModule, trainer: Trainer, *, share_uncopyable: bool = False) -> LightningModule:
    """A copy of the module that can be trained, logged from and broken without the run noticing.

    Data modules, data sets, loaders and device meshes are shared rather than copied; ``log`` does nothing, nor do
    loggers.

    Args:
        module: The module. It is not changed.
        trainer: Its Trainer.
        share_uncopyable: Share attributes that cannot be copied too, instead of raising.

    Raises:
        MisconfigurationException: If an attribute cannot be copied; it is named.
    """
    quiet: Any = _QuietTrainer(trainer)
    compiled = [m for part in module.modules() for m in compiled_methods(part).values()]

    def stand_in(value: Any) -> Any:
        if value is trainer:
            return quiet
        if is_lightning(value, Logger):  # type: ignore[type-abstract]
            return _QuietLogger(value)
        if is_lightning(value, *_SHARED) or is_device_mesh(value) or any(value is method for method in compiled):
            return value
        return None

    try:
        result = copy_module(module, stand_in, share_uncopyable=share_uncopyable)
    except UncopyableError as error:
        otherwise = ", or pass SpectralCollapseCallback(loss_fn=...), which shares it instead"
        raise MisconfigurationException(
            f"the probe works on a copy of {type(module).__name__}, but its {error}. Keep it outside of the module or "
            f"give it a __deepcopy__{otherwise if error.can_be_shared else ''}"
        ) from error
    quiet.module = weakref.ref(result)
    for part in result.modules():
        if is_lightning(part, LightningModule):
            for name in compiled_methods(part):
                del part.__dict__[name]
            part.trainer = quiet
            part.log = part.log_dict = _nothing  # type: ignore[method-assign]
    return result


@dataclass(frozen=True)
class ProbeContext:
    """A batch that is being trained on, and what it takes to look at it without the run noticing.

    Args:
        trainer: The Trainer.
        module: The module that it trains.
        batch: The batch, on the module's device.
        loss_fn: The loss of a module on a batch; ``None``: what ``training_step`` returns.
        batch_idx: The index of the batch, for ``training_step``.
    """

    trainer: Trainer
    module: LightningModule
    batch: Any
    loss_fn: LossFunction | None = None
    batch_idx: int = 0

    def joined(self, samples: int) -> ProbeContext:
        """The first samples of all processes that train together, the same in each of them; of one process: itself.

        To be asked for by all processes at the same point.
        """
        if not is_distributed():
            return self
        share = -(-samples // torch.distributed.get_world_size())
        try:
            with all_or_none():
                batch = all_gather_batch(slice_batch(self.batch, share))
        except PeerFailedError:  # not to be joined, such as sequences of different lengths: rank 0 shall do
            with all_or_none():
                batch = to_device(broadcast_object(slice_batch(self.batch, samples)), like=self.batch)
        return replace(self, batch=batch)

    def copy(self) -> LightningModule:
        """A copy of the module that may be used up; see :func:`isolated_copy`."""
        return isolated_copy(self.module, self.trainer, share_uncopyable=self.loss_fn is not None)

    def loss(self, module: Any) -> Tensor:
        """The loss of such a copy on the batch: the same however often it is asked for."""
        return self.loss_on(module, self.batch)

    def loss_on(self, module: LightningModule, batch: Any) -> Tensor:
        """The same on another batch, of which it is given a copy: some are changed in place, as by augmentations."""
        trained = (p.dtype for p in module.parameters() if p.requires_grad and p.is_floating_point())
        dtype = next(trained, torch.float32)
        batch = clone_batch(batch)
        if dtype not in HALF:  # inputs that are, autocast would take to the precision of the weights
            batch = apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.dtype in HALF else t)
        with preserve_attributes(module), default_dtype(dtype):
            if self.loss_fn is not None:
                return self.loss_fn(module, batch)
            return training_loss(module, batch, self.batch_idx)


@contextlib.contextmanager
def preserve_attributes(module: LightningModule) -> Iterator[None]:
    """Undoes what is assigned to attributes: a hidden state, carried on to the next batch, belongs to this one.

    And what is drawn from the random numbers of loaders, which are those of the original.
    """
    parts = list(module.modules())
    before = [dict(vars(part)) for part in parts]
    states = [(generator, generator.get_state()) for loader in _loaders(before) for generator in _generators(loader)]
    try:
        yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            for name in vars(part).keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
        for generator, state in states:
            generator.set_state(state)


def _loaders(attributes: Sequence[dict[str, Any]]) -> Iterator[DataLoader[Any]]:
    """Those that are attributes, or in a list or dict that is one."""
    for value in (value for own in attributes for value in own.values()):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (item for item in items if isinstance(item, DataLoader))


def _generators(loader: DataLoader[Any]) -> Iterator[torch.Generator]:
    inner = getattr(loader.batch_sampler, "sampler", None)
    for owner in (loader, loader.sampler, loader.batch_sampler, inner):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


def _nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def preserve_schedulers(trainer: Trainer) -> Iterator[None]:
    """Puts learning rates and schedulers back: a ``training_step`` that steps them itself reaches the real ones.

    They stay the objects that they are, and so does what they hold: others may hold it too.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    rates = [value for setting in settings for value in setting.values() if isinstance(value, Tensor)]
    values = [rate.detach().clone() for rate in rates]  # which schedulers change in place
    stepped = _with_nested_schedulers(schedulers(trainer))
    functions = [function for scheduler in stepped for function in getattr(scheduler, "lr_lambdas", ())]
    # What repairs may change, a scheduler that holds it too must not bring back.
    states = {id(held) for one in trainer.optimizers for held in (one.state, one.param_groups, *one.param_groups)}
    own = [getattr(one, "__dict__", None) for one in (*stepped, *functions)]
    kept = [_Snapshot(attributes, states) for attributes in own if isinstance(attributes, dict)]
    try:
        yield
    finally:
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)
        with torch.no_grad():
            for rate, value in zip(rates, values, strict=True):
                rate.copy_(value)
        for one in kept:
            one.put_back()


class _Snapshot:
    """The attributes of an object, and what is in their collections, to be put back into the same ones."""

    def __init__(self, attributes: dict[str, Any], not_ours: set[int]) -> None:
        self._contents: list[tuple[Any, Any]] = []
        ahead: list[Any] = [attributes]
        seen = set(not_ours)
        while ahead:
            value = ahead.pop()
            if id(value) not in seen and isinstance(value, dict | list | deque):
                seen.add(id(value))
                self._contents.append((value, value.copy()))
                ahead += value.values() if isinstance(value, dict) else value

    def put_back(self) -> None:
        for value, content in self._contents:
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)


def _with_nested_schedulers(given: Sequence[Any]) -> list[Any]:
    """Schedulers, and those that they hold, as a warm-up the one that follows it."""
    found = list(given)
    for scheduler in found:  # which grows
        held = _nested_schedulers(getattr(scheduler, "__dict__", {}))
        found += [one for one in held if not any(one is other for other in found)]
    return found


def _nested_schedulers(value: Any) -> Iterator[LRScheduler]:
    if isinstance(value, LRScheduler):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested_schedulers(item)
