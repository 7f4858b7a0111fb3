"""Walking the autograd graph: what does a tensor depend on, other than through what is known already?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Edge = tuple[Node, int]
"""A place in the graph: a node and the number of its output. Unlike the tensor there, it survives in-place changes."""


def edge_of(tensor: Tensor) -> Edge:
    """Where a tensor stands in the graph now."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def gradient_edge(edge: Edge) -> GradientEdge:
    """The same for :func:`torch.autograd.grad`."""
    return GradientEdge(*edge)


_grad = FunctionType(
    torch.autograd.grad.__code__,
    # A function mode would be off while it handles this call, and what a checkpoint computes again would escape it.
    {**torch.autograd.grad.__globals__, "has_torch_function": lambda _: False},
    argdefs=torch.autograd.grad.__defaults__,
)


def gradients(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    """Vector-Jacobian products along a graph that is kept; zeros where an output does not depend on an input."""
    result: Sequence[Tensor] = _grad(
        outputs, inputs, vectors, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return result


def vector_products(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """The same, dense, where some outputs may be constant: these have no graph, and count as zero."""
    pairs = [(output, vector) for output, vector in zip(outputs, vectors, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    curved, their_vectors = zip(*pairs, strict=True)
    return [product.to_dense() for product in gradients(curved, inputs, their_vectors)]


def or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient as autograd gives it, dense; zeros where there is none."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense()


def reached(start: Sequence[Edge], known: Mapping[Edge, Sequence[Edge]]) -> Iterator[Node]:
    """The nodes that the given places depend on, other than through what is known. Exact: there is no tolerance.

    Args:
        start: Where to begin.
        known: Where to walk on from a place whose dependence on everything in between is known.
    """
    seen: set[Edge] = set()
    pending = list(start)
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in known:
            pending += known[edge]
            continue
        yield edge[0]
        pending += [(following, number) for following, number in edge[0].next_functions if following is not None]


def leaves(start: Sequence[Edge], known: Mapping[Edge, Sequence[Edge]]) -> list[Tensor]:
    """The leaf tensors among what is :func:`reached`."""
    variables = [getattr(node, "variable", None) for node in reached(start, known)]
    return list({id(variable): variable for variable in variables if variable is not None}.values())
