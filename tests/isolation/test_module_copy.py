"""Check that a copied module holds no reference to the original."""

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.isolation.module_copy import UncopyableError, copy_module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_closures_over_module_act_on_copy() -> None:
    module = Net()
    outside: list[int] = []
    module.encode = lambda x: module.layer(x)
    module.layer.register_forward_hook(lambda m, inputs, output: module.outputs.append(output))
    module.layer.register_forward_pre_hook(lambda m, inputs: outside.append(1))
    copied = copy_module(module)
    with torch.no_grad():
        copied.layer.weight.fill_(3)
        copied.layer.bias.fill_(0)
    assert torch.equal(copied.encode(torch.ones(1, 2)), torch.full((1, 2), 6.0))
    assert (len(copied.outputs), len(module.outputs), outside) == (1, 0, [])
    module.encode(torch.ones(1, 2))
    assert (len(copied.outputs), len(module.outputs), outside) == (1, 1, [1])


def test_nested_closures_act_on_copy() -> None:
    module = Net()
    inner = lambda x: module.layer(x)  # noqa: E731
    module.outer = lambda x: inner(x)
    copied = copy_module(module)
    with torch.no_grad():
        copied.layer.weight.zero_()
        copied.layer.bias.zero_()
    assert copied.outer(torch.ones(1, 2)).abs().sum() == 0


class Helper:
    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self.keep = keep

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.keep(output)


def by_partial(net: Net) -> None:
    def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        net.outputs.append(output)

    net.layer.register_forward_hook(partial(keep, "layer"))


def by_default(net: Net) -> None:
    net.layer.register_forward_hook(lambda module, inputs, output, outputs=net.outputs: outputs.append(output))


def by_keyword_default(net: Net) -> None:
    def keep(module: nn.Module, inputs: Any, output: Tensor, *, net: Net = net) -> None:
        net.outputs.append(output)

    net.layer.register_forward_hook(keep)


def by_weak_reference(net: Net) -> None:
    net.layer.parent = weakref.ref(net)
    net.layer.register_forward_hook(lambda layer, inputs, output: layer.parent().outputs.append(output))


def by_closure_over_weak_reference(net: Net) -> None:
    parent = weakref.ref(net)
    net.layer.register_forward_hook(lambda layer, inputs, output: parent().outputs.append(output))


def by_bound_method_of_helper(net: Net) -> None:
    net.layer.register_forward_hook(Helper(lambda output: net.outputs.append(output)).hook)


def by_replaced_forward(net: Net) -> None:
    before = net.layer.forward

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        net.outputs.append(x)
        return before(x)

    net.layer.forward = MethodType(forward, net.layer)


def by_default_factory(net: Net) -> None:
    net.found = defaultdict(lambda: net.outputs.append(torch.ones(1)))
    net.layer.register_forward_hook(lambda *_: net.found[len(net.outputs)])


def by_hidden_module(net: Net) -> None:
    net.hidden = [nn.Identity()]
    net.hidden[0].register_forward_hook(lambda module, inputs, output: net.outputs.append(output))
    net.layer.register_forward_hook(lambda module, inputs, output: net.hidden[0](output))


@pytest.mark.parametrize(
    "add_reference",
    [
        by_partial,
        by_default,
        by_keyword_default,
        by_weak_reference,
        by_closure_over_weak_reference,
        by_bound_method_of_helper,
        by_replaced_forward,
        by_default_factory,
        by_hidden_module,
    ],
)
def test_running_copy_changes_only_the_copy(add_reference: Callable[[Net], None]) -> None:
    module = Net()
    add_reference(module)
    copied = copy_module(module)
    with torch.no_grad():
        copied.layer.weight.fill_(3)
        copied.layer.bias.fill_(0)
        assert torch.equal(copied(torch.ones(1, 2)), torch.full((1, 2), 6.0))
    assert (len(copied.outputs), len(module.outputs)) == (1, 0)
    module(torch.ones(1, 2))
    assert (len(copied.outputs), len(module.outputs)) == (1, 1)


def test_functions_without_closure_are_shared() -> None:
    module = Net()
    module.activation = nn.functional.relu
    assert copy_module(module).activation is nn.functional.relu


def test_weak_references_to_outside_objects_are_shared() -> None:
    module, outside = Net(), nn.Linear(2, 2)
    module.outside = weakref.ref(outside)
    assert copy_module(module).outside() is outside


def test_parameters_and_buffers_keep_their_attributes() -> None:
    module = Net()
    module.register_buffer("mean", torch.zeros(2))
    module.layer.weight.gain, module.mean.gain = 2.0, 3.0
    module.layer.weight.of = [module.layer]
    copied = copy_module(module)
    assert (copied.layer.weight.gain, copied.mean.gain) == (2.0, 3.0)
    assert copied.layer.weight.of[0] is copied.layer


@dataclass(slots=True)
class Slots:
    t: Tensor


class Keeper(nn.Module):
    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.t = t

    def hook(self) -> None: ...


@pytest.mark.parametrize(
    ("store", "get"),
    [
        (lambda t: t, lambda kept: kept),
        (lambda t: [t], lambda kept: kept[0]),
        (lambda t: {"a": {"b": t}}, lambda kept: kept["a"]["b"]),
        (lambda t: deque([t]), lambda kept: kept[0]),
        (lambda t: SimpleNamespace(t=(t,)), lambda kept: kept.t[0]),
        (lambda t: Slots(t), lambda kept: kept.t),
        (lambda t: partial(Slots, t), lambda kept: kept.args[0]),
        (lambda t: Keeper(t).hook, lambda kept: kept.__self__.t),
        (lambda t: [Keeper(t)], lambda kept: kept[0].t),
    ],
    ids=["itself", "list", "dicts", "deque", "namespace", "slots", "partial", "bound method", "hidden module"],
)
def test_tensors_with_graph_are_copied_without_it(store: Any, get: Any) -> None:
    module = Net()
    tensor = module(torch.ones(1, 2))
    module.kept, module.also = store(tensor), {"x": store(tensor)}
    copied = copy_module(module)
    for tensor_copy in (get(copied.kept), get(copied.also["x"])):
        assert torch.equal(tensor_copy, tensor)
        assert not tensor_copy.requires_grad
    tensor_copy.zero_()
    assert tensor.abs().sum() > 0


def test_buffer_with_graph_is_copied_without_it() -> None:
    module = Net()
    module.register_buffer("hidden", module(torch.ones(1, 2)))
    copied = copy_module(module)
    assert torch.equal(copied.hidden, module.hidden)
    assert not copied.hidden.requires_grad
    assert copied.hidden is not module.hidden


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_buffers_are_copied(layout: torch.layout) -> None:
    module = Net()
    module.register_buffer("adjacency", torch.eye(2).to_sparse(layout=layout))
    copied = copy_module(module)
    assert copied.adjacency is not module.adjacency
    assert torch.equal(copied.adjacency.to_dense(), torch.eye(2))


def test_no_random_number_is_drawn() -> None:
    class Drawing:
        def __deepcopy__(self, memo: Any) -> "Drawing":
            torch.rand(1)
            return self

    module, state = Net(), torch.get_rng_state()
    module.drawing = Drawing()
    copy_module(module)
    assert torch.equal(torch.get_rng_state(), state)


def test_uncopyable_attribute_raises_or_is_shared() -> None:
    module = Net()
    module.layer.lock = threading.Lock()
    with pytest.raises(UncopyableError, match=r"attribute 'layer.lock' \(a lock\) cannot be copied"):
        copy_module(module)
    copied = copy_module(module, share_uncopyable=True)
    assert copied.layer.lock is module.layer.lock
    assert copied.layer.weight is not module.layer.weight


class Unique(nn.Linear):
    def __deepcopy__(self, memo: Any) -> "Unique":
        raise TypeError("cannot be copied")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("locked", [False, True])
def test_uncopyable_submodules_are_never_shared(share: bool, locked: bool) -> None:
    module = nn.Sequential(Net(), nn.Sequential(nn.ReLU(), Unique(2, 2)))
    if locked:
        module[0].lock = threading.Lock()
    name = "0.lock" if locked and not share else "1.1"
    with pytest.raises(UncopyableError, match=f"attribute '{name}' .* cannot be copied") as caught:
        copy_module(module, share_uncopyable=share)
    assert caught.value.can_be_shared == (name == "0.lock")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_scripted_modules_with_gradients_raise() -> None:
    """torch copies scripted modules without the gradients of their parameters."""
    module = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(UncopyableError, match=r"attribute '0' .* without their gradients"):
        copy_module(module)
    module.requires_grad_(False)
    copy_module(module)


def test_stand_ins_replace_copies() -> None:
    module = Net()
    module.data = {"set": torch.utils.data.TensorDataset(torch.ones(3))}
    copied = copy_module(module, lambda value: value if isinstance(value, torch.utils.data.Dataset) else None)
    assert copied.data is not module.data
    assert copied.data["set"] is module.data["set"]
