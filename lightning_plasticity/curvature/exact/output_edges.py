"""Find the edges of the autograd graph where the network ends and the loss begins.

The network ends with the last operations that use parameters. What follows them, down to the loss, is a function of
their results alone. Two kinds of operations after that use parameters as well, and are part of the loss all the same:
those that add a term of the weights alone, such as a penalty, and those that scale or shift the loss by a learned
number. Their parameters are held constant, and named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of, gradient_edge, leaves
from lightning_plasticity.curvature.exact.operations import Operation

_ELEMENTWISE = {
    "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "multiply", "neg",
    "div", "rdiv", "idiv", "truediv", "rtruediv", "itruediv", "true_divide", "divide", "stack", "cat",
}  # fmt: skip
"""Functions that combine numbers entry by entry, by name without underscores: those that scale and add up losses."""

_LINEAR = {
    "getitem", "select", "narrow", "mean", "sum", "squeeze", "unsqueeze", "view", "reshape", "flatten", "unflatten",
    "permute", "transpose", "movedim", "contiguous", "t", "T", "mT", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "get",
}  # fmt: skip
"""Linear functions of one tensor that select, average or rearrange its entries."""


@dataclass(frozen=True, eq=False)
class NetworkEnd:
    """The results of a network that its loss is a function of.

    Args:
        edges: Their edges, in the order of computation.
        shapes: Their shapes.
        held_constant: The parameters that the loss uses besides these results.
    """

    edges: list[Edge]
    shapes: list[torch.Size]
    held_constant: list[Tensor] = field(default_factory=list)


def find_network_end(
    loss: Tensor, operations: Mapping[Edge, Operation], num_samples: int | None, chosen: Collection[Edge] = ()
) -> NetworkEnd:
    """Find where the network ends: at the last operations that use parameters.

    A result that the loss selects from or averages is replaced by the selection or the average, such as the mean over
    the pixels that follows the last convolution: the loss is a function of that alone.

    Args:
        loss: The loss.
        operations: The recorded operations, by the edge of their result.
        num_samples: Number of samples of the batch, if known.
        chosen: Edges that are outputs wherever they are.
    """
    search = _Search(loss, operations, num_samples, chosen)
    found = search.ends([edge_of(loss)])
    order = {edge: index for index, edge in enumerate(operations)}
    edges = [search.advance(edge) for edge in sorted(found, key=lambda edge: order.get(edge, -1))]
    held = leaves(search.held_constant, {})
    return NetworkEnd(edges, [search.shape(edge) for edge in edges], held)


def share_results(
    edges: Sequence[Edge], loss: Tensor, operations: Mapping[Edge, Operation], num_samples: int | None
) -> bool:
    """Return whether two of some edges in the loss are computed from the same result of the network."""
    ends = [set(_Search(loss, operations, num_samples, ()).ends([edge])) for edge in edges]
    return sum(map(len, ends)) > len(set().union(*ends))


def is_rearranged(edge: Edge, edges: Collection[Edge], operations: Mapping[Edge, Operation]) -> bool:
    """Return whether a result is one of some others with its entries in another shape or order, or the same."""
    while edge not in edges:
        operation = operations.get(edge)
        if operation is None or _name(operation) not in _LINEAR or len(operation.inputs) != 1:
            return False
        source = operations.get(operation.inputs[0])
        if source is None or source.shape.numel() != operation.shape.numel():
            return False
        edge = operation.inputs[0]
    return True


class _Search:
    """A walk from the loss towards the parameters: see :func:`find_network_end`."""

    def __init__(
        self, loss: Tensor, operations: Mapping[Edge, Operation], num_samples: int | None, chosen: Collection[Edge]
    ) -> None:
        self.held_constant: list[Edge] = []
        self._loss = loss
        self._operations = operations
        self._num_samples = num_samples
        self._chosen = chosen
        self._users: dict[Edge, list[Edge]] = {}
        last = operations.get(edge_of(loss))
        # A model may keep its data among its own tensors.
        self._data_is_in_model = last is not None and last.weights_only

    def ends(self, start: Sequence[Edge]) -> list[Edge]:
        """Return the edges, reached from the given ones, where the network ends."""
        found: dict[Edge, None] = {}
        seen: set[Edge] = set()
        pending = list(start)
        while pending:
            edge = pending.pop()
            if edge in seen:
                continue
            seen.add(edge)
            inputs = self._inputs_in_loss(edge)
            if inputs is None:
                found[edge] = None
                continue
            for child in inputs:
                self._users.setdefault(child, []).append(edge)
            pending += inputs
        return list(found)

    def advance(self, edge: Edge) -> Edge:
        """Return the smallest of the results that follow by selecting, averaging and rearranging entries."""
        best, size = edge, self.shape(edge).numel()
        while edge not in self._chosen:
            users = self._users.get(edge, [])
            operation = self._operations.get(users[0]) if len(users) == 1 else None
            if operation is None or _name(operation) not in _LINEAR or len(operation.inputs) != 1:
                break
            edge = users[0]
            if self._keeps_samples(operation.shape) and operation.shape.numel() <= size:
                best, size = edge, operation.shape.numel()
        return best

    def shape(self, edge: Edge) -> torch.Size:
        """Return the shape of the result at an edge."""
        if edge in self._operations:
            return self._operations[edge].shape
        node, output_nr = edge
        return torch.Size(node._input_metadata[output_nr].shape)

    def _inputs_in_loss(self, edge: Edge) -> list[Edge] | None:
        """Return the edges that a part of the loss is computed from, or ``None`` if the network ends at this edge."""
        if edge in self._chosen:
            return None
        operation = self._operations.get(edge)
        if operation is None:
            return self._inputs_of_unknown(edge)
        weights = [child for child in operation.inputs if self._is_weights_only(child)]
        others = [child for child in operation.inputs if child not in weights]
        if not weights:
            return others
        if others and (self._joins_losses(operation) or self._follows_loss(edge, operation, others)):
            self.held_constant += weights
            return others
        return None

    def _inputs_of_unknown(self, edge: Edge) -> list[Edge] | None:
        """Walk through nodes that no recorded operation made: the inside of a custom function or a script."""
        inputs, pending, seen = [], [edge], set()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self._operations:
                inputs.append(current)
                continue
            if isinstance(getattr(current[0], "variable", None), torch.nn.Parameter):
                return None
            pending += [(node, output) for node, output in current[0].next_functions if node is not None]
        return inputs

    def _is_weights_only(self, edge: Edge) -> bool:
        if edge in self._operations:
            return self._operations[edge].weights_only and not self._data_is_in_model
        return isinstance(getattr(edge[0], "variable", None), torch.nn.Parameter)

    def _joins_losses(self, operation: Operation) -> bool:
        """Return whether the result has too few entries to be outputs, one for each sample at least."""
        if not operation.shape:
            return True
        return _name(operation) in _ELEMENTWISE and operation.shape.numel() < (self._num_samples or 0)

    def _follows_loss(self, edge: Edge, operation: Operation, others: Sequence[Edge]) -> bool:
        """Return whether an operation scales or shifts the losses of single samples.

        The loss is then linear in the result, but not in what the operation is computed from.
        """
        if _name(operation) not in _ELEMENTWISE or not self._is_linear_in(edge):
            return False
        users = {edge: list(users) for edge, users in self._users.items()}
        held_constant = list(self.held_constant)
        nonlinear = any(not self._is_linear_in(end) for end in self.ends(others))
        self._users, self.held_constant = users, held_constant
        return nonlinear

    def _is_linear_in(self, edge: Edge) -> bool:
        (gradient,) = torch.autograd.grad(self._loss, [gradient_edge(edge)], create_graph=True, allow_unused=True)
        return gradient is None or not gradient.requires_grad

    def _keeps_samples(self, shape: torch.Size) -> bool:
        return self._num_samples is not None and shape[:1] == (self._num_samples,)


def _name(operation: Operation) -> str:
    return operation.function_name.strip("_")
