"""Restored attributes: collections of every kind, and those that cannot be changed."""

from collections import Counter, OrderedDict, deque
from typing import Any, NoReturn

import torch
from torch import nn

from lightning_plasticity.isolation.attributes import preserve_attributes


class FrozenDict(OrderedDict[str, Any]):
    """A configuration that cannot be updated, like that of diffusers' models."""

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("cannot be updated")


def test_collections_are_restored_in_place() -> None:
    module = nn.Linear(2, 1)
    module.held = held = {"list": [1], "deque": deque([1], maxlen=2), "counter": Counter("a")}
    inner = dict(held)
    with preserve_attributes(module):
        held["list"][0] = 2
        held["deque"].extend([2, 3])
        held["counter"].update("ab")
        held["new"] = None
        module.added = torch.ones(1)
    assert module.held is held
    assert held == {"list": [1], "deque": deque([1]), "counter": Counter("a")}
    assert all(held[name] is inner[name] for name in inner)
    assert not hasattr(module, "added")


def test_frozen_dicts_that_did_not_change_are_left_alone() -> None:
    module = nn.Linear(2, 1)
    module.config = FrozenDict(width=3)
    with preserve_attributes(module):
        module.calls = 1
    assert module.config == {"width": 3}
    assert not hasattr(module, "calls")
