"""Batches of any structure: how many samples they hold, and taking them apart and putting them together."""

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

Part: TypeAlias = Tensor | tuple[Any, ...] | list[Any]
_PARTS = (Tensor, tuple, list)
_COLLECTIONS = (dict, list, tuple, set)


def batch_size(batch: Any) -> int | None:
    """The number of samples in a batch.

    The most common first dimension of its tensors, the first one seen on a tie. Of lists of samples, which are as long
    as the tensors beside them, and whose own tensors have another first dimension, it is the length.

    Example:
        >>> waveforms, labels = [torch.zeros(400)] * 8, torch.zeros(8)
        >>> batch_size((waveforms, labels)), batch_size(([torch.zeros(8, 3)] * 2, labels))
        (8, 8)
    """
    lists = _lists_of_samples(batch)
    return len(lists[0]) if lists else _most_common_size(_tensors(batch))


def slice_batch(batch: Any, samples: int) -> Any:
    """A copy of the first samples of a batch (:func:`samples_between`).

    Example:
        >>> x, y, scale = slice_batch((torch.zeros(8, 3), torch.zeros(8), torch.zeros(2)), samples=4)
        >>> x.shape, y.shape, scale.shape
        (torch.Size([4, 3]), torch.Size([4]), torch.Size([2]))
    """
    return samples_between(batch, 0, samples)


def samples_between(batch: Any, first: int, end: int) -> Any:
    """A copy of some samples of a batch: of every tensor whose first dimension is the batch size, and list of samples.

    Other tensors are copied whole.
    """
    size = batch_size(batch)
    if first == 0 and (size is None or size <= end):
        return clone_batch(batch)

    def take(part: Part) -> Any:
        if not isinstance(part, Tensor):
            return clone_batch(part[first:end])
        return (_rows(part, first, end) if _by_sample(part, size) else part).detach().clone()

    return _apply_to_parts(batch, take)


def clone_batch(batch: Any) -> Any:
    """A copy of a batch, which may be changed in place: also of what it holds in objects and numpy arrays."""
    # Clones, since deepcopy refuses tensors with a graph, and of a view copies all that it is a view of.
    clones = _deepcopy_memo(batch)
    try:
        return copy.deepcopy(batch, clones)
    except Exception:  # an object that cannot be copied is shared
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().clone())


def micro_batches(batch: Any, size: int) -> Iterator[Any]:
    """The batch in pieces of ``size`` samples, the last one smaller."""
    samples = batch_size(batch) or 0
    for first in range(0, samples, size):
        yield samples_between(batch, first, first + size)


def concat_batches(batches: Sequence[Any], like: Any = None) -> Any:
    """One batch of the samples of several of the same structure, in their order.

    Args:
        batches: The batches.
        like: One of them, on the device that the result shall be on; by default the first.

    Example:
        >>> concat_batches([{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 3)}])["x"].shape
        torch.Size([3, 3])
    """
    sizes = [batch_size(batch) for batch in batches]
    parts = [_parts(batch) for batch in batches]
    if len({tuple(isinstance(part, Tensor) for part in own) for own in parts}) > 1:
        raise ValueError(f"batches that hold {[len(own) for own in parts]} tensors cannot be joined")
    columns = iter(list(zip(*parts, strict=True)))

    def join(part: Part) -> Any:
        column = next(columns)
        if not isinstance(part, Tensor):
            return type(part)(item for own in column for item in to_device(own, like=part))
        if not all(_by_sample(own, size) for own, size in zip(column, sizes, strict=True)):
            return part
        return torch.cat([own.to(part.device) for own in column])

    return _apply_to_parts(batches[0] if like is None else like, join)


def to_device(batch: Any, like: Any) -> Any:
    """The batch on the device of another one."""
    device = next((tensor.device for tensor in _tensors(like)), torch.device("cpu"))
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, such as what a function took or returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _lists_of_samples(batch: Any) -> list[tuple[Any, ...] | list[Any]]:
    """The lists in a batch that hold one item for each sample, as of sequences that were not padded."""
    beside: list[Tensor] = []
    lists: list[tuple[Any, ...] | list[Any]] = []

    def see(part: Part) -> None:
        if isinstance(part, Tensor):
            beside.append(part)
        elif type(part) in (tuple, list):  # not a named one
            lists.append(part)

    for item in batch if isinstance(batch, tuple | list) else [batch]:
        apply_to_collection(item, _PARTS, see)
    size, sizes = _most_common_size(beside), {tensor.shape[:1] for tensor in beside if tensor.dim()}
    return [
        own
        for own in lists
        if len(own) == size and _are_alike(own) and {tensor.shape[:1] for tensor in _tensors(own)} - sizes
    ]


def _are_alike(items: Sequence[Any]) -> bool:
    """Whether these may be one thing for each sample, and are no pair such as of inputs and labels."""
    return len({(type(item), getattr(item, "ndim", None), getattr(item, "dtype", None)) for item in items}) == 1


def _most_common_size(tensors: Iterable[Tensor]) -> int | None:
    sizes = Counter(tensor.shape[0] for tensor in tensors if tensor.dim())
    return sizes.most_common(1)[0][0] if sizes else None


def _apply_to_parts(batch: Any, function: Callable[[Part], Any]) -> Any:
    """The batch with what a function makes of every list of samples, and of every tensor outside of those."""
    lists = {id(part) for part in _lists_of_samples(batch)}

    def visit(part: Part) -> Any:
        if isinstance(part, Tensor) or id(part) in lists:
            return function(part)
        if type(part) in (tuple, list):
            return type(part)(apply_to_collection(item, _PARTS, visit) for item in part)
        return apply_to_collection(part, Tensor, function)

    return apply_to_collection(batch, _PARTS, visit)


def _parts(batch: Any) -> list[Part]:
    found: list[Part] = []
    _apply_to_parts(batch, found.append)
    return found


def _by_sample(tensor: Tensor, size: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == size


def _rows(tensor: Tensor, first: int, end: int) -> Tensor:
    if tensor.layout in (torch.strided, torch.jagged):
        return tensor[first:end]
    rows = torch.arange(first, min(end, len(tensor)), device=tensor.device)  # no sparse tensor can be sliced
    taken: Tensor = tensor.to_sparse_coo().index_select(0, rows).to_sparse(layout=tensor.layout)
    return taken


def _deepcopy_memo(batch: Any) -> dict[int, Any]:
    """What a deep copy of a batch is not to make itself: clones of tensors, and the objects that hold no numbers.

    Others may know those by their identity, and what they refer to, such as a vocabulary, may be large.
    """
    holders: dict[int, list[Any]] = {}
    found: dict[int, Any] = {}
    ahead, numbers = [batch], []
    while ahead:
        value = ahead.pop()
        if id(value) in found or isinstance(value, IMMUTABLE):
            continue
        found[id(value)] = value
        if isinstance(value, Tensor | np.ndarray):
            numbers.append(value)
        elif not isinstance(value, Dataset | DataLoader | nn.Module):
            items = referents(value)
            for item in items:
                holders.setdefault(id(item), []).append(value)
            ahead += items
    changing: set[int] = set()
    ahead = list(numbers)
    while ahead:
        value = ahead.pop()
        if id(value) not in changing:
            changing.add(id(value))
            ahead += holders.get(id(value), [])
    shared = {key: value for key, value in found.items() if key not in changing and not isinstance(value, _COLLECTIONS)}
    return shared | {id(value): value.detach().clone() for value in numbers if isinstance(value, Tensor)}


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found
