"""What is recorded of a call of a loss function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of
from lightning_plasticity.curvature.exact.hessian_factors import HessianFactor


@dataclass(frozen=True, eq=False)
class LossCurvature:
    """First and second derivative of a loss by the outputs that it was given.

    Args:
        residual: Gradient by the outputs, the shape of the outputs.
        root: Root of the Hessian. Block ``k`` is about the ``k``-th run of ``b`` numbers of the outputs once their
            class dimension is the last.
        scale: Size of the terms that the residual is the difference of: what its rounding error is relative to.
    """

    residual: Tensor
    root: HessianFactor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a loss function.

    Args:
        outputs_edge: Where the network outputs that it was given stand in the graph.
        outputs_shape: Their shape.
        value_edge: Where what it returned stood in the graph then.
        curvature: Takes the gradient of the whole loss by what it returned, returns the derivatives by the outputs.
        class_dim: The dimension of the outputs whose entries are coupled (the classes of a softmax), or -1.
    """

    outputs_edge: Edge
    outputs_shape: torch.Size
    value_edge: Edge
    curvature: Callable[[Tensor], LossCurvature]
    class_dim: int = -1


LossRule = Callable[..., "LossCall | None"]
"""Takes the value of a loss function, then what the function took; ``None``: this call has no closed form."""


def loss_call(
    outputs: Tensor, value: Tensor, curvature: Callable[[Tensor], LossCurvature], class_dim: int = -1
) -> LossCall | None:
    """A call about the outputs as they are; ``None`` if they do not depend on anything."""
    if not outputs.requires_grad:
        return None
    return LossCall(edge_of(outputs), outputs.shape, edge_of(value), curvature, class_dim)
