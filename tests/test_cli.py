"""The configuration files in examples/ build what they say, survive being printed and read again, and train."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_plasticity import SpectralCollapseCallback

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.chdir(tmp_path)


def fitted(config: Path) -> Any:
    from cli import main  # type: ignore[import-not-found]

    quiet = ["--trainer.max_epochs=3", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return main(["fit", "--config", str(config), *quiet])


def callback_of(cli: Any) -> SpectralCollapseCallback:
    return next(c for c in cli.trainer.callbacks if isinstance(c, SpectralCollapseCallback))


@pytest.mark.filterwarnings("ignore:task .*:lightning_plasticity.PlasticityWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_trains_as_it_does_after_being_printed_and_read_again(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    one, other = fitted(config), fitted(printed)
    first, second = callback_of(one), callback_of(other)
    assert [report.task_id for report in first.history] == [0, 1]
    assert [vars(i).keys() for i in first.interventions] == [vars(i).keys() for i in second.interventions]
    assert [report.metrics for report in first.history] == [report.metrics for report in second.history]
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert isinstance(one.trainer.logger, TensorBoardLogger)


def test_there_is_a_configuration_for_each_way_of_use() -> None:
    assert [path.stem for path in CONFIGS] == ["continual_backprop", "monitor", "repair_on_collapse"]


def test_the_help_of_the_callback_names_and_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    from cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help", "lightning_plasticity.SpectralCollapseCallback"])
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "probe": "How the curvature is measured",
        "collapse": "What is called a collapse",
        "interventions": "What is done about",
        "task_detector": "How new tasks are recognised",
        "monitor": "Whether dormant units",
        "monitor_every_n_steps": "on the batch in flight",
        "loss_fn": "returns the mean loss",
    }.items():
        assert re.search(rf"--trainer\.callbacks\.(init_args\.)?{name}\b", text)
        assert words in text
