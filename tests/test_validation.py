"""An argument of another kind is refused by a message that names it, its value and what would be right."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_plasticity import Collapse, PlasticityMonitor
from lightning_plasticity.interventions import Parseval, Reset
from tests.helpers.interventions import INTERVENTIONS


def arguments_of(*annotations: str) -> list[tuple[Callable[..., Any], str]]:
    """Return the arguments of all interventions that have one of the annotations."""
    return [(row.kind, name) for row in INTERVENTIONS for name, a in row.annotations.items() if a in annotations]


NUMBERS: list[tuple[Callable[..., Any], str]] = [
    (Collapse, "below"),
    (PlasticityMonitor, "dormant_threshold"),
    (PlasticityMonitor, "max_samples"),
    (PlasticityMonitor, "max_units"),
    (PlasticityMonitor, "channel_dim"),
    *arguments_of("float", "int", "int | None"),
]


@pytest.mark.parametrize("value", ["0.5", True, [0.5], math.nan, 1j])
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_what_is_no_number_is_refused(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + r"\)? must be"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [[], [None], 3, 0.5, "encoder"])
@pytest.mark.parametrize(
    ("kind", "name"), [(PlasticityMonitor, "layers"), (PlasticityMonitor, "measures"), (Reset, "layers")]
)
def test_what_is_no_list_of_names_is_refused(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{name}={re.escape(repr(value))}\)? must be"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [[None], 3, "encoder"])
def test_what_is_no_list_of_names_to_exclude_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Parseval(exclude={value!r}) must be a list of names")):
        Parseval(exclude=value)
    assert Parseval(exclude=[]).exclude == ()


@pytest.mark.parametrize("value", ["no", 0, None])
@pytest.mark.parametrize(("kind", "name"), arguments_of("bool"))
def test_what_is_neither_true_nor_false_is_refused(kind: Callable[..., Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind.__name__}({name}={value!r}) must be True or False")):
        kind(**{name: value})


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
@pytest.mark.parametrize("kind", [row.kind for row in INTERVENTIONS if "seed" in row.annotations])
def test_seeds_that_torch_has_not_are_refused(kind: Callable[..., Any], seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed={seed}\)? must be a whole number"):
        kind(seed=seed)


@pytest.mark.parametrize("kind", [row.kind for row in INTERVENTIONS if "initial" in row.annotations])
def test_initial_weights_that_are_no_state_are_refused(kind: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"initial='weights.pt'\)? must be a state_dict\(\)"):
        kind(initial="weights.pt")


def test_a_metric_that_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric=\['srank'\]\) is not a diagnostic"):
        Collapse(metric=["srank"])  # type: ignore[arg-type]
