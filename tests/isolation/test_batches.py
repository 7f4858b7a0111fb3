"""Test the size of batches of any structure, and how they are sliced and concatenated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plasticity.isolation.batches import batch_size, concat_batches, micro_batches, slice_batch


def test_micro_batches_concatenate_to_the_batch() -> None:
    whole = {"x": torch.randn(7, 4), "y": torch.randint(3, (7,)), "scale": torch.tensor(1.5)}
    pieces = list(micro_batches(whole, 3))
    assert [batch_size(piece) for piece in pieces] == [3, 3, 1]
    for name, tensor in concat_batches(pieces).items():
        assert torch.equal(tensor, whole[name])
    with pytest.raises(ValueError, match=r"batches that hold \[3, 1\] tensors cannot be joined"):
        concat_batches([whole, {"x": whole["x"]}])


def sequences(n: int) -> list[Tensor]:
    return [torch.full((20 + i,), float(i)) for i in range(n)]


SAMPLES: dict[str, Callable[[int], Any]] = {
    "of one length": lambda n: ([torch.full((40,), float(i)) for i in range(n)], torch.arange(n)),
    "of different lengths": lambda n: {"x": tuple(sequences(n)), "y": torch.arange(n)},
    "several of each": lambda n: [torch.ones(()), [{"x": x, "at": x[:5]} for x in sequences(n)], torch.arange(n)],
    "two lists": lambda n: (sequences(n), [torch.tensor(i) for i in range(n)], torch.arange(n)),
    "two views": lambda n: [[torch.arange(n), torch.zeros(n, 40)], torch.arange(n)],
    "two loaders": lambda n: [[torch.arange(n), torch.arange(n)], [torch.arange(n), torch.arange(n)]],
    "inputs and labels": lambda n: [torch.zeros(n, 4), torch.arange(n)],
}
"""Builders of a batch with a given number of samples."""


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("n", [1, 3, 4, 8, 11])
def test_sliced_batch_equals_the_smaller_batch(name: str, n: int) -> None:
    """Its micro-batches concatenate to the whole batch again."""
    make = SAMPLES[name]
    whole = make(n)
    assert batch_size(whole) == n
    for samples in range(1, n + 1):
        assert_same(slice_batch(whole, samples), make(samples))
        assert_same(concat_batches(list(micro_batches(whole, samples))), whole)


def test_two_views_are_not_two_samples() -> None:
    """The batch has two views of eight samples beside two numbers."""
    views = [torch.zeros(8, 3), torch.zeros(8, 3)]
    assert batch_size([views, torch.zeros(8), torch.ones(2)]) == 8


def test_two_edge_features_are_not_two_samples() -> None:
    nodes, edges = torch.zeros(100, 3), torch.zeros(2, 300)
    assert batch_size((nodes, edges, [torch.zeros(300), torch.zeros(300)], torch.zeros(100))) == 100


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sliced_sparse_batch_equals_the_dense_one(layout: torch.layout) -> None:
    x, y = torch.eye(7).roll(1, 0), torch.arange(7)
    for samples in (5, 7, 9):
        sliced, labels = slice_batch((x.to_sparse(layout=layout), y), samples)
        assert (sliced.layout, len(labels)) == (layout, min(samples, 7))
        assert torch.equal(sliced.to_dense(), x[:samples])


def test_tuple_of_unlike_tensors_is_not_a_list_of_samples() -> None:
    labels = torch.arange(3)
    mixed = (torch.zeros(3, 2), (labels, labels.flip(0), torch.tensor(0.3)))
    assert batch_size(mixed) == 3
    assert [part.tolist() for part in slice_batch(mixed, 2)[1][:2]] == [[0, 1], [2, 1]]
    assert batch_size({"labelled": (torch.zeros(16, 3), torch.zeros(16)), "others": torch.zeros(2, 3)}) == 16


def test_lists_of_images_and_targets_are_samples() -> None:
    images = [torch.zeros(3, 8, 8) for _ in range(5)]
    targets = [{"boxes": torch.zeros(index % 3, 4)} for index in range(5)]
    assert batch_size((images, targets)) == batch_size([images, targets]) == 5
    assert [len(items) for items in slice_batch((images, targets), 2)] == [2, 2]
    views = [[torch.zeros(8, 3)] * 2, [torch.zeros(8)] * 2]
    assert batch_size(views) == 8, "two views of eight samples"
