"""Training with the callback is bit-identical to training without it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity import Collapse, HessianProbe, PyHessianProbe, SpectralCollapseCallback
from tests.modules import MemoryLogger, trainer


def convolutional() -> nn.Module:
    body = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3))
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


class Rows(nn.Module):
    """Takes an image for a sequence of its rows, and classifies by the last output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.LazyLinear(3)
        self(torch.zeros(2, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        output = self.net(x.squeeze(1))
        return self.head((output[0] if isinstance(output, tuple) else output)[:, -1])


def transformer() -> nn.Module:
    return Rows(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True))  # scaled dot product attention


def gru() -> nn.Module:
    return Rows(nn.GRU(6, 5, num_layers=2, dropout=0.2, batch_first=True))


class Busy(LightningModule):
    """Everything in a training_step that a careless probe would disturb."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(3)
        self.outputs: list[Tensor] = []
        self.steps_seen = 0
        self.noise: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.outputs.append(loss)  # with its graph
        self.steps_seen += 1
        self.noise.append(random.random() + float(np.random.rand()))  # noqa: NPY002
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True)
        self.log_dict({"a": loss.detach(), "b": logits.mean().detach()}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": float(self.global_step)}, step=self.global_step)
        if self.trainer.is_last_batch:
            self.trainer.extra = self.steps_seen  # type: ignore[attr-defined]
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class InTheMiddle(Callback):
    """Has a task begin at the second batch of every epoch too: between the batches of one accumulated gradient."""

    def __init__(self, callback: SpectralCollapseCallback) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.callback.new_task()


def run(*callbacks: Callback, make_net: Callable[[], nn.Module] = convolutional, **options: Any) -> dict[str, Any]:
    """Three fits; returns everything that training leaves behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = Busy(make_net())
    logger = MemoryLogger()
    one = trainer(*callbacks, logger=logger, max_epochs=0, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        data = TensorDataset(
            torch.randn(24, 1, 6, 6, generator=generator), torch.randint(3, (24,), generator=generator)
        )
        one.fit_loop.max_epochs += 2
        one.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    rows = [row for row in logger.rows if not any("plasticity" in key for key in row)]
    return {
        "weights and buffers": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizer": one.optimizers[0].state_dict(),
        "losses": [loss.item() for loss in module.outputs],
        "steps": (module.steps_seen, one.extra, one.global_step),
        "noise": module.noise,
        "logged": rows,
        "metrics": {name: value.item() for name, value in one.callback_metrics.items()},
        "metric state": {name: getattr(module.accuracy, name).clone() for name in module.accuracy._defaults},
        "random numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "modes": [part.training for part in module.modules()],
        "flags": (
            torch.is_grad_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.mkldnn.enabled,
            torch.get_num_threads(),
            torch.get_default_dtype().itemsize,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()),
    }


@pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*")
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_training_is_bit_identical_with_and_without_the_callback(options: dict[str, Any]) -> None:
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9))
    without, with_callback = run(**options), run(callback, **options)
    assert len(callback.history) == 3
    check_identical(with_callback, without, callback)


@pytest.mark.parametrize(
    ("make_net", "options"),
    [
        (mlp, {}),
        (convolutional, {}),
        (transformer, {}),
        (gru, {}),
        (convolutional, {"accumulate_grad_batches": 2}),
        (transformer, {"precision": "bf16-mixed"}),
    ],
    ids=["mlp", "conv", "transformer", "gru", "conv accumulated", "transformer bf16"],
)
@pytest.mark.parametrize("kind", [HessianProbe, PyHessianProbe])
def test_so_is_training_with_a_probe_of_the_hessian(
    kind: type[HessianProbe], make_net: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    callback = SpectralCollapseCallback(kind(num_probes=2, num_steps=3), collapse=Collapse(below=1e-9))
    without = run(make_net=make_net, **options)
    with_callback = run(callback, InTheMiddle(callback), make_net=make_net, **options)
    assert len(callback.history) == 9
    check_identical(with_callback, without, callback)


def check_identical(with_callback: dict[str, Any], without: dict[str, Any], callback: SpectralCollapseCallback) -> None:
    assert all(report.spectrum is not None for report in callback.history)
    assert without["logged"], "an empty list is like any other"
    for key, value in without.items():
        torch.testing.assert_close(with_callback[key], value, rtol=0, atol=0, msg=f"{key} differs", equal_nan=True)


def test_the_comparison_would_notice_a_disturbance() -> None:
    class Disturbing(SpectralCollapseCallback):
        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            torch.rand(1)

    disturbing = Disturbing(collapse=Collapse(below=1e-9))
    without, disturbed = run(), run(disturbing)
    assert without["losses"] != disturbed["losses"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make_net", [mlp, convolutional, transformer, gru])
def test_training_is_bit_identical_while_it_is_monitored(make_net: Callable[[], nn.Module], precision: str) -> None:
    options: dict[str, Any] = {"make_net": make_net, "precision": precision, "accumulate_grad_batches": 2}
    monitored = SpectralCollapseCallback(collapse=Collapse(below=1e-9), monitor_every_n_steps=1)
    expected, actual = run(**options), run(monitored, **options)
    assert "dormant_fraction" in monitored.history[0].metrics
    check_identical(actual, expected, monitored)
