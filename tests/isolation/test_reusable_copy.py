"""A copy serves for several measurements as long as nothing but its weights changes."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.reusable_copy import ObjectState, ReusableCopy


class Note:
    """A plain object."""

    text = ""


CHANGES: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "dict": ({}, lambda value: value.update(a=1)),
    "list": ([1], lambda value: value.append(2)),
    "set": ({1}, lambda value: value.add(2)),
    "object": (Note(), lambda value: setattr(value, "text", "a")),
    "tensor": (torch.zeros(2), lambda value: value.data.add_(1)),
    "sparse tensor": (torch.eye(2).to_sparse(), lambda value: None),
    "array": (np.zeros(2), lambda value: np.add(value, 1, out=value)),
    "torch generator": (torch.Generator(), lambda value: torch.rand(1, generator=value)),
    "numpy generator": (np.random.default_rng(0), lambda value: value.random()),
    "random": (random.Random(0), lambda value: value.random()),
    "bytearray": (bytearray(b"a"), lambda value: value.append(0)),
    "frozen parameter": (nn.Parameter(torch.zeros(2)), lambda value: value.requires_grad_(False)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_of_objects_are_noticed(kind: str) -> None:
    value, change = CHANGES[kind]
    state = ObjectState([value])
    # Sparse tensors cannot be compared: they count as changed.
    assert state.is_unchanged() == (kind != "sparse tensor")
    change(value)
    assert not state.is_unchanged()


def test_values_of_weights_do_not_count() -> None:
    weight = nn.Parameter(torch.zeros(2))
    state = ObjectState([weight], weights=[weight])
    with torch.no_grad():
        weight.fill_(1)
    assert state.is_unchanged()


def test_copy_is_used_again_with_other_weights() -> None:
    module, reusable = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), ReusableCopy()
    copies: list[nn.Module] = []

    def make_copy(copied: list[Any]) -> nn.Module:
        copies.append(copy_module(module, copied=copied))
        return copies[-1]

    first = reusable.get(make_copy, module)
    first(torch.ones(4, 2)).sum().backward()
    first.zero_grad(set_to_none=True)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    assert reusable.get(make_copy, module, zeros) is first
    assert not any(tensor.any() for tensor in first.state_dict().values())
    assert reusable.get(make_copy, module) is first
    for name, tensor in module.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor)
    first.calls = [1]
    assert reusable.get(make_copy, module) is not first
    assert len(copies) == 2


def test_memory_that_a_weight_was_pointed_at_is_not_overwritten() -> None:
    """A training step may let a parameter refer to a tensor that the copy shares with the run."""
    shared = torch.ones(1)
    module, reusable = nn.Linear(2, 1), ReusableCopy()
    copy = reusable.get(lambda copied: copy_module(module, copied=copied), module)
    copy.bias.data = shared
    reusable.get(lambda copied: copy_module(module, copied=copied), module)
    assert torch.equal(shared, torch.ones(1))
