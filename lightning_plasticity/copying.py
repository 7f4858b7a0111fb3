"""A copy of a module that shares nothing with it that either could disturb."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.isolation import isolated_rng

Module = TypeVar("Module", bound=nn.Module)
StandIn = Callable[[Any], Any]
"""Takes a value that a module holds on to, returns what the copy holds instead, or ``None`` for a copy of it."""

_NOT_STATE = ("_parameters", "_buffers", "_modules")


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
    it, such as a hook or a lambda kept as attribute, act on the copy.

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
    functions: dict[int, FunctionType] = {}
    seen: set[int] = set()
    for part in module.modules():
        for value in (*_state(part).values(), *part._buffers.values()):
            _prepare(value, stand_in, memo, functions, seen)
    rebound = {key: _rebindable(function) for key, function in functions.items()}
    memo.update({key: new for key, (new, _) in rebound.items()})
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
        for key, (_, cells) in rebound.items():
            for cell, old in zip(cells, functions[key].__closure__ or (), strict=True):
                _fill(cell, old, used)
    return result


def _state(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if name not in _NOT_STATE}


def _prepare(
    value: Any, stand_in: StandIn | None, memo: dict[int, Any], functions: dict[int, FunctionType], seen: set[int]
) -> None:
    """Puts into the memo of a deep copy what is not to be copied, and finds the functions with captured variables."""
    if id(value) in seen or isinstance(value, type | ModuleType | nn.Module | str | bytes | int | float):
        return
    seen.add(id(value))
    replacement = stand_in(value) if stand_in is not None else None
    if replacement is not None:
        memo[id(value)] = replacement
    elif isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    elif isinstance(value, FunctionType):
        if value.__closure__:
            functions[id(value)] = value
            for cell in value.__closure__:
                with contextlib.suppress(ValueError):  # not assigned yet
                    _prepare(cell.cell_contents, stand_in, memo, functions, seen)
    else:
        for item in _items(value):
            _prepare(item, stand_in, memo, functions, seen)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        yield from list(value)
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from list(vars(value).values())


def _rebindable(function: FunctionType) -> tuple[FunctionType, tuple[CellType, ...]]:
    """The same function with captured variables of its own, still empty."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new, cells


def _fill(cell: CellType, old: CellType, memo: dict[int, Any]) -> None:
    try:
        content = old.cell_contents
    except ValueError:  # not assigned yet
        return
    try:
        cell.cell_contents = copy.deepcopy(content, memo)
    except Exception:  # captured from outside and not to be copied: shared, as it would be without us
        cell.cell_contents = content


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
