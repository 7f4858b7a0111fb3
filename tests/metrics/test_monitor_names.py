"""Names of the monitor's layers: the module that owns the weights, as in the repairs of its units."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity.interventions import ReDo, describe_units
from tests.helpers.monitored import Block, X, count_hooks, count_modes, measured_layers, mlp
from tests.helpers.unit_models import MODELS, Model

HEADS_AND_GROUPS = {"attention, Conv1D": {"qkv"}, "rotary attention": {"v"}, "group norm": {"0"}}
"""Layers whose units are heads of attention or groups of channels, where the monitor measures single channels."""

NOT_COMPARABLE = {"conv, flatten": {"0"}, "depthwise": {"0"}, **HEADS_AND_GROUPS}
"""These, and layers whose units ReDo scores behind a pooling layer or a depthwise convolution, by model."""

# The units of "softmax" go through no activation function.
EVERY_MODEL = pytest.mark.parametrize(
    "case", [case for case in MODELS if case.name != "softmax"], ids=lambda case: case.name
)


@pytest.mark.filterwarnings("ignore:PlasticityMonitor found no hidden layer")
@EVERY_MODEL
def test_monitor_and_repairs_give_layers_the_same_names(case: Model) -> None:
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(case.shape)
    groups = describe_units(model, forward=lambda model: model(x)).groups
    with PlasticityMonitor(model) as monitor:
        model(x)
    layers, names = monitor.layers, groups.keys() - HEADS_AND_GROUPS.get(case.name, set())
    assert names <= layers.keys()
    assert {name: layers[name].units for name in names} == {name: groups[name].num_units for name in names}
    assert layers.keys() <= dict(model.named_modules()).keys()


@pytest.mark.filterwarnings("ignore:ReDo rests", "ignore:PlasticityMonitor found no hidden layer")
@EVERY_MODEL
def test_dormant_fraction_counts_the_units_that_redo_resets(case: Model) -> None:
    torch.manual_seed(0)
    model, x = case.build().eval(), torch.randn(case.shape)
    with PlasticityMonitor(model, dormant_threshold=0.5) as monitor:
        model(x)
    fractions = monitor.compute() if monitor.layers else {}
    units = ReDo(threshold=0.5).repair(model, forward=lambda model: model(x)).units
    for name in case.groups.keys() - NOT_COMPARABLE.get(case.name, set()):
        expected = len(units.get(name, ())) / monitor.layers[name].units
        assert fractions[f"dormant_fraction/{name}"].item() == pytest.approx(expected), name


def units_by_layer(model: nn.Module, *inputs: Tensor, **options: object) -> dict[str, int]:
    """Return the number of units of each layer that a monitor measures in one forward pass."""
    with PlasticityMonitor(model, **options) as monitor:  # type: ignore[arg-type]
        model(*inputs)
    return {name: layer.units for name, layer in monitor.layers.items()}


class Network(nn.Module):
    """A network of named layers with a function as its ``forward``."""

    def __init__(self, function: Callable[[Network, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


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
    assert units_by_layer(Network(function, **linears(4, 8, 3)), X) == expected


def test_sum_has_the_name_of_the_layer_that_ran_last() -> None:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "out": nn.Linear(8, 3)}
    for total in (lambda net, x: net.a(x) + net.b(x), lambda net, x: torch.stack([net.a(x), net.b(x)]).sum(0)):
        assert units_by_layer(Network(lambda net, x, total=total: net.out(F.relu(total(net, x))), **layers), X) == {
            "b": 8
        }
    first_last = Network(lambda net, x: net.out(F.relu((b := net.b(x)) * 0 + net.a(x) + b)), **layers)
    assert units_by_layer(first_last, X) == {"a": 8}


def test_parametrized_weights_belong_to_their_layer() -> None:
    network = Network(lambda net, x: net.fc2(F.relu(net.fc1(x))), **linears(4, 8, 3))
    nn.utils.parametrizations.weight_norm(network.fc1)
    nn.utils.parametrizations.spectral_norm(network.fc2)
    assert units_by_layer(network, X) == {"fc1": 8}


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
    assert units_by_layer(network, X) == {"a": 4, "b": 4}


def test_layer_registered_twice_has_its_first_path() -> None:
    layer = nn.Linear(4, 4)
    network = Network(lambda net, x: net.out(F.relu(net.b(F.relu(net.a(x))))), a=layer, b=layer, out=nn.Linear(4, 3))
    assert units_by_layer(network, X) == {"a": 4}


def test_parameters_that_are_not_called_weight_name_their_layer() -> None:
    block = Network(
        lambda net, x: F.relu(F.relu(x @ net.w1) @ net.w2) @ net.w3,
        w1=nn.Parameter(torch.randn(4, 8)),
        w2=nn.Parameter(torch.randn(8, 5)),
        w3=nn.Parameter(torch.randn(5, 2)),
    )
    assert units_by_layer(block, X) == {"w1": 8, "w2": 5}
    network = nn.Sequential(block)
    assert units_by_layer(network, X) == {"0.w1": 8, "0.w2": 5}
    assert units_by_layer(network, X, layers=["0.w2"]) == {"0.w2": 5}


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
    assert units_by_layer(network, X, layers=["0", "1", "2"]) == {"0": 8, "1": 8, "2": 5}


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


def test_handwritten_recurrent_cell_is_one_layer_over_all_steps() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 5)
        for _ in range(3):
            state = torch.tanh(net.inputs(x) + net.states(state))
        return net.out(state)

    network = Network(forward, inputs=nn.Linear(4, 5), states=nn.Linear(5, 5), out=nn.Linear(5, 2))
    with PlasticityMonitor(network) as monitor:
        network(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {"states": 3 * len(X)}


def test_activations_behind_attention_have_its_path() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    network = Network(lambda net, x: net.out(F.relu(net.mha(x, x, x)[0])), mha=attention, out=nn.Linear(4, 2))
    assert units_by_layer(network, X[None]) == {"mha": 4}


def test_layers_of_blocks_have_the_paths_of_their_modules() -> None:
    model = nn.Sequential(Block(4), nn.ModuleDict({"inner": Block(4)})["inner"], nn.Linear(4, 2))
    assert measured_layers(model, X) == ["0.inner", "0.outer", "1.inner", "1.outer"]


def test_shared_activation_module_gives_one_layer_per_owner() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.act(self.two(self.act(self.one(x)))))

    model = Shared()
    monitor = PlasticityMonitor(model)
    for _ in range(2):
        with monitor:
            model(X)
            model(X)
    assert {name: (layer.units, layer.samples) for name, layer in monitor.layers.items()} == {
        "one": (8, 4 * len(X)),
        "two": (5, 4 * len(X)),
    }


def test_activation_module_with_several_paths() -> None:
    act = nn.GELU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), act), nn.Sequential(nn.Linear(8, 5), act), nn.Sequential(nn.Linear(5, 3))
    )
    assert measured_layers(model, X) == ["0.0", "1.0"]
    assert measured_layers(model, X, layers=["0.1", "1.1"]) == ["0.1", "1.1"]


def test_block_called_twice_has_twice_the_samples() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.out = Block(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.block(self.block(x)))

    model = Twice()
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {
        "block.inner": 2 * len(X),
        "block.outer": 2 * len(X),
    }


def test_layers_are_chosen_by_pattern_or_path() -> None:
    model = nn.Sequential(Block(4), Block(4), nn.Linear(4, 2))
    assert measured_layers(model, X, layers=["1.*"]) == ["1.inner", "1.outer"]
    assert measured_layers(model, X, layers=["*.outer"]) == ["0.outer", "1.outer"]
    assert measured_layers(model, X, layers=["0", "1.inner"]) == ["0", "1.inner"]
    assert measured_layers(mlp(8), X, layers=["1"]) == ["1"]
    # A chosen module is measured even if it is the output.
    assert measured_layers(mlp(8, last=nn.Sigmoid()), X, layers=["3"]) == ["3"]


def test_pattern_without_match_warns_with_the_names() -> None:
    monitor, model = PlasticityMonitor(layers=["*.fc"]), mlp(8, 6)
    with monitor.attach(model):
        # Nothing ran, so that no pattern is known to be wrong.
        pass
    monitor.attach(model)
    model(X)
    with pytest.warns(UserWarning, match=r"layers=\['\*.fc'\] match none of the activations seen: \['0', '2'\]"):
        monitor.detach()


@pytest.mark.parametrize("name", ["1", "net.5", "body.*", "net.1.relu-", "net.nonsense", "relu.1"])
def test_impossible_name_raises_at_attach(name: str) -> None:
    model = LightningModule()
    model.net = mlp(8)
    monitor = PlasticityMonitor(model.net, layers=["net.1", name])
    with pytest.raises(ValueError, match=r"can match nothing in LightningModule, which is made of \['net'\]: names"):
        monitor.attach(model)
    assert count_hooks(model) == count_modes() == 0
    assert not monitor.attached


def test_possible_names_do_not_raise() -> None:
    model = nn.Sequential(Block(4), nn.ModuleDict({"act": nn.ReLU()}), nn.Linear(4, 2))
    functions = ("0.relu", "0.relu-2", "re*", "relu", "*", "0.re?u-[12]", "1.act", "1.a*", "0.act", "", "2")
    for name in (*functions, "0.inner", "0.inner-[23]", "0.outer-2"):
        PlasticityMonitor(layers=[name]).attach(model).detach()
