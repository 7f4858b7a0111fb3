"""Modules, Trainers, loggers and data modules of ``pytorch_lightning``, the other name of the same code, work alike."""

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

from lightning_plasticity import Collapse, HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity._compat import has_full_weights, is_lightning, is_model_parallel
from lightning_plasticity.interventions import ShrinkPerturb
from lightning_plasticity.reporting import progress
from tests.helpers import usages
from tests.helpers.modules import loader
from tests.helpers.usages import Quartic
from tests.training.test_non_interference import check_usage
from tests.training.test_usages import ByHand, by_callback, trained

standalone = pytest.importorskip("pytorch_lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # the compiler
    pytest.mark.filterwarnings("ignore:.* averages weights over training steps, and ShrinkPerturb changes"),
]
with_its_trainer = pytest.mark.skipif(
    Version(standalone.__version__) < Version("2.6"), reason="before 2.6 its Trainer refuses callbacks but its own"
)


def of_standalone(name: str, **others: ModuleType) -> ModuleType:
    """A module of the tests, once more, with ``pytorch_lightning`` and others in place of what it imports."""
    twins = {
        twin.replace("pytorch_lightning", "lightning.pytorch", 1): module
        for twin, module in sys.modules.items()
        if twin.partition(".")[0] == "pytorch_lightning"
    }
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, {**twins, **others, name: module}):
        spec.loader.exec_module(module)
    return module


usages_of_standalone = of_standalone(
    usages.__name__, **{"tests.helpers.modules": of_standalone("tests.helpers.modules")}
)


of_standalone_in_every_usage = pytest.mark.parametrize(
    "usage", usages_of_standalone.USAGES, ids=lambda usage: usage.name
)


class Standalone(standalone.LightningModule):  # type: ignore[misc, name-defined]
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


class Tasks(standalone.LightningDataModule):  # type: ignore[misc, name-defined]
    def __init__(self, task_id: int) -> None:
        super().__init__()
        self.task_id = task_id

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def run(folder: Path, *callbacks: Any, **options: Any) -> tuple[dict[str, Any], EventAccumulator]:
    torch.manual_seed(0)
    module, logger = Standalone(), standalone.loggers.TensorBoardLogger(folder)
    for task in range(2):
        given = {"logger": logger, "enable_progress_bar": False, **options}
        quiet = {"enable_checkpointing": False, "enable_model_summary": False}
        trainer = standalone.Trainer(
            callbacks=list(callbacks), max_epochs=1, accelerator="cpu", log_every_n_steps=1, **quiet, **given
        )
        trainer.fit(module, datamodule=Tasks(task))
    events = EventAccumulator(logger.log_dir, {"histograms": 0, "scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if "plasticity" not in name]
    # Of two event files, the tenth of a process is read before the ninth.
    own = {name: sorted(events.Scalars(name), key=lambda event: event.wall_time) for name in names}
    result = {
        "weights and buffers": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "logged": {name: [(event.step, event.value) for event in values] for name, values in own.items()},
        "random numbers": torch.get_rng_state(),
        "calls": module.calls,
    }
    return result, events


@with_its_trainer
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
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9), monitor_every_n_steps=1)
    without, _ = run(tmp_path / "without", **options)
    with_callback, events = run(tmp_path / "with", callback, **options)
    assert without["logged"].keys() == {"loss", "calls", "epoch"}
    for name, value in without.items():
        torch.testing.assert_close(with_callback[name], value, rtol=0, atol=0, msg=f"{name} differs")
    steps = 2 if "accumulate_grad_batches" in options else 3
    seen = [(report.task_id, report.step, report.spectrum is not None) for report in callback.history]
    assert seen == [(0, 0, True), (1, steps, True)]
    assert "plasticity_by_task/log10_ggn_eigenvalues" in events.Tags()["histograms"]
    assert "plasticity_training/dormant_fraction" in events.Tags()["scalars"]


@with_its_trainer
@of_standalone_in_every_usage
@pytest.mark.parametrize("make_net", usages_of_standalone.NETS)
def test_so_is_training_in_every_other_way_to_use_it(usage: Any, make_net: Any) -> None:
    assert issubclass(usage.module, standalone.LightningModule)
    assert usages_of_standalone.Trainer is standalone.Trainer
    check_usage(usage, make_net)


@with_its_trainer
@of_standalone_in_every_usage
def test_so_are_regularizers_and_repairs(usage: Any) -> None:
    make_net = usages_of_standalone.convolutional
    expected = trained(usage, make_net, term=Quartic(1.0))
    assert (trained(usage, make_net, by_callback(usage, Quartic(1.0))) - expected).abs().max() <= 1e-6
    assert (trained(usage, make_net) - expected).abs().max() > 1e-3, "without the term it is another training"
    callback, hand = by_callback(usage, ShrinkPerturb(when=2)), ByHand(ShrinkPerturb())
    assert torch.equal(trained(usage, make_net, callback), trained(usage, make_net, hand))
    assert hand.repairs == sum(len(report.repairs) for report in callback.history) > 2


@with_its_trainer
def test_its_progress_bar_says_that_a_probe_is_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=2, num_steps=3), collapse=Collapse(below=1e-9))
    run(tmp_path, callback, standalone.callbacks.TQDMProgressBar(), enable_progress_bar=True)
    assert "probing curvature 6/6" in capsys.readouterr().out


@with_its_trainer
def test_its_averages_are_warned_of(tmp_path: Path) -> None:
    swa = standalone.callbacks.StochasticWeightAveraging(swa_lrs=1e-2)
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9), interventions=[ShrinkPerturb()])
    with pytest.warns(PlasticityWarning, match="StochasticWeightAveraging averages weights over training steps"):
        run(tmp_path, callback, swa)


def test_it_has_the_same_strategies() -> None:
    strategies = standalone.strategies
    assert has_full_weights(strategies.SingleDeviceStrategy())
    assert has_full_weights(strategies.DDPStrategy())
    assert is_model_parallel(strategies.ModelParallelStrategy())
    assert not has_full_weights(strategies.FSDPStrategy())


def test_classes_of_another_package_are_not_taken_for_lightnings() -> None:
    class DDPStrategy:
        pass

    assert not has_full_weights(DDPStrategy())
    assert is_lightning(TQDMProgressBar(), TQDMProgressBar)
    assert not is_lightning(TQDMProgressBar(), Trainer)
