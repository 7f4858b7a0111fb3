"""Represent the spectrum of the neural tangent kernel and the residual in its eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_plasticity.curvature.estimates import Estimate, JacobiMatrix
from lightning_plasticity.curvature.matrix_free.lanczos import LanczosProcess
from lightning_plasticity.functional.ranks import entropy_rank


def effective_rank_of(eigenvalues: Tensor, weights: Tensor | None = None) -> float:
    r"""Return the effective rank of a set of eigenvalues, the exponential of their entropy.

    :math:`\exp(-\sum_i p_i \log p_i)` with :math:`p_i = |\lambda_i| / \sum_j |\lambda_j|`.

    Args:
        eigenvalues: Eigenvalues, shape ``(k,)``.
        weights: Multiplicity of each eigenvalue, shape ``(k,)``; one by default.

    Returns:
        A number between 0 (all eigenvalues are zero) and the number of eigenvalues.

    References:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example:
        >>> round(effective_rank_of(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    return entropy_rank(eigenvalues, weights).item()


def fast_threshold(lr: float, steps: int, contraction: float) -> float:
    r"""Return the eigenvalue above which gradient descent converges along a direction, :math:`-\ln\gamma / (\eta K)`.

    Args:
        lr: Step size :math:`\eta > 0`.
        steps: Number of steps :math:`K \ge 1`.
        contraction: Factor :math:`\gamma` in (0, 1) to which the error along the direction must shrink.

    Raises:
        ValueError: If an argument is outside these bounds.

    References:
        Definition 4.4 of arXiv 2509.22335.
    """
    if not lr > 0 or not steps >= 1 or not 0 < contraction < 1:
        raise ValueError(
            f"lr={lr}, steps={steps}, contraction={contraction}: lr must be positive, steps at least 1 and contraction "
            "in (0, 1)"
        )
    return -math.log(contraction) / (lr * steps)


_EXACT = 1e-12
"""Width of the bracket at which the learnable fraction of a kernel matrix is called exact."""

_KEPT_HORIZON = 1000
"""Number of steps for which the learnable fraction is still exact after the kernel matrix was dropped."""

_DIAGONALIZED_ROWS = 512
"""Rows up to which a kernel matrix is diagonalised: Lanczos takes no less time there."""

_PRODUCTS_PER_ROW = 0.15
"""Products, as a fraction of the rows, that take as long as the eigenvectors of a kernel matrix."""


class TangentKernel:
    r"""The spectrum of the neural tangent kernel, and the spectral measure of the residual.

    With the Jacobian :math:`J` of the :math:`m` outputs of all :math:`n` samples with respect to the parameters, the
    kernel is :math:`\Theta = \frac1n J J^\top`, with eigenpairs :math:`(\lambda_k, u_k)`. The share of the residual
    :math:`r = \partial L / \partial f` along each eigenvector is
    :math:`c_k = \langle u_k, r\rangle^2 / \lVert r\rVert^2`.

    Args:
        eigenvalues: :math:`\lambda_k \ge 0`, descending, shape ``(m,)``, float64.
        residual_shares: :math:`c_k`, summing to 1, shape ``(m,)``, float64; all zero for a zero residual.
        squared_residual: :math:`n \lVert r\rVert^2`, the mean over samples of
            :math:`\lVert \partial \ell_i / \partial f_i\rVert^2` for a loss :math:`L = \frac1n \sum_i \ell_i`, such as
            ``mse_loss`` and ``cross_entropy``; ``nan`` if it is not known.

    References:
        Jacot et al. 2018, arXiv 1806.07572; Lemma 4.7 of arXiv 2509.22335.
    """

    def __init__(self, eigenvalues: Tensor, residual_shares: Tensor, squared_residual: float = math.nan) -> None:
        self.squared_residual = squared_residual
        self._eigenvalues: Tensor | None = eigenvalues
        self._shares: Tensor | None = residual_shares
        self._matrix: _KernelMatrix | None = None
        self._jacobi: JacobiMatrix | None = None
        self._lambda_max: Estimate | None = None

    @classmethod
    def _create(
        cls,
        squared_residual: float,
        *,
        eigenvalues: Tensor | None = None,
        matrix: _KernelMatrix | None = None,
        jacobi: JacobiMatrix | None = None,
        lambda_max: Estimate | None = None,
    ) -> TangentKernel:
        self = cls.__new__(cls)
        self.squared_residual = squared_residual
        self._eigenvalues, self._shares, self._matrix = eigenvalues, None, matrix
        self._jacobi, self._lambda_max = jacobi, lambda_max
        return self

    @classmethod
    def from_matrix(cls, matrix: Tensor, residual: Tensor, squared_residual: float = math.nan) -> TangentKernel:
        r"""Create the spectrum of a kernel matrix, which is decomposed on first access.

        The learnable fraction needs no eigenvectors: it is computed by Lanczos to 1e-12 unless that takes longer.

        Args:
            matrix: :math:`\Theta`, shape ``(m, m)``, float64.
            residual: :math:`r`, shape ``(m,)``, float64.
            squared_residual: :math:`n \lVert r\rVert^2`.
        """
        return cls._create(squared_residual, matrix=_KernelMatrix(matrix, residual))

    @classmethod
    def from_quadrature(
        cls, jacobi: JacobiMatrix, lambda_max: Estimate, squared_residual: float = math.nan
    ) -> TangentKernel:
        r"""Create a kernel without a matrix, whose learnable fraction is a bracket.

        Args:
            jacobi: The Jacobi matrix of Lanczos steps with :math:`\Theta` from :math:`r`; without rows for a zero
                residual.
            lambda_max: The largest eigenvalue of :math:`\Theta`, with a bracket.
            squared_residual: :math:`n \lVert r\rVert^2`.

        Example:
            >>> jacobi = JacobiMatrix(torch.tensor([0.75]).double(), torch.tensor([0.2]).double())
            >>> kernel = TangentKernel.from_quadrature(jacobi, Estimate(1.0))
            >>> fraction = kernel.learnable_fraction(steps=1)
            >>> round(fraction.lo, 3), round(fraction.hi, 3)
            (0.746, 0.777)
        """
        return cls._create(squared_residual, jacobi=jacobi, lambda_max=lambda_max)

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues, descending, shape ``(m,)``.

        Raises:
            ValueError: If the kernel was measured without a matrix.
        """
        if self._eigenvalues is None:
            if self._matrix is None:
                raise ValueError("the eigenvalues of a kernel that was measured without a matrix are not known")
            self._eigenvalues = self._matrix.eigenvalues()
        return self._eigenvalues

    @property
    def residual_shares(self) -> Tensor:
        """Share of the squared residual along each eigenvector, shape ``(m,)``.

        Raises:
            ValueError: If the kernel was measured without a matrix, or the matrix was dropped.
        """
        if self._shares is None:
            if self._matrix is None:
                raise ValueError("residual_shares needs the kernel matrix: read it before compact() drops the matrix")
            self._eigenvalues, self._shares = self._matrix.decomposition()
            self._matrix = None
        return self._shares

    @property
    def lambda_max(self) -> Estimate:
        """The largest eigenvalue, with a bracket for a kernel that was measured without a matrix."""
        return Estimate(max(self.eigenvalues[0].item(), 0.0)) if self._lambda_max is None else self._lambda_max

    @property
    def effective_rank(self) -> float:
        """Effective rank of the kernel (:func:`effective_rank_of`); ``nan`` for one measured without a matrix."""
        return effective_rank_of(self.eigenvalues) if self._lambda_max is None else math.nan

    def learnable_fraction(self, lr: float | None = None, steps: int = 100) -> Estimate:
        r"""Return the share of the squared residual that gradient descent can remove.

        .. math:: \sum_k c_k \, (1 - e^{-2 \eta K \lambda_k})

        With the kernel frozen at its current value, the residual obeys under gradient flow :math:`\dot r = -\Theta r`.

        Args:
            lr: Step size :math:`\eta > 0`. ``None`` takes :math:`1 / \lambda_{\max}` of the kernel, which makes the
                result independent of the kernel's scale and of the optimizer.
            steps: Number of steps :math:`K \ge 1`.

        Returns:
            A number in [0, 1]; 0 for a zero kernel, 1 for a zero residual. For a kernel that was measured without a
            matrix it comes with a bracket that holds the true number.

        Raises:
            ValueError: If ``lr`` or ``steps`` is not positive.

        Example:
            >>> kernel = TangentKernel(torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.25]))
            >>> round(kernel.learnable_fraction(), 6)
            0.75
        """
        if lr is not None and not lr > 0:
            raise ValueError(f"lr={lr} must be positive, or None for 1/λmax of the kernel")
        if not steps > 0:
            raise ValueError(f"steps={steps} must be a positive number of optimizer steps")
        if self._matrix is not None:
            self._measure_matrix(lr, steps)
        if self._has_zero_residual:
            return Estimate(1.0)
        largest = self.lambda_max
        if largest <= 0:
            return Estimate(0.0, hi=0.0 if largest.hi <= 0 else 1.0)
        if self._jacobi is None:
            learned = _share_learned(2 * steps * (lr or 1 / largest))(self.eigenvalues)
            return Estimate(min(max((self.residual_shares @ learned).item(), 0.0), 1.0))
        # The fraction grows with the step size, so its lower end belongs to the largest possible eigenvalue.
        slow, rate, fast = (lr, lr, lr) if lr is not None else (1 / largest.hi, 1 / largest, 1 / largest.lo)
        lower, upper = _bracket(self._jacobi, 2 * steps * rate)
        if self._lambda_max is None and upper - lower <= _EXACT:
            return Estimate((lower + upper) / 2)
        # An error E of the kernel changes the fraction by at most 2ηK‖E‖.
        rounding = 2 * steps * rate * largest * self._jacobi.rounding
        lo = max(_bracket(self._jacobi, 2 * steps * slow)[0] - rounding, 0.0)
        hi = min(_bracket(self._jacobi, 2 * steps * fast)[1] + rounding, 1.0)
        return Estimate(min(max((lower + upper) / 2, lo), hi), lo=lo, hi=hi)

    def remaining_residual(self, lr: float | None = None, steps: int = 100) -> Estimate:
        r"""Return what gradient descent would leave of the squared residual.

        .. math:: n \lVert r\rVert^2 \sum_k c_k \, e^{-2 \eta K \lambda_k}

        It is :attr:`squared_residual` without the part that :meth:`learnable_fraction` tells. That share alone is also
        low in a network that has nearly learned the task: what it has not learned is the slow part.

        Args:
            lr: Step size :math:`\eta`, as in :meth:`learnable_fraction`.
            steps: Number of steps :math:`K`.

        Returns:
            A number ≥ 0 in the units of :attr:`squared_residual`, with a bracket where the learnable fraction has one;
            ``nan`` if the squared residual is not known.

        Raises:
            ValueError: If ``lr`` or ``steps`` is not positive.

        Example:
            >>> kernel = TangentKernel(torch.tensor([1.0, 0.0]), torch.tensor([0.75, 0.25]), squared_residual=8.0)
            >>> round(kernel.remaining_residual(), 6)
            2.0
        """
        fraction, whole = self.learnable_fraction(lr, steps), self.squared_residual
        return Estimate(whole * (1 - fraction), lo=whole * (1 - fraction.hi), hi=whole * (1 - fraction.lo))

    def fast_residual_share(self, lr: float, steps: int, contraction: float = 0.1) -> Estimate:
        r"""Return the share of the squared residual in the directions in which gradient descent converges.

        .. math:: \sum_k c_k \, [\lambda_k > -\ln \gamma / (\eta K)]

        Args:
            lr: Step size :math:`\eta > 0`.
            steps: Number of steps :math:`K \ge 1`.
            contraction: Factor :math:`\gamma` in (0, 1) to which the residual along a direction must shrink.

        Returns:
            A number in [0, 1]; 1 for a zero residual. For a kernel that was measured without a matrix, or has more than
            256 rows, it comes with a Chebyshev-Markov-Stieltjes bracket that holds the true number.

        Raises:
            ValueError: If an argument is outside these bounds.

        References:
            Definition 4.4 of arXiv 2509.22335, for the tangent kernel instead of the Hessian.

        Example:
            >>> kernel = TangentKernel(torch.tensor([1.0, 0.01]), torch.tensor([0.75, 0.25]))
            >>> float(kernel.fast_residual_share(lr=0.1, steps=100))  # above ln 10 / 10
            0.75
        """
        threshold = fast_threshold(lr, steps, contraction)
        if self._matrix is not None:
            self._measure_matrix(None, _KEPT_HORIZON)
        if self._has_zero_residual:
            return Estimate(1.0)
        if self._jacobi is None:
            return Estimate(min(self.residual_shares[self.eigenvalues > threshold].sum().item(), 1.0))
        measure = self._jacobi.spectral_measure
        share = measure.weights[measure.nodes > threshold].sum().item()
        # An error E of the kernel moves its eigenvalues by at most ‖E‖.
        rounding = self._jacobi.rounding * float(self.lambda_max)
        lo = 1 - measure.mass_between(-rounding, threshold + rounding, semidefinite=True)[1]
        hi = 1 - measure.mass_between(-rounding, threshold - rounding, semidefinite=True)[0]
        return Estimate(min(max(share, lo), hi), lo=lo, hi=hi)

    @property
    def _has_zero_residual(self) -> bool:
        return len(self._jacobi.diagonal) == 0 if self._jacobi is not None else bool(self.residual_shares.sum() == 0)

    def _measure_matrix(self, lr: float | None, steps: int) -> None:
        """Compute the measure of the residual of a kernel matrix, exact for a horizon."""
        assert self._matrix is not None
        largest = self.lambda_max
        time = 2 * steps * (lr or (1 / largest if largest > 0 else 1.0))
        self._jacobi = self._matrix.measure(time)
        if self._jacobi is None:
            # Diagonalise the matrix, and drop it.
            _ = self.residual_shares

    def compact(self) -> TangentKernel:
        """Drop the kernel matrix, if there is one, and return this kernel.

        The learnable fraction stays exact to 1e-12 for up to 1000 steps of the default length, and is a bracket beyond.
        """
        if self._matrix is not None:
            self._measure_matrix(None, _KEPT_HORIZON)
            self._matrix = None
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the kernel as plain Python objects and tensors, without the kernel matrix."""
        if self._matrix is not None:
            state_of = self._create(self.squared_residual, eigenvalues=self.eigenvalues, matrix=self._matrix).compact()
            return state_of.to_dict()
        if self._shares is not None:
            return {
                "eigenvalues": self.eigenvalues,
                "residual_shares": self._shares,
                "squared_residual": self.squared_residual,
            }
        assert self._jacobi is not None
        largest = self._lambda_max
        return {
            "eigenvalues": self._eigenvalues,
            "jacobi": dict(vars(self._jacobi)),
            "lambda_max": None if largest is None else (float(largest), largest.lo, largest.hi),
            "squared_residual": self.squared_residual,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TangentKernel:
        """Create the kernel from the result of :meth:`to_dict`."""
        if "residual_shares" in state:
            return cls(**state)
        largest = state["lambda_max"]
        return cls._create(
            state["squared_residual"],
            eigenvalues=state["eigenvalues"],
            jacobi=JacobiMatrix(**state["jacobi"]),
            lambda_max=None if largest is None else Estimate(largest[0], lo=largest[1], hi=largest[2]),
        )


def _share_learned(time: float) -> Callable[[Tensor], Tensor]:
    r"""Return the function :math:`\lambda \mapsto 1 - e^{-t \lambda}`."""

    def learned(eigenvalues: Tensor) -> Tensor:
        return -torch.expm1(-time * eigenvalues)

    return learned


def _bracket(jacobi: JacobiMatrix, time: float) -> tuple[float, float]:
    return jacobi.bracket(_share_learned(time))


class _KernelMatrix:
    """A kernel matrix and the residual, with a Lanczos process that is extended as needed.

    Args:
        matrix: The matrix, shape ``(m, m)``.
        residual: The residual, shape ``(m,)``.
    """

    def __init__(self, matrix: Tensor, residual: Tensor) -> None:
        self._matrix, self._residual = matrix, residual
        self._process: LanczosProcess | None = None

    def eigenvalues(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self._matrix)
        return values.flip(0).clamp(min=0).cpu()

    def decomposition(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues, descending, and the share of the residual along each eigenvector."""
        values, vectors = torch.linalg.eigh(self._matrix)
        power = (vectors.T @ self._residual).square()
        total = power.sum()
        shares = power / total if total > 0 else torch.zeros_like(power)
        return values.flip(0).clamp(min=0).cpu(), shares.flip(0).cpu()

    def measure(self, time: float) -> JacobiMatrix | None:
        r"""Return a Jacobi matrix with the integral of :math:`1 - e^{-t \lambda}`, or ``None`` if it takes too long."""
        if len(self._residual) <= _DIAGONALIZED_ROWS or not self._residual.any():
            return None
        max_steps = int(_PRODUCTS_PER_ROW * len(self._residual))
        if self._process is None:
            self._process = LanczosProcess(self._matrix.mv, self._residual, max_steps)
        process = self._process
        while True:
            if process.num_products:
                lower, upper = process.jacobi.bracket(_share_learned(time))
                if upper - lower <= _EXACT:
                    return process.jacobi
            if process.finished:
                return None
            # The test takes time, too: the number of products grows by an eighth until the next one.
            for _ in range(max(process.num_products // 8, 4)):
                if not process.finished:
                    process.step()
