"""Tests of training on two ranks that Lightning launches itself, from a script or by spawning."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def launched(strategy: str, net: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train on two ranks and return the final state of each."""
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.launched", strategy, net, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def logged(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows logged by the callback, and all others."""
    with next(folder.rglob("metrics.csv")).open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    ours = [row for row in rows if any("plasticity" in name for name in row)]
    return ours, [row for row in rows if row not in ours]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "convolutional", "transformer", "gru"])
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_callback_leaves_training_bit_identical(strategy: str, net: str, tmp_path: Path) -> None:
    without = launched(strategy, net, tmp_path / "without")
    with_callback = launched(strategy, net, tmp_path / "with", "with_callback")
    assert without[0]["losses"] != without[1]["losses"], "each rank trains on its own samples"
    for one, other in zip(with_callback, without, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=0, atol=0, msg=f"{name} differs")
    ours, others = logged(tmp_path / "with")
    assert {"plasticity/learnable_fraction", "plasticity_training/dormant_fraction"} <= set().union(*ours)
    assert others
    assert ([], others) == logged(tmp_path / "without")
