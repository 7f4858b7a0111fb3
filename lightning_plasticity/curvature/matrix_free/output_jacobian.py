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

    def jvp(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        r"""Compute :math:`J v`, one tensor for each tensor of outputs, from one tensor for each parameter."""
        return dense_vjp(self._transposed, self._cotangents, tangents)

    def vjp(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        r"""Compute :math:`J^\top w`, one tensor for each parameter, from one tensor for each tensor of outputs."""
        return [product.to_dense() for product in vjp(self._edges, self._parameters, cotangents)]

    def check(self) -> None:
        """Check the two products against each other on a random vector.

        Raises:
            DoubleBackwardError: If the derivative of the backward pass is wrong.
        """
        cotangents = [normal(cotangent.shape, like=cotangent) for cotangent in self._cotangents]
        gradients = self.vjp(cotangents)
        self.check_transpose(cotangents, gradients, self.jvp(gradients))

    @staticmethod
    def check_transpose(cotangents: Sequence[Tensor], gradients: Sequence[Tensor], products: Sequence[Tensor]) -> None:
        r"""Check :math:`w^\top J (J^\top w) = \lVert J^\top w \rVert^2`, which hidden derivatives violate.

        Args:
            cotangents: :math:`w`.
            gradients: :math:`J^\top w`.
            products: :math:`J J^\top w`.

        Raises:
            DoubleBackwardError: If the two numbers differ.
        """
        square, by_transpose = _dot(gradients, gradients), _dot(cotangents, products)
        if not abs(square - by_transpose) <= 1e-3 * max(square, by_transpose):
            raise DoubleBackwardError(
                "torch's derivative of the backward pass of this model is wrong, and products with its Jacobian with "
                "it. Likely cause: a custom autograd.Function, marked once_differentiable or working on detached "
                "tensors. An exact measurement works without it: take fewer samples"
            )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))
