"""Infer the dimension of a tensor that counts units, from the layers that made the tensor and from those that read it.

Every dimension of a tensor stands for a set of axes. Axes are passed on by functions, so that a layer which reads units
along a dimension determines that dimension in all earlier tensors with the same axis.
"""

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
    """An axis that dimensions of several tensors share. Whether it counts units may become known later.

    Args:
        parent: The axes of the dimension that it was split from.
    """

    def __init__(self, parent: Axes = frozenset()) -> None:
        self.parent = parent
        self.counts_units = False


Axes = frozenset[Axis]
"""The axes of one dimension: several where tensors were added, none where they cannot count units."""

_UNITS = Axis()
_UNITS.counts_units = True
UNITS: Axes = frozenset([_UNITS])
NOTHING: Axes = frozenset()


def functions(names: str) -> set[Function]:
    """Return every form of these functions in torch: ``F.relu``, ``torch.relu``, ``Tensor.relu``."""
    namespaces = (F, torch, Tensor)
    return {getattr(space, name) for name in names.split() for space in namespaces if hasattr(space, name)}


CONVOLUTIONS = {getattr(F, f"{kind}{dims}d"): dims for kind in ("conv", "conv_transpose") for dims in (1, 2, 3)}
"""The number of spatial dimensions by convolution function."""

_POOLS = {
    function: int(match[1])
    for namespace in (F, torch)
    for name, function in vars(namespace).items()
    if (match := re.fullmatch(r"[a-z_]+_pool([123])d(?:_with_indices)?", name))
}
_SPATIAL = CONVOLUTIONS | _POOLS
_CHANNEL_NORMS = functions("batch_norm instance_norm group_norm")
_LAST_NORMS = functions("layer_norm rms_norm")
NORMS = _CHANNEL_NORMS | _LAST_NORMS

PRODUCTS = functions("matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum")
"""Matrix products. A factor may hold weights or not."""

_UNITS_IN_LAST_DIM = {F.linear, F.bilinear, F.multi_head_attention_forward}

MAKERS = {*CONVOLUTIONS, *NORMS, *PRODUCTS, *_UNITS_IN_LAST_DIM}
"""Functions that determine which dimension of their output counts units, whatever their inputs are."""

_VIEWS = functions(
    "transpose permute movedim moveaxis swapaxes swapdims t adjoint squeeze unsqueeze select unbind unfold diagonal"
)
_RESHAPES = functions("view reshape view_as reshape_as flatten unflatten ravel")
_REDUCTIONS = functions("sum mean amax amin max min median norm logsumexp prod nanmean var std mode quantile")
EINSUM = functions("einsum")
_REFLECTED = functions("__rmatmul__")
_MAKES_NEW_DIMS = functions("stack hstack vstack dstack outer kron one_hot diag_embed cov corrcoef fold view_as_real")


def new_axes(axes: Sequence[Axes], dims: Iterable[int], ndim: int) -> tuple[Axes, ...]:
    """Return the axes with a new one for each of these dimensions that has none."""
    result = list(axes) or [NOTHING] * ndim
    for dim in dims:
        result[dim] = result[dim] or frozenset([Axis()])
    return tuple(result)


def last_counts_units(ndim: int) -> tuple[Axes, ...]:
    """Return the axes of a tensor whose last dimension counts units."""
    return (*[NOTHING] * (ndim - 1), UNITS)


def counting_units(axes: Sequence[Axes]) -> int | None:
    """Return the dimension that counts units, if it is known; the last one of several."""
    for dim in reversed(range(len(axes))):
        if any(axis.counts_units for axis in axes[dim]):
            return dim
    return None


def is_weight(tensor: Tensor) -> bool:
    """Return whether a tensor is a parameter or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def infer_unit_dim(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Tensor],
    known: Sequence[tuple[Tensor, Sequence[Axes]]],
) -> None:
    """Mark the axes that count units, if they are those of the dimension in which a function reads its units."""
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
    """Return the axes of a function's output, from the function and the axes of its inputs; empty if unknown."""
    if output.layout is not torch.strided or output.is_nested:
        # Such a tensor has no strides, or other sizes than its shape.
        return ()
    if func in NORMS and known and counting_units(known[0][1]) is not None:
        # A norm over positions or tokens does not make them units.
        return known[0][1]
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
    """Return the axes of an output from those of the inputs; empty if unknown."""
    tensor, axes = known[0]
    shape = output.shape
    if func in _RESHAPES:
        return _reshaped(tensor, shape, axes)
    # Attributes such as ``x.mT`` are read by ``__get__``.
    if func in _VIEWS or (getattr(func, "__name__", None) == "__get__" and len(args) and args[0] is tensor):
        return _viewed(tensor, output, axes)
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if all(isinstance(item, int | slice) or item is None or item is Ellipsis for item in index):
            return _viewed(tensor, output, axes)
    if func in _MAKES_NEW_DIMS:
        return ()
    if output.ndim < tensor.ndim:
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = [dims] if isinstance(dims, int) else dims
        if func not in _REDUCTIONS or not isinstance(dims, tuple | list) or len(dims) + output.ndim != tensor.ndim:
            return ()
        reduced = {dim % tensor.ndim for dim in dims}
        return [kept for dim, kept in enumerate(axes) if dim not in reduced]
    if len(known) == 1 and output.ndim == tensor.ndim:
        return axes
    return _broadcast(shape, known)


def _product(
    factors: Sequence[Tensor], output: Tensor, known: Sequence[tuple[Tensor, Sequence[Axes]]]
) -> Sequence[Axes]:
    """Return the axes of a product without weights: the rows of the left factor, the columns of the right one."""
    left, right = (next((axes for tensor, axes in known if tensor is factor), ()) for factor in factors)
    if min(factor.ndim for factor in factors) < 2:
        return ()
    rows, columns = left[-2] if left else NOTHING, right[-1] if right else NOTHING
    return [*[NOTHING] * (output.ndim - 2), rows, columns]


def _broadcast(shape: Sequence[int], known: Sequence[tuple[Tensor, Sequence[Axes]]]) -> Sequence[Axes]:
    """Return the axes of an elementwise function of several tensors: the union of those of each dimension."""
    result: list[Axes] = [NOTHING] * len(shape)
    for tensor, axes in known:
        for from_end in range(1, min(len(axes), len(shape)) + 1):
            if axes[-from_end] and (tensor.shape[-from_end] != 1 or shape[-from_end] == 1):
                result[-from_end] |= axes[-from_end]
    for dim, joined in enumerate(result):
        if len(joined) > 1 and any(axis.counts_units for axis in joined):
            for axis in joined:
                axis.counts_units = True
            result[dim] = UNITS
    return result


def _viewed(tensor: Tensor, output: Tensor, axes: Sequence[Axes]) -> Sequence[Axes]:
    """Return the axes of a view: dimensions of both tensors correspond if they have the same stride."""
    by_stride: dict[int, Axes] = {}
    for stride, size, dim_axes in zip(tensor.stride(), tensor.shape, axes, strict=True):
        if size > 1:
            # Two dimensions of the same stride, as in an expanded tensor, cannot be distinguished.
            by_stride[stride] = NOTHING if stride in by_stride else dim_axes
    dims = zip(output.stride(), output.shape, strict=True)
    return [by_stride.get(stride, NOTHING) if size > 1 else NOTHING for stride, size in dims]


def _reshaped(tensor: Tensor, shape: Sequence[int], axes: Sequence[Axes]) -> Sequence[Axes]:
    """Return the axes of a reshaped tensor: a dimension may be split, and merged again from all of its parts.

    Both shapes are walked through at once, in the smallest groups of dimensions with the same number of elements.
    """
    if math.prod(shape) != tensor.numel() or not tensor.numel():
        return ()
    result: list[Axes] = [NOTHING] * len(shape)
    before = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    after = [dim for dim, size in enumerate(shape) if size > 1]
    while before and after:
        merged, split = [before.pop(0)], [after.pop(0)]
        while (merged_size := math.prod(tensor.shape[dim] for dim in merged)) != (
            split_size := math.prod(shape[dim] for dim in split)
        ):
            if merged_size < split_size:
                merged.append(before.pop(0))
            else:
                split.append(after.pop(0))
        group = axes[merged[0]]
        if len(merged) > 1:
            parents = {axis.parent for dim in merged for axis in axes[dim] or [_UNITS]}
            group = parents.pop() if len(parents) == 1 else NOTHING
        for dim in split:
            result[dim] = group if len(split) == 1 or not group else frozenset([Axis(parent=group)])
    return result


def _units_of_layer(
    func: Function, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
) -> tuple[Tensor | None, int | None, int | None]:
    """Return the tensor in which a function reads units, their dimension, and the dimension of those that it makes.

    Dimensions count from the end, and are ``None`` where they are unknown.
    """
    first = inputs[0]
    if func in _SPATIAL:
        return first, -1 - _SPATIAL[func], -1 - _SPATIAL[func]
    if func in _UNITS_IN_LAST_DIM:
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


def scales_elements(equation: Any, factors: Sequence[Tensor], followed: Collection[int]) -> bool:
    """Return whether an einsum only scales each element by a tensor that is no weight, as in a weighted loss."""
    terms = equation.replace(" ", "").partition("->")[0].split(",") if isinstance(equation, str) else []
    if len(terms) != len(factors):
        return False
    indices = {index for term, factor in zip(terms, factors, strict=True) if id(factor) in followed for index in term}
    return all(
        id(factor) in followed or (not is_weight(factor) and indices <= {*term})
        for term, factor in zip(terms, factors, strict=True)
    )


def factors_of(func: Function, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the left and the right factor of a matrix product."""
    return inputs[1::-1] if func in _REFLECTED else inputs[-2:]


def _units_of_einsum(equation: Any, factors: Sequence[Tensor]) -> tuple[Tensor | None, int | None, int | None]:
    """Return the factor of an einsum that is no weight, and the dimensions of the units it reads and makes.

    Units are read along the index that is summed with a weight, and made along the output index that comes from one.
    Dimensions count from the end, and are ``None`` if there is none, or more than one.
    """
    if not isinstance(equation, str):
        # The form with sublists is not supported.
        return None, None, None
    left, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    terms = left.split(",")
    weights = [is_weight(factor) for factor in factors]
    if len(terms) != len(factors) or sum(weights) != len(weights) - 1 or not result:
        return None, None, None
    of_weights = {index for term, is_one in zip(terms, weights, strict=True) if is_one for index in term} - {"."}
    read = terms[weights.index(False)]
    summed = [position - len(read) for position, index in enumerate(read) if index in of_weights - {*result}]
    made = [position - len(result) for position, index in enumerate(result) if index in of_weights - {*read}]
    return factors[weights.index(False)], summed[0] if len(summed) == 1 else None, made[0] if len(made) == 1 else None
