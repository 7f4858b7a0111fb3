"""Test that configuration files train, also after a round trip through ``--print_config``, and document arguments."""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_plasticity
from lightning_plasticity import (
    Collapse,
    GGNProbe,
    PlasticityMonitor,
    SpectralCollapseCallback,
    TaskDetector,
    interventions,
)
from lightning_plasticity.interventions import Intervention, StepIntervention
from lightning_plasticity.probes import Probe

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.chdir(tmp_path)


def fit(config: Path) -> Any:
    """Run three epochs of a configuration, with two epochs a task, and return the LightningCLI."""
    from cli import main  # type: ignore[import-not-found]

    short = ["--data.epochs_per_task=2", "--trainer.max_epochs=3"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return main(["fit", "--config", str(config), *short, *quiet])


def plasticity_callback(cli: Any) -> SpectralCollapseCallback:
    return next(each for each in cli.trainer.callbacks if isinstance(each, SpectralCollapseCallback))


@pytest.mark.filterwarnings("ignore:task .*:lightning_plasticity.PlasticityWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_printed_configuration_trains_identically(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    original_cli, printed_cli = fit(config), fit(printed)
    original, reread = plasticity_callback(original_cli), plasticity_callback(printed_cli)
    assert [report.task_id for report in original.history] == [0, 1]
    assert [vars(i).keys() for i in original.interventions] == [vars(i).keys() for i in reread.interventions]
    assert [report.metrics for report in original.history] == [report.metrics for report in reread.history]
    for p, q in zip(original_cli.model.parameters(), printed_cli.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert isinstance(original_cli.trainer.logger, TensorBoardLogger)


def test_example_configurations_are_complete() -> None:
    assert [path.stem for path in CONFIGS] == ["continual_backprop", "monitor", "repair_on_collapse"]


def test_callback_help_explains_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    from cli import main

    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help", "lightning_plasticity.SpectralCollapseCallback"])
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "probe": "The measurement of curvature",
        "collapse": "The rule for an alarm",
        "interventions": "Interventions, one after the other",
        "task_detector": "The rules by which tasks start",
        "monitor": "Whether to measure dormant units",
        "monitor_every_n_steps": "on the training batch",
        "loss_fn": "returns the mean loss",
    }.items():
        assert re.search(rf"--trainer\.callbacks\.(init_args\.)?{name}\b", text)
        assert words in text


CALLBACK = """
seed_everything: 0
trainer:
  accelerator: cpu
  limit_train_batches: 3
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_plasticity.SpectralCollapseCallback
      init_args:
"""


def configured(arguments: str) -> Path:
    path = Path("callback.yaml")
    path.write_text(CALLBACK + textwrap.indent(textwrap.dedent(arguments), " " * 8))
    return path


def stage(trainer: Trainer, module: LightningModule) -> str:
    return "early" if trainer.current_epoch < 2 else "late"


def loss(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def loss_without_types(module, batch):  # type: ignore[no-untyped-def]
    return loss(module, batch)


def mean_of_inputs(batch):  # type: ignore[no-untyped-def]
    return batch[0].mean()


ALL_ARGUMENTS = """
    probe:
      class_path: lightning_plasticity.HessianProbe
      init_args:
        num_probes: 1
        num_steps: 2
        ggn: {class_path: lightning_plasticity.GGNProbe, init_args: {samples: 8}}
    monitor:
      class_path: lightning_plasticity.PlasticityMonitor
      init_args: {measures: [dormant_fraction]}
    loss_fn: HERE.LOSS
    task_detector:
      class_path: lightning_plasticity.TaskDetector
      init_args: {task_key: HERE.stage}
"""


@pytest.mark.filterwarnings("ignore:task .*:lightning_plasticity.PlasticityWarning")
@pytest.mark.parametrize("loss_fn", [loss, loss_without_types])
def test_functions_are_configured_by_import_path(
    loss_fn: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    from cli import main

    config = configured(ALL_ARGUMENTS.replace("LOSS", loss_fn.__name__).replace("HERE", __name__))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    original, reread = plasticity_callback(fit(config)), plasticity_callback(fit(printed))
    assert [(report.task_id, report.step) for report in original.history] == [("early", 0), ("late", 6)]
    assert original.history[0].metrics.keys() >= {"hessian_trace", "learnable_fraction", "dormant_fraction"}
    assert str([report.to_dict() for report in original.history]) == str(
        [report.to_dict() for report in reread.history]
    )


def test_drift_detector_is_configured_by_class() -> None:
    drift = pytest.importorskip("river.drift", reason="river needs Python 3.11")
    config = configured(f"""
        task_detector:
          class_path: lightning_plasticity.TaskDetector
          init_args:
            drift_statistic: {__name__}.mean_of_inputs
            drift_detector: {{class_path: river.drift.ADWIN, init_args: {{delta: 0.5}}}}
    """)
    detector: Any = plasticity_callback(fit(config))._tasks._drift_detector
    assert isinstance(detector, drift.ADWIN)
    assert (detector.delta, detector.width) == (0.5, 9), "the detector was updated at every batch"


PUBLIC = [
    value
    for package in (lightning_plasticity, interventions)
    for name in package.__all__
    if inspect.isclass(value := getattr(package, name))
    and issubclass(value, SpectralCollapseCallback | TaskDetector | Collapse | Probe | PlasticityMonitor | Intervention)
    and value not in (Intervention, StepIntervention)
    and not inspect.isabstract(value)
]


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_arguments_are_typed_documented_and_optional(kind: type) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it", fail_untyped=True)
    documentation = {action.dest.removeprefix("it."): action.help for action in parser._actions}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.default is not parameter.empty, name
            # The help must contain words besides cross-references.
            assert re.search(r"[a-z]{3,} [a-z]{2,}", re.sub(r":\w+:`[^`]*`", "", documentation[name])), name
    assert isinstance(kind(), kind)


@pytest.mark.parametrize("when", [1000, "task"])
def test_when_parses_alike_from_command_line_and_file(when: int | str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(interventions.ReDo, "it")
    for arguments in (parser.parse_args([f"--it.when={when}"]), parser.parse_object({"it": {"when": when}})):
        assert interventions.ReDo(when=arguments.it.when).when == when


def test_every_kind_of_public_class_is_covered() -> None:
    assert {SpectralCollapseCallback, TaskDetector, Collapse, GGNProbe, PlasticityMonitor, interventions.ReDo} < {
        *PUBLIC
    }
    assert len(PUBLIC) > 20
