"""Define the record of one loss function call, and the derivatives of the loss at its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of
from lightning_plasticity.curvature.exact.hessian_factors import HessianFactor


@dataclass(frozen=True, eq=False)
class LossCurvature:
    r"""First and second derivative of a loss with respect to the network outputs, float64.

    Args:
        residual: Gradient with respect to the outputs, in the shape of the outputs.
        factor: Factor :math:`S` of the Hessian :math:`S S^\top`. Its blocks belong to consecutive entries of the
            outputs, once their class dimension is moved last.
        scale: Norm of the terms whose difference is the residual. The rounding error of the residual is relative to it.
    """

    residual: Tensor
    factor: HessianFactor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class LossCall:
    """One call of a loss function with a closed-form Hessian.

    Args:
        outputs_edge: Autograd edge of the network outputs that the function received.
        outputs_shape: Shape of these outputs.
        value_edge: Autograd edge of the returned value, at the time of the call.
        curvature: Maps the upstream gradient (of the total loss with respect to the returned value) to the derivatives
            of the total loss with respect to the outputs.
        class_dim: Dimension of the outputs whose entries the loss couples (the classes of a softmax), or -1.
        chooses_outputs: Whether what the function received are the network outputs, whatever it is computed from.
    """

    outputs_edge: Edge
    outputs_shape: torch.Size
    value_edge: Edge
    curvature: Callable[[Tensor], LossCurvature]
    class_dim: int = -1
    chooses_outputs: bool = False


LossRule = Callable[..., "LossCall | None"]
"""Maps a loss function's value, followed by its arguments, to a record; ``None`` if this call has no closed form."""


def loss_call(
    outputs: Tensor, value: Tensor, curvature: Callable[[Tensor], LossCurvature], class_dim: int = -1
) -> LossCall | None:
    """Build the record of a call, or return ``None`` if the outputs do not require gradients."""
    if not outputs.requires_grad:
        return None
    return LossCall(edge_of(outputs), outputs.shape, edge_of(value), curvature, class_dim)
