"""Compute vector-Jacobian products and walk through the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Edge = tuple[Node, int]
"""A node of the graph and the number of one of its outputs.

Unlike the tensor there, an edge stays valid when the tensor is changed in place.
"""


def edge_of(tensor: Tensor) -> Edge:
    """Return the edge of the graph that produced a tensor."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def has_edge(tensor: Tensor) -> bool:
    """Return whether a tensor is part of a graph: not inside of a custom autograd.Function, where views seem to be."""
    return tensor.requires_grad and (tensor.is_leaf or tensor.grad_fn is not None)


def gradient_edge(edge: Edge) -> GradientEdge:
    """Convert an edge into the form that :func:`torch.autograd.grad` takes."""
    return GradientEdge(*edge)


# `torch.autograd.grad` hands its call to an active function mode, which is off while it handles the call. Checkpointed
# blocks are recomputed during that call, so their operations would escape the mode. This copy never hands itself over.
_grad = FunctionType(
    torch.autograd.grad.__code__,
    {**torch.autograd.grad.__globals__, "has_torch_function": lambda _: False},
    argdefs=torch.autograd.grad.__defaults__,
)


def vjp(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    r"""Compute the vector-Jacobian products :math:`J^\top w` and keep the graph.

    Args:
        outputs: The outputs, as tensors or as edges of the graph.
        inputs: The tensors to differentiate with respect to.
        cotangents: :math:`w`, one tensor for each output, of its shape.
        create_graph: Whether the products get a graph themselves.

    Returns:
        One tensor for each input, of its shape; zeros where no output depends on the input.
    """
    result: Sequence[Tensor] = _grad(
        outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return result


def partial_vjp(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    edges: Sequence[Edge],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    r"""Compute vector-Jacobian products for results of which some may be computed from others; keep the graph.

    Each result is taken for an independent variable, so the derivative with respect to one result leaves out the paths
    that lead through another.

    Args:
        outputs: As in :func:`vjp`.
        edges: The edges of the results.
        cotangents: As in :func:`vjp`.
        create_graph: As in :func:`vjp`.

    Returns:
        One tensor for each edge, zeros where no output depends on it.
    """
    # A gradient is captured before the hooks of the node run, which then stop it.
    hooks = [node.register_prehook(_zero_gradients) for node in {edge[0] for edge in edges}] if len(edges) > 1 else []
    try:
        gradients = _grad(
            outputs,
            [gradient_edge(edge) for edge in edges],
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return [_zeros(edge) if gradient is None else gradient for edge, gradient in zip(edges, gradients, strict=True)]


def _zero_gradients(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)


def _zeros(edge: Edge) -> Tensor:
    metadata = edge[0]._input_metadata[edge[1]]
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def dense_vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Compute :func:`vjp` as dense tensors, where outputs without a graph are constants and contribute zero."""
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    differentiable, remaining_cotangents = zip(*pairs, strict=True)
    return [product.to_dense() for product in vjp(differentiable, inputs, remaining_cotangents)]


def or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter as a dense tensor, zeros if it is ``None``."""
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense()


def reached(start: Sequence[Edge], shortcuts: Mapping[Edge, Sequence[Edge]]) -> Iterator[Node]:
    """Yield the nodes that the given edges depend on, except those between an edge and its shortcut.

    Args:
        start: The edges where the walk begins.
        shortcuts: Edges whose own graph is skipped; the walk goes on at the edges that each one maps to.
    """
    seen: set[Edge] = set()
    pending = list(start)
    while pending:
        edge = pending.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in shortcuts:
            pending += shortcuts[edge]
            continue
        yield edge[0]
        pending += [(node, output) for node, output in edge[0].next_functions if node is not None]


def leaves(start: Sequence[Edge], shortcuts: Mapping[Edge, Sequence[Edge]]) -> list[Tensor]:
    """Return the leaf tensors of the nodes that :func:`reached` yields, each of them once."""
    variables = [getattr(node, "variable", None) for node in reached(start, shortcuts)]
    return list({id(variable): variable for variable in variables if variable is not None}.values())
