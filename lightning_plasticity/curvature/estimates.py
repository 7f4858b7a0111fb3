"""Numbers that are estimates: what a Lanczos run knows of a spectrum, and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


class Estimate(float):
    r"""A number with its uncertainty beside it: a ``float`` in every other respect.

    Args:
        value: The number.
        standard_error: Standard error of the mean over independent start vectors; 0 if the number is exact, ``nan``
            if there was only one start vector.
        lo: Lower end of the bracket that holds the number up to sampling error.
        hi: Upper end.
        start_vectors: How many the standard error is from; ``None`` if it needs no allowance for its own error.

    Example:
        >>> rank = Estimate(40.0, standard_error=1.0, lo=38.0, hi=43.0)
        >>> rank / 2, rank.resolved
        (20.0, True)
        >>> Estimate(3466.0, standard_error=0.0, lo=50.0, hi=3466.0).resolved
        False
        >>> Estimate(40.0, standard_error=1.0, lo=38.0, hi=43.0, start_vectors=2).resolved  # an error from two numbers
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
        """Makes the float and puts the rest beside it."""
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
        """Whether the number is known to a tenth.

        The bracket is not wider than a fifth of its upper end, and the sampling error is below a tenth with a
        confidence of 95 %. Of 205 brackets as narrow, all estimates were within 10 % of the exact rank up to sampling
        error; of the estimates that were further off, all lay in wider ones.
        """
        return self.hi - self.lo <= 0.2 * self.hi < math.inf and self.half_width <= 0.1 * abs(self)

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.standard_error:.2g}"


_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t for a two-sided 95 % interval, from 1 to 9 degrees of freedom; beyond, 2.26 bounds it from above."""


def _student_t(start_vectors: int | None) -> float:
    if start_vectors is None:
        return 1.96
    return _STUDENT_T[min(max(start_vectors - 2, 0), len(_STUDENT_T) - 1)]


@dataclass(frozen=True, eq=False)
class Quadrature:
    r"""What one Lanczos run knows of the spectrum: Gauss quadrature of the spectral measure of its start vector.

    Args:
        nodes: Ritz values :math:`\theta_j`, ascending, shape ``(k,)``, float64.
        weights: Squared first components of the Ritz vectors, summing to 1, shape ``(k,)``, float64.
        residuals: Bounds :math:`\beta_k |s_{kj}|`, shape ``(k,)``: an eigenvalue lies that close to each node.
        complete: Whether the run ended because nothing was left to find: the measure is the quadrature itself.
        known: Ritz values :math:`\mu_j` of another run, which deflate this one, shape ``(l,)``, float64.
        corrections: What each of them adds to the measure, of either sign, summing to 0, shape ``(l,)``, float64.

    References:
        Golub and Welsch 1969; Ubaru, Chen and Saad 2017 (stochastic Lanczos quadrature).
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    complete: bool = False
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    corrections: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))

    @property
    def measure(self) -> tuple[Tensor, Tensor]:
        """Its atoms and their weights, with those of the deflation, shape ``(k + l,)`` each; the weights sum to 1."""
        return torch.cat([self.nodes, self.known]), torch.cat([self.weights, self.corrections])

    def deflated(self, other: Quadrature, shares: Tensor, num_parameters: int) -> Quadrature:
        r"""This quadrature with what the run of an independent start vector knows as control variates.

        A random unit vector has the share :math:`s_j = (u_j \cdot v)^2`, :math:`1/P` in the mean, along each Ritz
        vector :math:`u_j` of the other run. Its deviation says by how much this vector has seen too much or too little
        around :math:`\mu_j`: the measure gains :math:`\sum_j (1/P - s_j)(\delta_{\mu_j} - \delta_\mu)`, nothing in the
        mean. What is moved comes from the heaviest node :math:`\mu` of the other run, where most directions lie: the
        estimate is exact if its Ritz vectors hold all the others.

        Args:
            other: The other run's quadrature.
            shares: :math:`s_j`, shape ``(l,)``, float64.
            num_parameters: :math:`P`.
        """
        corrections = 1 / num_parameters - shares
        corrections[other.weights.argmax()] -= corrections.sum()
        return replace(self, known=other.nodes, corrections=corrections)

    def mass_between(self, low: float, high: float, *, semidefinite: bool = False) -> tuple[float, float]:
        r"""Bounds on the share of the start vector's spectral measure that lies in :math:`[low, high]`.

        From the Chebyshev-Markov-Stieltjes inequalities :math:`\sum_{j<i} w_j \le F(\theta_i^-) \le F(\theta_i) \le
        \sum_{j \le i} w_j`: only the nodes next to the ends leave room. Corrections are numbers, which move both bounds
        alike; with them, the bounds may be outside of 0 and 1.

        Args:
            low: Lower end.
            high: Upper end.
            semidefinite: Whether the matrix has no negative eigenvalue, so that a ``low`` of 0 or less is no end.
        """
        nodes, weights = self.nodes.tolist(), self.weights.tolist()
        corrected = self.corrections[(low <= self.known) & (self.known <= high)].sum().item()
        if self.complete:
            mass = sum(w for node, w in zip(nodes, weights, strict=True) if low <= node <= high)
            return mass + corrected, mass + corrected
        below_low = (0.0, 0.0) if semidefinite and low <= 0 else _distribution(nodes, weights, low)
        below_high = _distribution(nodes, weights, high)
        lower, upper = max(below_high[0] - below_low[1], 0.0), min(below_high[1] - below_low[0], 1.0)
        return lower + corrected, upper + corrected


def _distribution(nodes: list[float], weights: list[float], x: float) -> tuple[float, float]:
    """Bounds on the distribution function of the measure at a point: between its neighbouring nodes' jumps."""
    before = [w for node, w in zip(nodes, weights, strict=True) if node <= x]
    lower = sum(before[:-1])
    upper = sum(weights[: len(before) + 1])
    return lower, upper
