"""Test which values `Collapse` judges to be a collapse, and the messages of its verdicts."""

import math
from typing import Any

import pytest

from lightning_plasticity import Collapse
from lightning_plasticity.curvature import Estimate


def test_falling_metric_is_compared_with_its_best() -> None:
    rule = Collapse("learnable_fraction")
    assert not rule.evaluate(0.77, earlier=[0.5, 0.95], initial=0.9).collapsed
    assert rule.evaluate(0.75, earlier=[0.5, 0.95], initial=0.9).collapsed
    assert not rule.evaluate(0.3, earlier=[], initial=0.9).collapsed, "the first task has no reference"


@pytest.mark.parametrize(
    ("relative_to", "value", "collapsed"),
    [
        ("first", 0.41, False),
        ("first", 0.39, True),
        ("initial", 0.73, False),
        ("initial", 0.71, True),
        (None, 0.79, True),
    ],
)
def test_value_is_compared_with_the_reference(relative_to: str | None, value: float, collapsed: bool) -> None:
    rule = Collapse("learnable_fraction", relative_to=relative_to)  # type: ignore[arg-type]
    assert rule.evaluate(value, earlier=[0.5, 0.95], initial=0.9).collapsed is collapsed


def test_message_names_task_value_and_both_comparisons() -> None:
    verdict = Collapse("learnable_fraction").evaluate(0.63, earlier=[0.8, 0.9, 0.95] + [0.9] * 9, initial=0.8)
    assert verdict.message == (
        "task 12: learnable fraction 0.63, 66 % of its best (task 2) and 79 % of what the initial weights would have "
        "on this batch: the network is losing its plasticity"
    )


def test_message_names_the_first_task_as_reference() -> None:
    verdict = Collapse("epsilon_rank", relative_to="first").evaluate(35, earlier=[None, 485], initial=70)
    assert verdict.message.startswith("task 2: ε-rank 35, 7 % of its first (task 1) and 50 % of what")


def test_failed_probes_are_ignored() -> None:
    verdict = Collapse("learnable_fraction").evaluate(0.5, earlier=[None, 0.9, None], initial=0.9)
    assert verdict.collapsed
    assert "its best (task 1)" in verdict.message


def test_reference_of_zero_is_no_collapse() -> None:
    assert not Collapse("learnable_fraction").evaluate(0.0, earlier=[0.0], initial=0.0).collapsed


def test_counts_may_have_absolute_thresholds() -> None:
    assert Collapse("epsilon_rank", below=50, relative_to=None).evaluate(49, earlier=[], initial=400).collapsed


RANK = Collapse("hessian_epsilon_rank")
UNRESOLVED = Estimate(3466.0, lo=50.0, hi=3466.0)
RESOLVED = Estimate(40.0, standard_error=2.0, lo=38.0, hi=43.0)


def test_unresolved_rank_is_inconclusive() -> None:
    verdict = RANK.evaluate(UNRESOLVED, earlier=[1e5], initial=1e5)
    assert verdict.inconclusive
    assert not verdict.collapsed
    assert verdict.message.startswith(
        "task 1: ε-rank of the Hessian is not resolved (it is somewhere between 50 and 3.47e+03), so it is "
        "unknown whether this is a collapse: raise num_steps of the probe, or"
    )


@pytest.mark.parametrize(
    ("best", "collapsed", "inconclusive"), [(1.0, True, False), (0.6, False, True), (0.3, False, False)]
)
def test_wide_bracket_of_a_fraction_is_compared_as_a_whole(best: float, collapsed: bool, inconclusive: bool) -> None:
    wide = Estimate(0.4, lo=0.3, hi=0.5)
    verdict = Collapse("learnable_fraction").evaluate(wide, earlier=[best], initial=1.0)
    assert (verdict.collapsed, verdict.inconclusive) == (collapsed, inconclusive)
    assert ("between 0.3 and 0.5), so it is unknown" in verdict.message) == inconclusive
    first = Collapse("learnable_fraction").evaluate(wide, earlier=[None], initial=1.0)
    assert not first.collapsed
    assert not first.inconclusive


def test_unresolved_rank_is_no_reference() -> None:
    by_initial = Collapse("hessian_epsilon_rank", relative_to="initial")
    verdict = by_initial.evaluate(RESOLVED, earlier=[40.0], initial=UNRESOLVED)
    assert verdict.inconclusive
    assert "of the initial weights on this batch is not resolved" in verdict.message
    by_best = RANK.evaluate(RESOLVED, earlier=[100.0], initial=UNRESOLVED)
    assert by_best.collapsed
    assert "initial weights" not in by_best.message


@pytest.mark.parametrize("relative_to", ["best", "first"])
def test_nan_is_no_reference(relative_to: str) -> None:
    rule = Collapse("effective_rank", relative_to=relative_to)  # type: ignore[arg-type]
    assert rule.evaluate(1.0, earlier=[math.nan, 6.0], initial=6.0).collapsed
    assert not rule.evaluate(5.0, earlier=[math.nan, 6.0], initial=6.0).collapsed


def test_nan_is_inconclusive() -> None:
    verdict = Collapse("effective_rank").evaluate(math.nan, earlier=[6.0], initial=6.0)
    assert (verdict.collapsed, verdict.inconclusive) == (False, True)
    assert "task 1: effective rank of the features is not a number, so it is unknown whether this is a collapse" in (
        verdict.message
    )


def test_wide_bounds_matter_only_for_ranks() -> None:
    wide = Estimate(1.0, lo=-9.0, hi=9.0)
    assert not wide.resolved
    assert (
        Collapse("hessian_lambda_max", below=2.0, relative_to=None).evaluate(wide, earlier=[], initial=wide).collapsed
    )


def test_signed_metric_has_an_absolute_threshold() -> None:
    rule = Collapse("hessian_lambda_min", below=-3.0, relative_to=None)
    assert not rule.evaluate(-2.0, earlier=[], initial=-1.0).collapsed
    verdict = rule.evaluate(-4.0, earlier=[-1.0], initial=-1.0)
    assert verdict.collapsed
    assert verdict.message == (
        "task 1: smallest eigenvalue of the Hessian -4, below -3: the network is losing its plasticity"
    )


def test_default_alarm_is_a_handicap_clearly_above_one() -> None:
    rule = Collapse()
    assert not rule.evaluate(1.24, earlier=[0.1, 0.2], initial=math.nan).collapsed
    assert rule.evaluate(1.26, earlier=[], initial=math.nan).collapsed
    assert rule.evaluate(math.inf, earlier=[], initial=math.nan).collapsed
    for error, collapsed in ((0.04, True), (0.06, False)):
        noisy = Estimate(1.3, standard_error=error)
        assert rule.evaluate(noisy, earlier=[], initial=math.nan).collapsed is collapsed


def test_message_of_the_default_alarm_says_what_it_means() -> None:
    verdict = Collapse().evaluate(1.714, earlier=[1.0, 1.1], initial=math.nan, explanation="fit loss 2 instead of 1")
    assert verdict.message == (
        "task 2: handicap 1.71, above 1.25: a fresh network would learn this task better (fit loss 2 instead of 1)"
    )
    assert Collapse().evaluate(1.1, earlier=[], initial=math.nan).message == "task 0: handicap 1.1, not above 1.25"


@pytest.mark.parametrize(
    ("relative_to", "value", "collapsed"),
    [
        (None, 2.01, True),
        (None, 1.99, False),
        ("best", 0.21, True),
        ("best", 0.19, False),
        ("first", 0.61, True),
        ("first", 0.59, False),
        ("initial", 0.41, True),
        ("initial", 0.39, False),
    ],
)
def test_rising_metric_is_compared_with_the_reference(relative_to: Any, value: float, collapsed: bool) -> None:
    """The best value of a metric that rises in a collapse is the smallest."""
    rule = Collapse("dormant_fraction", above=2.0, relative_to=relative_to)
    assert rule.evaluate(value, earlier=[0.3, 0.1], initial=0.2).collapsed is collapsed


def test_rising_metric_has_a_default_threshold_only_for_the_handicap() -> None:
    with pytest.raises(ValueError, match=r"Collapse\(metric='dead_fraction'\) needs a threshold: write above="):
        Collapse("dead_fraction")
    assert Collapse("fit_loss", above=-1.0).evaluate(-0.5, earlier=[], initial=-2.0).collapsed


FRACTION = {"metric": "learnable_fraction"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "loss"}, r"Collapse\(metric='loss'\) is not a diagnostic; choose one of \['handicap'"),
        ({"relative_to": "last"}, r"relative_to='last'\) is not a reference; choose one of \['best', 'initial'"),
        ({**FRACTION, "below": 0}, r"Collapse\(below=0\) must be in \(0, 1\]"),
        ({**FRACTION, "below": -0.5}, r"Collapse\(below=-0.5\) must be in \(0, 1\]"),
        ({**FRACTION, "below": 1.01}, r"Collapse\(below=1.01\) must be in \(0, 1\]"),
        ({**FRACTION, "below": math.nan}, r"Collapse\(below=nan\) must be in \(0, 1\]"),
        ({**FRACTION, "below": 2, "relative_to": None}, r"Collapse\(below=2\) must be in \(0, 1\]"),
        ({"below": math.inf, "relative_to": None, "metric": "epsilon_rank"}, "must be a positive number"),
        ({"metric": "hessian_trace"}, "relative_to='best'.: it can be negative, so a share .* write relative_to=None"),
        ({"metric": "hessian_trace", "relative_to": None, "below": math.nan}, "must be a finite number"),
        ({"metric": "hessian_trace", "relative_to": None}, r"metric='hessian_trace'\) needs a threshold: write below="),
        ({"below": 0.8}, r"metric='handicap', below=0.8\): it rises when a network collapses; write above="),
        ({**FRACTION, "above": 2}, r"fraction', above=2\): it falls when a network collapses; write below="),
        ({"above": 0}, r"Collapse\(above=0\) must be a positive number"),
        ({"above": math.inf}, r"Collapse\(above=inf\) must be a positive number"),
        ({"above": "2"}, r"Collapse\(above='2'\) must be a positive number"),
        ({"relative_to": "initial"}, "it is itself a comparison with the initial weights; write relative_to=None"),
        ({"metric": "fit_gap", "above": math.nan}, r"Collapse\(above=nan\) must be a finite number"),
        ({"metric": "fit_gap", "above": 1, "relative_to": "best"}, "fit_gap', relative_to='best'.: it can be negative"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Collapse(**arguments)  # type: ignore[arg-type]
