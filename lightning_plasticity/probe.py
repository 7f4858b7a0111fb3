"""What is the loss here, as a graph, without touching the run? A copy of the module is asked, on a few samples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_plasticity._compat import DummyLogger, compiled_methods
from lightning_plasticity.curvature import Spectrum, TooManyRowsError
from lightning_plasticity.curvature.gram import Gram, gram
from lightning_plasticity.isolation import isolated_rng

LossFunction = Callable[[LightningModule, Any], Tensor]
"""``loss_fn(module, batch)`` returns the mean loss of the data, a scalar with a graph."""

_SHARED = (Trainer, LightningDataModule, DataLoader, Dataset, Logger)
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
        """
        samples = self.samples
        while True:
            try:
                result = self._gram(make_copy(), first_samples(batch, samples), loss_fn)
                return ProbeResult(result.spectrum(), result.loss)
            except TooManyRowsError as error:
                samples = error.samples * self.max_rows // error.rows
                if samples < 1:
                    raise MisconfigurationException(
                        f"one sample has {error.rows // error.samples} outputs, more than "
                        f"GGNProbe(max_rows={self.max_rows}): raise max_rows, or pass a loss_fn on fewer outputs"
                    ) from error

    def _gram(self, module: LightningModule, batch: Any, loss_fn: LossFunction) -> Gram:
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters()):
            module = module.float()
            batch = apply_to_collection(batch, Tensor, lambda t: t.float() if t.is_floating_point() else t)
        return gram(module, batch, loss_fn, max_rows=self.max_rows)


def first_samples(batch: Any, samples: int) -> Any:
    """A copy of the first samples of a batch: of every tensor in it whose first dimension is the batch size.

    The batch size is the first dimension of the first tensor in the batch that has one. Other tensors are copied whole.

    Example:
        >>> x, y, scale = first_samples((torch.zeros(8, 3), torch.zeros(8), torch.zeros(2)), samples=4)
        >>> x.shape, y.shape, scale.shape
        (torch.Size([4, 3]), torch.Size([4]), torch.Size([2]))
    """
    sizes: list[int] = []

    def see(tensor: Tensor) -> None:
        if tensor.dim():
            sizes.append(tensor.shape[0])

    apply_to_collection(batch, Tensor, see)
    size = sizes[0] if sizes else None

    def take(tensor: Tensor) -> Tensor:
        shortened = tensor[:samples] if tensor.dim() and tensor.shape[0] == size else tensor
        return shortened.detach().clone()

    return apply_to_collection(batch, Tensor, take)


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

    Trainer, data modules, data sets, loaders and loggers are shared rather than copied; ``log`` does nothing.

    Args:
        module: The module. It is not changed.
        trainer: Its Trainer.
        share_uncopyable: Share attributes that cannot be copied too, instead of raising.

    Raises:
        MisconfigurationException: If an attribute cannot be copied; it is named.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        own = {k: v for k, v in part.__dict__.items() if k not in ("_parameters", "_buffers", "_modules", "_trainer")}
        _share(list(own.values()), memo, set())
        if isinstance(part, LightningModule):
            memo.update({id(method): method for method in compiled_methods(part).values()})
    try:
        with isolated_rng():
            result = copy.deepcopy(module, dict(memo))
    except Exception as error:
        culprits = _uncopyable(module, memo)
        if not (share_uncopyable and culprits):
            name, value, reason = next(iter(culprits), ("?", module, error))
            raise MisconfigurationException(
                f"the probe works on a copy of {type(module).__name__}, but its attribute {name!r} (a "
                f"{type(value).__name__}) cannot be copied: {reason}. Keep it outside of the module, give it a "
                "__deepcopy__, or pass SpectralCollapseCallback(loss_fn=...), which shares it instead"
            ) from error
        memo.update({id(value): value for _, value, _ in culprits})
        with isolated_rng():
            result = copy.deepcopy(module, memo)
    quiet: Any = _QuietTrainer(trainer)
    for part in result.modules():
        if isinstance(part, LightningModule):
            for name in compiled_methods(part):
                del part.__dict__[name]
            part._trainer = quiet
            part.log = part.log_dict = _nothing  # type: ignore[method-assign]
    return result


def _nothing(*_: object, **__: object) -> None:
    pass


def _share(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Puts what a copy shares with the original into the memo of a deep copy."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _SHARED):
        memo[id(value)] = value
    elif isinstance(value, Tensor) and not value.is_leaf:  # kept from an earlier step; cannot be copied with its graph
        memo[id(value)] = value.detach()
    elif isinstance(value, dict):
        _share(list(value.values()), memo, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _share(item, memo, seen)


def _uncopyable(module: nn.Module, memo: dict[int, Any]) -> list[tuple[str, Any, Exception]]:
    """The attributes of a module and of what is in it that cannot be copied, and why."""
    found = []
    for prefix, part in module.named_modules():
        for name, value in part.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules", "_trainer"):
                continue
            try:
                with isolated_rng():
                    copy.deepcopy(value, dict(memo))
            except Exception as error:
                found.append((f"{prefix}.{name}" if prefix else name, value, error))
    return found
