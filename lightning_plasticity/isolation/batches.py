"""Count, slice, copy and concatenate the samples of batches of any structure.

A batch is a nested structure of collections. Its leaves are the tensors, and the lists with one item per sample, such
as sequences that were not padded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_plasticity.isolation.module_copy import IMMUTABLE, referents

Leaf: TypeAlias = Tensor | tuple[Any, ...] | list[Any]
_LEAF_TYPES = (Tensor, tuple, list)
_COLLECTIONS = (dict, list, tuple, set)


def batch_size(batch: Any) -> int | None:
    """Return the number of samples in a batch, or ``None`` if it holds no tensor with dimensions.

    It is the most common first dimension of the tensors, and on a tie the one that occurs first. A list counts as a
    list of samples if it is as long as the other tensors, and its own tensors have another first dimension.

    Example:
        >>> waveforms, labels = [torch.zeros(400)] * 8, torch.zeros(8)
        >>> batch_size((waveforms, labels)), batch_size(([torch.zeros(8, 3)] * 2, labels))
        (8, 8)
    """
    lists = _lists_of_samples(batch)
    return len(lists[0]) if lists else _most_common_size(_tensors(batch))


def slice_batch(batch: Any, samples: int) -> Any:
    """Return a copy of the first samples of a batch. Tensors with another first dimension are copied whole.

    Example:
        >>> x, y, scale = slice_batch((torch.zeros(8, 3), torch.zeros(8), torch.zeros(2)), samples=4)
        >>> x.shape, y.shape, scale.shape
        (torch.Size([4, 3]), torch.Size([4]), torch.Size([2]))
    """
    return _slice_samples(batch, 0, samples)


def _slice_samples(batch: Any, start: int, stop: int) -> Any:
    size = batch_size(batch)
    if start == 0 and (size is None or size <= stop):
        return clone_batch(batch)

    def slice_leaf(leaf: Leaf) -> Any:
        if not isinstance(leaf, Tensor):
            return clone_batch(leaf[start:stop])
        return (_slice_tensor(leaf, start, stop) if _has_sample_dim(leaf, size) else leaf).detach().clone()

    return _map_leaves(batch, slice_leaf)


def clone_batch(batch: Any) -> Any:
    """Return a copy of a batch that can be changed in place, including its objects and NumPy arrays."""
    # deepcopy raises for tensors with a graph, and copies the whole storage of a view, so tensors are cloned before.
    memo = _deepcopy_memo(batch)
    try:
        return copy.deepcopy(batch, memo)
    except Exception:
        # Share objects that cannot be copied.
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())


def micro_batches(batch: Any, size: int) -> Iterator[Any]:
    """Yield the batch in micro-batches of ``size`` samples; the last one may be smaller."""
    samples = batch_size(batch) or 0
    for start in range(0, samples, size):
        yield _slice_samples(batch, start, start + size)


def concat_batches(batches: Sequence[Any], like: Any = None) -> Any:
    """Concatenate the samples of several batches of the same structure.

    Args:
        batches: The batches.
        like: The batch that determines the device, and from which leaves without samples are taken; by default the
            first one.

    Raises:
        ValueError: If the batches hold different numbers of tensors.

    Example:
        >>> concat_batches([{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 3)}])["x"].shape
        torch.Size([3, 3])
    """
    sizes = [batch_size(batch) for batch in batches]
    leaves = [_leaves(batch) for batch in batches]
    if len({tuple(isinstance(leaf, Tensor) for leaf in batch_leaves) for batch_leaves in leaves}) > 1:
        counts = [len(batch_leaves) for batch_leaves in leaves]
        raise ValueError(f"batches that hold {counts} tensors cannot be joined")
    columns = iter(list(zip(*leaves, strict=True)))

    def concat_leaf(leaf: Leaf) -> Any:
        column = next(columns)
        if not isinstance(leaf, Tensor):
            return type(leaf)(item for samples in column for item in to_device(samples, like=leaf))
        if not all(_has_sample_dim(tensor, size) for tensor, size in zip(column, sizes, strict=True)):
            return leaf
        return torch.cat([tensor.to(leaf.device) for tensor in column])

    return _map_leaves(batches[0] if like is None else like, concat_leaf)


def join_batches(batches: Sequence[Any], like: Any = None) -> Any:
    """Concatenate the samples of several batches that consist of samples only.

    Args:
        batches: The batches.
        like: The batch that determines the device; by default the first one.

    Raises:
        ValueError: If a batch holds more than samples, such as the edges of a graph, or if the batches differ in their
            structure, in the shape of their samples, or in what is no tensor.

    Example:
        >>> join_batches([(torch.zeros(2, 3), 0.5), (torch.ones(1, 3), 0.5)])[0].shape
        torch.Size([3, 3])
        >>> join_batches([torch.zeros(2, 3), torch.zeros(2, 4)])
        Traceback (most recent call last):
        ...
        ValueError: samples of shapes (3,) and (4,) cannot be joined
    """
    first, *others = map(_describe, batches)
    for other in others:
        try:
            is_equal = bool(first[0] == other[0])
        except (ValueError, RuntimeError):
            # Arrays have no single truth value.
            is_equal = False
        if not is_equal:
            raise ValueError("batches that differ in more than their samples cannot be joined")
        for one, another in zip(first[1], other[1], strict=True):
            if one != another:
                raise ValueError(f"samples of shapes {one} and {another} cannot be joined")
    return concat_batches(batches, like)


_SAMPLES = object()
"""Stands for the samples in the description of a batch."""


def _describe(batch: Any) -> tuple[Any, list[tuple[int, ...] | None]]:
    """Return what a batch holds beside its samples, and the shapes of single samples; ``None`` for a list of them.

    Raises:
        ValueError: If it holds something with dimensions, or a list, that does not consist of samples.
    """
    size, shapes = batch_size(batch), []

    def describe_leaf(leaf: Leaf) -> Any:
        if isinstance(leaf, Tensor) and not leaf.dim():
            return leaf.item()
        if isinstance(leaf, Tensor) and not _has_sample_dim(leaf, size):
            raise ValueError(
                f"batches of {size} samples that hold a tensor of shape {tuple(leaf.shape)} as well cannot be joined"
            )
        shapes.append(tuple(leaf.shape[1:]) if isinstance(leaf, Tensor) else None)
        return _SAMPLES

    return _map_leaves(batch, describe_leaf), shapes


def to_device(batch: Any, like: Any) -> Any:
    """Return the batch on the device of another one."""
    device = next((tensor.device for tensor in _tensors(like)), torch.device("cpu"))
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts, such as the arguments or the result of a function."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _lists_of_samples(batch: Any) -> list[tuple[Any, ...] | list[Any]]:
    """Return the lists in a batch that hold one item per sample, such as sequences that were not padded."""
    other_tensors: list[Tensor] = []
    lists: list[tuple[Any, ...] | list[Any]] = []

    def collect(leaf: Leaf) -> None:
        if isinstance(leaf, Tensor):
            other_tensors.append(leaf)
        elif type(leaf) in (tuple, list):
            # Named tuples have fields, not samples.
            lists.append(leaf)

    for item in batch if isinstance(batch, tuple | list) else [batch]:
        apply_to_collection(item, _LEAF_TYPES, collect)
    size = _most_common_size(other_tensors)
    are_as_long = size is None and len(lists) > 1 and len({len(items) for items in lists}) == 1
    # Images and targets of a detector: a list of each. Tensors of all samples would have one first dimension.
    if are_as_long and len({tensor.shape[:1] for items in lists for tensor in _tensors(items)}) > 1:
        return [items for items in lists if items and _are_homogeneous(items)]
    first_dims = {tensor.shape[:1] for tensor in other_tensors if tensor.dim()}
    return [
        items
        for items in lists
        if len(items) == size
        and _are_homogeneous(items)
        and {tensor.shape[:1] for tensor in _tensors(items)} - first_dims
    ]


def _are_homogeneous(items: Sequence[Any]) -> bool:
    """Return whether all items may be samples of one kind, unlike those of a pair of inputs and labels."""
    return len({(type(item), getattr(item, "ndim", None), getattr(item, "dtype", None)) for item in items}) == 1


def _most_common_size(tensors: Iterable[Tensor]) -> int | None:
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    return sizes.most_common(1)[0][0] if sizes else None


def _map_leaves(batch: Any, function: Callable[[Leaf], Any]) -> Any:
    """Apply a function to every list of samples, and to every tensor outside of those."""
    lists = {id(items) for items in _lists_of_samples(batch)}

    def visit(node: Leaf) -> Any:
        if isinstance(node, Tensor) or id(node) in lists:
            return function(node)
        if type(node) in (tuple, list):
            return type(node)(apply_to_collection(item, _LEAF_TYPES, visit) for item in node)
        return apply_to_collection(node, Tensor, function)

    return apply_to_collection(batch, _LEAF_TYPES, visit)


def _leaves(batch: Any) -> list[Leaf]:
    leaves: list[Leaf] = []
    _map_leaves(batch, leaves.append)
    return leaves


def _has_sample_dim(tensor: Tensor, size: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size


def _slice_tensor(tensor: Tensor, start: int, stop: int) -> Tensor:
    if tensor.layout in (torch.strided, torch.jagged):
        return tensor[start:stop]
    # torch cannot slice sparse tensors.
    rows = torch.arange(start, min(stop, len(tensor)), device=tensor.device)
    sliced: Tensor = tensor.to_sparse_coo().index_select(0, rows).to_sparse(layout=tensor.layout)
    return sliced


def _deepcopy_memo(batch: Any) -> dict[int, Any]:
    """Return a memo that makes a deep copy of a batch clone its tensors and share the objects that hold no numbers.

    Such objects are shared because they may be compared by identity, and may be large, such as a vocabulary.
    """
    holders: dict[int, list[Any]] = {}
    reachable: dict[int, Any] = {}
    pending, arrays = [batch], []
    while pending:
        value = pending.pop()
        if id(value) in reachable or isinstance(value, IMMUTABLE):
            continue
        reachable[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            arrays.append(value)
        elif not isinstance(value, Dataset | DataLoader | nn.Module):
            items = referents(value)
            for item in items:
                holders.setdefault(id(item), []).append(value)
            pending += items
    to_copy = _ids_of_holders(arrays, holders)
    shared = {
        key: value for key, value in reachable.items() if key not in to_copy and not isinstance(value, _COLLECTIONS)
    }
    return shared | {id(array): array.detach().clone() for array in arrays if isinstance(array, Tensor)}


def _ids_of_holders(values: Sequence[Any], holders: dict[int, list[Any]]) -> set[int]:
    """Return the ids of the values and of all objects that refer to them, directly or through others."""
    ids: set[int] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) not in ids:
            ids.add(id(value))
            pending += holders.get(id(value), [])
    return ids


def _tensors(batch: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append)
    return tensors
