r"""Measure the tangent kernel by products, for outputs of any number.

Lanczos started at the residual gives the learnable fraction as a bracket (:class:`JacobiMatrix`), and mostly the
largest eigenvalue, which sets the step size. The residual may be orthogonal to its eigenvector, as the residuals of
cross-entropy, which sum to zero over classes, are to a shift of all outputs: a few products from a random start find it
then.
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

_RANDOM_PRODUCTS = 2
"""Fewest products from the random start, if they are not more than half of all."""

_RANDOM_SHARE = 1 / 5
"""Smallest share of the products from the random start."""


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
    tolerance: float = 0.02,
    steps: int = 100,
    seed: int = 0,
    squared_residual: float = math.nan,
    progress: Progress | None = None,
) -> TangentKernel:
    r"""Measure the tangent kernel by products until the bracket of the learnable fraction is narrow.

    A few products start at a random vector, all others at the residual, unless the width of the bracket comes from what
    the random start leaves open about the largest eigenvalue.

    Args:
        operator: The kernel :math:`\Theta`, whose products must be finite.
        residual: :math:`r = \partial L / \partial f`, shape ``(m,)``, on the device of the operator.
        max_products: Largest number of products.
        tolerance: Width of the bracket at which to stop, as a share of its upper end, for the step size
            :math:`1 / \lambda_{\max}`.
        steps: Number of steps :math:`K` of that bracket.
        seed: Seed of the random start vector.
        squared_residual: :math:`n \lVert r\rVert^2` over all outputs, also where the operator has only some of them.
        progress: Called after each product with the number of products done and ``max_products``.

    Returns:
        The kernel. There is an eigenvalue between the ends of ``lambda_max``; a larger one is possible, but only if its
        eigenvector is nearly orthogonal to both start vectors. The bracket of the learnable fraction is as certain for
        ``lr=None``, and certain for a given ``lr``.

    Raises:
        ValueError: If the residual or a product is not finite, or a number is not positive.

    References:
        Golub and Meurant 2010; Parlett 1998, "The symmetric eigenvalue problem", chapter 13.
    """
    check_positive_ints(max_products=max_products, steps=steps)
    check_seed(seed)
    if not torch.isfinite(residual).all():
        raise ValueError(NOT_FINITE)
    measurement = _Measurement(operator, residual.double(), max_products, seed, squared_residual)
    for done in range(1, max_products + 1):
        measurement.advance(steps)
        if progress is not None:
            progress(done, max_products)
        if measurement.finished or measurement.is_narrow(tolerance, steps):
            break
    return measurement.kernel()


class _Measurement:
    """The two Lanczos processes of a measurement.

    Args:
        operator: The kernel.
        residual: The residual, float64.
        max_products: Largest number of products of both.
        seed: Seed of the random start vector.
        squared_residual: The squared residual of the kernel.
    """

    def __init__(
        self, operator: KernelOperator, residual: Tensor, max_products: int, seed: int, squared_residual: float
    ) -> None:
        # Kernels have positive sums: a start vector near the sum finds the largest eigenvalue sooner.
        start = 1 + normal((operator.dimension,), residual, torch.Generator().manual_seed(seed))
        self._from_random = LanczosProcess(operator, start, max(max_products // 2, 1), rounding=operator.rounding)
        self._from_residual = (
            LanczosProcess(operator, residual, max_products, rounding=operator.rounding) if residual.any() else None
        )
        self._squared_residual = squared_residual
        self._fewest_random = max(min(_RANDOM_PRODUCTS, max_products // 2), 1)

    @property
    def finished(self) -> bool:
        """Whether neither process can advance."""
        return self._from_random.finished and (self._from_residual is None or self._from_residual.finished)

    def advance(self, steps: int) -> None:
        """Multiply once, in the process that narrows the bracket of a horizon most."""
        random, residual = self._from_random, self._from_residual
        if residual is None or residual.finished:
            random.step()
        elif random.finished or not (self._has_few_random or self._needs_random(steps)):
            residual.step()
        else:
            random.step()

    def is_narrow(self, tolerance: float, steps: int) -> bool:
        """Return whether the bracket of a horizon is narrow."""
        if self._from_residual is None or not self._from_residual.num_products:
            return False
        if self._has_few_random and not self._from_random.finished:
            return False
        fraction = self.kernel().learnable_fraction(steps=steps)
        return fraction.hi - fraction.lo <= tolerance * fraction.hi

    @property
    def _has_few_random(self) -> bool:
        assert self._from_residual is not None
        count = self._from_random.num_products
        return count < max(self._fewest_random, _RANDOM_SHARE * (count + self._from_residual.num_products))

    def _needs_random(self, steps: int) -> bool:
        """Return whether the random start sets the upper end of λmax, and with it most of the bracket's width."""
        assert self._from_residual is not None
        if not self._from_residual.num_products:
            return False
        random, residual = _largest(self._from_random), _largest(self._from_residual)
        if random.hi <= residual.hi:
            return False
        kernel, largest = self.kernel(), self._lambda_max()
        fast, slow = kernel.learnable_fraction(1 / largest.lo, steps), kernel.learnable_fraction(1 / largest.hi, steps)
        return fast.hi - slow.hi > slow.hi - slow.lo

    def kernel(self) -> TangentKernel:
        """Return the kernel as known so far."""
        empty = torch.zeros(0, dtype=torch.float64, device="cpu")
        process = self._from_residual
        return TangentKernel.from_quadrature(
            JacobiMatrix(empty, empty) if process is None else process.jacobi,
            self._lambda_max(),
            self._squared_residual,
        )

    def _lambda_max(self) -> Estimate:
        """Return the larger of what both processes found, with a margin for rounding."""
        processes = [process for process in (self._from_residual, self._from_random) if process is not None]
        found = [_largest(process) for process in processes if process.num_products]
        largest, margin = max(max(found, default=0.0), 0.0), _MARGIN * self._from_random.rounding
        upper = max([largest, *(estimate.hi for estimate in found)])
        return Estimate(largest, lo=largest * (1 - margin), hi=upper * (1 + margin))


def _largest(process: LanczosProcess) -> Estimate:
    """Return the largest Ritz value, and as its upper end the largest distance of an eigenvalue near it."""
    values, vectors = process.jacobi.eigh()
    residual = process.jacobi.off_diagonal[-1] * vectors[-1, -1].abs()
    return Estimate(values[-1].item(), hi=(values[-1] + residual).item())
