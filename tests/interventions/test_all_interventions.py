"""All interventions: they are in the table of the tests and in the documentation, print, and name what they lack."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity import interventions
from lightning_plasticity.interventions import Intervention, ReDo, Regularizer, Repair, StepIntervention
from tests.helpers.interventions import INTERVENTIONS, Row, for_each, select


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def forward(model: nn.Module) -> Any:
    return model(torch.ones(6, 4))


def loss(model: nn.Module) -> Tensor:
    return forward(model).square().mean()


def test_table_holds_every_public_intervention() -> None:
    classes = [value for name in interventions.__all__ if inspect.isclass(value := getattr(interventions, name))]
    base_classes = {Intervention, Repair, StepIntervention, Regularizer}
    public = {kind for kind in classes if issubclass(kind, Intervention)} - base_classes
    assert {row.kind for row in INTERVENTIONS} == public


def test_documentation_has_a_row_for_every_intervention() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text().splitlines()
    rows = [line.split("|")[1].strip(" `") for line in lines if line.count("|") == 8]
    assert rows[2:] == [row.name for row in INTERVENTIONS]


@for_each(INTERVENTIONS)
def test_repr_is_the_constructor_call(row: Row) -> None:
    intervention = row.make()
    rebuilt = eval(repr(intervention), vars(interventions))
    assert type(rebuilt) is row.kind
    assert repr(rebuilt) == repr(intervention)
    for name, value in row.arguments.items():
        assert f"{name}={value!r}" in repr(intervention)


@for_each(INTERVENTIONS)
def test_duplicate_has_the_same_arguments_and_state(row: Row) -> None:
    original = row.make()
    original.start(mlp(), forward=forward)
    duplicate = original.duplicate()
    assert type(duplicate) is row.kind
    assert repr(duplicate) == repr(original)
    torch.testing.assert_close(duplicate.state_dict(), original.state_dict(), rtol=0, atol=0)
    original.stop()


def test_repr_is_short_without_arguments_that_are_none() -> None:
    assert repr(ReDo()) == "ReDo(threshold=0.025, when='collapse', utility='activation')"


@for_each(row for row in INTERVENTIONS if "initial" in row.annotations)
def test_repr_gives_the_size_of_initial_weights(row: Row) -> None:
    assert "initial=<6 tensors>" in repr(row.make(initial=mlp().state_dict()))


def run(intervention: Intervention, model: nn.Module, options: dict[str, Any]) -> None:
    """Call everything that a plain loop calls, with the given options."""
    if isinstance(intervention, Repair):
        intervention.repair(model, **options)
        return
    forward_option = {name: value for name, value in options.items() if name == "forward"}
    if "start" in options:
        intervention.start(model, **forward_option)
    if isinstance(intervention, StepIntervention):
        intervention.after_step(model, **forward_option)
    if isinstance(intervention, Regularizer):
        intervention.penalty(model)
    intervention.stop()


MESSAGES = {
    "forward": (ValueError, "needs a forward pass of the model: .*forward=lambda model"),
    "loss": (ValueError, "needs gradients: .*loss=lambda model"),
    "start": (RuntimeError, r"start\(model"),
}


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(INTERVENTIONS)
def test_works_with_what_the_table_names_and_not_without(row: Row) -> None:
    needed = {name: {"forward": forward, "loss": loss, "start": True}[name] for name in row.needs}
    run(row.make(), mlp(), needed)
    for name in row.needs:
        model, (error, message) = mlp(), MESSAGES[name]
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=message):
            run(row.make(), model, {other: value for other, value in needed.items() if other != name})
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@for_each(select(Repair))
def test_only_repairs_of_units_report_units(row: Row) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].bias[0] = -100
    report = row.make().repair(model, forward=forward, loss=loss)
    assert bool(report.units) == row.on_units


def test_documented_example_is_an_intervention() -> None:
    text = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text()
    namespace: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], namespace)
    model = mlp()
    before = model[0].weight.detach().clone()
    assert namespace["Shrink"]().repair(model).num_parameters_changed > 0
    assert torch.equal(model[0].weight, 0.5 * before)
    assert repr(namespace["Shrink"](0.1)) == "Shrink(factor=0.1, when='collapse')"
