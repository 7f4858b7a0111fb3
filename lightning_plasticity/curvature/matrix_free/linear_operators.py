"""Define curvature matrices as linear operators, whose products reuse one autograd graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.curvature.autograd_graph import dense_vjp, vjp
from lightning_plasticity.curvature.exact.loss_hessian import LossHessian
from lightning_plasticity.curvature.matrix_free.output_jacobian import OutputJacobian


class CurvatureLinearOperator(ABC):
    r"""A symmetric matrix :math:`A`, :math:`P \times P`, defined by its products with vectors.

    Args:
        parameters: The parameters of the rows and columns, flattened and concatenated.
        loss: Value of the loss.
    """

    semidefinite: bool = False
    """``True`` if the matrix has no negative eigenvalue by construction."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float = math.nan) -> None:
        self.parameters = list(parameters)
        self.loss = loss
        self.sizes = [parameter.numel() for parameter in self.parameters]

    @property
    def dimension(self) -> int:
        """Number of rows :math:`P`."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of vectors and products."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of vectors and products."""
        return self.parameters[0].device

    @abstractmethod
    def __call__(self, vector: Tensor) -> Tensor:
        """Compute the product :math:`A v`, shape ``(P,)``, with a vector of shape ``(P,)``."""

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split a vector into one tensor for each parameter, of its shape."""
        return [
            piece.reshape(parameter.shape)
            for piece, parameter in zip(vector.split(self.sizes), self.parameters, strict=True)
        ]


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class HessianLinearOperator(CurvatureLinearOperator):
    r"""The Hessian of a loss, :math:`H v = \nabla_\theta (\nabla_\theta L \cdot v)` (Pearlmutter 1994).

    The graph of the gradient is built once and kept.

    Args:
        loss: The loss, a scalar with a graph that can be differentiated twice.
        parameters: The parameters.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, loss.item())
        self._gradients = vjp([loss], self.parameters, [torch.ones_like(loss)], create_graph=True)

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        return _flatten(dense_vjp(self._gradients, self.parameters, self.split(vector)))


class GGNLinearOperator(CurvatureLinearOperator):
    r"""The generalized Gauss-Newton matrix :math:`J^\top \frac{\partial^2 L}{\partial f^2} J`.

    Args:
        loss: The loss.
        hessian: The Hessian of the loss with respect to the network outputs.
        parameters: The parameters.

    Raises:
        DoubleBackwardError: If the derivative of the backward pass is wrong.
    """

    semidefinite = True

    def __init__(self, loss: Tensor, hessian: LossHessian, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, loss.item())
        self._hessian = hessian
        self._jacobian = OutputJacobian(
            [output.edge for output in hessian.outputs], [output.shape for output in hessian.outputs], parameters
        )
        self._jacobian.check()

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        tangents = self._jacobian.jvp(self.split(vector))
        images = self._hessian.matvec([tangent.double() for tangent in tangents])
        return _flatten(
            self._jacobian.vjp([image.to(tangent.dtype) for image, tangent in zip(images, tangents, strict=True)])
        )
