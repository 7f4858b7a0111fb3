"""Test what CSV files and the services get: W&B, MLflow and Comet, by records and, where installed, for real."""

import csv
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, WandbLogger

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.curvature.plotting import LOG_EIGENVALUE_EDGES
from lightning_plasticity.interventions import ShrinkPerturb
from tests.helpers.modules import ALWAYS, NEVER, Classifier, MemoryLogger, fit_three_tasks, loader, trainer, weights
from tests.helpers.recording_loggers import (
    RecordingComet,
    RecordingMLFlow,
    RecordingWandb,
    Unreachable,
    services,  # noqa: F401
)

FIGURES = ["overview", "spectrum", "dormant_units"]
COMPARED = ["fit_loss", "learnable_fraction", "epsilon_rank", "dormant_fraction"]


@pytest.fixture
def one_fit_of_three_tasks() -> Any:
    def fit(*loggers: Any, **arguments: Any) -> SpectralCollapseCallback:
        detector = TaskDetector(every_n_epochs=1)
        callback = SpectralCollapseCallback(task_detector=detector, **{"collapse": NEVER, **arguments})
        trainer(callback, logger=list(loggers), max_epochs=3).fit(Classifier(), loader())
        return callback

    return fit


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_is_table_of(rows: list[dict[str, str]], callback: SpectralCollapseCallback) -> None:
    """Compare a table with the reports of tasks in which every one is an alarm and is repaired."""
    assert [int(row["task"]) for row in rows] == [0, 1, 2]
    for row, report in zip(rows, callback.history, strict=True):
        assert int(row["step"]) == report.step == 3 * report.task
        for name in ("handicap", *COMPARED):
            assert float(row[name]) == report.metrics[name]
        for name in COMPARED:
            assert float(row[f"fresh_{name}"]) == report.fresh[name]
        assert float(row["collapsed"]) == 1
        assert float(row["alarms"]) == float(row["repairs"]) == report.task + 1
        assert row["verdict"] == report.verdict
        assert row["repaired_by"] == str(report.repairs[0])
        assert row["effect"] == report.effect


def histogram_of(report: Any) -> list[float]:
    eigenvalues = report.spectrum.eigenvalues.numpy()
    return np.histogram(np.log10(eigenvalues[eigenvalues > 1e-8]), LOG_EIGENVALUE_EDGES.numpy())[0].tolist()


def is_image(value: Any) -> bool:
    return value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3 and value.std() > 0


@pytest.mark.filterwarnings("ignore::lightning_plasticity.PlasticityWarning")
def test_csv_has_a_file_of_tasks(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callback = fit_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    assert_is_table_of(read_csv(Path(logger.log_dir, "plasticity_tasks.csv")), callback)


def test_csv_steps_are_all_optimizer_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callback = fit_three_tasks(logger)
    rows = read_csv(Path(logger.log_dir, "metrics.csv"))
    assert not any(name.startswith(("plasticity_by_task", "plasticity_fresh")) for name in rows[0])
    logged = [(int(row["step"]), float(row["plasticity/handicap"])) for row in rows if row["plasticity/handicap"]]
    assert logged == [(report.step, report.metrics["handicap"]) for report in callback.history]


def test_csv_of_tasks_grows_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.reporting.reporter._MAX_SHARE", 1e9)
    logger, lengths = CSVLogger(tmp_path, version=0), []

    class Reading(Classifier):
        def on_train_epoch_end(self) -> None:
            lengths.append(len(read_csv(Path(logger.log_dir, "plasticity_tasks.csv"))))

    callback = SpectralCollapseCallback(task_detector=TaskDetector(every_n_epochs=1), collapse=NEVER)
    trainer(callback, logger=logger, max_epochs=3).fit(Reading(), loader())
    assert lengths == [1, 2, 3]


def test_csv_of_tasks_may_be_at_a_url() -> None:
    logger = CSVLogger("memory://logs", version=0)
    fit_three_tasks(logger)
    with fsspec.open(f"{logger.log_dir}/plasticity_tasks.csv", "rt") as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_csv_files_of_several_callbacks(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callbacks = [SpectralCollapseCallback(name=name, collapse=NEVER) for name in ("one", "other")]
    trainer(*callbacks, logger=logger).fit(Classifier(), loader())
    for name in ("one", "other"):
        assert len(read_csv(Path(logger.log_dir, f"plasticity_{name}_tasks.csv"))) == 1


def test_csv_has_repairs_after_the_start_of_a_task(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ShrinkPerturb(when=2)])
    trainer(callback, logger=logger).fit(Classifier(), loader(batches=3))
    (row,) = read_csv(Path(logger.log_dir, "plasticity_tasks.csv"))
    assert (row["repairs"], row["repaired_by"]) == ("1.0", str(callback.history[0].repairs[0]))


def test_csv_tasks_of_an_earlier_fit_stay(tmp_path: Path) -> None:
    callback, module = SpectralCollapseCallback(collapse=NEVER), Classifier()
    for version in range(2):
        trainer(callback, logger=CSVLogger(tmp_path, version=version)).fit(module, loader())
    rows = read_csv(tmp_path / "lightning_logs" / "version_1" / "plasticity_tasks.csv")
    assert [row["task"] for row in rows] == ["0", "1"]


@pytest.mark.filterwarnings("ignore::lightning_plasticity.PlasticityWarning")
@pytest.mark.usefixtures("services")
def test_wandb_gets_media_and_table(one_fit_of_three_tasks: Any) -> None:
    logger = RecordingWandb()
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    assert [report.errors for report in callback.history] == [{}] * 3
    defined = {args[0]: kwargs.get("step_metric") for args, kwargs in logger.experiment.of("define_metric")}
    axis = "plasticity_by_task/task"
    groups = ("plasticity_by_task/*", "plasticity_fresh_network/*", "plasticity_figures/*")
    assert defined == {axis: None} | dict.fromkeys(groups, axis)
    by_task = [row for row in logger.rows if "plasticity_by_task/handicap" in row]
    expected = [(report.task, report.metrics["handicap"], -1) for report in callback.history]
    assert [(row[axis], row["plasticity_by_task/handicap"], row["step"]) for row in by_task] == expected
    assert list(logger.values("plasticity/handicap")) == [0, 3, 6]
    histograms = [row for row in logger.rows if "plasticity_by_task/log10_ggn_eigenvalues" in row]
    for row, report in zip(histograms, callback.history, strict=True):
        counts, edges = row["plasticity_by_task/log10_ggn_eigenvalues"].kwargs["np_histogram"]
        assert row[axis] == report.task
        assert counts.tolist() == histogram_of(report)
        assert np.array_equal(edges, LOG_EIGENVALUE_EDGES)
    figures = [row for row in logger.rows if "plasticity_figures/overview" in row][-1]
    assert all(is_image(figures[f"plasticity_figures/{name}"].args[0]) for name in FIGURES)
    assert figures[axis] == 2
    columns, data = [row for row in logger.rows if "plasticity_tasks" in row][-1]["plasticity_tasks"].args
    assert_is_table_of([dict(zip(columns, row, strict=True)) for row in data], callback)


@pytest.mark.filterwarnings("ignore::lightning_plasticity.PlasticityWarning")
def test_mlflow_gets_artifacts(one_fit_of_three_tasks: Any) -> None:
    logger = RecordingMLFlow()
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    assert [report.errors for report in callback.history] == [{}] * 3
    assert list(logger.values("plasticity_by_task/handicap")) == [0, 1, 2]
    figures = {file: figure for (_, figure, file), _ in logger.experiment.of("log_figure")}
    assert list(figures) == [f"plasticity_figures/{name}.png" for name in FIGURES]
    assert all(figure.axes for figure in figures.values())
    texts = {file: text for (_, text, file), _ in logger.experiment.of("log_text")}
    assert_is_table_of(list(csv.DictReader(io.StringIO(texts.pop("plasticity_tasks.csv")))), callback)
    assert list(texts) == [f"plasticity_events/task_{task}.md" for task in range(3)]
    assert "**Alarm**" in texts["plasticity_events/task_1.md"]
    assert "**Repair**" in texts["plasticity_events/task_1.md"]
    assert {args[0] for _, args, _ in logger.experiment.calls} == {"run"}


@pytest.mark.filterwarnings("ignore::lightning_plasticity.PlasticityWarning")
@pytest.mark.usefixtures("services")
def test_comet_gets_assets(one_fit_of_three_tasks: Any) -> None:
    logger = RecordingComet()
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    assert [report.errors for report in callback.history] == [{}] * 3
    assert list(logger.values("plasticity_by_task/handicap")) == [0, 1, 2]
    for ((histogram,), options), report in zip(logger.experiment.of("log_histogram_3d"), callback.history, strict=True):
        assert options == {"name": "plasticity_by_task/log10_ggn_eigenvalues", "step": report.task}
        expected = dict(zip(LOG_EIGENVALUE_EDGES.tolist(), histogram_of(report), strict=False))
        assert histogram.counts.tolist() == list(expected.values())
        assert histogram.values == pytest.approx([edge + 0.1 for edge in expected])
    images = {options["name"]: image for (image,), options in logger.experiment.of("log_image")}
    assert list(images) == [f"plasticity_figures/{name}" for name in FIGURES]
    assert all(map(is_image, images.values()))
    (text,), options = logger.experiment.of("log_asset_data")[-1]
    assert options == {"name": "plasticity_tasks.csv", "overwrite": True}
    assert_is_table_of(list(csv.DictReader(io.StringIO(text))), callback)
    texts = {options["step"]: text for (text,), options in logger.experiment.of("log_text")}
    assert list(texts) == [0, 1, 2]
    assert all("**Repair**" in text for text in texts.values())


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("kind", [RecordingWandb, RecordingMLFlow, RecordingComet])
def test_unreachable_service_affects_no_training(kind: Any, one_fit_of_three_tasks: Any) -> None:
    trained = []
    for logger in ([], [kind(Unreachable())]):
        torch.manual_seed(0)
        module, callback = Classifier(), SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for seed in range(2):
                trainer(callback, logger=logger).fit(module, loader(seed=seed))
        trained.append(weights(module))
    assert torch.equal(*trained)
    messages = [str(warning.message) for warning in caught if warning.category is PlasticityWarning]
    assert messages
    # No error is told twice.
    assert len(set(messages)) == len(messages)
    assert all(f"{kind.__name__} could not log" in message for message in messages)
    assert "no route for" in callback.history[0].errors[kind.__name__]


def test_error_that_recurs_is_told_once_and_recorded() -> None:
    class Broken(MemoryLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise OSError("disk full")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = fit_three_tasks(Broken())
    assert [report.errors for report in callback.history] == [{"Broken": "OSError: disk full"}] * 3
    assert sum(warning.category is PlasticityWarning for warning in caught) == 1


def reason(package: str) -> str:
    return f"{package} is not installed: its logger is tested with a record in place of the service"


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the services offline, and in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(tmp_path),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_real_wandb(real: Path, one_fit_of_three_tasks: Any) -> None:
    wandb = pytest.importorskip("wandb", reason=reason("wandb"))
    logger = WandbLogger(project="plasticity", save_dir=real, offline=True)
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert [report.errors for report in callback.history] == [{}] * 3
    assert summary["plasticity_by_task/task"] == 2
    assert summary["plasticity_by_task/handicap"] == callback.history[2].metrics["handicap"]
    (files,) = real.glob("wandb/offline-run-*/files/media")
    tables = [json.loads(path.read_text()) for path in files.glob("table/plasticity_tasks_*.table.json")]
    table = max(tables, key=lambda table: len(table["data"]))
    assert_is_table_of([dict(zip(table["columns"], row, strict=True)) for row in table["data"]], callback)
    assert all(list(files.glob(f"images/plasticity_figures/{name}_*.png")) for name in FIGURES)


@pytest.mark.filterwarnings("ignore")
def test_real_mlflow(real: Path, one_fit_of_three_tasks: Any) -> None:
    pytest.importorskip("mlflow", reason=reason("mlflow"))
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{real}/mlflow.db", artifact_location=f"file://{real}/artifacts")
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    assert [report.errors for report in callback.history] == [{}] * 3
    values = logger.experiment.get_metric_history(logger.run_id, "plasticity_by_task/handicap")
    expected = [(report.task, report.metrics["handicap"]) for report in callback.history]
    assert [(value.step, value.value) for value in values] == expected
    (folder,) = real.glob("artifacts/*/artifacts")
    assert_is_table_of(read_csv(folder / "plasticity_tasks.csv"), callback)
    assert {path.stem for path in folder.glob("plasticity_figures/*.png")} == set(FIGURES)
    assert len(list(folder.glob("plasticity_events/task_?.md"))) == 3


@pytest.mark.filterwarnings("ignore")
def test_real_comet(real: Path, one_fit_of_three_tasks: Any) -> None:
    pytest.importorskip("comet_ml", reason=reason("comet_ml"))
    logger = CometLogger(project="plasticity", offline_directory=str(real))
    callback = one_fit_of_three_tasks(logger, collapse=ALWAYS, interventions=[ShrinkPerturb()])
    logger.experiment.end()
    assert [report.errors for report in callback.history] == [{}] * 3
    (archive,) = real.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = [json.loads(line) for line in files.read("messages.json").decode().splitlines()]
        uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
        parameters = [upload["additional_params"] for upload in uploads]
        last = [upload for upload in uploads if upload["additional_params"].get("fileName") == "plasticity_tasks.csv"]
        table = files.read(last[-1]["file_path"]).decode()
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    logged = [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == "plasticity_by_task/handicap"]
    assert logged == [(report.task, report.metrics["handicap"]) for report in callback.history]
    assert {p["figName"] for p in parameters if "figName" in p} == {f"plasticity_figures/{n}" for n in FIGURES}
    assert [p["step"] for p in parameters if p.get("type") == "histogram3d"] == [0, 1, 2]
    assert [p["step"] for p in parameters if p.get("type") == "text-sample"] == [0, 1, 2]
    assert_is_table_of(list(csv.DictReader(io.StringIO(table))), callback)
