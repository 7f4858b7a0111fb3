"""Compute the eigenvalues of largest absolute value of a linear operator, with their eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.problem import NOT_FINITE, normal

_BREAKDOWN = 50
"""Norm below which a new direction is rounding error alone, in units of the rounding error of a product."""

_SETTLED = 0.1
"""Residual, relative to its Ritz value, at which that value is close enough to be compared with others."""


class RestartedLanczos:
    r"""A Lanczos process in a basis of bounded size, which keeps the best Ritz vectors when it is full.

    A Krylov space has one direction of each eigenspace. When ``k`` pairs have converged, the process starts again at a
    random vector orthogonal to them, and ends when that finds no larger eigenvalue. So it finds multiple eigenvalues,
    and those whose eigenvectors the first start vector missed.

    Args:
        operator: The matrix.
        k: Number of eigenpairs.
        tolerance: Residual :math:`\lVert A v - \lambda v \rVert`, relative to the largest absolute eigenvalue, at which
            a pair has converged.
        seed: Seed of the start vectors.

    References:
        Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".
    """

    def __init__(self, operator: CurvatureLinearOperator, k: int, tolerance: float, seed: int) -> None:
        self._operator, self._k, self._tolerance = operator, k, tolerance
        self._generator = torch.Generator().manual_seed(seed)
        self._eps = torch.finfo(operator.dtype).eps
        rows = min(2 * k + 20, operator.dimension)
        self._basis = torch.empty(rows, operator.dimension, dtype=operator.dtype, device=operator.device)
        self._projected = torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
        self._size = 0
        # The next direction, and its product with the matrix times each vector of the basis.
        self._next, self._coupling = self._random_direction(), torch.zeros(0, dtype=torch.float64, device="cpu")
        # The values of k converged pairs, while larger ones are searched for.
        self._found: Tensor | None = None
        self.finished = False

    def advance(self) -> None:
        """Multiply once.

        Raises:
            ValueError: If the product is not finite.
        """
        if self._size == len(self._basis):
            self._restart((self._k + self._size) // 2)
        step, basis = self._size, self._basis[: self._size + 1]
        self._basis[step] = self._next
        image = self._operator(self._basis[step]).detach()
        if not torch.isfinite(image).all():
            raise ValueError(NOT_FINITE)
        components = basis @ image
        image = torch.addmv(image, basis.T, components, alpha=-1)
        image = torch.addmv(image, basis.T, basis @ image, alpha=-1)
        self._projected[step, : step + 1] = self._projected[: step + 1, step] = components.cpu().double()
        self._size += 1
        norm = image.norm().item()
        self._coupling = torch.zeros(self._size, dtype=torch.float64, device="cpu")
        self._coupling[-1] = norm
        values, _, residuals = self._ritz()
        if self._size == self._operator.dimension:
            self.finished = True
        elif norm <= _BREAKDOWN * self._eps * values[0].abs():
            self._coupling[-1] = 0
            self._leave_invariant_space()
        else:
            self._next = image / norm
            if self._has_converged(values, residuals):
                self._leave_invariant_space()

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return at most ``k`` Ritz values by absolute value, descending, and their vectors in the rows of a matrix."""
        values, vectors, _ = self._ritz()
        combinations = vectors[:, : self._k].T.to(self._basis)
        return values[: self._k], combinations @ self._basis[: self._size]

    def _ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Ritz values by absolute value, descending, their coordinates and the bounds on their residuals."""
        values, vectors = torch.linalg.eigh(self._projected[: self._size, : self._size])
        order = values.abs().argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        return values, vectors, (self._coupling @ vectors).abs()

    def _has_converged(self, values: Tensor, residuals: Tensor) -> bool:
        """Return whether the pairs are found; in a search for others also whether the largest other is known."""
        if self._size < self._k or (residuals[: self._k] > self._tolerance * values[0].abs()).any():
            return False
        if self._found is None:
            return True
        if self._size == self._k:
            return False
        other, residual = values[self._k].abs(), residuals[self._k]
        return bool(residual <= _SETTLED * other and other + residual < values[self._k - 1].abs())

    def _leave_invariant_space(self) -> None:
        """Start again at a random vector, or finish if that has been done and no pair has changed."""
        self._restart(min(self._k, self._size))
        found, before = self._projected.diagonal()[: self._size].clone(), self._found
        if before is not None and (found.abs() - before.abs()).abs().max() <= self._tolerance * found[0].abs():
            self.finished = True
            return
        self._found = found if self._size == self._k else None
        self._next, self._coupling = self._random_direction(), torch.zeros_like(self._coupling)

    def _restart(self, size: int) -> None:
        """Replace the basis by the best Ritz vectors."""
        values, vectors, _ = self._ritz()
        self._basis[:size] = vectors[:, :size].T.to(self._basis) @ self._basis[: self._size]
        self._projected.zero_()
        self._projected.diagonal()[:size] = values[:size]
        self._coupling, self._size = (self._coupling @ vectors)[:size], size

    def _random_direction(self) -> Tensor:
        vector = normal((self._operator.dimension,), self._basis, self._generator)
        basis = self._basis[: self._size]
        for _ in range(2):
            vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
        direction: Tensor = vector / vector.norm()
        return direction
