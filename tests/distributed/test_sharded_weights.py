"""A module that FSDP has sharded is, for a while, what it would be without: copies are whole, and it is unharmed."""

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
    """Is called by another method, which FSDP must be told of."""

    def score(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Counting:
    """A hook with a memory."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.calls += 1


def layers(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def hooked() -> nn.Sequential:
    net = layers()
    net.register_forward_hook(Counting())
    net[2].register_forward_hook(Counting())
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "layer by layer": layers,
    "replicated": layers,
    "by columns": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
    "several as one": layers,
    "with a method": lambda: layers(Scoring),
    "with hooks": hooked,
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
    elif name == "several as one":
        fully_shard([module[0], module[2]], **options)
    elif name == "recurrent":
        fully_shard(module.lstm, **options)
    fully_shard(module, **options)
    if name == "with a method":
        register_fsdp_forward_method(module, "score")


def inside(module: nn.Module) -> list[Any]:
    """All that a module is made of, by identity."""

    def identities(value: Any) -> Any:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        return id(value), [(key, id(item)) for key, item in items]

    return [(type(part), {name: identities(value) for name, value in vars(part).items()}) for part in module.modules()]


def full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gradients(module: nn.Module, call: Call, x: Tensor) -> list[Any]:
    """Of what a module returns, and that itself."""
    module.zero_grad()
    output = call(module, x)
    output.square().sum().backward()
    return [output, *(full(parameter.grad) for parameter in module.parameters())]


def counted(module: nn.Module) -> list[int]:
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    return [hook.calls for hook in hooks if isinstance(hook, Counting)]


def same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def facts(name: str) -> dict[str, bool]:
    """What is so of a module; all of it should be."""
    torch.manual_seed(0)
    expected = MODULES[name]()
    sharded: Any = copy.deepcopy(expected)
    shard(name, sharded)
    call: Call = (lambda net, x: net.score(x)) if name == "with a method" else (lambda net, x: net(x))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    wanted, parameters = gradients(expected, call, x), [*sharded.parameters()]
    found = {"trains as it should": same(gradients(sharded, call, x), wanted)}
    sharded.state_dict()  # FSDP has hooks for it from now on
    before, calls = inside(sharded), counted(sharded)
    with torch.no_grad():
        call(sharded, x)  # which leaves parameters gathered
    found["is gathered"] = inside(sharded) != before
    with contextlib.suppress(KeyError), gather_full_parameters(sharded) as wholes:
        copied = copy_module(sharded)
        found["its parameters are found"] = same([wholes[p] for p in parameters], [*expected.parameters()])
        pieces = [sharded_like(p, wholes[p].detach()) for p in parameters]
        raise KeyError
    found["is as before"] = inside(sharded) == before
    with gather_full_parameters(sharded):
        again = copy_module(sharded)
    found["is as before, again"] = inside(sharded) == before
    found["pieces are cut as they are"] = same([p.to_local() for p in pieces], [p.to_local() for p in parameters])
    for number, other in enumerate((copied, again)):
        found[f"copy {number} is of the same kinds"] = [*map(type, other.modules())] == [*map(type, expected.modules())]
        found[f"copy {number} has the same state"] = same(other.state_dict().values(), expected.state_dict().values())
        found[f"copy {number} trains as it should"] = same(gradients(other, call, x), wanted)
        found[f"copy {number} knows nothing of FSDP"] = "_fully_shard." not in str([vars(p) for p in other.modules()])
    found["its hooks have not seen the copies"] = counted(sharded) == [count + 1 for count in calls]
    found["still trains as it should"] = same(gradients(sharded, call, x), wanted)
    return found


def of_all(rank: int) -> dict[str, dict[str, bool]]:
    return {name: facts(name) for name in MODULES}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, bool]]]:
    skip_without_fsdp_on_the_cpu()
    return in_two_processes(of_all)


@pytest.mark.parametrize("name", [*MODULES])
def test_a_sharded_module_is_made_whole_and_left_as_it_was(name: str, found: list[dict[str, dict[str, bool]]]) -> None:
    for facts in found:
        assert len(facts[name]) == 16
        assert [fact for fact, is_so in facts[name].items() if not is_so] == []


def test_nothing_happens_to_a_module_that_is_not_sharded() -> None:
    module = layers()
    before = inside(module)
    with gather_full_parameters(module) as wholes:
        assert inside(module) == before
        assert not wholes
    assert sharded_like(module[0].weight, gradient := torch.ones(7, 4)) is gradient
