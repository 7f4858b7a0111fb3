"""Which dimension of a tensor counts units? Followed from the layers that made it, and back from those that read it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[..., Any]


class Axis:
    """What a dimension of tensors stands for; whether it counts units may turn out later.

    Args:
        parent: The axes of the dimension that this one is a part of.
    """

    def __init__(self, parent: Axes = frozenset()) -> None:
        self.parent = parent
        self.counts_units = False


Axes = frozenset[Axis]
"""What one dimension stands for: several where tensors were added up, nothing where nobody has to know."""

_UNITS = Axis()
_UNITS.counts_units = True
UNITS: Axes = frozenset([_UNITS])
NOTHING: Axes = frozenset()


def functions(names: str) -> set[Function]:
    """Every form in which torch has them: ``F.relu``, ``torch.relu``, ``Tensor.relu``."""
    return {getattr(place, name) for name in names.split() for place in (F, torch, Tensor) if hasattr(place, name)}


CONVOLUTIONS = {getattr(F, f"{kind}{dims}d"): dims for kind in ("conv", "conv_transpose") for dims in (1, 2, 3)}
"""Convolutions, and the number of their spatial dimensions."""

_POOLS = {
    function: int(match[1])
    for place in (F, torch)
    for name, function in vars(place).items()
    if (match := re.fullmatch(r"[a-z_]+_pool([123])d(?:_with_indices)?", name))
}
_SPATIAL = CONVOLUTIONS | _POOLS
_CHANNEL_NORMS = functions("batch_norm instance_norm group_norm")
_LAST_NORMS = functions("layer_norm rms_norm")
NORMS = _CHANNEL_NORMS | _LAST_NORMS

PRODUCTS = functions("matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum")
"""Matrix products, of which it is not certain that one factor holds weights."""

_ON_LAST = {F.linear, F.bilinear, F.multi_head_attention_forward}

MAKERS = {*CONVOLUTIONS, *NORMS, *PRODUCTS, *_ON_LAST}
"""Functions after which it is known which dimension counts units, whatever goes in."""

_VIEWS = functions(
    "transpose permute movedim moveaxis swapaxes swapdims t adjoint squeeze unsqueeze select unbind unfold diagonal"
)
_RESHAPES = functions("view reshape view_as reshape_as flatten unflatten ravel")
_REDUCTIONS = functions("sum mean amax amin max min median norm logsumexp prod nanmean var std mode quantile")
EINSUM = functions("einsum")
_REFLECTED = functions("__rmatmul__")
_OF_ANOTHER_KIND = functions("stack hstack vstack dstack outer kron one_hot diag_embed cov corrcoef fold view_as_real")


def new_axes(axes: Sequence[Axes], dims: Iterable[int], ndim: int) -> tuple[Axes, ...]:
    """The same, with an axis of its own for each of these dimensions that stands for nothing yet."""
    named = list(axes) or [NOTHING] * ndim
    for dim in dims:
        named[dim] = named[dim] or frozenset([Axis()])
    return tuple(named)


def last_counts_units(ndim: int) -> tuple[Axes, ...]:
    """Of so many dimensions the last one counts units."""
    return (*[NOTHING] * (ndim - 1), UNITS)


def counting_units(axes: Sequence[Axes]) -> int | None:
    """The dimension that counts units, if it is known; the last one of several."""
    for dim in reversed(range(len(axes))):
        if any(axis.counts_units for axis in axes[dim]):
            return dim
    return None


def is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def infer_unit_dim(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    known: Sequence[tuple[Tensor, Sequence[Axes]]],
) -> None:
    """Learns from what a function reads which axes count units."""
    if not known or (func not in MAKERS and func not in _POOLS):
        return
    read, dim, _ = _units_of_layer(func, args, kwargs, inputs)
    for tensor, axes in known:
        if tensor is read and dim is not None and -dim <= len(axes):
            for axis in axes[dim]:
                axis.counts_units = True


def axes_after(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    output: Tensor,
    known: Sequence[tuple[Tensor, Sequence[Axes]]],
) -> Sequence[Axes]:
    """What the dimensions of a result stand for, by the function and by those of its inputs; empty if unknown."""
    if output.layout is not torch.strided or output.is_nested:  # its dimensions are not what they seem
        return ()
    if func in NORMS and known and counting_units(known[0][1]) is not None:
        return known[0][1]  # a norm over positions or tokens does not make units of them
    if func in MAKERS:
        dim = _units_of_layer(func, args, kwargs, inputs)[2]
        if dim is not None and -dim <= output.ndim:
            return [UNITS if other - output.ndim == dim else NOTHING for other in range(output.ndim)]
        if func in PRODUCTS:
            return _product(factors_of(func, inputs), output, known) if func not in EINSUM else ()
        if func not in NORMS:
            return ()
    return _axes_of_result(func, args, kwargs, output, known) if known else ()


def _axes_of_result(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Tensor,
    known: Sequence[tuple[Tensor, Sequence[Axes]]],
) -> Sequence[Axes]:
    """What the dimensions of a result stand for, by those of the inputs; empty if nothing is known."""
    tensor, axes = known[0]
    shape = output.shape
    if func in _RESHAPES:
        return _reshaped(tensor, shape, axes)
    if func in _VIEWS or (getattr(func, "__name__", None) == "__get__" and len(args) and args[0] is tensor):
        return _viewed(tensor, output, axes)
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if all(isinstance(item, int | slice) or item is None or item is Ellipsis for item in index):
            return _viewed(tensor, output, axes)
    if func in _OF_ANOTHER_KIND:
        return ()
    if output.ndim < tensor.ndim:
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = [dims] if isinstance(dims, int) else dims
        if func not in _REDUCTIONS or not isinstance(dims, tuple | list) or len(dims) + output.ndim != tensor.ndim:
            return ()
        gone = {dim % tensor.ndim for dim in dims}
        return [names for dim, names in enumerate(axes) if dim not in gone]
    if len(known) == 1 and output.ndim == tensor.ndim:
        return axes
    return _broadcast(shape, known)


def _product(
    factors: Sequence[Tensor], output: Tensor, known: Sequence[tuple[Tensor, Sequence[Axes]]]
) -> Sequence[Axes]:
    """Of a matrix product without weights: rows are those of the left factor, columns those of the right one."""
    left, right = (next((axes for tensor, axes in known if tensor is factor), ()) for factor in factors)
    if min(factor.ndim for factor in factors) < 2:
        return ()
    ends = left[-2] if left else NOTHING, right[-1] if right else NOTHING
    return [*[NOTHING] * (output.ndim - 2), *ends]


def _broadcast(shape: Sequence[int], known: Sequence[tuple[Tensor, Sequence[Axes]]]) -> Sequence[Axes]:
    """Of several tensors whose last dimensions correspond."""
    result: list[Axes] = [NOTHING] * len(shape)
    for tensor, axes in known:
        for from_end in range(1, min(len(axes), len(shape)) + 1):
            if axes[-from_end] and (tensor.shape[-from_end] != 1 or shape[-from_end] == 1):
                result[-from_end] |= axes[-from_end]
    for dim, names in enumerate(result):
        if len(names) > 1 and any(axis.counts_units for axis in names):
            for axis in names:
                axis.counts_units = True
            result[dim] = UNITS
    return result


def _viewed(tensor: Tensor, output: Tensor, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Of the same memory looked at in another way: the step from one number to the next tells the dimensions apart."""
    by_step: dict[int, Axes] = {}
    for step, size, names in zip(tensor.stride(), tensor.shape, axes, strict=True):
        if size > 1:
            by_step[step] = NOTHING if step in by_step else names
    steps = zip(output.stride(), output.shape, strict=True)
    return [by_step.get(step, NOTHING) if size > 1 else NOTHING for step, size in steps]


def _reshaped(tensor: Tensor, shape: Sequence[int], axes: Sequence[Axes]) -> Sequence[Axes]:
    """Of the same numbers in the same order: dimensions may be split, and merged if they are parts of one."""
    if math.prod(shape) != tensor.numel() or not tensor.numel():
        return ()
    result: list[Axes] = [NOTHING] * len(shape)
    before = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    after = [dim for dim, size in enumerate(shape) if size > 1]
    while before and after:
        merged, split = [before.pop(0)], [after.pop(0)]
        while (ours := math.prod(tensor.shape[dim] for dim in merged)) != (
            theirs := math.prod(shape[dim] for dim in split)
        ):
            if ours < theirs:
                merged.append(before.pop(0))
            else:
                split.append(after.pop(0))
        names = axes[merged[0]]
        if len(merged) > 1:
            parents = {axis.parent for dim in merged for axis in axes[dim] or [_UNITS]}
            names = parents.pop() if len(parents) == 1 else NOTHING
        for dim in split:
            result[dim] = names if len(split) == 1 or not names else frozenset([Axis(parent=names)])
    return result


def _units_of_layer(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, int | None, int | None]:
    """The tensor in which a function reads units, the dimension that counts them, and that of those that it makes.

    Dimensions are counted from the end, and ``None`` where that is not known.
    """
    first = inputs[0]
    if func in _SPATIAL:
        return first, -1 - _SPATIAL[func], -1 - _SPATIAL[func]
    if func in _ON_LAST:
        return first, -1, -1
    if func in _CHANNEL_NORMS:
        return first, 1 - first.ndim, 1 - first.ndim
    if func in _LAST_NORMS:
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return (first, -1, -1) if len(shape) == 1 else (None, None, None)
    if func in EINSUM:
        return _units_of_einsum(args[0], inputs)
    left, right = factors_of(func, inputs)
    if is_weight(right) and right.ndim > 1:
        return left, -1, -1
    return (right, -2, -2) if is_weight(left) and right.ndim > 1 else (None, None, None)


def weighs_numbers(equation: Any, factors: Sequence[Tensor], followed: Collection[int]) -> bool:
    """Whether an einsum is but a sum of numbers, each with a number of its own: that of a loss with its targets."""
    terms = equation.replace(" ", "").partition("->")[0].split(",") if isinstance(equation, str) else []
    if len(terms) != len(factors):
        return False
    ours = {letter for term, factor in zip(terms, factors, strict=True) if id(factor) in followed for letter in term}
    return all(
        id(factor) in followed or (not is_weight(factor) and ours <= {*term})
        for term, factor in zip(terms, factors, strict=True)
    )


def factors_of(func: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The two of a matrix product."""
    return inputs[1::-1] if func in _REFLECTED else inputs[-2:]


def _units_of_einsum(equation: Any, factors: Sequence[Tensor]) -> tuple[Tensor | None, int | None, int | None]:
    """The factor that is no weight, its dimension that is summed with a weight, and the result's that comes from one.

    Dimensions are counted from the end, and ``None`` if there is no such, or more than one.
    """
    if not isinstance(equation, str):  # torch has another way to write it
        return None, None, None
    left, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = left.split(",")
    weights = [is_weight(factor) for factor in factors]
    if len(terms) != len(factors) or sum(weights) != len(weights) - 1 or not result:
        return None, None, None
    of_weights = {letter for term, is_one in zip(terms, weights, strict=True) if is_one for letter in term} - {"."}
    read = terms[weights.index(False)]
    summed = [position - len(read) for position, letter in enumerate(read) if letter in of_weights - {*result}]
    made = [position - len(result) for position, letter in enumerate(result) if letter in of_weights - {*read}]
    return factors[weights.index(False)], summed[0] if len(summed) == 1 else None, made[0] if len(made) == 1 else None
