"""Test what the callback writes to loggers, by reading event files back."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_plasticity import HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.curvature.plotting import LOG_EIGENVALUE_EDGES
from lightning_plasticity.interventions import L2Init, ShrinkPerturb
from tests.helpers.event_files import read_events, sort_by_step
from tests.helpers.modules import ALWAYS, Classifier, MemoryLogger, fit_three_tasks, loader, trainer

LEAD = ["alarms", "dormant_fraction", "epsilon_rank", "handicap", "learnable_fraction", "repairs"]


def tags_of(events: EventAccumulator, kind: str) -> set[str]:
    return {tag for tag in events.Tags()[kind] if "plasticity" in tag}


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    shown = sort_by_step(events.Tensors(f"{tag}/text_summary"))
    return {event.step: event.tensor_proto.string_val[0].decode() for event in shown}


def test_default_scalars_are_few_and_first(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = read_events(tmp_path)
    by_task = {f"plasticity_by_task/{name}" for name in [*LEAD, "fit_loss", "collapsed"]}
    compared = ("fit_loss", "learnable_fraction", "epsilon_rank", "dormant_fraction")
    fresh = {f"plasticity_fresh_network/{name}" for name in compared}
    assert tags_of(events, "scalars") == {f"_plasticity/{name}" for name in LEAD} | by_task | fresh
    for prefix, steps in (("_plasticity/", [0, 3, 6]), ("plasticity_by_task/", [0, 1, 2])):
        for name in set(LEAD) - {"alarms", "repairs"}:
            shown = sort_by_step(events.Scalars(prefix + name))
            assert [event.step for event in shown] == steps
            expected = [report.metrics[name] for report in callback.history]
            assert [event.value for event in shown] == pytest.approx(expected, rel=1e-6)
    for name in compared:
        shown = sort_by_step(events.Scalars(f"plasticity_fresh_network/{name}"))
        assert [event.value for event in shown] == pytest.approx([report.fresh[name] for report in callback.history])
    assert callback.history[2].fresh["fit_loss"] != callback.history[2].metrics["fit_loss"]


def test_all_scalars_on_request(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0), log="all")
    events, report = read_events(tmp_path), callback.history[-1]
    details = {tag.partition("/")[2] for tag in tags_of(events, "scalars") if tag.startswith("plasticity_details/")}
    assert {"probe_loss", "probe_samples", "probe_failed", "ggn_trace", "fit_loss", "churn"} <= details
    assert {name for name in details if "_vs_initial" in name} == {
        f"{name}_vs_initial" for name in ("fit_loss", "learnable_fraction", "epsilon_rank", "dormant_fraction")
    } & report.metrics.keys()
    left_out = {name for name in report.metrics if "_vs_initial" not in name and "/" not in name} - details
    assert left_out == set(LEAD) - {"alarms", "repairs"}
    (shown,) = (event for event in events.Scalars("plasticity_layers/effective_rank/net.0") if event.step == 6)
    assert shown.value == pytest.approx(report.metrics["effective_rank/net.0"])


def test_nothing_is_logged_on_request(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0), log=False)
    assert len(callback.history) == 3
    assert not any(tag for tags in read_events(tmp_path).Tags().values() if isinstance(tags, list) for tag in tags)


@pytest.mark.parametrize("log", [True, "few", None])
def test_log_must_be_a_known_level(log: Any) -> None:
    with pytest.raises(ValueError, match=r"log=.* must be 'lead', 'all' or False"):
        SpectralCollapseCallback(log=log)


def test_alarms_and_repairs_are_counted_and_told(tmp_path: Path) -> None:
    with pytest.warns(PlasticityWarning, match="a fresh network would learn this task better"):
        callback = fit_three_tasks(
            TensorBoardLogger(tmp_path, version=0), collapse=ALWAYS, interventions=[ShrinkPerturb()]
        )
    events, history = read_events(tmp_path), callback.history
    assert [report.collapsed for report in history] == [True] * 3
    for name in ("alarms", "repairs"):
        assert [event.value for event in sort_by_step(events.Scalars(f"_plasticity/{name}"))][-1] == 3
    told = texts(events, "plasticity/events")
    assert list(told) == [0, 1, 2]
    report = history[2]
    assert told[2].splitlines() == [
        "**Task 2**, step 6",
        "",
        f"- **Alarm** ▼ {report.verdict.removeprefix('task 2: ')}",
        f"- **Repair** ▲ ShrinkPerturb: 67 parameters changed; {report.effect}",
    ]
    assert f"handicap {report.metrics['handicap']:.3g} → {report.after['handicap']:.3g}" in told[2]


def test_quantities_are_explained_once(tmp_path: Path) -> None:
    fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    (page,) = texts(read_events(tmp_path), "plasticity/meaning").values()
    assert "- **alarms**: number of tasks so far with an alarm" in page


def test_charts_of_network_fresh_one_and_alarms(tmp_path: Path) -> None:
    """The regular expressions of the layout select the tags that are there."""
    fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = read_events(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    shown = {
        chart.title: {
            tag for tag in tags_of(events, "scalars") for regex in chart.multiline.tag if re.search(regex, tag)
        }
        for chart in category.chart
    }
    assert shown["fit loss"] == {
        "plasticity_by_task/fit_loss",
        "plasticity_fresh_network/fit_loss",
        "plasticity_by_task/collapsed",
    }
    assert shown["ε-rank"] == {"plasticity_by_task/epsilon_rank", "plasticity_fresh_network/epsilon_rank"}
    assert shown["alarms and repairs so far"] == {"plasticity_by_task/alarms", "plasticity_by_task/repairs"}


def test_tensorboard_histograms_share_bins(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = read_events(tmp_path)
    shown = sort_by_step(events.Histograms("plasticity_by_task/log10_ggn_eigenvalues"))
    assert [event.step for event in shown] == [0, 1, 2]
    for event, report in zip(shown, callback.history, strict=True):
        histogram, eigenvalues = event.histogram_value, report.spectrum.eigenvalues.numpy()
        assert len(eigenvalues) == 67, "one eigenvalue for each parameter"
        edges = LOG_EIGENVALUE_EDGES.numpy()
        expected, _ = np.histogram(np.log10(eigenvalues[eigenvalues > 1e-8]), edges)
        assert 0 < histogram.num == expected.sum() < 67, "those that are zero are left out"
        counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
        assert [counts.get(edge, 0) for edge in edges[1:]] == expected.tolist()


@pytest.mark.parametrize("negative", [False, True])
def test_tensorboard_histograms_of_hessian_by_sign(tmp_path: Path, negative: bool) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0), probe=HessianProbe(num_probes=3, num_steps=8))
    events = read_events(tmp_path)
    tags = ["plasticity_by_task/log10_hessian_eigenvalues", "plasticity_by_task/log10_hessian_negative_eigenvalues"]
    assert sorted(events.Tags()["histograms"]) == tags
    shown = sort_by_step(events.Histograms(tags[negative]))
    assert [event.step for event in shown] == [0, 1, 2]
    edges = LOG_EIGENVALUE_EDGES.numpy()
    for event, report in zip(shown, callback.history, strict=True):
        values, weights = (tensor.numpy() for tensor in report.spectrum.undeflated)
        selected = ((values < 0) == negative) & (np.abs(values) > 1e-8)
        logarithms = np.log10(np.abs(values[selected]))
        expected, _ = np.histogram(logarithms, edges, weights=67 * weights[selected])
        counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
        assert [counts.get(edge, 0) for edge in edges[1:]] == pytest.approx(expected.tolist())
        assert event.histogram_value.num == round(67 * weights[selected].sum())
    spectrum = callback.history[0].spectrum
    zero = 67 * spectrum.undeflated[1][spectrum.undeflated[0].abs() <= 1e-8].sum().item()
    both = [sum(sort_by_step(events.Histograms(tag))[0].histogram_value.bucket) for tag in tags]
    assert sum(both) == pytest.approx(67 - zero), "every other parameter is one eigenvalue"


def test_semidefinite_hessian_has_no_negative_histogram(tmp_path: Path) -> None:
    class Linear(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

    logger = TensorBoardLogger(tmp_path, version=0)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=1, num_steps=2))
    trainer(callback, logger=logger).fit(Linear(), loader())
    assert callback.history[0].spectrum.lambda_min > 0
    events = read_events(tmp_path)
    assert events.Tags()["histograms"] == ["plasticity_by_task/log10_hessian_eigenvalues"]


def test_tensorboard_figures_of_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.reporting.reporter._MAX_SHARE", 1e9)
    fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = read_events(tmp_path)
    names = ("dormant_units", "overview", "spectrum")
    assert set(events.Tags()["images"]) == {f"plasticity_figures/{name}" for name in names}
    for tag in events.Tags()["images"]:
        assert [event.step for event in sort_by_step(events.Images(tag))] == [0, 1, 2]


def test_every_logger_gets_the_metrics() -> None:
    first, second = MemoryLogger(), MemoryLogger()
    callback = fit_three_tasks(first, second)
    for logger in (first, second):
        for group, steps in (("plasticity/", [0, 3, 6]), ("plasticity_by_task/", [0, 1, 2])):
            logged = logger.values(f"{group}learnable_fraction")
            expected = [report.metrics["learnable_fraction"] for report in callback.history]
            assert logged == dict(zip(steps, expected, strict=True))


def test_loggers_get_separate_dictionaries() -> None:
    class Consuming(MemoryLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            super().log_metrics(metrics, step)
            metrics.clear()

    loggers = [Consuming(), Consuming(), MemoryLogger()]
    callback = SpectralCollapseCallback(monitor_every_n_steps=1, interventions=[L2Init()])
    trainer(callback, logger=loggers).fit(Classifier(), loader())
    assert loggers[0].rows == loggers[1].rows == loggers[2].rows
    assert len(loggers[0].values("plasticity_training/dormant_fraction")) == 3
    assert len(loggers[0].values("plasticity_training/L2Init/penalty")) == 3


def test_failing_logger_only_warns() -> None:
    class Broken(Logger):
        name, version = "broken", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            raise OSError("disk full")

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    callback, module = SpectralCollapseCallback(), Classifier()
    with pytest.warns(PlasticityWarning, match=r"Broken could not log the plasticity .* training goes on: OSError"):
        trainer(callback, logger=Broken()).fit(module, loader())
    assert len(callback.history) == 1
