r"""Measure the tangent kernel by products, for outputs of any number.

Lanczos started at the residual gives the learnable fraction as a bracket (:class:`JacobiMatrix`). The largest
eigenvalue, which sets the step size, comes from a second process with a random start: the residual may be orthogonal to
its eigenvector, as the residuals of cross-entropy, which sum to zero over classes, are to a shift of all outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lightning_plasticity._validation import check_positive_ints, check_seed
from lightning_plasticity.curvature.autograd_graph import Edge
from lightning_plasticity.curvature.estimates import Estimate, JacobiMatrix
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.matrix_free.lanczos import LanczosProcess
from lightning_plasticity.curvature.matrix_free.output_jacobian import OutputJacobian
from lightning_plasticity.curvature.problem import NOT_FINITE, Progress, normal

_MARGIN = 10
"""Error of a Ritz value by rounding, in units of the relative rounding error of a product."""

_PRODUCTS_BETWEEN_BRACKETS = 3
"""Products after which the bracket is computed again."""

_FAILURE_PROBABILITY = 0.01
"""Probability, over the random start vector, that the largest eigenvalue exceeds its bound."""


class KernelOperator(Protocol):
    """Products with a symmetric matrix without negative eigenvalues."""

    @property
    def dimension(self) -> int:
        """Number of rows."""

    @property
    def rounding(self) -> float:
        """Relative rounding error of a product."""

    def __call__(self, vector: Tensor) -> Tensor:
        """Compute the product with a vector of shape ``(dimension,)``, float64."""


class TangentKernelOperator:
    r"""The neural tangent kernel :math:`\Theta = \frac1n J J^\top`, :math:`m \times m`, defined by its products.

    A product is one vector-Jacobian and one Jacobian-vector product, about two gradients of the batch. Rows and columns
    are the outputs, flattened one tensor after the other. Vectors are float64, whatever the parameters are.

    Args:
        edges: The edge of the graph at each tensor of outputs.
        shapes: The shape of each tensor of outputs.
        parameters: The parameters.
        num_samples: Number of samples :math:`n`.
        entries: The rows and columns to take, ascending; ``None`` for all.

    Example:
        >>> from torch.autograd.graph import get_gradient_edge
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> outputs = model(x)
        >>> operator = TangentKernelOperator([get_gradient_edge(outputs)], [outputs.shape], [model.weight], 2)
        >>> operator(torch.ones(2, dtype=torch.float64))  # of ½ xxᵀ
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        edges: Sequence[GradientEdge | Edge],
        shapes: Sequence[torch.Size],
        parameters: Sequence[nn.Parameter],
        num_samples: int,
        entries: Tensor | None = None,
    ) -> None:
        check_positive_ints(num_samples=num_samples)
        self._jacobian = OutputJacobian(edges, shapes, parameters)
        self._shapes, self._num_samples, self._entries = list(shapes), num_samples, entries
        self._dtype = parameters[0].dtype
        self.products = 0
        """Number of products so far."""

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return self._num_outputs if self._entries is None else len(self._entries)

    @property
    def rounding(self) -> float:
        """Relative rounding error of a product."""
        return torch.finfo(self._dtype).eps

    def __call__(self, vector: Tensor) -> Tensor:
        r"""Compute :math:`\Theta v`, float64.

        Raises:
            DoubleBackwardError: If the derivative of the backward pass is wrong, at the first product.
        """
        flat = vector.to(self._dtype)
        if self._entries is not None:
            flat = flat.new_zeros(self._num_outputs).index_copy_(0, self._entries, flat)
        pieces = flat.split([shape.numel() for shape in self._shapes])
        cotangents = [piece.reshape(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        gradients = self._jacobian.vjp(cotangents)
        products = self._jacobian.jvp(gradients)
        if not self.products:
            self._jacobian.check_transpose(cotangents, gradients, products)
        self.products += 1
        result = torch.cat([product.reshape(-1) for product in products])
        if self._entries is not None:
            result = result[self._entries]
        return result.to(vector.dtype).div_(self._num_samples)

    @property
    def _num_outputs(self) -> int:
        return sum(shape.numel() for shape in self._shapes)


def kernel_by_lanczos(
    operator: KernelOperator,
    residual: Tensor,
    *,
    max_products: int,
    tolerance: float = 0.01,
    steps: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> TangentKernel:
    r"""Measure the tangent kernel by products until the bracket of the learnable fraction is narrow.

    Each product goes to the process that the width of the bracket comes from: the one from the residual, or the one
    for the largest eigenvalue.

    Args:
        operator: The kernel :math:`\Theta`, whose products must be finite.
        residual: :math:`r = \partial L / \partial f`, shape ``(m,)``, on the device of the operator.
        max_products: Largest number of products.
        tolerance: Width of the bracket at which to stop, as a share of its upper end, for the step size
            :math:`1 / \lambda_{\max}`.
        steps: Number of steps :math:`K` of that bracket.
        seed: Seed of the random start vector.
        progress: Called after each product with the number of products done and ``max_products``.

    Returns:
        The kernel. The upper end of ``lambda_max`` holds with a probability of 99 % over the random start vector, and
        with it the bracket for ``lr=None``.

    Raises:
        ValueError: If the residual or a product is not finite, or a number is not positive.

    References:
        Golub and Meurant 2010; van Dorsselaer, Hochstenbach and van der Vorst 2000.
    """
    check_positive_ints(max_products=max_products, steps=steps)
    check_seed(seed)
    if not torch.isfinite(residual).all():
        raise ValueError(NOT_FINITE)
    residual = residual.double()
    measurement = _Measurement(operator, residual.double(), max_products, seed)
    for done in range(1, max_products + 1):
        measurement.advance()
        if progress is not None:
            progress(done, max_products)
        if measurement.finished:
            break
        # A bracket takes as long as a product with a small network.
        if done % _PRODUCTS_BETWEEN_BRACKETS == 0:
            fraction = measurement.kernel().learnable_fraction(steps=steps)
            if fraction.hi - fraction.lo <= tolerance * fraction.hi:
                break
            measurement.choose(steps)
    return measurement.kernel()


class _Measurement:
    """The two Lanczos processes of a measurement.

    Args:
        operator: The kernel.
        residual: The residual, float64.
        max_products: Largest number of products of both.
        seed: Seed of the random start vector.
    """

    def __init__(self, operator: KernelOperator, residual: Tensor, max_products: int, seed: int) -> None:
        # Kernels have positive sums: a start vector near the sum finds the largest eigenvalue sooner. The bound on it
        # holds for any shift of the normal distribution.
        start = 1 + normal((operator.dimension,), residual, torch.Generator().manual_seed(seed))
        most, rounding = max(max_products // 2, 1), operator.rounding
        self._from_residual = (
            LanczosProcess(operator, residual, max_products, rounding=rounding) if residual.any() else None
        )
        self._from_random = LanczosProcess(operator, start, most, rounding=rounding)
        self._chosen: LanczosProcess | None = None
        # The overlap with a fixed unit vector is normally distributed before start is normalised.
        self._overlap = _FAILURE_PROBABILITY * math.sqrt(math.pi / 2) / start.norm().item()

    @property
    def finished(self) -> bool:
        """Whether neither process can advance."""
        return not self._unfinished

    @property
    def _unfinished(self) -> list[LanczosProcess]:
        processes = [self._from_residual, self._from_random]
        return [process for process in processes if process is not None and not process.finished]

    def advance(self) -> None:
        """Multiply once, in the process that was chosen last; before, in each of them in turn."""
        unfinished = self._unfinished
        if self._chosen in unfinished:
            self._chosen.step()
        else:
            min(unfinished, key=lambda process: process.num_products).step()

    def choose(self, steps: int) -> None:
        """Choose the process that widens the bracket of a horizon most."""
        kernel, largest = self.kernel(), self._lambda_max()
        fast, slow = kernel.learnable_fraction(1 / largest.lo, steps), kernel.learnable_fraction(1 / largest.hi, steps)
        is_lambda_max = fast.hi - slow.hi > slow.hi - slow.lo
        self._chosen = self._from_random if is_lambda_max else self._from_residual

    def kernel(self) -> TangentKernel:
        """Return the kernel as known so far."""
        empty = torch.zeros(0, dtype=torch.float64, device="cpu")
        process = self._from_residual
        return TangentKernel.from_quadrature(
            JacobiMatrix(empty, empty) if process is None else process.jacobi, self._lambda_max()
        )

    def _lambda_max(self) -> Estimate:
        """Return the largest eigenvalue found by either process, up to what the random start vector may have missed."""
        processes = [process for process in (self._from_residual, self._from_random) if process is not None]
        found = max((process.jacobi.eigh()[0][-1].item() for process in processes if process.num_products), default=0.0)
        found = max(found, 0.0)
        possible = (
            self._from_random.jacobi.largest_possible(self._overlap) if self._from_random.num_products else math.inf
        )
        margin = _MARGIN * self._from_random.rounding
        return Estimate(found, lo=found * (1 - margin), hi=max(found, possible) * (1 + margin))
