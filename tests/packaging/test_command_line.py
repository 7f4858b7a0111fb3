"""The commands of ``python -m lightning_plasticity``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plasticity import SpectralCollapseCallback
from lightning_plasticity.__main__ import main
from lightning_plasticity.interventions import describe_units
from tests.helpers.modules import NEVER, Classifier, loader, trainer

HERE = "tests.packaging.test_command_line"


class Network(Classifier):
    """A classifier that can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 4)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class WithoutExample(Network):
    """The same without example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = None


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Train for a task and return the checkpoint."""
    fit = trainer(SpectralCollapseCallback(collapse=NEVER))
    fit.fit(Network(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_report_prints_table_and_writes_page(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.parent / "report.html"
    assert main(["report", str(checkpoint.parent), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"from {checkpoint}"
    assert lines[1].startswith("task  step  verdict   handicap")
    assert lines[2].startswith("0     0     no alarm")
    assert lines[3:] == ["1 task, 0 alarms, 0 repairs.", f"written to {output}"]
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_module_is_a_command(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_plasticity", "report", str(checkpoint)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 task, 0 alarms, 0 repairs." in done.stdout


@pytest.mark.parametrize("arguments", [["Network"], ["WithoutExample", "--input-shape", "3,4"]], ids=["own", "given"])
def test_units_prints_those_of_the_network(
    arguments: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *shape = arguments
    assert main(["units", f"{HERE}:{name}", "--checkpoint", str(checkpoint), *shape]) == 0
    expected = str(describe_units(Network(), forward=lambda module: module(torch.randn(2, 4))))
    assert capsys.readouterr().out.rstrip() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere does not exist: pass a checkpoint or a log directory"),
        (["report", "CHECKPOINT", "--output", "nowhere/report.html"], "--output nowhere/report.html cannot be written"),
        (["units", "Network", "--checkpoint", "CHECKPOINT"], "'Network' must be MODULE:CLASS, such as"),
        (["units", "nowhere:Network", "--checkpoint", "CHECKPOINT"], "'nowhere:Network' cannot be imported: No module"),
        (["units", f"{HERE}:Nothing", "--checkpoint", "CHECKPOINT"], "cannot be imported: module"),
        (["units", f"{HERE}:HERE", "--checkpoint", "CHECKPOINT"], "must be a class that derives from LightningModule"),
        (["units", f"{HERE}:Network", "--checkpoint", "nowhere"], "nowhere is no file: pass a checkpoint"),
        (
            ["units", f"{HERE}:WithoutExample", "--checkpoint", "CHECKPOINT"],
            "has no example_input_array: pass the shape of a batch, as --input-shape 2,3,32,32",
        ),
        (
            ["units", f"{HERE}:Network", "--checkpoint", "CHECKPOINT", "--input-shape", "2,x"],
            "--input-shape '2,x' must be positive numbers",
        ),
        (
            ["units", f"{HERE}:Network", "--checkpoint", "CHECKPOINT", "--input-shape", "2,5"],
            "does not run on --input-shape 2,5: RuntimeError",
        ),
        (
            ["units", "lightning.pytorch.demos.boring_classes:BoringModel", "--checkpoint", "CHECKPOINT"],
            "does not fit BoringModel: RuntimeError",
        ),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint) if each == "CHECKPOINT" else each for each in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
