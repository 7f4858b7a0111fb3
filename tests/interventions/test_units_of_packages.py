"""Test the units of networks of other packages. The table of docs/units.md has those of more and larger ones."""

from collections import Counter

import pytest

from benchmarks.real_modules import declare_operators
from benchmarks.units import CASES, Case, measure
from tests.helpers.package_models import PACKAGE_MODELS, PackageModel, require


@pytest.mark.parametrize("model", PACKAGE_MODELS, ids=lambda model: model.case.name)
def test_dead_units_of_transformers_reset_bit_equal(model: PackageModel) -> None:
    require(model.case)
    row = measure(model.case)
    assert Counter(group.num_units for group in row.units.groups.values()) == model.units
    assert row.unchanged
    assert row.reset == sum(layers * -(-units // 3) for units, layers in model.units.items())


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.package else []) for case in CASES],
)
def test_known_network_is_served_within_20_seconds(case: Case) -> None:
    if case.package == "torchvision":
        declare_operators()
    require(case)
    row = measure(case)
    for part in case.finds:
        assert any(part in layer for layer in row.units.groups), part
    assert row.unchanged
    assert row.reset
    assert row.seconds < 20
