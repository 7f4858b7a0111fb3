"""Multiply by the Jacobian of network outputs and by its transpose, on one autograd graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_plasticity.curvature.autograd_graph import Edge, dense_vjp, gradient_edge, vjp
from lightning_plasticity.curvature.double_backward import DoubleBackwardError
from lightning_plasticity.curvature.problem import normal


class OutputJacobian:
    r"""The Jacobian :math:`J` of network outputs with respect to parameters.

    :math:`J v` is computed by reverse mode alone, as the vector-Jacobian product of the linear map
    :math:`w \mapsto J^\top w`. The graph of that map is built once and kept.

    Args:
        edges: The edge of the graph at each tensor of outputs.
        shapes: The shape of each tensor of outputs.
        parameters: The parameters.

    Raises:
        DoubleBackwardError: If the derivative of the backward pass is wrong.
    """

    def __init__(
        self,
        edges: Sequence[GradientEdge | Edge],
        shapes: Sequence[torch.Size],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._edges = [edge if isinstance(edge, GradientEdge) else gradient_edge(edge) for edge in edges]
        self._parameters = list(parameters)
        # The map is linear: its derivative is the same at any cotangents.
        self._cotangents = [
            torch.zeros(shape, dtype=parameters[0].dtype, device=parameters[0].device, requires_grad=True)
            for shape in shapes
        ]
        self._transposed = vjp(self._edges, self._parameters, self._cotangents, create_graph=True)
        self._check_transpose()

    def jvp(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        r"""Compute :math:`J v`, one tensor for each tensor of outputs, from one tensor for each parameter."""
        return dense_vjp(self._transposed, self._cotangents, tangents)

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        r"""Compute :math:`J^\top w`, one tensor for each parameter, from one tensor for each tensor of outputs."""
        return [product.to_dense() for product in vjp(self._edges, self._parameters, cotangents)]

    def _check_transpose(self) -> None:
        r"""Check :math:`w^\top J (J^\top w) = \lVert J^\top w \rVert^2`, which hidden derivatives violate.

        Raises:
            DoubleBackwardError: If the two numbers differ.
        """
        size = sum(cotangent.numel() for cotangent in self._cotangents)
        vector = normal((size,), like=self._parameters[0]) / size**0.5
        pieces = vector.split([cotangent.numel() for cotangent in self._cotangents])
        cotangents = [piece.reshape(like.shape) for piece, like in zip(pieces, self._cotangents, strict=True)]
        gradients = self.vjp(cotangents)
        square = _dot(gradients, gradients)
        by_transpose = _dot(cotangents, self.jvp(gradients))
        if not abs(square - by_transpose) <= 1e-3 * max(square, by_transpose):
            raise DoubleBackwardError(
                "torch's derivative of the backward pass of this model is wrong, and products with its Gauss-Newton "
                "matrix with it. Likely cause: a custom autograd.Function, marked once_differentiable or working on "
                "detached tensors. ggn_spectrum(method='gram') works without it"
            )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
