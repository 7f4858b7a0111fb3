"""Test that learning rate schedulers run as without the callback, whatever objects they hold."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_plasticity import SpectralCollapseCallback
from tests.helpers.modules import NEVER
from tests.helpers.training_runs import NewTaskAtSecondBatch, check_identical, train
from tests.helpers.usages import StatefulClassifier, Usage, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*was measured on . samples")


class WarmUp(torch.optim.lr_scheduler.LRScheduler):
    """A linear warm-up before another scheduler.

    Its state contains that scheduler, and thereby the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, after: torch.optim.lr_scheduler.LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch <= 2:
            return [rate * (self.last_epoch + 1) / 3 for rate in self.base_lrs]
        self.after.step()
        return [group["lr"] for group in self.optimizer.param_groups]


class WarmUpByTrainer(StatefulClassifier):
    steps_in_training_step = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.steps_in_training_step:
            self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = WarmUp(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return [optimizer], [{"scheduler": schedule, "interval": "epoch" if self.steps_in_training_step else "step"}]


class WarmUpInTrainingStep(WarmUpByTrainer):
    steps_in_training_step = True


class HalvedPerEpoch:
    """A learning rate factor that reads the epoch from the Trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, step: int) -> float:
        return 0.5**self.trainer.current_epoch


class TrainerDependent(StatefulClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, HalvedPerEpoch(self.trainer))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class LossScaledLR(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that shares an object with the module, has a lock, and leaves ``phase`` out of its state."""

    def __init__(self, optimizer: torch.optim.Optimizer, shared: SimpleNamespace) -> None:
        self.shared, self.phase, self.lock = shared, 1, threading.Lock()
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [rate * self.shared.loss / self.phase for rate in self.base_lrs]

    def step(self, *_: Any) -> None:
        super().step()
        self.phase = 1 + self.last_epoch // 2

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch, self.phase = state["last_epoch"], 1


class LossDependent(StatefulClassifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.shared = SimpleNamespace(loss=1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.shared.loss = output["loss"].item()
        return output

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": LossScaledLR(optimizer, self.shared), "interval": "step"}]


class TensorLearningRate(WarmUpInTrainingStep):
    """Has a tensor as its learning rate, which the scheduler changes in place."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1))
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "module", [WarmUpByTrainer, WarmUpInTrainingStep, TrainerDependent, LossDependent, TensorLearningRate]
)
def test_learning_rates_are_unchanged(module: type[StatefulClassifier]) -> None:
    usage, callback = Usage("scheduled", module=module), SpectralCollapseCallback(collapse=NEVER)
    rates = []

    class RateRecorder(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    without = train(RateRecorder(), usage=usage, make_net=mlp)
    with_callback = train(callback, NewTaskAtSecondBatch(callback), RateRecorder(), usage=usage, make_net=mlp)
    check_identical(with_callback, without, callback)
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]
    assert len(set(rates)) > 1, "the scheduler changes the learning rate"
