"""Index tensors by positions in their flattened form."""

from __future__ import annotations

from torch import Tensor


def unravel_index(positions: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the coordinates of positions in a flattened tensor, which index the tensor in any memory layout.

    The same as :func:`torch.unravel_index` for positions that are in range, which checks its arguments in Python for
    longer than all other work on the weights of a unit takes.

    Args:
        positions: Indices into the flattened tensor.
        shape: Shape of the tensor.

    Example:
        >>> import torch
        >>> unravel_index(torch.tensor([1, 5]), (2, 3))
        (tensor([0, 1]), tensor([1, 2]))
    """
    coordinates = []
    for size in reversed(shape):
        coordinates.append(positions % size)
        positions = positions // size
    return tuple(reversed(coordinates))
