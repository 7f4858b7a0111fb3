"""Training with the callback is bit-identical to training without it."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plasticity import Collapse, SpectralCollapseCallback
from tests.modules import trainer


class Busy(LightningModule):
    """Everything in a training_step that a careless probe would disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
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


def run(path: Path, callback: SpectralCollapseCallback | None, **options: Any) -> dict[str, Any]:
    """Three tasks; returns everything that training leaves behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = Busy()
    logger = CSVLogger(path, flush_logs_every_n_steps=10_000)
    one = trainer(*([callback] if callback else []), logger=logger, max_epochs=0, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        data = TensorDataset(
            torch.randn(24, 1, 6, 6, generator=generator), torch.randint(3, (24,), generator=generator)
        )
        one.fit_loop.max_epochs += 2
        one.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    rows = [row for row in logger.experiment.metrics if not any("plasticity" in key for key in row)]
    return {
        "weights and buffers": module.state_dict(),
        "optimizer": one.optimizers[0].state_dict(),
        "losses": [loss.item() for loss in module.outputs],
        "steps": (module.steps_seen, one.extra, one.global_step),
        "noise": module.noise,
        "logged": [{key: value for key, value in row.items() if key != "created_at"} for row in rows],
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
        ),
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()),
    }


@pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*")
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9))
    without, with_callback = run(tmp_path / "a", None, **options), run(tmp_path / "b", callback, **options)
    assert len(callback.history) == 3
    assert all(report.spectrum is not None for report in callback.history)
    for key, value in without.items():
        torch.testing.assert_close(with_callback[key], value, rtol=0, atol=0, msg=f"{key} differs", equal_nan=True)


def test_the_comparison_would_notice_a_disturbance(tmp_path: Path) -> None:
    class Disturbing(SpectralCollapseCallback):
        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            torch.rand(1)

    disturbing = Disturbing(collapse=Collapse(below=1e-9))
    without, disturbed = run(tmp_path / "a", None), run(tmp_path / "b", disturbing)
    assert without["losses"] != disturbed["losses"]
