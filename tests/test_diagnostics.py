"""Check the list of diagnostics against the documentation and the monitor."""

from __future__ import annotations

from pathlib import Path

from lightning_plasticity.diagnostics import DIAGNOSTICS, resolved_value
from lightning_plasticity.metrics.monitor import MEASURES
from lightning_plasticity.reporting.names import LOGGED_NUMBERS

NUMBERS = Path(__file__).parent.parent / "docs" / "numbers.md"


def test_table_lists_every_logged_number_in_order() -> None:
    table = NUMBERS.read_text().partition("| name | meaning | healthy |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| `")]
    assert rows == [[f"`{name}`", number.meaning] for name, number in LOGGED_NUMBERS.items()]


def test_monitor_and_fit_test_measure_what_has_no_spectrum() -> None:
    names = [name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.compute is None]
    assert names == ["handicap", "fit_loss", "fit_gap", "churn", "live_metric_gap", *MEASURES]


def test_lower_end_of_a_wide_bracket_is_compared() -> None:
    wide = {"learnable_fraction": 0.4, "learnable_fraction_lo": 0.3, "learnable_fraction_resolved": 0.0}
    assert resolved_value(wide, "learnable_fraction") == 0.3
    assert resolved_value({**wide, "learnable_fraction_resolved": 1.0}, "learnable_fraction") == 0.4
    rank = {"hessian_epsilon_rank": 40.0, "hessian_epsilon_rank_resolved": 0.0}
    assert resolved_value(rank, "hessian_epsilon_rank") is None
