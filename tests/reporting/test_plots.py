"""Test the figures of a history."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from lightning_plasticity import Collapse, GGNProbe, HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import ShrinkPerturb
from lightning_plasticity.reporting.plots import plot_history, plot_spectra, plot_units
from tests.helpers.event_files import read_events, sort_by_step
from tests.helpers.modules import ALWAYS, NEVER, Classifier, fit_three_tasks, loader, trainer


def line(axes: Any, label: str) -> Any:
    """Return the line with this label."""
    (found,) = (each for each in axes.lines if each.get_label() == label)
    return found


def test_overview_shows_network_and_fresh_one() -> None:
    history = fit_three_tasks().history
    names = ["fit_loss", "learnable_fraction", "epsilon_rank", "dormant_fraction"]
    for axes, name in zip(plot_history(history)[1], names, strict=True):
        assert list(line(axes, "network").get_ydata()) == [report.metrics[name] for report in history]
        assert list(line(axes, "fresh network").get_ydata()) == [report.fresh[name] for report in history]
        assert list(line(axes, "network").get_xdata()) == [0, 1, 2]


def test_overview_marks_alarms_and_repairs() -> None:
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        history = fit_three_tasks(collapse=ALWAYS, interventions=[ShrinkPerturb()]).history
    history[1].collapsed, history[1].repairs = False, []
    top = plot_history(history)[1][0]
    assert list(line(top, "alarm").get_xdata()) == list(line(top, "after repair").get_xdata()) == [0, 2]
    assert list(line(top, "after repair").get_ydata()) == [history[task].after["fit_loss"] for task in (0, 2)]


def test_overview_shows_number_that_the_module_logs(tmp_path: Path) -> None:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"train_loss": loss, "accuracy": float(self.trainer.global_step)})
            return loss

    callback, module = SpectralCollapseCallback(collapse=NEVER), Logging()
    for _ in range(2):
        trainer(callback, logger=TensorBoardLogger(tmp_path)).fit(module, loader())
    assert [report.logged["accuracy"] for report in callback.history] == [2, 2]
    last = plot_history(callback.history, metric="accuracy")[1][-1]
    assert list(last.lines[0].get_ydata()) == [2, 2]
    assert last.get_title(loc="left") == "accuracy, at the end of the task"


def test_overview_draws_into_given_axes() -> None:
    history = fit_three_tasks().history
    figure = Figure()
    given = figure.subplots(2, 2)
    drawn, axes = plot_history(history, given)
    assert drawn is figure
    assert axes == given.ravel().tolist()
    assert list(line(given[0, 0], "network").get_ydata()) == [report.metrics["fit_loss"] for report in history]
    assert {text.get_text() for text in given[0, 0].get_legend().get_texts()} == {"network", "fresh network"}
    assert not figure.legends
    with pytest.raises(ValueError, match="ax has 1 axes, and this history has 4 panels"):
        plot_history(history, Figure().subplots())


def test_failed_probe_leaves_a_gap() -> None:
    history = fit_three_tasks().history
    history[1].spectrum, history[1].metrics = None, {}
    assert list(line(plot_history(history)[1][0], "network").get_xdata()) == [0, 2]
    feet = [ridge.get_ydata().min() for ridge in plot_spectra(history)[1].lines if len(ridge.get_ydata()) > 2]
    assert sorted(feet) == [0, 2]
    (image,) = plot_units(history)[1].images
    assert image.get_array().mask.tolist() == [[False, True, False]]


def test_ticks_of_one_task_are_integers() -> None:
    history = fit_three_tasks().history[:1]
    ticks = [*plot_spectra(history)[1].get_yticks(), *plot_history(history)[1][-1].get_xticks()]
    assert all(tick == round(tick) for tick in ticks)


def test_long_history_thins_ridges_but_keeps_last() -> None:
    report = fit_three_tasks().history[0]
    history = [dataclasses.replace(report, task=task) for task in range(120)]
    feet = [ridge.get_ydata().min() for ridge in plot_spectra(history)[1].lines if len(ridge.get_ydata()) > 2]
    assert sorted(feet) == list(range(2, 120, 3))
    assert list(line(plot_history(history)[1][0], "network").get_xdata()) == list(range(120))


def test_ridges_leave_out_zeros() -> None:
    """The Gauss-Newton matrix of few samples has zeros among its eigenvalues, which would all be in the first bin."""
    (report, *_) = fit_three_tasks().history
    assert (report.spectrum.eigenvalues <= 1e-8).any()
    ridge = plot_spectra([report])[1].lines[0]
    assert ridge.get_ydata()[0] == 0
    assert ridge.get_ydata().max() == 3


@pytest.mark.parametrize("ggn", [GGNProbe(), None], ids=["beside", "alone"])
def test_spectra_of_hessians_are_labelled(ggn: GGNProbe | None) -> None:
    probe = HessianProbe(num_probes=2, num_steps=8, ggn=ggn)
    history = fit_three_tasks(probe=probe, collapse=Collapse("hessian_effective_rank", below=1e-9)).history
    _, axes = plot_spectra(history)
    assert axes.get_xlabel() == "log10 eigenvalue of the Hessian"
    assert "negative eigenvalues, by their size" in [text.get_text() for text in axes.get_legend().get_texts()]
    titles = [axes.get_title(loc="left") for axes in plot_history(history)[1]]
    assert ("ε-rank of the Hessian" in titles) == (ggn is None)


def test_spectra_after_change_of_probe() -> None:
    callback, module = SpectralCollapseCallback(collapse=Collapse("learnable_fraction", below=1e-9)), Classifier()
    for probe in (GGNProbe(), HessianProbe(num_probes=3, num_steps=8)):
        callback.probe = probe
        trainer(callback).fit(module, loader())
    assert plot_spectra(callback.history)[1].get_xlabel() == "log10 eigenvalue of the Gauss-Newton matrix or Hessian"


def test_units_are_a_map_of_layers_and_tasks() -> None:
    history = fit_three_tasks().history
    figure, axes = plot_units(history)
    (image,) = axes.images
    assert image.get_array().tolist() == [[report.metrics["dormant_fraction/net.0"] for report in history]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["net.0"]
    assert plot_units(history, ax=figure.add_subplot())[0] is figure


def test_figures_take_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drawing takes a second, and each task seven."""
    drawn: list[int] = []
    clock = [0.0]

    def plot(history: Any, **options: Any) -> Any:
        drawn.append(len(history))
        clock[0] += 1
        return plot_history(history, **options)

    monkeypatch.setattr("lightning_plasticity.reporting.loggers.plot_history", plot)
    monkeypatch.setattr("lightning_plasticity.reporting.reporter.time", SimpleNamespace(monotonic=lambda: clock[0]))
    callback, module = SpectralCollapseCallback(collapse=NEVER), Classifier()
    for _ in range(8):
        trainer(callback, logger=TensorBoardLogger(tmp_path, version=0)).fit(module, loader())
        clock[0] += 7
    assert drawn == [1, 4, 7]


def test_first_alarm_is_drawn_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.reporting.reporter._MAX_SHARE", 1e-12)
    callback, module = SpectralCollapseCallback(collapse=NEVER), Classifier()
    for rule in (NEVER, NEVER, ALWAYS, ALWAYS):
        callback._task_start.verdicts.collapse = rule
        with pytest.warns(PlasticityWarning) if rule is ALWAYS else contextlib.nullcontext():
            trainer(callback, logger=TensorBoardLogger(tmp_path, version=0)).fit(module, loader())
    shown = sort_by_step(read_events(tmp_path).Images("plasticity_figures/overview"))
    assert [event.step for event in shown] == [0, 2]
