"""Test the table of the evidence on runs that are written out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.evidence.figures import draw
from benchmarks.evidence.page import page
from benchmarks.evidence.ranking import auc, found, interval, rank_correlation, told
from benchmarks.evidence.results import TaskOfRun, read_tasks, scores, tasks_of
from benchmarks.evidence.table import (
    change,
    lack_at_end,
    lead_times,
    methods_by_lack,
    table_of_goals,
    table_of_verdicts,
    tables,
)


def run(lacks: list[float], numbers: list[float], *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a run of classification tasks; the accuracy of the fresh network is 0.9."""
    outcome = [{"loss": 1.0, "accuracy": 0.9 - lack} for lack in lacks]
    tasks = [
        {
            "metrics": {
                "handicap": 2 - number,
                "learnable_fraction": number,
                "probe_loss": 1 - number,
                "probe_samples": 64.0,
            },
            "repairs": [],
            "collapsed": number < 0.5,
            "network": each,
            "unrepaired": each,
            "fresh": {"loss": 1.0, "accuracy": 0.9},
        }
        for each, number in zip(outcome, numbers, strict=True)
    ]
    run = {"stream": "s", "method": "none", "seed": seed, "regression": False, "seconds_in_callback": 1.0}
    return run | {"tasks": tasks} | changes


def test_auc_is_the_share_of_ordered_pairs() -> None:
    score, times = np.random.default_rng(0).integers(0, 6, (2, 70)).astype(float)
    bad = np.arange(70) < 40
    pairs = [
        (times[b] * times[h], (score[b] > score[h]) + 0.5 * (score[b] == score[h]))
        for b in np.flatnonzero(bad)
        for h in np.flatnonzero(~bad)
    ]
    assert auc(score, bad, ~bad) == pytest.approx(np.mean([ordered for _, ordered in pairs]), abs=1e-12)
    weights, ordered = np.array(pairs).T
    assert auc(score, bad * times, ~bad * times) == pytest.approx(np.average(ordered, weights=weights), abs=1e-12)


def test_there_is_no_auc_of_one_kind() -> None:
    assert math.isnan(auc(np.arange(2.0), np.zeros(2), np.ones(2)))


def test_auc_takes_infinite_ratios() -> None:
    bad = np.array([True, True, False, False])
    assert auc(np.array([np.inf, 3.0, 1.0, np.inf]), bad, ~bad) == (0.5 + 1 + 1 + 0) / 4


@pytest.mark.parametrize("ties", [False, True])
def test_threshold_keeps_to_the_false_alarms(ties: bool) -> None:
    healthy = np.random.default_rng(0).standard_normal(100).round(0 if ties else 9)
    bad = np.linspace(-3, 3, 200)
    thresholds = [t for t in healthy if (healthy > t).mean() <= 0.05]
    assert found(bad, healthy, 0.05) == (bad > min(thresholds)).mean()


def test_rank_correlation_of_reversed_order() -> None:
    assert rank_correlation(np.array([3.0, 2.0, 1.0]), np.array([0.1, 0.2, 9.0])) == -1
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_tasks_are_bad_healthy_or_between() -> None:
    tasks = tasks_of(run([0.0, 0.06, 0.03, 0.01], [1.0, 0.4, 0.6, 0.9]))
    assert [(task.bad, task.healthy) for task in tasks] == [(True, False), (False, False), (False, True)]
    assert [task.collapsed for task in tasks] == [True, False, False]


def test_regressions_are_judged_by_the_ratio_of_losses() -> None:
    regression = run([0.0, 0.0], [1.0, 1.0], regression=True)
    regression["tasks"][1]["unrepaired"] = {"loss": 1.3, "accuracy": math.nan}
    (task,) = tasks_of(regression)
    assert task.lack == pytest.approx(math.log(1.3))
    assert task.bad


def test_diverged_networks_are_bad() -> None:
    regression = run([0.0, 0.0], [1.0, 1.0], regression=True)
    regression["tasks"][1]["unrepaired"] = {"loss": math.nan, "accuracy": math.nan}
    assert tasks_of(regression)[0].bad


def test_verdict_is_about_the_unrepaired_network() -> None:
    repaired = run([0.0, 0.2], [1.0, 0.4])
    repaired["tasks"][1]["network"] = {"loss": 1.0, "accuracy": 0.9}
    (task,) = tasks_of(repaired)
    assert task.lack == pytest.approx(0.2)
    assert task.lack_repaired == 0


def test_scores_are_turned_and_compared_with_the_best() -> None:
    measured = [{"learnable_fraction": 0.8, "probe_loss": 0.5}, {"learnable_fraction": 0.4, "probe_loss": 2.0}]
    assert scores(measured) == {
        "learnable_fraction": -0.4,
        "learnable_fraction / best": -0.5,
        "probe_loss": 2.0,
        "probe_loss / best": 4.0,
    }


def test_numbers_that_measure_no_health_are_left_out() -> None:
    assert set(scores([{"effective_rank/net.0": 3.0, "probe_samples": 64.0, "epsilon_rank_resolved": 1.0}])) == set()


def test_a_number_that_orders_all_tasks_has_auc_one() -> None:
    tasks = tasks_of(run([0.0, 0.3, 0.1, 0.0, -0.1], [1.0, 0.1, 0.2, 0.6, 0.7]))
    perfect = told(tasks, "learnable_fraction")
    assert (perfect.auc, perfect.found, perfect.correlation, perfect.interval) == (1.0, 1.0, 1.0, None)
    assert perfect.by_stream == {"s": (1.0, 1.0)}


def test_interval_spans_the_values_of_two_seeds() -> None:
    score, bad = np.array([1.0, 0.0, 0.0, 1.0]), np.array([True, False, True, False])
    # The first seed orders its tasks, the second the other way round.
    assert interval(score, bad, ~bad, [("s", 0)] * 2 + [("s", 1)] * 2) == (0.0, 1.0)
    assert interval(score, bad, ~bad, [("s", 0)] * 2 + [("t", 0)] * 2) is None


def test_verdict_table_counts_alarms_of_both_kinds() -> None:
    tasks = tasks_of(run([0.0, 0.3, 0.1, 0.0, -0.1], [1.0, 0.1, 0.9, 0.2, 0.7]))
    assert table_of_verdicts(tasks).splitlines()[-2:] == [
        "| s | 4 | 2 | .50 | 2 | .50 | 0 | – | 0 |",
        "| all | 4 | 2 | .50 | 2 | .50 | 0 | – | 0 |",
    ]


def test_lead_is_counted_from_the_first_alarm() -> None:
    lacks = [0.0, 0.0, 0.0, 0.3, 0.3]
    early = tasks_of(run(lacks, [1.0, 0.4, 1.0, 1.0, 0.4]))
    late = tasks_of(run(lacks, [1.0, 1.0, 1.0, 1.0, 0.4], seed=1))
    never = tasks_of(run(lacks, [1.0] * 5, seed=2))
    healthy = tasks_of(run([0.0, 0.0], [1.0, 0.4], seed=3))
    assert lead_times([*early, *late, *never, *healthy]) == [2, -1, -math.inf]


def test_tables_are_made_from_the_files_of_a_directory(tmp_path: Path) -> None:
    for seed in range(2):
        lacks, numbers = [0.0, 0.3, 0.1, 0.0, -0.1], [1.0, 0.1, 0.2, 0.6, 0.7]
        (tmp_path / f"s.none.{seed}.json").write_text(json.dumps(run(lacks, numbers, seed=seed)))
    tasks = read_tasks(tmp_path)
    assert len(tasks) == 8
    assert all(isinstance(task, TaskOfRun) for task in tasks)
    assert "| probe_loss | 1.00 | 1.00 to 1.00 | 1.00 | 1.00 | 8 |" in tables(tasks)


def test_live_tasks_count_for_no_default_verdict() -> None:
    plain = tasks_of(run([0.0, 0.3, 0.0], [1.0, 0.1, 0.9]))
    live = tasks_of(run([0.0, 0.3, 0.0], [1.0, 0.9, 0.1], method="live"))
    repaired = tasks_of(run([0.0, 0.3, 0.0], [1.0, 0.9, 0.9], method="redo"))
    lines = table_of_goals([*plain, *live, *repaired]).splitlines()
    assert "| bad tasks that ring | at least 80 % | 100.0 % | – | 50.0 % |" in lines
    assert "| healthy tasks that ring | at most 3 % | 0.0 % | – | 0.0 % |" in lines


def test_new_seeds_have_a_column_of_their_own() -> None:
    first = tasks_of(run([0.0, 0.3, 0.0], [1.0, 0.1, 0.9]))
    new = tasks_of(run([0.0, 0.3, 0.0], [1.0, 0.9, 0.9], seed=3))
    lines = table_of_goals([*first, *new]).splitlines()
    assert "| bad tasks that ring | at least 80 % | 50.0 % | 0.0 % | 50.0 % |" in lines


def test_lack_at_the_end_is_that_of_the_last_tenth() -> None:
    tasks = tasks_of(run([0.1 * number for number in range(21)], [1.0] * 21))
    assert lack_at_end(tasks) == pytest.approx((1.9 + 2.0) / 2)
    # Accuracy at tasks 1 and 2, and at tasks 19 and 20.
    assert change(tasks) == pytest.approx((0.1 + 0.2) / 2 - (1.9 + 2.0) / 2)


def test_methods_are_ordered_beside_none_on_their_streams() -> None:
    lacks = {("none", "a"): 0.3, ("none", "b"): 0.0, ("good", "a"): 0.1, ("worse", "b"): 0.1, ("bad", "a"): 0.5}
    tasks = [
        task
        for (method, stream), lack in lacks.items()
        for task in tasks_of(run([0.0, lack], [1.0, 1.0], method=method, stream=stream))
    ]
    assert methods_by_lack(tasks)[0] == ["good", "none", "worse", "bad"]


def test_ranks_at_other_thresholds_fall_in_a_collapse() -> None:
    assert scores([{"hessian_epsilon_rank@0.1": 8.0}, {"hessian_epsilon_rank@0.1": 2.0}]) == {
        "hessian_epsilon_rank@0.1": -2.0,
        "hessian_epsilon_rank@0.1 / best": -0.25,
    }


def test_page_and_figures_are_made_from_all_kinds_of_runs(tmp_path: Path) -> None:
    for method in ("none", "live", "hessian", "redo"):
        for seed in range(2):
            lacks, numbers = [0.0, 0.3, 0.1, 0.0, -0.1], [1.0, 0.1, 0.2, 0.6, 0.7]
            result = run(lacks, numbers, seed=seed, method=method, stream="random-labels")
            (tmp_path / f"random-labels.{method}.{seed}.json").write_text(json.dumps(result))
    tasks = read_tasks(tmp_path)
    assert "| random-labels | 5 | 4 | 2 | 2 to 2 |" in page(tasks)
    draw(tasks, tmp_path / "images")
    assert len(list((tmp_path / "images").glob("evidence-*.png"))) == 3


def test_a_directory_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no runs"):
        read_tasks(tmp_path)
