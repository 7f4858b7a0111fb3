"""Test what the callback writes to loggers and draws into figures."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plasticity import Collapse, GGNProbe, HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.diagnostics import DIAGNOSTICS, diagnostics_of
from lightning_plasticity.interventions import L2Init
from lightning_plasticity.reporting.plots import LOG_EIGENVALUE_EDGES, plot_history
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, loader, trainer

GGN = [diagnostic.name for diagnostic in diagnostics_of(["ggn"])]
# So few steps learn no direction fast: there is no ratio of fast ranks.
RATIOS = {f"{name}_vs_initial" for name in GGN} - {"fast_rank_vs_initial"}
NAMES = {*GGN, *RATIOS, "probe_loss", "probe_samples", "collapsed", "probe_failed"}


def fit_three_tasks(*loggers: Logger, **arguments: Any) -> SpectralCollapseCallback:
    callback = SpectralCollapseCallback(**{"collapse": Collapse(above=1e9), **arguments})
    module = Classifier()
    for _ in range(3):
        trainer(callback, logger=list(loggers)).fit(module, loader())
    return callback


def test_tensorboard_scalars_by_step_and_by_task(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"scalars": 0}).Reload()
    for prefix, steps in (("plasticity/", [0, 3, 6]), ("plasticity_by_task/", [0, 1, 2])):
        shown_names = {tag[len(prefix) :] for tag in events.Tags()["scalars"] if tag.startswith(prefix)}
        assert shown_names > NAMES
        assert shown_names == {name for report in callback.history for name in report.metrics} | {*NAMES}
        for name in (*GGN, "dormant_fraction", "effective_rank", "effective_rank/net.0"):
            shown = sort_by_step(events.Scalars(prefix + name))
            assert [event.step for event in shown] == steps
            expected = [report.metrics[name] for report in callback.history]
            assert [event.value for event in shown] == pytest.approx(expected, rel=1e-6)


def sort_by_step(events: list[Any]) -> list[Any]:
    """Sort events by step: event files are read in the order of their names, not of the fits that wrote them."""
    return sorted(events, key=lambda event: event.step)


def test_tensorboard_histograms_share_bins(tmp_path: Path) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"histograms": 0}).Reload()
    shown = sort_by_step(events.Histograms("plasticity_by_task/log10_ggn_eigenvalues"))
    assert [event.step for event in shown] == [0, 1, 2]
    for event, report in zip(shown, callback.history, strict=True):
        histogram = event.histogram_value
        assert histogram.num == 67, "one eigenvalue for each parameter"
        edges = LOG_EIGENVALUE_EDGES.numpy()
        values = np.log10(np.clip(report.spectrum.eigenvalues.numpy(), 1e-8, None))
        expected, _ = np.histogram(values, edges)
        counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
        assert [counts.get(edge, 0) for edge in edges[1:]] == expected.tolist()


@pytest.mark.parametrize("negative", [False, True])
def test_tensorboard_histograms_of_hessian_by_sign(tmp_path: Path, negative: bool) -> None:
    callback = fit_three_tasks(TensorBoardLogger(tmp_path, version=0), probe=HessianProbe(num_probes=3, num_steps=8))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"histograms": 0}).Reload()
    tags = ["plasticity_by_task/log10_hessian_eigenvalues", "plasticity_by_task/log10_hessian_negative_eigenvalues"]
    assert sorted(events.Tags()["histograms"]) == tags
    shown = sort_by_step(events.Histograms(tags[negative]))
    assert [event.step for event in shown] == [0, 1, 2]
    edges = LOG_EIGENVALUE_EDGES.numpy()
    for event, report in zip(shown, callback.history, strict=True):
        values, weights = (tensor.numpy() for tensor in report.spectrum.undeflated)
        selected = (values < 0) == negative
        logarithms = np.log10(np.abs(values[selected])).clip(-8, 4)
        expected, _ = np.histogram(logarithms, edges, weights=67 * weights[selected])
        counts = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket, strict=True))
        assert [counts.get(edge, 0) for edge in edges[1:]] == pytest.approx(expected.tolist())
        assert event.histogram_value.num == round(67 * weights[selected].sum())
    both = [sum(sort_by_step(events.Histograms(tag))[0].histogram_value.bucket) for tag in tags]
    assert sum(both) == pytest.approx(67), "every parameter is one eigenvalue"


def test_semidefinite_hessian_has_no_negative_histogram(tmp_path: Path) -> None:
    class Linear(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

    logger = TensorBoardLogger(tmp_path, version=0)
    callback = SpectralCollapseCallback(HessianProbe(num_probes=1, num_steps=2))
    trainer(callback, logger=logger).fit(Linear(), loader())
    assert callback.history[0].spectrum.lambda_min > 0
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload()
    assert events.Tags()["histograms"] == ["plasticity_by_task/log10_hessian_eigenvalues"]


def test_tensorboard_figure_of_every_task(tmp_path: Path) -> None:
    fit_three_tasks(TensorBoardLogger(tmp_path, version=0))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in sort_by_step(events.Images("plasticity_by_task/history"))] == [0, 1, 2]


def test_every_logger_gets_the_metrics(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path, name="a", version=0), CSVLogger(tmp_path, name="b", version=0)
    callback = fit_three_tasks(first, second)
    for logger in (first, second):
        text = Path(logger.log_dir, "metrics.csv").read_text()
        header, *rows = [line.split(",") for line in text.splitlines()]
        column = header.index("plasticity_by_task/learnable_fraction")
        logged = [float(row[column]) for row in rows if row[column]]
        assert logged == pytest.approx([report.metrics["learnable_fraction"] for report in callback.history])


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


def test_figure_with_failed_probe() -> None:
    callback = fit_three_tasks()
    callback.history[1].spectrum, callback.history[1].metrics = None, {}
    figure = plot_history(callback.history)
    ridges, curve = figure.axes
    assert ridges.get_ylabel() == curve.get_xlabel() == "task"
    assert list(curve.lines[0].get_xdata()) == [0, 2]
    assert torch.isfinite(torch.tensor(curve.lines[0].get_ydata())).all()


def test_figure_without_spectra_has_no_ridges() -> None:
    callback = fit_three_tasks()
    for report in callback.history:
        report.spectrum = None
    (curve,) = plot_history(callback.history).axes
    assert list(curve.lines[0].get_xdata()) == [0, 1, 2]


def test_figure_of_one_task_has_integer_ticks() -> None:
    ridges, curve = plot_history(fit_three_tasks().history[:1]).axes
    assert all(tick == round(tick) for tick in [*ridges.get_yticks(), *curve.get_xticks()])


def test_figure_of_long_history_thins_ridges_but_keeps_last() -> None:
    report = fit_three_tasks().history[0]
    history = [dataclasses.replace(report, task=task) for task in range(120)]
    ridges, curve = plot_history(history).axes
    feet = [line.get_ydata().min() for line in ridges.lines if len(line.get_ydata()) > 2]
    assert sorted(feet) == list(range(2, 120, 3))
    assert list(curve.lines[0].get_xdata()) == list(range(120))


@pytest.mark.parametrize("ggn", [GGNProbe(), None], ids=["beside", "alone"])
def test_figure_of_hessians_labels_the_matrix(ggn: GGNProbe | None) -> None:
    probe = HessianProbe(num_probes=2, num_steps=8, ggn=ggn)
    callback = fit_three_tasks(probe=probe, collapse=Collapse("hessian_effective_rank", below=1e-9))
    ridges, curve = plot_history(callback.history).axes
    assert ridges.get_xlabel() == "log10 eigenvalue of the Hessian"
    assert "negative eigenvalues, by their size" in [text.get_text() for text in ridges.get_legend().get_texts()]
    assert curve.get_ylabel() == DIAGNOSTICS["handicap"].title
    assert list(curve.lines[0].get_ydata()) == [report.metrics["handicap"] for report in callback.history]


def test_figure_after_change_of_probe() -> None:
    callback, module = SpectralCollapseCallback(collapse=Collapse("learnable_fraction", below=1e-9)), Classifier()
    for probe in (GGNProbe(), HessianProbe(num_probes=3, num_steps=8)):
        callback.probe = probe
        trainer(callback).fit(module, loader())
    ridges, _ = plot_history(callback.history).axes
    assert ridges.get_xlabel() == "log10 eigenvalue of the Gauss-Newton matrix or Hessian"


def test_figure_is_drawn_only_after_a_new_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def plot(history: Any) -> Any:
        drawn.append(len(history))
        return plot_history(history)

    monkeypatch.setattr("lightning_plasticity.reporting.loggers.plot_history", plot)
    callback, module = SpectralCollapseCallback(collapse=NEVER), Classifier()
    for task_id in (0, 0, 1):
        module.task_id = task_id
        trainer(callback, logger=TensorBoardLogger(tmp_path)).fit(module, loader())
    assert drawn == [1, 2]
