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
from lightning_plasticity.interventions import (
    UPGD,
    Intervention,
    ReDo,
    Regularizer,
    Repair,
    Reset,
    SelectiveWeightReinit,
    ShrinkPerturb,
    SoftShrinkPerturb,
    StepIntervention,
)
from tests.helpers.interventions import INTERVENTIONS, Row, for_each, select
from tests.helpers.unit_models import Conv1D


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def forward(model: nn.Module) -> Any:
    return model(torch.ones(6, 4))


def loss(model: nn.Module) -> Tensor:
    return forward(model).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


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
    original, model = row.make(), mlp()
    original.start(model, forward=forward, optimizers=[optimizer_of(model)])
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
    used = {name: value for name, value in options.items() if name == "forward"}
    if "optimizers" in options:
        used["optimizers"] = [optimizer_of(model)]
    if "start" in options:
        intervention.start(model, **used)
    if isinstance(intervention, StepIntervention):
        intervention.after_step(model, **used)
    if isinstance(intervention, Regularizer):
        intervention.penalty(model)
    intervention.stop()


MESSAGES = {
    "forward": (ValueError, "needs a forward pass of the model: .*forward=lambda model"),
    "loss": (ValueError, "needs gradients: .*loss=lambda model"),
    "optimizers": (ValueError, r"start\(model, optimizers=\[optimizer\]\)"),
    "start": (RuntimeError, r"start\(model"),
}


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(INTERVENTIONS)
def test_works_with_what_the_table_names_and_not_without(row: Row) -> None:
    needed = {name: {"forward": forward, "loss": loss, "start": True, "optimizers": True}[name] for name in row.needs}
    run(row.make(), mlp(), needed)
    for name in row.needs:
        model, (error, message) = mlp(), MESSAGES[name]
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=message):
            run(row.make(), model, {other: value for other, value in needed.items() if other != name})
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(INTERVENTIONS)
def test_unbatched_sample_counts_as_batch_of_one(row: Row) -> None:
    torch.manual_seed(0)
    original, results = mlp(), []
    for x in (torch.ones(4), torch.ones(1, 4)):
        model, intervention = copy.deepcopy(original), row.make()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def output(model: nn.Module, x: Tensor = x) -> Any:
            return model(x)

        intervention.start(model, forward=output, optimizers=[optimizer])
        for _ in range(4):
            output(model).square().sum().backward()
            optimizer.step()
            if isinstance(intervention, StepIntervention):
                intervention.after_step(model, [optimizer], forward=output)
        if isinstance(intervention, Repair):
            generator = torch.Generator().manual_seed(0)
            options: Any = {"forward": output, "loss": lambda model: output(model).square().sum()}
            intervention.repair(model, optimizers=[optimizer], generator=generator, **options)
        intervention.stop()
        results.append(model.state_dict())
    torch.testing.assert_close(*results)


def of_conv1d(linear: nn.Sequential) -> nn.Sequential:
    """Return the same network of ``Conv1D`` layers."""
    layers = copy.deepcopy(linear)
    for name, layer in linear.named_children():
        if isinstance(layer, nn.Linear):
            layers[int(name)] = Conv1D(layer.out_features, layer.in_features)
            layers[int(name)].weight.data = layer.weight.data.T.contiguous()
            layers[int(name)].bias.data = layer.bias.data.clone()
    return layers


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(
    row
    for row in INTERVENTIONS
    if row.kind not in (Reset, SelectiveWeightReinit, ShrinkPerturb, SoftShrinkPerturb, UPGD)
)
def test_conv1d_of_transformers_is_a_linear_layer(row: Row) -> None:
    """Fresh weights differ, permuted in another order: there, the first units to be reset are compared."""
    torch.manual_seed(0)
    linear, x, results = mlp(), torch.randn(6, 4), []
    with torch.no_grad():
        linear[0].bias[3] = -100
    for model in (of_conv1d(linear), linear):
        intervention, reset = row.make(), []
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        options: Any = {"forward": lambda model: model(x), "loss": lambda model: model(x).square().mean()}
        intervention.start(model, forward=options["forward"], optimizers=[optimizer])
        for _ in range(8):
            penalty = intervention.penalty(model) if isinstance(intervention, Regularizer) else 0
            optimizer.zero_grad()
            (options["loss"](model) + penalty).backward()
            optimizer.step()
            if isinstance(intervention, StepIntervention):
                reset.append(intervention.after_step(model, [optimizer], forward=options["forward"]))
        if isinstance(intervention, Repair):
            reset.append(intervention.repair(model, optimizers=[optimizer], **options))
        intervention.stop()
        weights = [p.T if p.ndim > 1 and model is not linear else p for p in model.parameters()]
        results.append(next(report.units for report in reset if report is not None) if row.on_units else weights)
    torch.testing.assert_close(*results)


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
