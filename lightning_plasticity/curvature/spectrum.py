"""Hold the spectrum of a curvature matrix and derive ranks, extremes and densities from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plasticity.curvature.estimates import Estimate, Quadrature
from lightning_plasticity.curvature.kernel import TangentKernel, effective_rank_of, fast_threshold
from lightning_plasticity.curvature.plotting import plot_spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""The spectrum of a :math:`P \times P` curvature matrix: eigenvalues and the fraction of all directions of each.

    Derived quantities are :class:`Estimate` objects: floats with a standard error and, where one is known, a bracket.
    For an exact spectrum the standard error is 0 and the bracket is the number itself.

    Args:
        eigenvalues: :math:`\lambda_k`, shape ``(k,)``, float64, in units of loss per squared parameter. For an estimate
            the Ritz values of all start vectors.
        weights: Fraction of all :math:`P` eigenvalues that each one represents, shape ``(k,)``, summing to 1. A
            deflated estimate includes corrections (:meth:`Quadrature.deflated`), which may be negative.
        num_parameters: :math:`P`, the number of trainable parameters.
        exact: Whether the eigenvalues are those of the matrix rather than an estimate.
        kernel: The tangent kernel of the same batch, if it was computed.
        quadratures: The quadrature of each start vector, for an estimate.
        semidefinite: Whether the matrix is known to have no negative eigenvalue.
        trace_standard_error: Standard error of the trace, for an estimate without quadratures. Its other errors are
            unknown.

    Example:
        >>> spectrum = Spectrum(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.25, 0.25, 0.5]), 4, exact=True)
        >>> float(spectrum.trace), float(spectrum.lambda_max), float(spectrum.epsilon_rank(0.5))
        (4.0, 3.0, 2.0)
    """

    eigenvalues: Tensor
    weights: Tensor
    num_parameters: int
    exact: bool
    kernel: TangentKernel | None = None
    quadratures: tuple[Quadrature, ...] = ()
    semidefinite: bool = False
    trace_standard_error: float = 0.0

    @classmethod
    def from_quadratures(
        cls, quadratures: Sequence[Quadrature], num_parameters: int, *, semidefinite: bool = False
    ) -> Spectrum:
        """Average the quadratures of independent start vectors.

        Args:
            quadratures: One quadrature for each start vector.
            num_parameters: :math:`P`.
            semidefinite: Whether the matrix is known to have no negative eigenvalue.
        """
        values, weights = (torch.cat(parts) for parts in zip(*(q.measure for q in quadratures), strict=True))
        return cls(values, weights / len(quadratures), num_parameters, False, None, tuple(quadratures), semidefinite)

    @property
    def lambda_max(self) -> Estimate:
        r"""The largest eigenvalue :math:`\lambda_{\max}`, the sharpness; bracketed by the bound on its residual."""
        return self._extreme_eigenvalue(largest=True)

    @property
    def lambda_min(self) -> Estimate:
        r"""The smallest eigenvalue :math:`\lambda_{\min}`; bracketed by the bound on its residual."""
        return self._extreme_eigenvalue(largest=False)

    @property
    def trace(self) -> Estimate:
        r"""The sum of all eigenvalues, :math:`P \sum_k w_k \lambda_k`."""
        trace = self._estimate(lambda values, weights: self.num_parameters * (weights * values).sum().item())
        return trace if self.exact or self.quadratures else Estimate(trace, standard_error=self.trace_standard_error)

    @property
    def effective_rank(self) -> Estimate:
        """Effective rank of the matrix (:func:`effective_rank_of`).

        An estimate is biased because few nodes represent many eigenvalues; with few steps the bias exceeds the standard
        error. It can be compared with another estimate, but is never ``resolved``.
        """
        rank = self._estimate(lambda values, weights: effective_rank_of(values, self.num_parameters * weights))
        return rank if self.exact else _with_bracket(rank, 0.0, float(self.num_parameters))

    @property
    def negative_mass(self) -> Estimate:
        r"""Negative fraction of the curvature.

        :math:`\sum_{\lambda_k < 0} w_k |\lambda_k| / \sum_k w_k |\lambda_k|`

        The bias of an estimate is not bounded.
        """

        def negative_fraction(values: Tensor, weights: Tensor) -> float:
            total = (weights * values.abs()).sum()
            return ((weights * values.clamp(max=0).abs()).sum() / total).item() if total > 0 else 0.0

        mass = self._estimate(negative_fraction)
        return mass if self.exact else _with_bracket(mass, 0.0, 1.0)

    def top(self, k: int) -> Tensor:
        """Return the ``k`` largest eigenvalues, descending, shape ``(min(k, number of eigenvalues),)``.

        For an estimate they are the Ritz values of the first start vector. Only the first few are close to eigenvalues;
        :attr:`Quadrature.residuals` bounds the distance.

        Raises:
            ValueError: If ``k`` is less than 1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        values = self.quadratures[0].nodes if self.quadratures else self.eigenvalues
        return values.sort(descending=True).values[:k]

    def epsilon_fraction(self, epsilon: float) -> Estimate:
        r"""Compute the fraction of directions with notable curvature, :math:`\sum_k w_k [|\lambda_k| > \epsilon]`.

        Args:
            epsilon: The threshold :math:`\epsilon \ge 0`, in units of the eigenvalues.

        Returns:
            The fraction, with a Chebyshev-Markov-Stieltjes bracket if it is an estimate. For an ``epsilon`` below its
            resolution, Lanczos quadrature reports full rank; ``resolved`` is then false.

        Raises:
            ValueError: If ``epsilon`` is negative.

        References:
            arXiv 2509.22335, section 4.
        """
        _check_threshold(epsilon=epsilon)
        estimate = self._estimate(lambda values, weights: weights[values.abs() > epsilon].sum().item())
        if self.exact:
            return estimate
        if not self.quadratures:
            return Estimate(estimate, standard_error=math.nan, lo=0.0, hi=1.0)
        inside = [q.mass_between(-epsilon, epsilon, semidefinite=self.semidefinite) for q in self.quadratures]
        lo = 1 - sum(high for _, high in inside) / len(inside)
        hi = 1 - sum(low for low, _ in inside) / len(inside)
        lo, fraction, hi = (min(max(value, 0.0), 1.0) for value in (lo, estimate, hi))
        return Estimate(
            fraction, standard_error=estimate.standard_error, lo=lo, hi=hi, start_vectors=estimate.start_vectors
        )

    def epsilon_rank(self, epsilon: float) -> Estimate:
        r"""Count the directions with notable curvature, :math:`\#\{k : |\lambda_k| > \epsilon\}`.

        Args:
            epsilon: The threshold :math:`\epsilon \ge 0`, in units of the eigenvalues.

        Returns:
            A number between 0 and :math:`P`: an integer if the spectrum is exact, else bracketed as in
            :meth:`epsilon_fraction`.

        Raises:
            ValueError: If ``epsilon`` is negative.

        References:
            arXiv 2509.22335, section 4.
        """
        fraction, total = self.epsilon_fraction(epsilon), self.num_parameters
        if self.exact:
            return Estimate(round(total * fraction))
        return Estimate(
            total * fraction,
            standard_error=total * fraction.standard_error,
            lo=total * fraction.lo,
            hi=total * fraction.hi,
            start_vectors=fraction.start_vectors,
        )

    def relative_epsilon_rank(self, relative_epsilon: float) -> Estimate:
        r"""Count the directions with :math:`|\lambda_k| > \epsilon_{\mathrm{rel}} \max_j |\lambda_j|`.

        Raises:
            ValueError: If ``relative_epsilon`` is negative.
        """
        _check_threshold(relative_epsilon=relative_epsilon)
        return self.epsilon_rank(relative_epsilon * self.eigenvalues.abs().max().item())

    def fast_rank(self, lr: float, steps: int, contraction: float = 0.1) -> Estimate:
        r"""Count the directions in which gradient descent converges, :math:`\lambda_k > -\ln \gamma / (\eta K)`.

        Args:
            lr: Step size :math:`\eta > 0`.
            steps: Number of steps :math:`K \ge 1`.
            contraction: Factor :math:`\gamma` in (0, 1) to which the error along a direction must shrink.

        Raises:
            ValueError: If an argument is outside these bounds.

        References:
            Definition 4.4 of arXiv 2509.22335.
        """
        return self.epsilon_rank(fast_threshold(lr, steps, contraction))

    def learnable_fraction(self, lr: float | None = None, steps: int = 100) -> float:
        """Compute the fraction of the squared residual that gradient descent can remove.

        See :meth:`TangentKernel.learnable_fraction`.

        Raises:
            ValueError: If this spectrum was computed without the tangent kernel.
        """
        if self.kernel is None:
            raise ValueError(
                "learnable_fraction needs the tangent kernel and its residual, which this spectrum was computed "
                "without: use ggn_spectrum(method='gram')"
            )
        return self.kernel.learnable_fraction(lr, steps)

    @property
    def undeflated(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and weights without deflation corrections, shape ``(k,)`` each: no weight is negative."""
        if not self.quadratures:
            return self.eigenvalues, self.weights
        nodes = torch.cat([quadrature.nodes for quadrature in self.quadratures])
        weights = torch.cat([quadrature.weights for quadrature in self.quadratures])
        return nodes, weights / len(self.quadratures)

    def density(self, grid: Tensor, bandwidth: float) -> Tensor:
        r"""Compute the spectral density, smoothed by Gaussians, for plots: smoothing makes ranks derived from it wrong.

        :math:`\sum_k w_k \, \mathcal N(x; \lambda_k, b^2)`

        Weights are those of :attr:`undeflated`, so the density is never negative.

        Args:
            grid: Points :math:`x`, shape ``(g,)``.
            bandwidth: Standard deviation :math:`b > 0`, in units of the eigenvalues.

        Returns:
            The density at the points, shape ``(g,)``, float64.

        Raises:
            ValueError: If ``bandwidth`` is not positive.
        """
        if not bandwidth > 0:
            raise ValueError(f"bandwidth={bandwidth} must be positive, in units of the eigenvalues")
        values, weights = self.undeflated
        distance = (grid.double()[:, None] - values) / bandwidth
        kernel = torch.exp(-distance.square() / 2) / (bandwidth * math.sqrt(2 * math.pi))
        return kernel @ weights

    def distance(self, other: Spectrum) -> float:
        r"""Compute the Wasserstein distance to another spectrum, :math:`\int |F(x) - G(x)| \, dx`.

        Args:
            other: The other spectrum. Its number of parameters may differ.

        Returns:
            The distance, in units of the eigenvalues.

        Example:
            >>> a = Spectrum(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), 2, exact=True)
            >>> b = Spectrum(torch.tensor([3.0, 0.0]), torch.tensor([0.5, 0.5]), 2, exact=True)
            >>> a.distance(b)
            1.0
        """
        values = torch.cat([self.eigenvalues, other.eigenvalues]).double()
        steps = torch.cat([self.weights, -other.weights]).double()
        order = values.argsort()
        gap = steps[order].cumsum(0)[:-1].abs()
        return (gap * values[order].diff()).sum().item()

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot a histogram of the eigenvalues over their logarithm; negative ones are shown by their size.

        Those below 1e-8 are zero and left out: the title gives their number. The numbers of an estimate are on a
        logarithmic axis, since nearly all eigenvalues are in the bulk.

        Args:
            ax: The axes to draw into; by default those of a new figure, which is not registered with pyplot.

        Returns:
            The figure and its axes.

        Example:
            >>> spectrum = Spectrum(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.25, 0.25, 0.5]), 4, exact=True)
            >>> figure, ax = spectrum.plot()
            >>> ax.get_title(loc="left")
            '2 of 4 eigenvalues are zero, not shown'
        """
        return plot_spectrum(self, ax)

    def to_dict(self) -> dict[str, Any]:
        """Convert the spectrum to plain Python objects and tensors, for checkpoints.

        Example:
            >>> spectrum = Spectrum(torch.tensor([1.0]), torch.tensor([1.0]), 1, exact=True)
            >>> float(Spectrum.from_dict(spectrum.to_dict()).trace)
            1.0
        """
        return {
            "eigenvalues": self.eigenvalues,
            "weights": self.weights,
            "num_parameters": self.num_parameters,
            "exact": self.exact,
            "kernel": None if self.kernel is None else self.kernel.to_dict(),
            "quadratures": [dict(vars(quadrature)) for quadrature in self.quadratures],
            "semidefinite": self.semidefinite,
            "trace_standard_error": self.trace_standard_error,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Spectrum:
        """Restore a spectrum from the result of :meth:`to_dict`."""
        kernel = state["kernel"]
        return cls(
            **{
                **state,
                "kernel": None if kernel is None else TangentKernel.from_dict(kernel),
                "quadratures": tuple(Quadrature(**quadrature) for quadrature in state["quadratures"]),
            }
        )

    def _estimate(self, statistic: Callable[[Tensor, Tensor], float]) -> Estimate:
        """Return the pooled estimate of a statistic and its standard error over the start vectors.

        Args:
            statistic: Computes the statistic from eigenvalues and weights.
        """
        value = statistic(self.eigenvalues, self.weights)
        if self.exact:
            return Estimate(value)
        if len(self.quadratures) < 2:
            return Estimate(value, standard_error=math.nan)
        each = torch.tensor(
            [statistic(*quadrature.measure) for quadrature in self.quadratures], dtype=torch.float64, device="cpu"
        )
        error = (each.std() / math.sqrt(len(each))).item()
        return Estimate(value, standard_error=error, start_vectors=len(each))

    def _extreme_eigenvalue(self, *, largest: bool) -> Estimate:
        if not self.quadratures:
            value = (self.eigenvalues.max() if largest else self.eigenvalues.min()).item()
            return (
                Estimate(value) if self.exact else Estimate(value, standard_error=math.nan, lo=-math.inf, hi=math.inf)
            )
        nodes = torch.cat([quadrature.nodes for quadrature in self.quadratures])
        residuals = torch.cat([quadrature.residuals for quadrature in self.quadratures])
        index = nodes.argmax() if largest else nodes.argmin()
        value, residual = nodes[index].item(), residuals[index].item()
        return Estimate(value, lo=value - residual, hi=value + residual)


def _check_threshold(**threshold: float) -> None:
    for name, value in threshold.items():
        if not value >= 0 or math.isinf(value):
            raise ValueError(f"{name}={value} must be a finite number, zero or larger")


def _with_bracket(estimate: Estimate, lo: float, hi: float) -> Estimate:
    """Return the estimate, clamped to a bracket that holds for every matrix."""
    value = min(max(float(estimate), lo), hi)
    error, count = estimate.standard_error, estimate.start_vectors
    return Estimate(value, standard_error=error, lo=lo, hi=hi, start_vectors=count)
