"""Tests that ``gather_full_parameters`` turns a sharded module into an unsharded one and back."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.sharded_weights import gather_full_parameters, sharded_like
from lightning_plasticity.isolation.module_copy import copy_module
from tests.helpers.processes import in_two_processes, skip_without_fsdp_on_the_cpu

Call = Callable[[Any, Tensor], Tensor]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.lstm(x[:, None].expand(-1, 2, -1))[0]
        return self.head(hidden[:, -1].clone())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Scoring(nn.Sequential):
    """A network with another forward method, which is registered with FSDP."""

    def score(self, x: Tensor) -> Tensor:
        return super().forward(x)


class CountingHook:
    """A forward hook that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.calls += 1


def layers(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def layers_with_hooks() -> nn.Sequential:
    net = layers()
    net.register_forward_hook(CountingHook())
    net[2].register_forward_hook(CountingHook())
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layer by layer": layers,
    "replicated": layers,
    "by columns": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
    "several as a group": layers,
    "with a method": lambda: layers(Scoring),
    "with hooks": layers_with_hooks,
    "recurrent": Recurrent,
    "tied": Tied,
}


def shard(name: str, module: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (2,))}
    if name == "layer by layer":
        for layer in module[::4]:
            fully_shard(layer, **options)
        options["reshard_after_forward"] = False
    elif name == "replicated":
        options["mesh"] = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    elif name == "by columns":
        options["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.ndim == 2 else None
    elif name == "several as a group":
        fully_shard([module[0], module[2]], **options)
    elif name == "recurrent":
        fully_shard(module.lstm, **options)
    fully_shard(module, **options)
    if name == "with a method":
        register_fsdp_forward_method(module, "score")


def snapshot(module: nn.Module) -> list[Any]:
    """Return the classes of all submodules and the identities of all they hold."""

    def identities(value: Any) -> Any:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        return id(value), [(key, id(item)) for key, item in items]

    return [(type(part), {name: identities(value) for name, value in vars(part).items()}) for part in module.modules()]


def full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def output_and_gradients(module: nn.Module, call: Call, x: Tensor) -> list[Any]:
    """Return the output of a module, and the gradients of its sum of squares for all parameters."""
    module.zero_grad()
    output = call(module, x)
    output.square().sum().backward()
    return [output, *(full(parameter.grad) for parameter in module.parameters())]


def calls_of_hooks(module: nn.Module) -> list[int]:
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    return [hook.calls for hook in hooks if isinstance(hook, CountingHook)]


def equal(tensors: Any, others: Any) -> bool:
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def check(name: str) -> dict[str, bool]:
    """Shard a module, gather its parameters twice, and return the result of each check."""
    torch.manual_seed(0)
    unsharded = MODULES[name]()
    sharded: Any = copy.deepcopy(unsharded)
    shard(name, sharded)
    call: Call = (lambda net, x: net.score(x)) if name == "with a method" else (lambda net, x: net(x))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    expected, parameters = output_and_gradients(unsharded, call, x), [*sharded.parameters()]
    checks = {"trains like the unsharded": equal(output_and_gradients(sharded, call, x), expected)}
    # The first call of state_dict lets FSDP register its hooks for it.
    sharded.state_dict()
    before, calls = snapshot(sharded), calls_of_hooks(sharded)
    with torch.no_grad():
        # A forward pass leaves parameters gathered.
        call(sharded, x)
    checks["is gathered after a forward pass"] = snapshot(sharded) != before
    with contextlib.suppress(KeyError), gather_full_parameters(sharded) as full_parameters:
        copied = copy_module(sharded)
        checks["full parameters equal"] = equal([full_parameters[p] for p in parameters], [*unsharded.parameters()])
        shards = [sharded_like(p, full_parameters[p].detach()) for p in parameters]
        raise KeyError
    checks["is restored after an error"] = snapshot(sharded) == before
    with gather_full_parameters(sharded):
        copied_again = copy_module(sharded)
    checks["is restored"] = snapshot(sharded) == before
    checks["shards equal"] = equal([p.to_local() for p in shards], [p.to_local() for p in parameters])
    for number, other in enumerate((copied, copied_again)):
        checks |= {
            f"copy {number} is of the same classes": [*map(type, other.modules())] == [*map(type, unsharded.modules())],
            f"copy {number} has the same state": equal(other.state_dict().values(), unsharded.state_dict().values()),
            f"copy {number} trains like the unsharded": equal(output_and_gradients(other, call, x), expected),
            f"copy {number} is free of FSDP": "_fully_shard." not in str([vars(p) for p in other.modules()]),
        }
    checks["copies leave hooks alone"] = calls_of_hooks(sharded) == [count + 1 for count in calls]
    checks["still trains like the unsharded"] = equal(output_and_gradients(sharded, call, x), expected)
    return checks


def check_all(rank: int) -> dict[str, dict[str, bool]]:
    return {name: check(name) for name in MODULES}


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict[str, bool]]]:
    skip_without_fsdp_on_the_cpu()
    return in_two_processes(check_all)


@pytest.mark.parametrize("name", [*MODULES])
def test_sharded_module_is_gathered_and_restored(name: str, results: list[dict[str, dict[str, bool]]]) -> None:
    for checks in results:
        assert len(checks[name]) == 16
        assert [check for check, passed in checks[name].items() if not passed] == []


def test_unsharded_module_is_left_alone() -> None:
    module = layers()
    before = snapshot(module)
    with gather_full_parameters(module) as full_parameters:
        assert snapshot(module) == before
        assert not full_parameters
    assert sharded_like(module[0].weight, gradient := torch.ones(7, 4)) is gradient
