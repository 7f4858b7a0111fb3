"""Networks compiled by torch.compile or TorchScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor
from tests.helpers.modules import Classifier, loader, trainer
from tests.helpers.monitored import Block, Functional, X, count_hooks, count_modes, measured_layers, mlp


def compiled_network() -> nn.Module:
    return torch.compile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), backend="eager")  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.compile(backend="eager")
    return model


def compiled_method() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model


class WithForward(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def unwrapped_by_trainer() -> nn.Module:
    module = WithForward()
    trainer(max_epochs=0).fit(torch.compile(module, backend="eager"), loader())
    return module


def compiled_part() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.compile(Block(4), backend="eager"), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("make", "where", "layers"),
    [
        (compiled_network, "the network itself", ["0"]),
        (compiled_in_place, "the network itself", ["0"]),
        (compiled_method, "the network itself", ["0"]),
        (unwrapped_by_trainer, "the network itself", ["net.0"]),
        (compiled_part, "'1'", ["1.inner", "1.outer"]),
    ],
)
def test_compiled_modules_are_refused_or_run_uncompiled(
    make: Callable[[], nn.Module], where: str, layers: list[str]
) -> None:
    model = make()
    # The compiler warns about inputs in the middle of a graph.
    with torch.no_grad():
        model(X)
    with pytest.raises(RuntimeError, match=rf"cannot observe compiled modules \({where}\).*compiled='eager'"):
        PlasticityMonitor(model).attach()
    assert count_hooks(model) == count_modes() == 0
    assert measured_layers(model, X, compiled="eager") == layers
    assert count_hooks(model) == count_modes() == 0
    assert torch.compiler.is_compiling() is False
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_functions_in_a_network_warn() -> None:
    function = torch.compile(lambda x: F.relu(x) * 2, backend="aot_eager")
    model = Functional(torch.relu)
    model.activation = function
    monitor = PlasticityMonitor(model)
    monitor.attach()
    # The compiler warns about inputs in the middle of a graph.
    with torch.no_grad():
        model(X)
    with pytest.warns(UserWarning, match="code compiled by torch.compile has run while PlasticityMonitor was attached"):
        monitor.detach()
    assert monitor.layers == {}
    assert measured_layers(model, X, compiled="eager") == ["hidden"]


def test_scripted_networks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot observe TorchScript"):
        PlasticityMonitor(torch.jit.trace(mlp(8), X)).attach()
