"""The configuration files in examples/ build what they say, survive being printed and read again, and train."""

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


EVERYTHING_AT_ONCE = """
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
def test_functions_are_given_by_their_import_paths(
    loss_fn: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    from cli import main

    config = configured(EVERYTHING_AT_ONCE.replace("LOSS", loss_fn.__name__).replace("HERE", __name__))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config), "--print_config"])
    printed = Path("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    one, other = callback_of(fitted(config)), callback_of(fitted(printed))
    assert [(report.task_id, report.step) for report in one.history] == [("early", 0), ("late", 6)]
    assert one.history[0].metrics.keys() >= {"hessian_trace", "learnable_fraction", "dormant_fraction"}
    assert str([report.to_dict() for report in one.history]) == str([report.to_dict() for report in other.history])


def test_a_drift_detector_is_given_by_its_class() -> None:
    drift = pytest.importorskip("river.drift", reason="river needs Python 3.11")
    config = configured(f"""
        task_detector:
          class_path: lightning_plasticity.TaskDetector
          init_args:
            drift_statistic: {__name__}.mean_of_inputs
            drift_detector: {{class_path: river.drift.ADWIN, init_args: {{delta: 0.5}}}}
    """)
    detector: Any = callback_of(fitted(config))._tasks._drift_detector
    assert isinstance(detector, drift.ADWIN)
    assert (detector.delta, detector.width) == (0.5, 9), "it has seen all batches"


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
def test_every_argument_of_what_a_file_may_hold_is_typed_explained_and_has_a_default(kind: type) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it", fail_untyped=True)
    explained = {action.dest.removeprefix("it."): action.help for action in parser._actions}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.default is not parameter.empty, name
            assert re.search(r"[a-z]{3,} [a-z]{2,}", re.sub(r":\w+:`[^`]*`", "", explained[name])), name  # in words
    assert isinstance(kind(), kind)


@pytest.mark.parametrize("when", [1000, "task"])
def test_when_is_given_on_the_command_line_as_in_a_file(when: int | str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(interventions.ReDo, "it")
    for arguments in (parser.parse_args([f"--it.when={when}"]), parser.parse_object({"it": {"when": when}})):
        assert interventions.ReDo(when=arguments.it.when).when == when


def test_all_kinds_are_among_them() -> None:
    assert {SpectralCollapseCallback, TaskDetector, Collapse, GGNProbe, PlasticityMonitor, interventions.ReDo} < {
        *PUBLIC
    }
    assert len(PUBLIC) > 20
