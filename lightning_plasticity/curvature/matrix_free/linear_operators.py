"""Curvature as matrices to multiply with: one graph is built and kept, and every product is a walk through it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.curvature.autograd_graph import gradient_edge, gradients, vector_products
from lightning_plasticity.curvature.double_backward import DoubleBackwardError
from lightning_plasticity.curvature.exact.outputs import Outputs
from lightning_plasticity.curvature.problem import normal


class CurvatureLinearOperator(ABC):
    r"""A symmetric matrix :math:`A`, :math:`P \times P`, known by its products with vectors.

    Args:
        parameters: The parameters that the rows and columns belong to, one after the other.
        loss: The loss that this is the curvature of.
    """

    semidefinite: bool = False
    """Whether the matrix is known to have no negative eigenvalue."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: float = math.nan) -> None:
        self.parameters = list(parameters)
        self.loss = loss
        self.sizes = [parameter.numel() for parameter in self.parameters]

    @property
    def dimension(self) -> int:
        """:math:`P`."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of vectors and products."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Where vectors and products are."""
        return self.parameters[0].device

    @abstractmethod
    def __call__(self, vector: Tensor) -> Tensor:
        """The product :math:`A v`, shape ``(P,)``, with a vector of shape ``(P,)``."""

    def _split(self, vector: Tensor) -> list[Tensor]:
        return [
            piece.reshape(parameter.shape)
            for piece, parameter in zip(vector.split(self.sizes), self.parameters, strict=True)
        ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.to_dense().reshape(-1) for tensor in tensors])


class HessianLinearOperator(CurvatureLinearOperator):
    r"""The Hessian of a loss, :math:`H v = \nabla_\theta (\nabla_\theta L \cdot v)` (Pearlmutter 1994).

    Args:
        loss: The loss, a scalar with a graph that can be differentiated twice.
        parameters: The parameters.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, loss.item())
        self._gradients = gradients([loss], self.parameters, [torch.ones_like(loss)], create_graph=True)

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        return _flat(vector_products(self._gradients, self.parameters, self._split(vector)))


class GGNLinearOperator(CurvatureLinearOperator):
    r"""The generalized Gauss-Newton matrix :math:`J^\top \frac{\partial^2 L}{\partial f^2} J`.

    :math:`J v` is the derivative of :math:`J^\top w` by :math:`w`, times :math:`v`: the graph of a backward pass is
    kept.

    Args:
        loss: The loss.
        outputs: The network's outputs and the closed form of the loss there.
        parameters: The parameters.
    """

    semidefinite = True

    def __init__(self, loss: Tensor, outputs: Sequence[Outputs], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, loss.item())
        self._edges = [gradient_edge(output.edge) for output in outputs]
        self._outputs = list(outputs)
        self._probes = [
            torch.zeros(output.shape, dtype=self.dtype, device=self.device, requires_grad=True) for output in outputs
        ]
        self._pulled_back = gradients(self._edges, self.parameters, self._probes, create_graph=True)
        self._check_transpose()

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        pushed = zip(self._outputs, self._jvp(vector), strict=True)
        return self._vjp([output.hessian_matvec(change).to(change.dtype) for output, change in pushed])

    def _jvp(self, vector: Tensor) -> Sequence[Tensor]:
        r""":math:`J v`."""
        return vector_products(self._pulled_back, self._probes, self._split(vector))

    def _vjp(self, changes: Sequence[Tensor]) -> Tensor:
        r""":math:`J^\top w`."""
        return _flat(gradients(self._edges, self.parameters, changes))

    def _check_transpose(self) -> None:
        r"""Whether :math:`\lVert J v \rVert^2 = v^\top J^\top (J v)`: a backward pass may hide its own derivative."""
        vector = normal((self.dimension,), like=self.parameters[0])
        vector /= vector.norm()
        pushed = self._jvp(vector)
        square = sum(change.double().square().sum().item() for change in pushed)
        again = torch.dot(vector.double(), self._vjp(pushed).double()).item()
        if not abs(square - again) <= 1e-3 * max(square, again):
            raise DoubleBackwardError(
                "torch's derivative of the backward pass of this model is wrong, and products with its Gauss-Newton "
                "matrix with it. Likely cause: a custom autograd.Function, marked once_differentiable or working on "
                "detached tensors. ggn_spectrum(method='gram') does without"
            )
