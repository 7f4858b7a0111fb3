"""Copy a module so that running the copy cannot change the original, and vice versa."""

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
"""Maps an object that a module refers to onto the object to put into the copy; ``None`` means a copy of it."""

IMMUTABLE = (type, ModuleType, str, bytes, int, float, type(None), torch.dtype, torch.device, BuiltinFunctionType)
"""Types whose instances refer to nothing that a module could change."""


class UncopyableError(ValueError):
    """A module refers to an object that cannot be copied.

    Args:
        attribute: Dotted name of the attribute; empty for the module itself.
        value: The object.
        reason: The error that the attempt to copy it raised.
    """

    def __init__(self, attribute: str, value: object, reason: Exception) -> None:
        subject = f"attribute {attribute!r} (a {type(value).__name__})" if attribute else "state as a whole"
        super().__init__(f"{subject} cannot be copied: {reason}")
        # A shared module would be run and changed with the weights of the original.
        self.can_be_shared = not isinstance(value, nn.Module)


def copy_module(
    module: Module,
    stand_in: StandIn | None = None,
    *,
    share_uncopyable: bool = False,
    copied: list[Any] | None = None,
) -> Module:
    """Return a deep copy of a module that holds no reference to the original.

    It succeeds where :func:`copy.deepcopy` fails or leaves references to the original: tensors with a graph are copied
    without it, and functions with a closure over the module or a part of it, such as hooks or lambdas kept as
    attributes, as well as weak references kept as attributes, refer to the copy.

    Args:
        module: The module. It is not changed, and no random number is drawn.
        stand_in: Returns what the copy refers to in place of an object, or ``None`` for a copy of the object.
        share_uncopyable: Share objects that cannot be copied, except modules, instead of raising.
        copied: The objects that the copy consists of, and does not share with the module, are appended to this list.

    Raises:
        UncopyableError: If an object cannot be copied.
    """
    for name, submodule in module.named_modules():
        if isinstance(submodule, torch.jit.ScriptModule) and any(p.requires_grad for p in submodule.parameters()):
            raise UncopyableError(name, submodule, TypeError("torch copies scripted modules without their gradients"))
    memo: dict[int, Any] = {}
    reachable = _reachable_objects(module, stand_in, memo)
    functions = [value for value in reachable if isinstance(value, FunctionType) and _may_refer_to_module(value)]
    memo.update({id(function): _clone_with_empty_closure(function) for function in functions})
    with isolated_rng():
        try:
            copies = dict(memo)
            result = copy.deepcopy(module, copies)
        except Exception as error:
            uncopyable = _find_uncopyable(module, memo)
            if uncopyable and not share_uncopyable:
                raise UncopyableError(*uncopyable[0]) from error
            memo_with_shared = {**memo, **{id(value): value for _, value, _ in uncopyable}}
            copies = dict(memo_with_shared)
            try:
                result = copy.deepcopy(module, copies)
            except Exception as second_error:
                culprit = _find_uncopyable_submodule(module, memo_with_shared, second_error)
                raise UncopyableError(*culprit) from second_error
        for function in functions:
            _fill_closure(copies[id(function)], function, copies)
        for value in reachable:
            _copy_skipped_attributes(value, copies.get(id(value)), copies)
    if copied is not None:
        # The memo holds clones and stand-ins, of which some are the shared objects themselves.
        pairs = [*memo.items(), *((id(value), copies.get(id(value))) for value in reachable)]
        copied += {id(value): value for original, value in pairs if id(value) != original}.values()
    return result


def _reachable_objects(module: nn.Module, stand_in: StandIn | None, memo: dict[int, Any]) -> list[Any]:
    """Return the objects that a deep copy of the module reaches, once each.

    Stand-ins, and clones of the tensors that :func:`copy.deepcopy` cannot copy, are added to the memo instead.
    """
    reachable: list[Any] = []
    seen: set[int] = set()
    pending: list[Any] = [module]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, IMMUTABLE):
            continue
        seen.add(id(value))
        replacement = None if stand_in is None or isinstance(value, nn.Module) else stand_in(value)
        if replacement is not None:
            memo[id(value)] = replacement
        elif isinstance(value, Tensor) and (not value.is_leaf or _is_sparse_buffer(value)):
            memo[id(value)] = value.detach().clone()
        else:
            reachable.append(value)
            pending += referents(value)
    return reachable


def _is_sparse_buffer(tensor: Tensor) -> bool:
    """Return whether a tensor is a sparse buffer: :func:`copy.deepcopy` does not support all sparse layouts."""
    return tensor.layout is not torch.strided and not tensor.requires_grad and not isinstance(tensor, nn.Parameter)


def referents(value: Any) -> list[Any]:
    """Return the objects that a value refers to: items, attributes, slots, captured variables and defaults."""
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
        items += [*_captured_values(value), value.__defaults__, value.__kwdefaults__]
    if isinstance(value, defaultdict):
        items.append(value.default_factory)
    if isinstance(getattr(value, "__dict__", None), dict):
        items += vars(value).values()
    cls: Any = type(value)
    for name in _slots(cls):
        # The slot may not be assigned yet, or be shadowed by a property that raises any error.
        with contextlib.suppress(Exception):
            items.append(getattr(value, name))
    return items


# Cached, since it is called for every object.
@lru_cache(maxsize=256)
def _slots(cls: type) -> list[str]:
    declared = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return [name for names in declared for name in ([names] if isinstance(names, str) else names) if name != "__dict__"]


def _captured_values(function: FunctionType) -> list[Any]:
    values = []
    for cell in function.__closure__ or ():
        # The variable may not be assigned yet.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    return values


def _may_refer_to_module(function: FunctionType) -> bool:
    captured = _captured_values(function)
    referred = (*captured, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    all_assigned = len(captured) == len(function.__closure__ or ())
    return not all_assigned or not all(isinstance(value, IMMUTABLE) for value in referred)


def _clone_with_empty_closure(function: FunctionType) -> FunctionType:
    """Return the same function with new, empty cells; :func:`_fill_closure` fills them once the copies exist."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    return FunctionType(function.__code__, function.__globals__, function.__name__, closure=cells)


def _fill_closure(clone: FunctionType, function: FunctionType, memo: dict[int, Any]) -> None:
    """Give the clone copies of the captured variables, defaults and attributes of the function."""
    for cell, original_cell in zip(clone.__closure__ or (), function.__closure__ or (), strict=True):
        # The variable may not be assigned yet.
        with contextlib.suppress(ValueError):
            cell.cell_contents = _copy_or_share(original_cell.cell_contents, memo)
    if function.__defaults__ is not None:
        clone.__defaults__ = tuple(_copy_or_share(value, memo) for value in function.__defaults__)
    if function.__kwdefaults__ is not None:
        clone.__kwdefaults__ = {name: _copy_or_share(value, memo) for name, value in function.__kwdefaults__.items()}
    vars(clone).update({name: _copy_or_share(value, memo) for name, value in vars(function).items()})


def _copy_skipped_attributes(original: Any, copied: Any, memo: dict[int, Any]) -> None:
    """Copy the attributes that :func:`copy.deepcopy` shares or leaves out.

    It leaves out the attributes of parameters, and shares weak references and the functions of bound methods.
    """
    before, after = getattr(original, "__dict__", None), getattr(copied, "__dict__", None)
    if copied is original or not isinstance(before, dict) or not isinstance(after, dict):
        return
    for name, value in list(before.items()):
        if name not in after:
            skipped = isinstance(original, nn.Parameter)
        elif isinstance(value, MethodType):
            skipped = id(value.__func__) in memo
        else:
            skipped = type(value) is weakref.ref and after[name] is value
        if skipped:
            after[name] = _copy_or_share(value, memo)


def _copy_or_share(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a value, or the value itself if it cannot be copied."""
    # deepcopy copies only __self__ of a method, and shares the object of a weak reference.
    if isinstance(value, MethodType):
        return MethodType(memo.get(id(value.__func__), value.__func__), _copy_or_share(value.__self__, memo))
    if type(value) is weakref.ref:
        return weakref.ref(memo[id(value())]) if id(value()) in memo else value
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        # Share the value, as deepcopy shares functions with everything that they capture.
        return value


def _find_uncopyable(module: nn.Module, memo: dict[int, Any]) -> list[tuple[str, Any, Exception]]:
    """Return the attributes of the module and its submodules that cannot be copied: names, values and errors."""
    uncopyable: list[tuple[str, Any, Exception]] = []
    for prefix, submodule in module.named_modules():
        for name, value in _plain_attributes(submodule).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as error:
                uncopyable.append((f"{prefix}.{name}" if prefix else name, value, error))
    return uncopyable


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module other than its parameters, buffers and submodules."""
    registries = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in registries}


def _find_uncopyable_submodule(
    module: nn.Module, memo: dict[int, Any], error: Exception
) -> tuple[str, nn.Module, Exception]:
    """Return the innermost submodule that cannot be copied although all of its attributes can."""
    innermost = "", module, error
    # named_modules() yields parents before their children.
    for name, submodule in module.named_modules():
        try:
            copy.deepcopy(submodule, dict(memo))
        except Exception as reason:
            innermost = name, submodule, reason
    return innermost
