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

from lightning_plasticity.curvature.estimates import Quadrature
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.problem import NOT_FINITE

Reorthogonalization: TypeAlias = Literal["full", "partial", "none"]

_BREAKDOWN = 50
"""Norm below which a new direction is rounding error alone, in units of the rounding error of a product."""


def lanczos(
    operator: CurvatureLinearOperator,
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
        operator: The matrix.
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
    operator: CurvatureLinearOperator,
    start: Tensor,
    steps: int,
    report: Callable[[int], None] | None,
    reorthogonalization: Reorthogonalization,
) -> LanczosRun:
    """Run :func:`lanczos` and keep the basis."""
    eps = torch.finfo(start.dtype).eps
    rows = min(steps, 2) if reorthogonalization == "none" else steps
    basis = torch.empty(rows, len(start), dtype=start.dtype, device=start.device)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    orthogonality = OrthogonalityEstimate(eps * math.sqrt(len(start)))
    torch.div(start, start.norm(), out=basis[0])
    complete, scale = False, 1.0
    for step in range(steps):
        vector = basis[step % rows]
        image = operator(vector).detach()
        if not step:
            scale = _scale_of(image)
        if scale != 1:
            image = image / scale
        size = image.norm().item()
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
        if step:
            image = image.add(basis[(step - 1) % rows], alpha=-off_diagonal[-1])
        diagonal.append(torch.dot(vector, image).item())
        image = image.add(vector, alpha=-diagonal[-1])
        if reorthogonalization == "full" or (
            reorthogonalization == "partial"
            and orthogonality.needs_reorthogonalization(diagonal, [*off_diagonal, image.norm().item()])
        ):
            image = _orthogonalize(image, basis[: step + 1])
        off_diagonal.append(image.norm().item())
        if report is not None:
            report(step + 1)
        if off_diagonal[-1] <= _BREAKDOWN * eps * max(size, *map(abs, diagonal), *off_diagonal[:-1]):
            complete = True
            break
        if step + 1 < steps:
            torch.div(image, off_diagonal[-1], out=basis[(step + 1) % rows])
    nodes, weights, residuals, vectors = _ritz(diagonal, off_diagonal)
    # A bound cannot be sharper than the rounding error of the products.
    residuals = residuals + _BREAKDOWN * eps * nodes.abs().max()
    complete = complete or len(diagonal) == len(start)
    return LanczosRun(Quadrature(scale * nodes, weights, scale * residuals, complete), basis[: len(diagonal)], vectors)


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


def _ritz(diagonal: list[float], off_diagonal: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the eigenvalues of the tridiagonal matrix, their quadrature weights, residuals and eigenvectors."""
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64, device="cpu")
    tridiagonal += torch.diag(inner, 1) + torch.diag(inner, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[0].square()
    return nodes, weights / weights.sum(), off_diagonal[-1] * vectors[-1].abs(), vectors
