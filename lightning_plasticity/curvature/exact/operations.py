"""Define the record of one operation of a forward pass, and tell the weights from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of, has_edge
from lightning_plasticity.isolation.batches import tensors_in

_CONSTANT_FACTORIES = {
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.zeros,
}
"""Functions that make tensors from numbers, and so from no data of the batch."""

_NUMBERS = (bool, int, float)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation whose result requires gradients.

    Args:
        function_name: Name of the function.
        shape: Shape of the result.
        inputs: Edges of the arguments that require gradients.
        weights_only: Whether the result is computed from the tensors of the model alone, and not from the batch.
    """

    function_name: str
    shape: torch.Size
    inputs: list[Edge]
    weights_only: bool


class OperationRecorder:
    """A recorder of all operations of a forward pass, by the edge of their result.

    Args:
        model: The model. Its parameters, buffers and tensor attributes do not depend on the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.operations: dict[Edge, Operation] = {}
        # The tensors are kept, so that no other tensor gets their id.
        self._constants = {id(tensor): tensor for tensor in _tensors_of(model)}

    def is_weights_only(self, function: Callable[..., Any], args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        """Return whether a function computes its result from the model's tensors alone, and not from the batch.

        Args:
            function: The function.
            args: Its positional arguments.
            tensors: All tensors among its arguments.
        """
        if tensors:
            return all(map(self._is_constant, tensors))
        is_number = function in (torch.tensor, torch.as_tensor) and isinstance(args[0] if args else None, _NUMBERS)
        return is_number or function in _CONSTANT_FACTORIES

    def record(self, function: Callable[..., Any], inputs: list[Edge], result: Any, *, weights_only: bool) -> None:
        """Record a call of a function.

        Args:
            function: The function.
            inputs: The edges of its arguments that require gradients, before the call.
            result: The value that it returned.
            weights_only: What :meth:`is_weights_only` returned before the call.
        """
        for tensor in tensors_in(result):
            if has_edge(tensor):
                edge = edge_of(tensor)
                if not tensor.is_leaf and edge not in inputs:
                    name = getattr(function, "__name__", "")
                    self.operations[edge] = Operation(name, tensor.shape, inputs, weights_only)
            elif weights_only:
                self._constants[id(tensor)] = tensor
            else:
                # A tensor may have been written to in place.
                self._constants.pop(id(tensor), None)

    def _is_constant(self, tensor: Tensor) -> bool:
        if tensor.is_leaf:
            return id(tensor) in self._constants
        operation = self.operations.get(edge_of(tensor))
        return operation is not None and operation.weights_only


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor | list | tuple | dict):
                yield from tensors_in(value)
