"""Represent the spectrum of the neural tangent kernel and the residual in its eigenbasis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


class TangentKernel:
    r"""The spectrum of the neural tangent kernel, and the share of the residual along each eigenvector.

    With the Jacobian :math:`J` of the :math:`m` outputs of all :math:`n` samples with respect to the parameters, the
    kernel is :math:`\Theta = \frac1n J J^\top`, with eigenpairs :math:`(\lambda_k, u_k)`. The share of the residual
    :math:`r = \partial L / \partial f` along each eigenvector is
    :math:`c_k = \langle u_k, r\rangle^2 / \lVert r\rVert^2`.

    Args:
        eigenvalues: :math:`\lambda_k \ge 0`, descending, shape ``(m,)``, float64.
        residual_shares: :math:`c_k`, summing to 1, shape ``(m,)``, float64; all zero for a zero residual.

    References:
        Jacot et al. 2018, arXiv 1806.07572; Lemma 4.7 of arXiv 2509.22335.
    """

    def __init__(self, eigenvalues: Tensor, residual_shares: Tensor) -> None:
        # At any time exactly one of the two is set.
        self._decomposition: tuple[Tensor, Tensor] | None = (eigenvalues, residual_shares)
        self._matrix_and_residual: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_matrix(cls, matrix: Tensor, residual: Tensor) -> TangentKernel:
        r"""Create the spectrum of a kernel matrix, which is decomposed on first access.

        Args:
            matrix: :math:`\Theta`, shape ``(m, m)``.
            residual: :math:`r`, shape ``(m,)``.
        """
        self = cls.__new__(cls)
        self._decomposition, self._matrix_and_residual = None, (matrix, residual)
        return self

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues, descending, shape ``(m,)``."""
        return self._decompose()[0]

    @property
    def residual_shares(self) -> Tensor:
        """Share of the squared residual along each eigenvector, shape ``(m,)``."""
        return self._decompose()[1]

    def _decompose(self) -> tuple[Tensor, Tensor]:
        if self._decomposition is None:
            assert self._matrix_and_residual is not None
            matrix, residual = self._matrix_and_residual
            values, vectors = torch.linalg.eigh(matrix)
            power = (vectors.T @ residual).square()
            total = power.sum()
            shares = power / total if total > 0 else torch.zeros_like(power)
            self._decomposition = values.flip(0).clamp(min=0).cpu(), shares.flip(0).cpu()
            self._matrix_and_residual = None
        return self._decomposition

    @property
    def effective_rank(self) -> float:
        """Effective rank of the kernel (:func:`effective_rank_of`)."""
        return effective_rank_of(self.eigenvalues)

    def learnable_fraction(self, lr: float | None = None, steps: int = 100) -> float:
        r"""Return the share of the squared residual that gradient descent can remove.

        .. math:: \sum_k c_k \, (1 - e^{-2 \eta K \lambda_k})

        With the kernel frozen at its current value, the residual obeys under gradient flow :math:`\dot r = -\Theta r`.

        Args:
            lr: Step size :math:`\eta > 0`. ``None`` takes :math:`1 / \lambda_{\max}` of the kernel, which makes the
                result independent of the kernel's scale and of the optimizer.
            steps: Number of steps :math:`K \ge 1`.

        Returns:
            A number in [0, 1]; 0 for a zero kernel, 1 for a zero residual.

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
        if self.residual_shares.sum() == 0:
            return 1.0
        largest = self.eigenvalues.max().item()
        if largest <= 0:
            return 0.0
        rates = self.eigenvalues * (lr if lr is not None else 1.0 / largest)
        learned = (self.residual_shares * -torch.expm1(-2.0 * steps * rates)).sum().item()
        return min(max(learned, 0.0), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the spectrum as plain Python objects and tensors."""
        return {"eigenvalues": self.eigenvalues, "residual_shares": self.residual_shares}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TangentKernel:
        """Create the spectrum from the result of :meth:`to_dict`."""
        return cls(**state)
