"""Names of the monitor's layers: the module that owns the weights, as in the repairs of its units."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity.interventions import ReDo, describe_units
from tests.helpers.unit_models import MODELS, Model

NOT_COMPARABLE = {"conv, flatten": ["0"], "depthwise": ["0"]}
"""Layers whose units ReDo scores behind a pooling layer or a depthwise convolution, by model."""

# The units of "softmax" go through no activation function.
EVERY_MODEL = pytest.mark.parametrize(
    "case", [case for case in MODELS if case.name != "softmax"], ids=lambda case: case.name
)


@EVERY_MODEL
def test_monitor_and_repairs_give_layers_the_same_names(case: Model) -> None:
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(case.shape)
    groups = describe_units(model, forward=lambda model: model(x)).groups
    with PlasticityMonitor(model) as monitor:
        model(x)
    layers = monitor.layers
    assert groups.keys() <= layers.keys()
    assert {name: layers[name].units for name in groups} == {name: group.num_units for name, group in groups.items()}
    assert layers.keys() <= dict(model.named_modules()).keys()


@EVERY_MODEL
def test_dormant_fraction_counts_the_units_that_redo_resets(case: Model) -> None:
    torch.manual_seed(0)
    model, x = case.build().eval(), torch.randn(case.shape)
    with PlasticityMonitor(model, dormant_threshold=0.5) as monitor:
        model(x)
    fractions = monitor.compute()
    units = ReDo(threshold=0.5).repair(model, forward=lambda model: model(x)).units
    for name in case.groups.keys() - NOT_COMPARABLE.get(case.name, []):
        expected = len(units.get(name, ())) / monitor.layers[name].units
        assert fractions[f"dormant_fraction/{name}"].item() == pytest.approx(expected), name


def layers_of(model: nn.Module, *inputs: Tensor, **options: object) -> dict[str, int]:
    """Number of units by the name of each layer that a monitor measures."""
    with PlasticityMonitor(model, **options) as monitor:  # type: ignore[arg-type]
        model(*inputs)
    return {name: layer.units for name, layer in monitor.layers.items()}


class Network(nn.Module):
    """Layers by name, and what ``forward`` computes from them."""

    def __init__(self, function: Callable[[Network, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def linears(*widths: int) -> dict[str, nn.Module]:
    return {f"fc{i}": nn.Linear(*pair) for i, pair in enumerate(itertools.pairwise(widths), 1)}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda net, x: net.fc2(F.relu(net.fc1(x))), {"fc1": 8}),
        (lambda net, x: net.fc2(torch.tanh(F.relu(net.fc1(x)))), {"fc1": 8, "fc1-2": 8}),
        (lambda net, x: net.fc2((h := net.fc1(x)).relu() + h.sigmoid()), {"fc1": 8, "fc1-2": 8}),
        (lambda net, x: net.fc2(F.relu(F.dropout(F.layer_norm(2 * net.fc1(x), (8,)), 0.1))), {"fc1": 8}),
        (lambda net, x: net.fc2(F.relu(F.linear(x, net.fc1.weight))), {"fc1": 8}),
        (lambda net, x: F.relu(x @ net.fc1.weight.T) @ net.fc2.weight.T, {"fc1": 8}),
        (lambda net, x: net.fc2(F.relu(torch.eye(32) @ net.fc1(x))), {"fc1": 8}),
        (lambda net, x: net.fc2(F.relu(x @ torch.ones(4, 8))), {"relu": 8}),
        (lambda net, x: net.fc2(F.relu(net.fc1(x)) + F.tanh(x @ torch.ones(4, 8))), {"fc1": 8, "tanh": 8}),
        (lambda net, x: net.fc2(net.fc1(F.relu(x))), {"relu": 4}),
    ],
)
def test_layer_has_the_path_of_the_module_with_the_weights(
    function: Callable[[Any, Tensor], Tensor], expected: dict[str, int]
) -> None:
    assert layers_of(Network(function, **linears(4, 8, 3)), X) == expected


def test_sum_has_the_name_of_the_layer_that_ran_last() -> None:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "out": nn.Linear(8, 3)}
    for total in (lambda net, x: net.a(x) + net.b(x), lambda net, x: torch.stack([net.a(x), net.b(x)]).sum(0)):
        assert layers_of(Network(lambda net, x, total=total: net.out(F.relu(total(net, x))), **layers), X) == {"b": 8}
    first_last = Network(lambda net, x: net.out(F.relu((b := net.b(x)) * 0 + net.a(x) + b)), **layers)
    assert layers_of(first_last, X) == {"a": 8}


def test_parametrized_weights_belong_to_their_layer() -> None:
    network = Network(lambda net, x: net.fc2(F.relu(net.fc1(x))), **linears(4, 8, 3))
    nn.utils.parametrizations.weight_norm(network.fc1)
    nn.utils.parametrizations.spectral_norm(network.fc2)
    assert layers_of(network, X) == {"fc1": 8}


def test_layer_called_twice_is_one_layer_with_twice_the_samples() -> None:
    network = Network(
        lambda net, x: net.fc2(F.relu(net.fc1(F.relu(net.fc1(x))))), fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 3)
    )
    with PlasticityMonitor(network) as monitor:
        network(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {"fc1": 2 * len(X)}


def test_shared_layer_with_other_numbers_of_units_is_numbered() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(torch.cat([F.relu(net.fc1(x)), F.glu(net.fc1(x)), F.relu(net.fc1(x))], 1))

    network = Network(forward, fc1=nn.Linear(4, 8), out=nn.Linear(20, 3))
    with PlasticityMonitor(network) as monitor:
        network(X)
        network(X)
    layers = {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()}
    assert layers == {"fc1": (8, 4 * len(X)), "fc1-2": (4, 2 * len(X))}


def test_tied_layers_have_the_path_of_the_one_that_is_called() -> None:
    network = Network(lambda net, x: net.out(F.relu(net.b(F.relu(net.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    network.b.weight, network.out = network.a.weight, nn.Linear(4, 3)
    assert layers_of(network, X) == {"a": 4, "b": 4}


def test_layer_registered_twice_has_its_first_path() -> None:
    layer = nn.Linear(4, 4)
    network = Network(lambda net, x: net.out(F.relu(net.b(F.relu(net.a(x))))), a=layer, b=layer, out=nn.Linear(4, 3))
    assert layers_of(network, X) == {"a": 4}


def test_parameters_that_are_not_called_weight_name_their_layer() -> None:
    block = Network(
        lambda net, x: F.relu(F.relu(x @ net.w1) @ net.w2) @ net.w3,
        w1=nn.Parameter(torch.randn(4, 8)),
        w2=nn.Parameter(torch.randn(8, 5)),
        w3=nn.Parameter(torch.randn(5, 2)),
    )
    assert layers_of(block, X) == {"w1": 8, "w2": 5}
    network = nn.Sequential(block)
    assert layers_of(network, X) == {"0.w1": 8, "0.w2": 5}
    assert layers_of(network, X, layers=["0.w2"]) == {"0.w2": 5}


def test_exact_path_of_a_layer_measures_its_activations_if_any() -> None:
    network = Network(lambda net, x: net.fc3(net.fc2(F.relu(net.fc1(x)))), **linears(4, 8, 6, 3))
    nn.init.constant_(network.fc1.bias, -100.0)
    nn.init.constant_(network.fc2.bias, -100.0)
    with PlasticityMonitor(network, layers=["fc1", "fc2"], measures=["dead_fraction"]) as monitor:
        for _ in range(2):
            network(X)
    values = {name: value.item() for name, value in monitor.compute().items()}
    assert values == {"dead_fraction": 8 / 14, "dead_fraction/fc1": 1, "dead_fraction/fc2": 0}
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {"fc1": 2 * len(X), "fc2": 2 * len(X)}


def test_exact_path_of_an_output_layer_measures_its_output() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())
    with PlasticityMonitor(network, layers=["2"], measures=["feature_norm"]) as monitor:
        network(X)
    expected = network[:3](X).norm(dim=1).mean().item()
    assert monitor.compute()["feature_norm/2"].item() == pytest.approx(expected, rel=1e-6)


def test_exact_path_of_an_activation_module_has_its_own_name() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.GRU(8, 5))
    assert layers_of(network, X, layers=["0", "1", "2"]) == {"0": 8, "1": 8, "2": 5}


def test_recurrent_cells_have_their_path_at_every_step() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 5)
        for _ in range(3):
            state = net.cell(x, state)
        return net.out(F.relu(state))

    network = Network(forward, cell=nn.GRUCell(4, 5), out=nn.Linear(5, 2))
    with PlasticityMonitor(network) as monitor:
        network(X)
    samples = {name: layer.samples for name, layer in monitor.layers.items()}
    assert samples == {"cell": 3 * len(X), "cell-2": len(X)}


def test_activations_behind_attention_have_its_path() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    network = Network(lambda net, x: net.out(F.relu(net.mha(x, x, x)[0])), mha=attention, out=nn.Linear(4, 2))
    assert layers_of(network, X[None]) == {"mha": 4}
