"""A copy of a module that shares nothing with it that either could disturb."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.isolation.state import isolated_rng

Module = TypeVar("Module", bound=nn.Module)
StandIn = Callable[[Any], Any]
"""Takes a value that a module holds on to, returns what the copy holds instead, or ``None`` for a copy of it."""

_NOT_STATE = ("_parameters", "_buffers", "_modules")

IMMUTABLE = (type, ModuleType, str, bytes, int, float, type(None), torch.dtype, torch.device, BuiltinFunctionType)
"""Kinds of values that hold on to nothing, or that nobody changes."""


class UncopyableError(ValueError):
    """A module holds on to something that cannot be copied.

    Args:
        attribute: Dotted name of the attribute.
        value: What it is.
        reason: Why it cannot be copied.
    """

    def __init__(self, attribute: str, value: object, reason: Exception) -> None:
        what = f"attribute {attribute!r} (a {type(value).__name__})" if attribute else "state as a whole"
        super().__init__(f"{what} cannot be copied: {reason}")
        self.can_be_shared = not isinstance(value, nn.Module)  # whose weights would be those of the original


def copy_module(module: Module, stand_in: StandIn | None = None, *, share_uncopyable: bool = False) -> Module:
    """A deep copy, also where :func:`copy.deepcopy` would fail or leave a way back to the original.

    Tensors kept from an earlier step are copied without their graph. Functions that captured the module, or a part of
    it, such as a hook or a lambda kept as attribute, act on the copy, and so do weak references kept as attribute.

    Args:
        module: The module. It is not changed, and no random number is drawn.
        stand_in: What the copy shares or holds instead.
        share_uncopyable: Share what cannot be copied, instead of raising; but no module.

    Raises:
        UncopyableError: If something cannot be copied; it is named.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and any(p.requires_grad for p in part.parameters()):
            raise UncopyableError(name, part, TypeError("torch copies scripted modules without their gradients"))
    memo: dict[int, Any] = {}
    reached = _reached(module, stand_in, memo)
    functions = [value for value in reached if isinstance(value, FunctionType) and _may_lead_back(value)]
    memo.update({id(function): _unfilled(function) for function in functions})
    with isolated_rng():
        try:
            used = dict(memo)
            result = copy.deepcopy(module, used)
        except Exception as error:
            culprits = _uncopyable(module, memo)
            if culprits and not share_uncopyable:
                raise UncopyableError(*culprits[0]) from error
            shared = {**memo, **{id(value): value for _, value, _ in culprits}}
            used = dict(shared)
            try:
                result = copy.deepcopy(module, used)
            except Exception as still:
                raise UncopyableError(*_innermost_uncopyable(module, shared, still)) from still
        for function in functions:
            _fill(used[id(function)], function, used)
        for value in reached:
            _complete(used.get(id(value)), value, used)
    return result


def _state(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if name not in _NOT_STATE}


def _reached(module: nn.Module, stand_in: StandIn | None, memo: dict[int, Any]) -> list[Any]:
    """What a deep copy of a module comes to, each thing once; what is not to be copied gets into its memo instead."""
    found: list[Any] = []
    seen: set[int] = set()
    ahead: list[Any] = [module]
    while ahead:
        value = ahead.pop()
        if id(value) in seen or isinstance(value, IMMUTABLE):
            continue
        seen.add(id(value))
        replacement = None if stand_in is None or isinstance(value, nn.Module) else stand_in(value)
        if replacement is not None:
            memo[id(value)] = replacement
        elif isinstance(value, Tensor) and (not value.is_leaf or _is_sparse_buffer(value)):
            memo[id(value)] = value.detach().clone()
        else:
            found.append(value)
            ahead += referents(value)
    return found


def _is_sparse_buffer(tensor: Tensor) -> bool:
    """Whether a deep copy, which knows only some of their layouts, may fail."""
    return tensor.layout is not torch.strided and not tensor.requires_grad and not isinstance(tensor, nn.Parameter)


def referents(value: Any) -> list[Any]:
    """What a value holds on to."""
    items: list[Any] = []
    if isinstance(value, dict):
        items += [*value, *value.values()]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        items += value
    elif isinstance(value, partial):
        items += [value.func, value.args, value.keywords]
    elif isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    elif isinstance(value, FunctionType):
        items += [*_captured(value), value.__defaults__, value.__kwdefaults__]
    if isinstance(value, defaultdict):
        items.append(value.default_factory)
    if isinstance(getattr(value, "__dict__", None), dict):
        items += vars(value).values()
    kind: Any = type(value)
    for name in _slots(kind):
        with contextlib.suppress(Exception):  # not assigned yet, or of a __getattr__ or property that raises
            items.append(getattr(value, name))
    return items


@lru_cache(maxsize=256)  # asked for every object
def _slots(kind: type) -> list[str]:
    slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    return [name for own in slots for name in ((own,) if isinstance(own, str) else own) if name != "__dict__"]


def _captured(function: FunctionType) -> list[Any]:
    values = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            values.append(cell.cell_contents)
    return values


def _may_lead_back(function: FunctionType) -> bool:
    captured = _captured(function)
    held = (*captured, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    complete = len(captured) == len(function.__closure__ or ())
    return not complete or not all(isinstance(value, IMMUTABLE) for value in held)


def _unfilled(function: FunctionType) -> FunctionType:
    """The same function with captured variables of its own, still empty."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, closure=cells)


def _fill(new: FunctionType, function: FunctionType, memo: dict[int, Any]) -> None:
    """Gives a function copies of what another one holds: variables, defaults and attributes."""
    for cell, old in zip(new.__closure__ or (), function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            cell.cell_contents = _copied(old.cell_contents, memo)
    if function.__defaults__ is not None:
        new.__defaults__ = tuple(_copied(value, memo) for value in function.__defaults__)
    if function.__kwdefaults__ is not None:
        new.__kwdefaults__ = {name: _copied(value, memo) for name, value in function.__kwdefaults__.items()}
    vars(new).update({name: _copied(value, memo) for name, value in vars(function).items()})


def _complete(twin: Any, value: Any, memo: dict[int, Any]) -> None:
    """Brings to the copy of an object the attributes that a deep copy takes over as they are, or leaves out."""
    before, after = getattr(value, "__dict__", None), getattr(twin, "__dict__", None)
    if twin is value or not isinstance(before, dict) or not isinstance(after, dict):
        return
    is_parameter = isinstance(value, nn.Parameter)
    for name, held in list(before.items()):
        if name not in after:
            to_do = is_parameter  # whose copy has none of its attributes
        elif isinstance(held, MethodType):
            to_do = id(held.__func__) in memo
        else:
            to_do = type(held) is weakref.ref and after[name] is held
        if to_do:
            after[name] = _copied(held, memo)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, MethodType):  # of which a deep copy takes over the function
        return MethodType(memo.get(id(value.__func__), value.__func__), _copied(value.__self__, memo))
    if type(value) is weakref.ref:
        return weakref.ref(memo[id(value())]) if id(value()) in memo else value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # held from outside and not to be copied: shared, as it would be without us
        return value


def _innermost_uncopyable(
    module: nn.Module, memo: dict[int, Any], error: Exception
) -> tuple[str, nn.Module, Exception]:
    """The part of a module that cannot be copied although all of its attributes can."""
    found = "", module, error
    for name, part in module.named_modules():  # from the outermost inwards
        try:
            copy.deepcopy(part, dict(memo))
        except Exception as reason:
            found = name, part, reason
    return found


def _uncopyable(module: nn.Module, memo: dict[int, Any]) -> list[tuple[str, Any, Exception]]:
    """The attributes of a module and of what is in it that cannot be copied, and why."""
    found: list[tuple[str, Any, Exception]] = []
    for prefix, part in module.named_modules():
        for name, value in _state(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as reason:
                found.append((f"{prefix}.{name}" if prefix else name, value, reason))
    return found
