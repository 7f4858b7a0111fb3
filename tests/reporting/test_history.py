"""The reports of all tasks as a list, a table, rows and files."""

import copy
import csv
import io
import json
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, TaskReport
from lightning_plasticity.interventions import RepairReport, ShrinkPerturb
from lightning_plasticity.reporting.history import History
from tests.helpers.modules import ALWAYS, NEVER, fit_three_tasks


def repaired() -> History:
    with pytest.warns(PlasticityWarning, match="a fresh network"):
        return fit_three_tasks(collapse=ALWAYS, interventions=[ShrinkPerturb()]).history


def test_history_remains_a_list() -> None:
    reports = [TaskReport(0, None, 0), TaskReport(1, None, 200)]
    history = History(reports)
    assert history == reports
    assert isinstance(history, list)
    assert history[-1] is reports[-1]
    assert copy.copy(history) == reports
    assert [report.step for report in pickle.loads(pickle.dumps(history))] == [0, 200]
    assert type(pickle.loads(pickle.dumps(history))) is History


def test_checkpoint_restores_rows() -> None:
    callback, restored = fit_three_tasks(), SpectralCollapseCallback(collapse=NEVER)
    buffer = io.BytesIO()
    torch.save(callback.state_dict(), buffer)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert restored.history.to_rows() == callback.history.to_rows()


def test_rows_hold_all_of_a_report() -> None:
    history = repaired()
    history[1].errors = {"CSVLogger": "OSError: disk full"}
    history[1].remarks = ["first", "second"]
    rows = history.to_rows()
    assert len({tuple(row) for row in rows}) == 1
    for row, report in zip(rows, history, strict=True):
        assert (row["task"], row["step"], row["collapsed"]) == (report.task, report.step, True)
        assert row["repaired_by"] == f"ShrinkPerturb: {report.repairs[0].num_parameters_changed} parameters changed"
        assert (row["verdict"], row["effect"]) == (report.verdict, report.effect)
        assert {name: row[name] for name in report.metrics} == report.metrics
        assert row["fresh_fit_loss"] == report.fresh["fit_loss"]
        assert row["fit_loss_after_repair"] == report.after["fit_loss"]
        assert {type(value) for value in row.values()} <= {bool, int, float, str, type(None)}
    assert rows[1]["errors"] == "CSVLogger: OSError: disk full"
    assert rows[1]["remarks"] == "first; second"
    assert rows[0]["errors"] == ""


def read_csv(text: str) -> Any:
    """Return a cell as the value that it was written from."""
    constants: dict[str, Any] = {"": None, "True": True, "False": False}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def test_csv_and_json_return_the_rows(tmp_path: Path) -> None:
    history = repaired()
    history[1].metrics = {}
    history[2].task_id = 'cats, "dogs"\nand ε'
    rows = history.to_rows()
    history.to_json(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text(encoding="utf-8")) == rows
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
        read = [{name: read_csv(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert read == [{name: None if value == "" else value for name, value in row.items()} for row in rows]


def test_json_has_null_for_nan(tmp_path: Path) -> None:
    history = History([TaskReport(0, None, 0, metrics={"handicap": math.nan, "fit_loss": math.inf})])
    history.to_json(tmp_path / "history.json")
    (row,) = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert row["handicap"] is row["fit_loss"] is None


def test_empty_history_has_no_rows(tmp_path: Path) -> None:
    history = History()
    assert history.to_rows() == []
    history.to_csv(tmp_path / "history.csv")
    history.to_json(tmp_path / "history.json")
    assert (tmp_path / "history.csv").read_text() == "\n"
    assert json.loads((tmp_path / "history.json").read_text()) == []
    assert str(history) == "no task yet"


def test_pandas_gets_the_rows() -> None:
    pandas = pytest.importorskip("pandas")
    history = repaired()
    pandas.testing.assert_frame_equal(history.to_pandas(), pandas.DataFrame.from_records(history.to_rows()))


def test_missing_pandas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: install it by `pip install pandas`, or use to_rows"):
        History().to_pandas()


def test_history_prints_as_aligned_table() -> None:
    history = repaired()
    header, *lines = str(history).splitlines()
    assert header.split("  ")[0] == "task"
    assert "fit loss (fresh)" in header
    assert "name" not in header
    for line, report in zip(lines, history, strict=True):
        assert line[header.index("verdict") :].startswith("alarm ")
        both = f"{report.metrics['fit_loss']:.3g} ({report.fresh['fit_loss']:.3g})"
        assert line[header.index("fit loss (fresh)") :].startswith(both)
        assert line.endswith(f"ShrinkPerturb: {report.repairs[0].num_parameters_changed} parameters")


def test_table_counts_repairs_of_a_task() -> None:
    repairs = [RepairReport("ReDo", {"0": torch.arange(n)}, 9, candidates=8) for n in (2, 3)]
    history = History([TaskReport(0, "cats", 0, repairs=repairs, errors={"probe": "no memory"})])
    assert history.to_table() == (
        ["task", "name", "step", "verdict", "repairs", "errors"],
        [["0", "cats", "0", "not measured", "ReDo: 5 units in 2 repairs", "probe"]],
    )


def test_terminal_gets_rich_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    text = str(History([TaskReport(0, "[red]", 0, metrics={"handicap": 2.0}, verdict="v", collapsed=True)]))
    assert "[red]" in text
    assert "─" in text
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in text.splitlines())
    monkeypatch.setattr("lightning_plasticity.reporting.history.find_spec", lambda name: None)
    assert str(History([TaskReport(0, None, 0)])) == "task  step  verdict\n0     0     not measured"
