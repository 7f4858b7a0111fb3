"""Hold estimated quantities: a number with its error, and the quadratures of one Lanczos run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class Estimate(float):
    r"""A ``float`` with a standard error and a bracket.

    Args:
        value: The number.
        standard_error: Standard error of the mean over independent start vectors; 0 if the number is exact, ``nan``
            if there was only one start vector.
        lo: Lower end of the bracket that holds the number up to sampling error.
        hi: Upper end.
        start_vectors: Number of start vectors behind the standard error, for the width of its confidence interval;
            ``None`` for the normal distribution.

    Example:
        >>> rank = Estimate(40.0, standard_error=1.0, lo=38.0, hi=43.0)
        >>> rank / 2, rank.resolved
        (20.0, True)
        >>> Estimate(3466.0, standard_error=0.0, lo=50.0, hi=3466.0).resolved
        False
        >>> Estimate(40.0, standard_error=1.0, lo=38.0, hi=43.0, start_vectors=2).resolved  # t distribution, 1 d.o.f.
        False
    """

    standard_error: float
    lo: float
    hi: float
    start_vectors: int | None

    def __new__(
        cls,
        value: float,
        *,
        standard_error: float = 0.0,
        lo: float | None = None,
        hi: float | None = None,
        start_vectors: int | None = None,
    ) -> Estimate:
        """Create the float and set its attributes."""
        self = super().__new__(cls, value)
        self.standard_error = standard_error
        self.lo = value if lo is None else lo
        self.hi = value if hi is None else hi
        self.start_vectors = start_vectors
        return self

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % confidence interval of the sampling error, by Student's t."""
        return _student_t(self.start_vectors) * self.standard_error

    @property
    def resolved(self) -> bool:
        """``True`` if the number is known to 10 %.

        The bracket must not be wider than a fifth of its upper end, and the sampling error must be below 10 % with a
        confidence of 95 %. The limit on the bracket was measured on 512 estimates of ε-ranks: all 205 with so narrow a
        bracket were within 10 % of the exact rank up to sampling error, and all that were further off had a wider one.
        """
        return self.hi - self.lo <= 0.2 * self.hi < math.inf and self.half_width <= 0.1 * abs(self)

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.standard_error:.2g}"


_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for a two-sided 95 % interval, from 1 to 9 degrees of freedom; beyond, 2.26 is an upper bound."""


def _student_t(start_vectors: int | None) -> float:
    if start_vectors is None:
        return 1.96
    return _STUDENT_T[min(max(start_vectors - 2, 0), len(_STUDENT_T) - 1)]


def _no_numbers() -> Tensor:
    return torch.zeros(0, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Quadrature:
    r"""Gauss quadrature of the spectral measure of a start vector, from one Lanczos run.

    Args:
        nodes: Ritz values :math:`\theta_j`, ascending, shape ``(k,)``, float64.
        weights: Squared first components of the Ritz vectors, summing to 1, shape ``(k,)``, float64.
        residuals: Bounds :math:`\beta_k |s_{kj}|` on the distance from each node to an eigenvalue, shape ``(k,)``.
        complete: Whether the Krylov space was exhausted: the quadrature is then the spectral measure itself.
        known: Ritz values :math:`\mu_j` of the run that deflates this one, shape ``(l,)``, float64.
        corrections: Weights that deflation adds to the measure at :math:`\mu_j`, of either sign, summing to 0, shape
            ``(l,)``, float64.

    References:
        Golub and Welsch 1969; Ubaru, Chen and Saad 2017 (stochastic Lanczos quadrature).
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    complete: bool = False
    known: Tensor = field(default_factory=_no_numbers)
    corrections: Tensor = field(default_factory=_no_numbers)

    @property
    def measure(self) -> tuple[Tensor, Tensor]:
        """Atoms and weights, including the corrections, shape ``(k + l,)`` each; the weights sum to 1."""
        return torch.cat([self.nodes, self.known]), torch.cat([self.weights, self.corrections])

    def deflated(self, other: Quadrature, overlaps: Tensor, num_parameters: int) -> Quadrature:
        r"""Return this quadrature with the Ritz vectors of an independent run as control variates.

        A random unit vector :math:`v` has the squared overlap :math:`s_j = (u_j \cdot v)^2` with a Ritz vector
        :math:`u_j` of the other run, and :math:`E[s_j] = 1/P`. The deviation measures by how much :math:`v` over- or
        underweights the spectrum around :math:`\mu_j`. The correction
        :math:`\sum_j (1/P - s_j)(\delta_{\mu_j} - \delta_\mu)` removes it and has mean zero. The compensating weight
        goes to the heaviest node :math:`\mu` of the other run, where most directions lie: the estimate is exact if the
        Ritz vectors span all other directions.

        Args:
            other: Quadrature of the other run.
            overlaps: :math:`s_j`, shape ``(l,)``, float64.
            num_parameters: :math:`P`.
        """
        corrections = 1 / num_parameters - overlaps
        corrections[other.weights.argmax()] -= corrections.sum()
        return replace(self, known=other.nodes, corrections=corrections)

    def mass_between(self, low: float, high: float, *, semidefinite: bool = False) -> tuple[float, float]:
        r"""Return bounds on the mass of the spectral measure in :math:`[low, high]`.

        By the Chebyshev-Markov-Stieltjes inequalities :math:`\sum_{j<i} w_j \le F(\theta_i^-) \le F(\theta_i) \le
        \sum_{j \le i} w_j`, only the nodes next to the ends of the interval are uncertain. Corrections shift both
        bounds by the same amount, so with deflation the bounds may lie outside [0, 1].

        Args:
            low: Lower end of the interval.
            high: Upper end of the interval.
            semidefinite: Whether the matrix has no negative eigenvalue. No mass is then below a ``low`` of 0 or less.
        """
        nodes, weights = self.nodes.tolist(), self.weights.tolist()
        correction = self.corrections[(low <= self.known) & (self.known <= high)].sum().item()
        if self.complete:
            mass = sum(w for node, w in zip(nodes, weights, strict=True) if low <= node <= high)
            return mass + correction, mass + correction
        below_low = (0.0, 0.0) if semidefinite and low <= 0 else _distribution_bounds(nodes, weights, low)
        below_high = _distribution_bounds(nodes, weights, high)
        lower, upper = max(below_high[0] - below_low[1], 0.0), min(below_high[1] - below_low[0], 1.0)
        return lower + correction, upper + correction


@dataclass(frozen=True, eq=False)
class JacobiMatrix:
    r"""The tridiagonal matrix :math:`T_k` of :math:`k` Lanczos steps, which brackets integrals of the spectral measure.

    Args:
        diagonal: :math:`\alpha_1, \dots, \alpha_k`, shape ``(k,)``, float64.
        off_diagonal: :math:`\beta_1, \dots, \beta_k`, shape ``(k,)``, float64. The last is the norm of the vector that
            would come next.
        rounding: Relative rounding error of the products.

    References:
        Golub and Meurant 2010, "Matrices, moments and quadrature with applications", chapter 6.

    Example:
        >>> jacobi = JacobiMatrix(torch.tensor([0.5]).double(), torch.tensor([0.5]).double())
        >>> lower, upper = jacobi.bracket(torch.sqrt)  # the measure has mean 1/2 and variance 1/4, and lies above 0
        >>> round(lower, 6), round(upper, 6)
        (0.5, 0.707107)
    """

    diagonal: Tensor
    off_diagonal: Tensor
    rounding: float = torch.finfo(torch.float64).eps

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of the matrix, ascending, shape ``(k,)``, and its eigenvectors, shape ``(k, k)``."""
        return _tridiagonal_eigh(self.diagonal, self.off_diagonal[:-1])

    @property
    def spectral_measure(self) -> Quadrature:
        """The Gauss quadrature of the spectral measure."""
        nodes, vectors = self.eigh()
        weights, last = vectors[0].square(), self.off_diagonal[-1]
        return Quadrature(nodes, weights / weights.sum(), last * vectors[-1].abs(), complete=bool(last == 0))

    def bracket(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        r"""Bracket the integral of a function over the spectral measure of a matrix without negative eigenvalues.

        If the odd derivatives of the function are positive and the even ones negative, as those of
        :math:`1 - e^{-\tau \lambda}`, the Gauss quadrature is an upper bound and the Gauss-Radau quadrature with a node
        at 0 a lower one. Both approach the integral with each step.

        Args:
            function: The function, from eigenvalues to values, element by element.
        """
        upper = _quadrature(self.diagonal, self.off_diagonal[:-1], function)
        if self.off_diagonal[-1] == 0:
            return upper, upper
        # The last pivot of the extended matrix, which has an eigenvalue of 0, is 0.
        pivot = _last_pivot(self.diagonal.tolist(), self.off_diagonal.tolist())
        last = self.off_diagonal[-1:].square() / pivot
        lower = _quadrature(torch.cat([self.diagonal, last]), self.off_diagonal, function)
        return min(lower, upper), upper


def _tridiagonal_eigh(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(
        torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    )
    return values, vectors


def _quadrature(diagonal: Tensor, off_diagonal: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    nodes, vectors = _tridiagonal_eigh(diagonal, off_diagonal)
    weights = vectors[0].square()
    # Negative nodes are rounding errors.
    return (weights / weights.sum() * function(nodes.clamp(min=0))).sum().item()


def _last_pivot(diagonal: list[float], off_diagonal: list[float]) -> float:
    """Return the last pivot of the factorisation :math:`L D L^T` of a tridiagonal matrix without negative eigenvalues.

    A pivot of zero or less is a rounding error. In its place comes the smallest number that is none, which makes the
    lower bound slightly lower.
    """
    floor = torch.finfo(torch.float64).eps * max(*diagonal, *off_diagonal)
    pivot = math.inf
    for previous, alpha in zip([0.0, *off_diagonal], diagonal, strict=False):
        pivot = max(alpha - previous * previous / pivot, floor)
    return pivot


def _distribution_bounds(nodes: list[float], weights: list[float], x: float) -> tuple[float, float]:
    """Return bounds on the distribution function of the spectral measure at ``x``."""
    count = sum(node <= x for node in nodes)
    return sum(weights[: max(count - 1, 0)]), sum(weights[: count + 1])
