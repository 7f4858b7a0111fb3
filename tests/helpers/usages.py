"""Define the networks and the ways to use Lightning over which the training tests are parametrised."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity.interventions import Regularizer
from tests.helpers.modules import MemoryLogger, trainer


def convolutional() -> nn.Module:
    body = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


class RowSequenceClassifier(nn.Module):
    """Reads an image as the sequence of its rows, and classifies the last output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.LazyLinear(3)
        self(torch.zeros(2, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x.squeeze(1))
        return self.head((output[0] if isinstance(output, tuple) else output)[:, -1])


def transformer() -> nn.Module:
    """Return a classifier with scaled dot product attention."""
    return RowSequenceClassifier(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True))


def gru() -> nn.Module:
    return RowSequenceClassifier(nn.GRU(6, 5, num_layers=2, dropout=0.2, batch_first=True))


class Quartic(Regularizer):
    """The penalty ``coefficient * sum(p**4)``, whose gradient depends on the weights."""

    def penalty(self, model: nn.Module) -> Tensor:
        return self.coefficient * torch.stack([p.float().pow(4).sum() for p in model.parameters()]).sum()


NETS = (mlp, convolutional, transformer, gru)


class StatefulClassifier(LightningModule):
    """Changes every kind of state in ``training_step`` that a careless probe would disturb."""

    term: Regularizer | None = None
    """A regularizer that ``training_step`` adds to the loss."""

    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(3)
        # Lightning does not reset this metric, since it is not logged.
        self.tally = MulticlassAccuracy(3)
        self.outputs: list[Tensor] = []
        self.steps_seen = 0
        self.noise: list[float] = []

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x, y

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = self.inputs_and_labels(batch)
        logits = self.logits(x)
        loss = F.cross_entropy(logits, y)
        self.record_step(loss, logits, y)
        return {"loss": loss if self.term is None else loss + self.term.penalty(self)}

    def record_step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Update metrics, counters and lists, draw random numbers, and log."""
        self.accuracy(logits, y)
        self.tally.update(logits, y)
        # The loss is kept with its graph on purpose.
        self.outputs.append(loss)
        self.steps_seen += 1
        self.noise.append(random.random() + float(np.random.rand()))  # noqa: NPY002
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, batch_size=len(y))
        self.log("loss", loss, on_step=True)
        means = {"a": loss.detach(), "b": logits.mean().detach()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=len(y))
        self.logger.log_metrics({"direct": float(self.global_step)}, step=self.global_step)
        if self.trainer.is_last_batch:
            self.trainer.extra = self.steps_seen  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=1e-2)


def data_loss(module: StatefulClassifier, batch: Any) -> Tensor:
    """Return the cross-entropy, without the regularizer and without any side effect on metrics or loggers."""
    x, y = module.inputs_and_labels(batch)
    return F.cross_entropy(module.logits(x), y)


class ManualOptimization(StatefulClassifier):
    """Steps two optimizers in turn, each on its own loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = super().training_step(batch, batch_idx)["loss"]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()
        return [self.make_optimizer([first], lr=1e-2), torch.optim.SGD(others, lr=0.1)]


class LBFGSOptimization(StatefulClassifier):
    """Evaluates ``training_step`` several times a batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Compilable(StatefulClassifier):
    """Records a step after it has ended: torch (2.13) cannot compile Lightning's ``log``."""

    last_step: tuple[Tensor, Tensor, Tensor] | None = None

    def record_step(self, *last_step: Tensor) -> None:
        self.last_step = last_step

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().record_step(*self.last_step)


class ActivationCheckpointing(StatefulClassifier):
    """Recomputes activations in the backward pass instead of storing them."""

    def logits(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class TruncatedBPTT(StatefulClassifier):
    """Takes dicts, and carries a state between batches as truncated backpropagation through time does."""

    carried: Tensor | None = None

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["y"]

    def logits(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        if self.carried is not None:
            logits = logits + 0.1 * self.carried.detach()
        self.carried = logits.mean(0)
        return logits


class CombinedBatches(StatefulClassifier):
    """Takes batches of two loaders at once."""

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        (x, y), (more_x, more_y) = batch["one"], batch["other"]
        return torch.cat([x, more_x]), torch.cat([y, more_y])


class StreamDataset(IterableDataset[Any]):
    """Shuffles the samples itself, and has no length."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[int(index)] for index in torch.randperm(len(self.data)))


def tensor_loader(data: TensorDataset) -> Any:
    return DataLoader(data, batch_size=8, shuffle=True)


def dict_loader(data: TensorDataset) -> Any:
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        return dict(zip("xy", default_collate(samples), strict=True))

    return DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)


def combined_loader(data: TensorDataset) -> Any:
    subset = TensorDataset(*data[:8])
    loaders = {"one": tensor_loader(data), "other": DataLoader(subset, batch_size=4, shuffle=True)}
    return CombinedLoader(loaders, "max_size_cycle")


def stream_loader(data: TensorDataset) -> Any:
    return DataLoader(StreamDataset(data), batch_size=8)


def half_precision() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


def weight_averages() -> list[Callback]:
    package = Callback.__module__.partition(".callbacks")[0]
    averaging = pytest.importorskip(f"{package}.callbacks.weight_averaging", reason="Lightning 2.6 has it")
    return [averaging.EMAWeightAveraging(decay=0.5)]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_compiled_network(module: StatefulClassifier) -> StatefulClassifier:
    module.net = compiled(module.net)
    return module


@dataclass(frozen=True)
class Usage:
    """One way to use Lightning.

    Args:
        name: Test id.
        module: Class of the LightningModule.
        options: Factory of Trainer arguments; a factory, because stateful ones must be new for each Trainer.
        callbacks: Factory of further callbacks.
        loader: Factory of the training loader.
        prepared: Maps the module to the object that is passed to ``Trainer.fit``.
        loss_fn: ``loss_fn`` of the callback.
    """

    name: str
    module: type[StatefulClassifier] = StatefulClassifier
    options: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[Callback]] = list
    loader: Callable[[TensorDataset], Any] = tensor_loader
    prepared: Callable[[StatefulClassifier], Any] = lambda module: module
    loss_fn: Callable[[Any, Any], Tensor] | None = None

    def fit(
        self, module: StatefulClassifier, *callbacks: Callback, fits: int = 2, **options: Any
    ) -> tuple[list[Trainer], MemoryLogger]:
        """Run ``fits`` fits of two epochs of three batches, each on new data and with a new Trainer."""
        prepared, logger, trainers = self.prepared(module), MemoryLogger(), []
        generator = torch.Generator().manual_seed(1)
        for _ in range(fits):
            x = torch.randn(24, 1, 6, 6, generator=generator)
            data = TensorDataset(x, torch.randint(3, (24,), generator=generator))
            trainer_options = {"logger": logger, "max_epochs": 2, **self.options(), **options}
            trainers.append(trainer(*callbacks, *self.callbacks(), **trainer_options))
            trainers[-1].fit(prepared, self.loader(data))
            # Callbacks that average weights deep-copy the module, which fails for tensors with a graph.
            module.outputs = [loss.detach() for loss in module.outputs]
        return trainers, logger


PLAIN = Usage("plain")

USAGES = (
    PLAIN,
    Usage("accumulation with a short last window", options=lambda: {"accumulate_grad_batches": 2}),
    Usage("bf16", options=lambda: {"precision": "bf16-mixed"}),
    Usage("fp16", options=half_precision),
    Usage("clipping", options=lambda: {"gradient_clip_val": 0.1}),
    Usage("two manual optimizers", module=ManualOptimization, loss_fn=data_loss),
    Usage("LBFGS", module=LBFGSOptimization),
    Usage("compiled module", module=Compilable, prepared=compiled),
    Usage("compiled network", prepared=with_compiled_network),
    Usage("activation checkpoints", module=ActivationCheckpointing),
    Usage("EMA", callbacks=weight_averages),
    Usage("SWA", callbacks=lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]),
    Usage("dicts and carried state", module=TruncatedBPTT, loader=dict_loader),
    Usage("two loaders", module=CombinedBatches, loader=combined_loader),
    Usage("stream", loader=stream_loader),
)
