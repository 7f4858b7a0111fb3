"""Use one copy of a module for several measurements, as long as a measurement leaves no trace in it."""

from __future__ import annotations

import copyreg
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.isolation.module_copy import referents
from lightning_plasticity.isolation.weights import load_weights, named_tensors

_PYTHON_STATE = (nn.Module, dict, list, tuple, set, frozenset, deque, partial, MethodType, FunctionType)
"""Types whose state is the objects that they refer to."""


class ReusableCopy:
    """A copy of a module that is replaced by a new one when a run has changed more in it than its weights.

    A training step may advance a random number generator, update an average of the weights that is no submodule, or
    count in an object. The next measurement must not see that.
    """

    def __init__(self) -> None:
        self._copy: nn.Module | None = None
        self._state = ObjectState(())

    def discard(self) -> None:
        """Free the memory of the copy."""
        self._copy, self._state = None, ObjectState(())

    def get(
        self,
        make_copy: Callable[[list[Any]], nn.Module],
        module: nn.Module,
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """Return a copy in the state of the module, which is valid until the next call.

        Args:
            make_copy: Copies the module, and appends the objects that the copy consists of to the list.
            module: The module.
            weights: Parameters and buffers of the copy by name; by default those of the module.
        """
        if self._copy is None or not self._state.is_unchanged():
            copied: list[Any] = []
            self._copy = make_copy(copied)
            self._state = ObjectState(copied, weights=named_tensors(self._copy).values())
        load_weights(self._copy, module, named_tensors(module) if weights is None else weights)
        return self._copy


class ObjectState:
    """The state of objects, for comparison with their later state.

    Args:
        objects: The objects.
        weights: Tensors among them whose values do not count.

    Example:
        >>> counts = {"calls": 0}
        >>> state = ObjectState([counts])
        >>> counts["calls"] += 1
        >>> state.is_unchanged()
        False
    """

    def __init__(self, objects: Iterable[Any], weights: Iterable[Tensor] = ()) -> None:
        self._weights = {id(tensor) for tensor in weights}
        self._before = [(value, self._parts(value)) for value in objects]

    def is_unchanged(self) -> bool:
        """Return whether no object has changed."""
        return all(_are_equal(before, self._parts(value)) for value, before in self._before)

    def _parts(self, value: Any) -> list[Any]:
        """Return what the state of an object consists of: referred objects, numbers, or its pickle."""
        if isinstance(value, Tensor):
            attributes = [value.requires_grad, value.dtype, value.grad]
            if id(value) not in self._weights:
                return [*attributes, value.detach().clone()]
            # Loading weights must not write to memory that a run let them refer to.
            return [*attributes, _storage_address(value)]
        if isinstance(value, torch.Generator):
            return [value.get_state()]
        parts = referents(value)
        if not isinstance(value, _PYTHON_STATE) and _has_hidden_state(value):
            try:
                parts.append(pickle.dumps(value))
            except Exception:
                # The state cannot be compared: a new object equals none.
                parts.append(object())
        return parts


def _has_hidden_state(value: Any) -> bool:
    """Return whether attributes may not be all of an object's state, as for a random number generator or an array."""
    cls: Any = type(value)
    is_pickled_by_default = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    return not is_pickled_by_default or hasattr(cls, "__deepcopy__") or cls in copyreg.dispatch_table


def _are_equal(before: list[Any], now: list[Any]) -> bool:
    if len(before) != len(now):
        return False
    differing = [(one, other) for one, other in zip(before, now, strict=True) if one is not other]
    return all(
        (isinstance(one, Tensor) and isinstance(other, Tensor) and _are_equal_tensors(one, other))
        or (isinstance(one, bytes | int) and one == other)
        for one, other in differing
    )


def _storage_address(tensor: Tensor) -> int | None:
    # Tensors of other layouts have no single storage.
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided and not tensor.is_nested else None


def _are_equal_tensors(one: Tensor, other: Tensor) -> bool:
    if one.layout is not torch.strided or one.is_nested:
        return False
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
