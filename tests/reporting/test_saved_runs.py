"""Runs that are read back from checkpoints and event files, and the page about them."""

import base64
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, TaskReport
from lightning_plasticity.interventions import ReDo, ShrinkPerturb
from lightning_plasticity.reporting.history import History
from lightning_plasticity.reporting.names import LOGGED_NUMBERS
from lightning_plasticity.reporting.page import report_page
from lightning_plasticity.reporting.saved_runs import SavedRun, UnreadableRunError, read_runs
from lightning_plasticity.reporting.sentences import events
from tests.helpers.modules import ALWAYS, NEVER, Classifier, loader, trainer


class Logging(Classifier):
    """Logs a number of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("accuracy", 0.25 + self.trainer.global_step)
        return super().training_step(batch, batch_idx)


def run(directory: Path, *callbacks: SpectralCollapseCallback, tasks: int = 3, one_directory: bool = True) -> None:
    """Train for some tasks, log to TensorBoard, and save a checkpoint at the end of each."""
    module = Logging()
    for task in range(tasks):
        logger = TensorBoardLogger(directory, version=0 if one_directory else None)
        fit = trainer(*callbacks, logger=logger)
        fit.fit(module, loader())
        fit.save_checkpoint(directory / f"{task}.ckpt")
        # The same second would not tell which one is newest.
        os.utime(directory / f"{task}.ckpt", (task, task))


def repaired(directory: Path, **arguments: Any) -> SpectralCollapseCallback:
    callback = SpectralCollapseCallback(
        collapse=ALWAYS, interventions=[ShrinkPerturb(), ReDo(threshold=0.5)], **arguments
    )
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        run(directory, callback)
    return callback


class Page(HTMLParser):
    """Collects headings, cells, images and other text, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self._open.append(tag)
        values = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "img":
            prefix, _, data = (values["src"] or "").partition(",")
            assert prefix == "data:image/png;base64"
            self.images.append(base64.b64decode(data))
        self.links += [value or "" for name, value in attrs if name in ("href", "src") and tag != "img"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        elif {"h1", "h2", "h3"} & set(self._open):
            self.headings[-1] += data


def test_newest_checkpoint_holds_the_history(tmp_path: Path) -> None:
    callback = repaired(tmp_path)
    (saved,) = read_runs(tmp_path)
    assert saved.source == str(tmp_path / "2.ckpt")
    assert [row["handicap"] for row in saved.history.to_rows()] == [r.metrics["handicap"] for r in callback.history]
    (first,) = read_runs(tmp_path / "0.ckpt")
    assert len(first.history) == 1


def test_page_shows_what_was_measured_and_done(tmp_path: Path) -> None:
    callback = repaired(tmp_path)
    history = callback.history
    page = Page(report_page(read_runs(tmp_path)))
    assert page.headings == [
        "Plasticity",
        "Summary",
        "Tasks",
        "Alarms and repairs",
        "Errors and remarks",
        "What the numbers mean",
    ]
    assert len(page.images) == 3
    assert all(image.startswith(b"\x89PNG") for image in page.images)
    assert page.links == []
    assert "3 tasks, 3 alarms (the first at task 0)" in page.text
    assert "Nothing was repaired" not in page.text
    header, *rows = page.rows[:4]
    for row, report in zip(rows, history, strict=True):
        cells = dict(zip(header, row, strict=True))
        assert (cells["task"], cells["step"], cells["verdict"]) == (str(report.task), str(report.step), "alarm")
        both = f"{report.metrics['fit_loss']:.3g} ({report.fresh['fit_loss']:.3g})"
        assert cells["fit loss (fresh)"] == both
        assert "ShrinkPerturb: " in cells["repairs"]
        assert report.verdict.removeprefix(f"task {report.task}: ") in page.text
        assert str(report.repairs[0]) in page.text
        assert report.effect in page.text
    meanings = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    last = history[-1]
    for name in ("handicap", "learnable_fraction", "dormant_fraction", "ggn_trace"):
        assert meanings[name][0] == f"{last.metrics[name]:.4g}"
        assert meanings[name][2] == LOGGED_NUMBERS[name].meaning
    assert meanings["fit_loss"][1] == f"{last.fresh['fit_loss']:.4g}"


def test_page_shows_errors_and_escapes_text(tmp_path: Path) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER)
    run(tmp_path, callback, tasks=1)
    (saved,) = read_runs(tmp_path)
    (report,) = saved.history
    report.errors, report.remarks, report.task_id = {"CSVLogger": "<b>disk</b> & full"}, ["left out"], "<i>"
    page = Page(report_page([saved]))
    assert ["0", "CSVLogger", "<b>disk</b> & full"] in page.rows
    assert ["0", "remark", "left out"] in page.rows
    assert page.rows[0][:4] == ["task", "name", "step", "verdict"]
    assert page.rows[1][1] == "<i>"


def test_event_files_give_the_lead_numbers(tmp_path: Path) -> None:
    callback = repaired(tmp_path)
    for checkpoint in tmp_path.glob("*.ckpt"):
        checkpoint.unlink()
    (saved,) = read_runs(tmp_path)
    assert saved.source.startswith(f"TensorBoard's files in {tmp_path / 'lightning_logs' / 'version_0'}, which hold no")
    for read, report in zip(saved.history, callback.history, strict=True):
        assert (read.task, read.step, read.collapsed) == (report.task, report.step, report.collapsed)
        assert read.verdict == report.verdict
        for name in ("handicap", "fit_loss", "learnable_fraction", "epsilon_rank", "dormant_fraction"):
            assert read.metrics[name] == pytest.approx(report.metrics[name], rel=1e-6)
        assert read.fresh["fit_loss"] == pytest.approx(report.fresh["fit_loss"], rel=1e-6)
        changed = [(repair.name, repair.num_parameters_changed, repair.undone) for repair in report.repairs]
        assert [(repair.name, repair.num_parameters_changed, repair.undone) for repair in read.repairs] == changed
    (from_checkpoint,) = (text for text in saved.events if "**Task 1**" in text)
    assert str(callback.history[1].repairs[0]) in from_checkpoint
    page = Page(report_page([saved]))
    assert len(page.images) == 1
    assert callback.history[2].effect in page.text


def test_alarm_without_repair_is_told() -> None:
    report = TaskReport(4, None, 80, metrics={"handicap": 2.0}, collapsed=True, verdict="task 4: handicap 2")
    saved = SavedRun("last.ckpt", None, History([report]), [events(report, [])])
    assert "Alarm ▼ handicap 2\nNothing was repaired." in Page(report_page([saved])).text


def test_directories_of_tasks_are_joined(tmp_path: Path) -> None:
    """Each task has a new Trainer and a new directory; an earlier run of the same directory is left out."""
    run(tmp_path, SpectralCollapseCallback(collapse=NEVER), one_directory=False)
    callback = SpectralCollapseCallback(collapse=NEVER)
    run(tmp_path, callback, one_directory=False)
    for checkpoint in tmp_path.glob("*.ckpt"):
        checkpoint.unlink()
    files = sorted(tmp_path.rglob("events.out.tfevents.*"), key=lambda file: file.parent.name)
    for age, file in enumerate(files):
        os.utime(file, (age, age))
    (saved,) = read_runs(tmp_path)
    assert [report.task for report in saved.history] == [0, 1, 2]
    assert "version_2" not in saved.source
    losses = [report.metrics["fit_loss"] for report in callback.history]
    assert [report.metrics["fit_loss"] for report in saved.history] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("from_events", [False, True], ids=["checkpoint", "events"])
def test_named_callbacks_have_a_section_each(tmp_path: Path, from_events: bool) -> None:
    callbacks = [SpectralCollapseCallback(collapse=NEVER, name=name) for name in ("actor", "critic")]
    run(tmp_path, *callbacks, tasks=1)
    runs = read_runs(tmp_path / "lightning_logs" if from_events else tmp_path)
    assert [saved.name for saved in runs] == ["actor", "critic"]
    headings = Page(report_page(runs)).headings
    assert [heading for heading in headings if heading in ("actor", "critic")] == ["actor", "critic"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRunError, match=r"missing does not exist: pass a checkpoint or a log directory"):
        read_runs(tmp_path / "missing")
    with pytest.raises(UnreadableRunError, match="holds neither a checkpoint"):
        read_runs(tmp_path)
    (tmp_path / "text.txt").write_text("no checkpoint")
    with pytest.raises(UnreadableRunError, match="is no checkpoint"):
        read_runs(tmp_path / "text.txt")
    torch.save({"callbacks": {"Other": {"version": 1}}}, tmp_path / "other.ckpt")
    with pytest.raises(UnreadableRunError, match="holds no state of SpectralCollapseCallback"):
        read_runs(tmp_path / "other.ckpt")
    state = {**SpectralCollapseCallback().state_dict(), "version": 99}
    torch.save({"callbacks": {"SpectralCollapseCallback": state}}, tmp_path / "new.ckpt")
    with pytest.raises(UnreadableRunError, match="in version 99, and this release reads version 1"):
        read_runs(tmp_path / "new.ckpt")


def test_other_objects_need_trust(tmp_path: Path) -> None:
    state = SpectralCollapseCallback().state_dict()
    torch.save({"callbacks": {"SpectralCollapseCallback": state}, "path": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(UnreadableRunError, match=r"if you trust the file, .* add --trust"):
        read_runs(tmp_path / "a.ckpt")
    (saved,) = read_runs(tmp_path / "a.ckpt", trust=True)
    assert saved.history == []
    assert "0 tasks, 0 alarms, 0 repairs." in Page(report_page([saved])).text
