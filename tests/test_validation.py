"""Check that invalid arguments raise errors that give the argument, its value and the values that are allowed."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from lightning_plasticity import Collapse, PlasticityMonitor
from lightning_plasticity._validation import check_choice, check_number, check_positive_ints, check_seed
from lightning_plasticity.interventions import Parseval, Reset
from tests.helpers.interventions import INTERVENTIONS


def arguments_of(*annotations: str) -> list[tuple[Callable[..., Any], str]]:
    """Return the arguments of all interventions that have one of the annotations."""
    return [(row.kind, name) for row in INTERVENTIONS for name, a in row.annotations.items() if a in annotations]


NUMBERS: list[tuple[Callable[..., Any], str]] = [
    (Collapse, "above"),
    (partial(Collapse, "learnable_fraction"), "below"),
    (PlasticityMonitor, "dormant_threshold"),
    (PlasticityMonitor, "max_samples"),
    (PlasticityMonitor, "max_units"),
    (PlasticityMonitor, "channel_dim"),
    *arguments_of("float", "int", "int | None"),
]


@pytest.mark.parametrize("value", ["0.5", True, [0.5], math.nan, 1j])
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_values_that_are_not_numbers_raise(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + r"\)? must be"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [[], [None], 3, 0.5, "encoder"])
@pytest.mark.parametrize(
    ("kind", "name"), [(PlasticityMonitor, "layers"), (PlasticityMonitor, "measures"), (Reset, "layers")]
)
def test_values_that_are_not_lists_of_names_raise(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{name}={re.escape(repr(value))}\)? must be"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [[None], 3, "encoder"])
def test_parseval_exclude_must_be_a_list_of_names(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Parseval(exclude={value!r}) must be a list of names")):
        Parseval(exclude=value)
    assert Parseval(exclude=[]).exclude == []


@pytest.mark.parametrize("value", ["no", 0, None])
@pytest.mark.parametrize(("kind", "name"), arguments_of("bool"))
def test_values_that_are_not_bools_raise(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}({name}={value!r}) must be True or False")):
        kind(**{name: value})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
@pytest.mark.parametrize("kind", [row.kind for row in INTERVENTIONS if "seed" in row.annotations])
def test_seeds_outside_the_range_of_torch_raise(kind: Callable[..., Any], seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed={seed}\)? must be a whole number"):
        kind(seed=seed)


@pytest.mark.parametrize("kind", [row.kind for row in INTERVENTIONS if "initial" in row.annotations])
def test_initial_must_be_a_state_dict(kind: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"initial='weights.pt'\)? must be a state_dict\(\)"):
        kind(initial="weights.pt")


def test_metric_must_be_a_name() -> None:
    with pytest.raises(ValueError, match=r"metric=\['srank'\]\) is not a diagnostic"):
        Collapse(metric=["srank"])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_check_positive_ints_rejects(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"steps={value!r} must be a whole number, at least 1")):
        check_positive_ints(samples=3, steps=value)


def test_check_positive_ints_accepts_none_only_if_optional() -> None:
    check_positive_ints(optional=True, samples=None, steps=1)
    with pytest.raises(ValueError, match=r"ReDo\(samples=0\) must be a whole number, at least 1"):
        check_positive_ints("ReDo", optional=True, samples=0)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "allowed"),
    [
        ("[0, 1]", [0, 0.5, 1], [-0.1, 1.1, math.inf], "in [0, 1]"),
        ("[0, 1)", [0, 0.99], [1], "in [0, 1)"),
        ("(0, 1]", [0.01, 1], [0], "in (0, 1]"),
        ("(0, 1)", [0.5], [0, 1], "in (0, 1)"),
        ("[0, inf)", [0, 1e300], [-1, math.inf], "a finite number, at least 0"),
        ("(0, inf)", [1e-300], [0, math.inf], "a finite number, greater than 0"),
        ("[0, inf]", [0, math.inf], [-1], "at least 0"),
        ("(-inf, inf)", [-1e300, 0], [-math.inf, math.inf], "a finite number"),
    ],
)
def test_check_number_intervals(interval: str, inside: list[float], outside: list[Any], allowed: str) -> None:
    for value in inside:
        check_number(interval, rate=value)
    for value in [*outside, math.nan, None, True, "0.5", [0.5]]:
        with pytest.raises(ValueError, match=re.escape(f"Net(rate={value!r}) must be {allowed}: a share") + "$"):
            check_number(interval, "Net", "a share", rate=value)


@pytest.mark.parametrize(
    ("choices", "invalid", "allowed"),
    [
        (("auto", "gram", "lanczos"), ["exact", None, ["auto"]], "'auto', 'gram' or 'lanczos'"),
        ((True, False), [0, 1, None], "True or False"),
        (("eager",), ["raise"], "'eager'"),
    ],
)
def test_check_choice(choices: tuple[Any, ...], invalid: list[Any], allowed: str) -> None:
    for choice in choices:
        check_choice(choices, method=choice)
    for value in invalid:
        with pytest.raises(ValueError, match=re.escape(f"method={value!r} must be {allowed}") + "$"):
            check_choice(choices, method=value)


def test_check_seed_range() -> None:
    for seed in (-(2**63), 2**64 - 1):
        check_seed(seed)
    for seed in (-(2**63) - 1, 2**64, 0.5, True):
        with pytest.raises(ValueError, match=re.escape(f"seed={seed!r} must be a whole number, from -2**63 to 2**64")):
            check_seed(seed)
    with pytest.raises(ValueError, match=re.escape("GGNProbe(seed=-1) must be a whole number, from 0 to 2**64 - 1")):
        check_seed(-1, "GGNProbe", minimum=0)
