"""Test that all works with ``pytorch_lightning``, the standalone package with the same code as ``lightning``."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plasticity import HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity._compat import has_full_weights, is_lightning, is_model_parallel
from lightning_plasticity.interventions import ShrinkPerturb
from lightning_plasticity.reporting import progress
from tests.helpers import usages
from tests.helpers.modules import NEVER, loader
from tests.helpers.training_runs import ManualRepair, callback_with, check_usage, trained_state
from tests.helpers.usages import Quartic

standalone = pytest.importorskip("pytorch_lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was measured on . samples"),
    pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*"),
    # torch.compile reads .grad of tensors that are not leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* averages weights over training steps, and ShrinkPerturb changes"),
]
needs_callbacks_of_lightning = pytest.mark.skipif(
    Version(standalone.__version__) < Version("2.6"),
    reason="before 2.6 the Trainer of pytorch_lightning refuses callbacks of lightning",
)


def import_with_standalone(name: str, **others: ModuleType) -> ModuleType:
    """Execute a test module a second time, with ``pytorch_lightning`` in place of ``lightning.pytorch``.

    Args:
        name: Name of the module.
        others: Further modules that its imports receive, by name.
    """
    replacements = {
        module_name.replace("pytorch_lightning", "lightning.pytorch", 1): module
        for module_name, module in sys.modules.items()
        if module_name.partition(".")[0] == "pytorch_lightning"
    }
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {**replacements, **others, name: module}):
        spec.loader.exec_module(module)
    return module


standalone_usages = import_with_standalone(
    usages.__name__, **{"tests.helpers.modules": import_with_standalone("tests.helpers.modules")}
)
in_every_usage = pytest.mark.parametrize("usage", standalone_usages.USAGES, ids=lambda usage: usage.name)


class StandaloneClassifier(standalone.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        self.logger.log_metrics({"calls": float(self.calls)}, step=self.global_step)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class TaskData(standalone.LightningDataModule):  # type: ignore[misc, name-defined]
    def __init__(self, task_id: int) -> None:
        super().__init__()
        self.task_id = task_id

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def train(folder: Path, *callbacks: Any, **options: Any) -> tuple[dict[str, Any], EventAccumulator]:
    """Train two tasks, and return the state that training leaves behind and all that was logged."""
    torch.manual_seed(0)
    module, logger = StandaloneClassifier(), standalone.loggers.TensorBoardLogger(folder)
    for task in range(2):
        settings = {"logger": logger, "enable_progress_bar": False, "enable_checkpointing": False, **options}
        trainer = standalone.Trainer(
            callbacks=list(callbacks),
            max_epochs=1,
            accelerator="cpu",
            log_every_n_steps=1,
            enable_model_summary=False,
            **settings,
        )
        trainer.fit(module, datamodule=TaskData(task))
    events = EventAccumulator(logger.log_dir, {"histograms": 0, "scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if "plasticity" not in name]
    # Event files are read in the order of their names, in which the tenth of a process comes before the ninth.
    scalars = {name: sorted(events.Scalars(name), key=lambda event: event.wall_time) for name in names}
    result = {
        "weights and buffers": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "logged": {name: [(event.step, event.value) for event in values] for name, values in scalars.items()},
        "random numbers": torch.get_rng_state(),
        "calls": module.calls,
    }
    return result, events


@needs_callbacks_of_lightning
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda options: "".join(options) or "plain",
)
def test_training_is_bit_identical_with_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1)
    without, _ = train(tmp_path / "without", **options)
    with_callback, events = train(tmp_path / "with", callback, **options)
    assert without["logged"].keys() == {"loss", "calls", "epoch"}
    for name, value in without.items():
        torch.testing.assert_close(with_callback[name], value, rtol=0, atol=0, msg=f"{name} differs")
    steps = 2 if "accumulate_grad_batches" in options else 3
    tasks = [(report.task_id, report.step, report.spectrum is not None) for report in callback.history]
    assert tasks == [(0, 0, True), (1, steps, True)]
    assert "plasticity_by_task/log10_ggn_eigenvalues" in events.Tags()["histograms"]
    assert "plasticity_training/dormant_fraction" in events.Tags()["scalars"]


@needs_callbacks_of_lightning
@in_every_usage
@pytest.mark.parametrize("make_net", standalone_usages.NETS)
def test_training_is_bit_identical_in_every_usage(usage: Any, make_net: Any) -> None:
    assert issubclass(usage.module, standalone.LightningModule)
    assert standalone_usages.Trainer is standalone.Trainer
    check_usage(usage, make_net)


@needs_callbacks_of_lightning
@in_every_usage
def test_regularizers_and_repairs_equal_manual_ones(usage: Any) -> None:
    make_net = standalone_usages.convolutional
    expected = trained_state(usage, make_net, term=Quartic(1.0))
    assert (trained_state(usage, make_net, callback_with(usage, Quartic(1.0))) - expected).abs().max() <= 1e-6
    assert (trained_state(usage, make_net) - expected).abs().max() > 1e-3, "the penalty changes training"
    callback, manual = callback_with(usage, ShrinkPerturb(when=2)), ManualRepair(ShrinkPerturb())
    assert torch.equal(trained_state(usage, make_net, callback), trained_state(usage, make_net, manual))
    assert manual.repairs == sum(len(report.repairs) for report in callback.history) > 2


@needs_callbacks_of_lightning
def test_progress_bar_shows_the_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=2, num_steps=3), collapse=NEVER)
    train(tmp_path, callback, standalone.callbacks.TQDMProgressBar(), enable_progress_bar=True)
    assert "probing curvature 6/6" in capsys.readouterr().out


@needs_callbacks_of_lightning
def test_weight_averaging_warns(tmp_path: Path) -> None:
    swa = standalone.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ShrinkPerturb()])
    with pytest.warns(PlasticityWarning, match="StochasticWeightAveraging averages weights over training steps"):
        train(tmp_path, callback, swa)


def test_strategies_are_recognised() -> None:
    strategies = standalone.strategies
    assert has_full_weights(strategies.SingleDeviceStrategy())
    assert has_full_weights(strategies.DDPStrategy())
    assert is_model_parallel(strategies.ModelParallelStrategy())
    assert not has_full_weights(strategies.FSDPStrategy())


def test_same_named_classes_of_other_packages_are_not_matched() -> None:
    class DDPStrategy:
        pass

    assert not has_full_weights(DDPStrategy())
    assert is_lightning(TQDMProgressBar(), TQDMProgressBar)
    assert not is_lightning(TQDMProgressBar(), Trainer)
