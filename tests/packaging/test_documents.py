"""Run the code of README and documentation."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import SpectralCollapseCallback

ROOT = Path(__file__).parents[2]


class Classifier(LightningModule):
    """Classify vectors of 8 numbers into 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S)


PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem == "tutorial" else [])
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if blocks(page, "python")
]


def run_blocks(document: Path, names: dict[str, Any]) -> None:
    """Run the Python of a document from top to bottom, with ``names``, which it may change."""
    for block in blocks(document, "python"):
        if "import ADWIN" in block:
            pytest.importorskip("river")
        exec(compile(block, str(document), "exec"), names)


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


# Pages train networks that collapse, and their Trainers have the defaults of Lightning.
@pytest.mark.filterwarnings("ignore:.*task .*:lightning_plasticity.PlasticityWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_documentation_runs(page: Path) -> None:
    run_blocks(page, {})


@pytest.mark.filterwarnings("ignore:.*task .*:lightning_plasticity.PlasticityWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning")
def test_readme_measures_every_task() -> None:
    data = [TensorDataset(torch.randn(64, 8), torch.randint(3, (64,))) for _ in range(3)]
    names: dict[str, Any] = {"model": Classifier(), "loaders": [DataLoader(task, batch_size=16) for task in data]}
    run_blocks(ROOT / "README.md", names)
    watching = next(each for each in names["trainer"].callbacks if isinstance(each, SpectralCollapseCallback))
    assert [report.task for report in watching.history] == [0, 1, 2]
    assert names["trainer"].global_step == 3 * 5 * 4


def test_configuration_of_the_documentation_is_read() -> None:
    (block,) = blocks(ROOT / "docs" / "reference-configuration.md", "yaml")
    cli = LightningCLI(BoringModel, run=False, seed_everything_default=False, args=yaml.safe_load(block))
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, SpectralCollapseCallback)]
    assert callback.probe.num_steps == 32
