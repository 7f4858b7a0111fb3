"""What is the loss here, as a graph, without touching the run? A copy of the module is asked, on a few samples."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_plasticity._compat import DummyLogger, compiled_methods
from lightning_plasticity.copying import UncopyableError, copy_module
from lightning_plasticity.curvature import Spectrum, TooManyRowsError
from lightning_plasticity.curvature.batches import batch_size, first_samples
from lightning_plasticity.curvature.gram import Gram, gram

LossFunction = Callable[[LightningModule, Any], Tensor]
"""``loss_fn(module, batch)`` returns the mean loss of the data, a scalar with a graph."""

_SHARED = (LightningDataModule, DataLoader, Dataset)
"""Kinds of attributes that a copy of a module shares with the original: large, or not the module's own."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe saw on one batch.

    Args:
        spectrum: Spectrum of the Gauss-Newton matrix, with the tangent kernel.
        loss: The loss on the probe's samples.
    """

    spectrum: Spectrum
    loss: float


@dataclasses.dataclass(frozen=True)
class GGNProbe:
    """The exact Gauss-Newton spectrum on the first samples of a batch.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        max_rows: Bound on the rows of the Gram matrix (samples times outputs a sample). Time grows with its cube,
            memory with its square. Where it is exceeded, fewer samples are taken.

    Raises:
        ValueError: If an argument is not a positive whole number.
    """

    samples: int = 64
    max_rows: int = 2048

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("max_rows", self.max_rows)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"GGNProbe({name}={value!r}) must be a whole number, 1 or larger")

    def measure(self, make_copy: Callable[[], LightningModule], batch: Any, loss_fn: LossFunction) -> ProbeResult:
        """Probes a module on a batch.

        Args:
            make_copy: Makes a copy of the module that may be used up.
            batch: The batch, on the module's device. It is not changed.
            loss_fn: The loss of a module on a batch.

        Raises:
            MisconfigurationException: If one sample alone has more outputs than ``max_rows``.
        """
        available = batch_size(batch)
        samples = self.samples if available is None else min(self.samples, available)
        while True:
            try:
                known = None if available is None else samples
                result = self._gram(make_copy(), first_samples(batch, samples), loss_fn, known)
                return ProbeResult(result.spectrum(), result.loss)
            except TooManyRowsError as error:
                fewer = min(samples - 1, samples * self.max_rows // error.rows)
                if available is None or fewer < 1:
                    raise MisconfigurationException(
                        f"one sample has {error.rows // samples} outputs, more than "
                        f"GGNProbe(max_rows={self.max_rows}): raise max_rows, or pass a loss_fn on fewer outputs"
                    ) from error
                samples = fewer

    def _gram(self, module: LightningModule, batch: Any, loss_fn: LossFunction, samples: int | None) -> Gram:
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module = module.float()
            batch = apply_to_collection(batch, Tensor, lambda t: t.float() if t.is_floating_point() else t)
        return gram(module, batch, loss_fn, samples=samples, max_rows=self.max_rows)


def training_loss(module: LightningModule, batch: Any) -> Tensor:
    """The loss that ``training_step`` returns.

    Raises:
        MisconfigurationException: If it returns none.
    """
    arguments = [batch, 0] if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else [batch]
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


class _QuietTrainer:
    """The Trainer as a probed copy sees it: everything but the loggers, and what is set on it is forgotten."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for what is not there
            raise AttributeError(name)
        return getattr(self._trainer, name)


def isolated_copy(module: LightningModule, trainer: Trainer, *, share_uncopyable: bool = False) -> LightningModule:
    """A copy of the module that can be trained, logged from and broken without the run noticing.

    Data modules, data sets and loaders are shared rather than copied; ``log`` does nothing, nor do loggers.

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
        if isinstance(value, Logger):
            return quiet.logger
        if isinstance(value, _SHARED) or any(value is method for method in compiled):
            return value
        return None

    try:
        result = copy_module(module, stand_in, share_uncopyable=share_uncopyable)
    except UncopyableError as error:
        raise MisconfigurationException(
            f"the probe works on a copy of {type(module).__name__}, but its {error}. Keep it outside of the module, "
            "give it a __deepcopy__, or pass SpectralCollapseCallback(loss_fn=...), which shares it instead"
        ) from error
    for part in result.modules():
        if isinstance(part, LightningModule):
            for name in compiled_methods(part):
                del part.__dict__[name]
            part._trainer = quiet
            part.log = part.log_dict = _nothing  # type: ignore[method-assign]
    return result


def _nothing(*_: object, **__: object) -> None:
    pass


@contextlib.contextmanager
def untouched_schedules(trainer: Trainer) -> Iterator[None]:
    """Puts learning rates and schedulers back: a ``training_step`` that steps them itself reaches the real ones."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    states = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    try:
        yield
    finally:
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
