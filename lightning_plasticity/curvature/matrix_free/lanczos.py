r"""Run the Lanczos process on a linear operator.

From a start vector :math:`v`, :math:`k` products give an orthonormal basis :math:`Q` of the Krylov space and a
tridiagonal :math:`T = Q^\top A Q`. Its eigenvalues (Ritz values) and the squared first components of its eigenvectors
are the Gauss quadrature of the spectral measure of :math:`v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_plasticity.curvature.estimates import JacobiMatrix, Quadrature
from lightning_plasticity.curvature.problem import NOT_FINITE

Reorthogonalization: TypeAlias = Literal["full", "partial", "none"]

_BREAKDOWN = 50
"""Norm below which a new direction is rounding error alone, in units of the rounding error of a product."""


def lanczos(
    operator: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    report: Callable[[int], None] | None = None,
    *,
    reorthogonalization: Reorthogonalization = "partial",
) -> Quadrature:
    """Compute the Gauss quadrature of the spectral measure of a start vector by one Lanczos run.

    The run ends early when the Krylov space is exhausted. The test is relative to the matrix, so the scale of the loss
    does not matter.

    Args:
        operator: Computes the product of the matrix with a vector.
        start: The start vector, shape ``(P,)``, of any length.
        steps: Number of products, at most :math:`P`.
        report: Called after every product with the number of products done.
        reorthogonalization: ``"full"``: orthogonalise every new direction against all earlier ones, by two
            matrix-vector products with the basis. ``"partial"``: do so only when an estimate of the lost orthogonality
            exceeds the square root of the rounding error, up to which the tridiagonal matrix stays accurate to rounding
            error. ``"none"``: never, which needs only two vectors of the basis; eigenvalues then appear in several
            copies, whose weights add up to the right one.

    Raises:
        ValueError: If a product is not finite.

    References:
        Simon 1984, "The Lanczos algorithm with partial reorthogonalization".
    """
    return run_lanczos(operator, start, steps, report, reorthogonalization).quadrature


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """The results of a Lanczos run.

    Args:
        quadrature: The quadrature.
        basis: The Lanczos vectors, shape ``(k, P)``.
        vectors: The eigenvectors of the tridiagonal matrix, in its columns, shape ``(k, k)``, float64.
    """

    quadrature: Quadrature
    basis: Tensor
    vectors: Tensor

    def overlaps(self, vector: Tensor) -> Tensor:
        """Compute the squared overlap of a normalised vector with each Ritz vector, shape ``(k,)``, float64."""
        components = (self.basis @ (vector / vector.norm())).cpu().double()
        return torch.mv(self.vectors.T, components).square()


def run_lanczos(
    operator: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    report: Callable[[int], None] | None,
    reorthogonalization: Reorthogonalization,
) -> LanczosRun:
    """Run :func:`lanczos` and keep the basis."""
    process = LanczosProcess(operator, start, steps, reorthogonalization)
    while not process.finished:
        process.step()
        if report is not None:
            report(process.num_products)
    jacobi = process.jacobi
    nodes, vectors = jacobi.eigh()
    weights = vectors[0].square()
    # A bound cannot be sharper than the rounding error of the products.
    residuals = jacobi.off_diagonal[-1] * vectors[-1].abs() + _BREAKDOWN * process.rounding * nodes.abs().max()
    return LanczosRun(Quadrature(nodes, weights / weights.sum(), residuals, process.complete), process.basis, vectors)


class LanczosProcess:
    """A Lanczos process that advances by one product at a time.

    Args:
        multiply: Computes the product of the matrix with a vector.
        start: The start vector, shape ``(P,)``, of any length but zero.
        max_steps: Largest number of products, for which memory is allocated.
        reorthogonalization: See :func:`lanczos`.
        rounding: Relative rounding error of a product, if larger than that of the data type of ``start``.
    """

    def __init__(
        self,
        multiply: Callable[[Tensor], Tensor],
        start: Tensor,
        max_steps: int,
        reorthogonalization: Reorthogonalization = "full",
        *,
        rounding: float | None = None,
    ) -> None:
        eps = torch.finfo(start.dtype).eps
        self.rounding = eps if rounding is None else rounding
        self.complete = False
        self._multiply, self._reorthogonalization = multiply, reorthogonalization
        rows = min(max_steps, 2) if reorthogonalization == "none" else max_steps
        self._basis = torch.empty(rows, len(start), dtype=start.dtype, device=start.device)
        self._max_steps, self._scale = max_steps, 1.0
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._orthogonality = OrthogonalityEstimate(eps * math.sqrt(len(start)))
        torch.div(start, start.norm(), out=self._basis[0])

    @property
    def num_products(self) -> int:
        """Number of products done."""
        return len(self._diagonal)

    @property
    def finished(self) -> bool:
        """Whether the Krylov space is exhausted or all products are done."""
        return self.complete or self.num_products == self._max_steps

    @property
    def basis(self) -> Tensor:
        """The Lanczos vectors, shape ``(k, P)``; without reorthogonalization only the last two."""
        return self._basis[: self.num_products]

    @property
    def jacobi(self) -> JacobiMatrix:
        """The tridiagonal matrix so far."""
        diagonal, off_diagonal = (
            self._scale * torch.tensor(numbers, dtype=torch.float64, device="cpu")
            for numbers in (self._diagonal, self._off_diagonal)
        )
        return JacobiMatrix(diagonal, off_diagonal, self.rounding)

    def step(self) -> None:
        """Multiply once.

        Raises:
            ValueError: If the product is not finite.
        """
        step, basis = self.num_products, self._basis
        rows = len(basis)
        vector = basis[step % rows]
        image = self._multiply(vector).detach()
        if not step:
            self._scale = _scale_of(image)
        if self._scale != 1:
            image = image / self._scale
        size = image.norm().item()
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
        if step:
            image = image.add(basis[(step - 1) % rows], alpha=-self._off_diagonal[-1])
        self._diagonal.append(torch.dot(vector, image).item())
        image = image.add(vector, alpha=-self._diagonal[-1])
        if self._reorthogonalization == "full" or (
            self._reorthogonalization == "partial"
            and self._orthogonality.needs_reorthogonalization(
                self._diagonal, [*self._off_diagonal, image.norm().item()]
            )
        ):
            image = _orthogonalize(image, basis[: step + 1])
        norm = image.norm().item()
        exhausted = norm <= _BREAKDOWN * self.rounding * max(size, *map(abs, self._diagonal), *self._off_diagonal)
        self._off_diagonal.append(norm)
        self.complete = exhausted or step + 1 == len(vector)
        if step + 1 < self._max_steps and not self.complete:
            torch.div(image, norm, out=basis[(step + 1) % rows])


def _scale_of(image: Tensor) -> float:
    """Return a power of two to divide products by, so that squares of their entries neither underflow nor overflow."""
    largest = image.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(NOT_FINITE)
    return 1.0 if largest == 0 or 1e-9 < largest < 1e9 else 2.0 ** math.floor(math.log2(largest))


def _orthogonalize(vector: Tensor, basis: Tensor) -> Tensor:
    """Project a vector off the rows of a basis, twice if the first pass removes most of it."""
    before = vector.norm()
    vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
    if vector.norm() < 0.5 * before:
        vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
    return vector


class OrthogonalityEstimate:
    r"""An estimate of the orthogonality of the Lanczos vectors that does not read them.

    :math:`\omega_{jk} = q_j \cdot q_k` obeys the same three-term recurrence as the vectors, driven by rounding errors.

    Args:
        noise: Size of one rounding error.

    References:
        Simon 1984, "The Lanczos algorithm with partial reorthogonalization".
    """

    def __init__(self, noise: float) -> None:
        self._noise = noise
        # Estimated products of the last two Lanczos vectors with all vectors before each of them.
        self._previous = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._current = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._again = False

    def needs_reorthogonalization(self, diagonal: list[float], off_diagonal: list[float]) -> bool:
        """Advance the recurrence by one step and return whether to orthogonalise the new vector against all others.

        Args:
            diagonal: The diagonal of :math:`T` so far, ``step + 1`` numbers.
            off_diagonal: The off-diagonal of :math:`T` so far, the norm of the new vector last, ``step + 1`` numbers.
        """
        count = len(diagonal)
        alpha, beta = (
            torch.tensor(diagonal, dtype=torch.float64, device="cpu"),
            torch.tensor(off_diagonal, dtype=torch.float64, device="cpu"),
        )
        # Relative to the matrix, not to the neighbours in T: a short new vector is mostly rounding error.
        rounding = self._noise * torch.maximum(alpha.abs().max(), beta.max())
        following = (rounding / beta[-1]).expand(count).clone()
        if count > 1 and beta[-1] > 0:
            current, previous = self._current, self._previous
            padded = torch.cat([current, torch.ones(1, dtype=torch.float64, device="cpu")])
            grown = beta[: count - 1] * padded[1:] + (alpha[: count - 1] - alpha[-1]) * current
            grown[1:] += beta[: count - 2] * current[:-1]
            grown[: len(previous)] -= beta[-2] * previous
            if len(previous) < len(grown):
                grown[-1] -= beta[-2]
            following[:-1] = (grown + torch.copysign(rounding.expand_as(grown), grown)) / beta[-1]
        needed = self._again or bool(following.abs().max() > math.sqrt(self._noise))
        # The vector before it is as far from orthogonal and enters the next step: two in a row are orthogonalised.
        self._again = needed and not self._again
        if needed:
            following.fill_(self._noise)
        self._previous, self._current = self._current, following
        return needed
