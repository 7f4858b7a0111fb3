r"""Roots of the Hessian of a loss by the network's outputs, :math:`S S^\top = \partial^2 L / \partial f^2`.

The Hessian falls into blocks of ``b`` numbers. Only the small ones are ever written out: with a vocabulary of fifty
thousand, one block would be a matrix of fifty thousand squared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override


class HessianFactor(ABC):
    """A root, block by block."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The number of blocks, and of numbers in each."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        r""":math:`S v`, for vectors of shape ``(blocks, b)``."""

    @abstractmethod
    def transposed_matvec(self, vectors: Tensor) -> Tensor:
        r""":math:`S^\top v`, for vectors of shape ``(blocks, b)``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrices, shape ``(blocks, b, b)``."""


@dataclass(frozen=True, eq=False)
class DenseFactor(HessianFactor):
    """Any root.

    Args:
        matrices: Shape ``(blocks, b, b)``.
    """

    matrices: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.matrices.shape[0], self.matrices.shape[1]

    @override
    def matvec(self, vectors: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", self.matrices, vectors)

    @override
    def transposed_matvec(self, vectors: Tensor) -> Tensor:
        return torch.einsum("nij,ni->nj", self.matrices, vectors)

    @override
    def dense(self) -> Tensor:
        return self.matrices


@dataclass(frozen=True, eq=False)
class DiagonalFactor(HessianFactor):
    """The root of a loss that treats every output by itself.

    Args:
        values: Any shape: one block of one number each.
    """

    values: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.values.numel(), 1

    @override
    def matvec(self, vectors: Tensor) -> Tensor:
        return self.values.reshape(-1, 1) * vectors

    transposed_matvec = matvec

    @override
    def dense(self) -> Tensor:
        return self.values.reshape(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class SoftmaxFactor(HessianFactor):
    r"""The root :math:`\sqrt s (\mathrm{diag} \sqrt p - p \sqrt p^\top)` of :math:`s (\mathrm{diag}(p) - p p^\top)`.

    Args:
        strength: :math:`s`, shape ``(blocks, 1)``.
        probabilities: :math:`p`, shape ``(blocks, b)``.
    """

    strength: Tensor
    probabilities: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.probabilities.shape[0], self.probabilities.shape[1]

    @override
    def matvec(self, vectors: Tensor) -> Tensor:
        weighted = self.probabilities.sqrt() * vectors
        return self.strength.sqrt() * (weighted - self.probabilities * weighted.sum(1, keepdim=True))

    @override
    def transposed_matvec(self, vectors: Tensor) -> Tensor:
        mean = (self.probabilities * vectors).sum(1, keepdim=True)
        return (self.strength * self.probabilities).sqrt() * (vectors - mean)

    @override
    def dense(self) -> Tensor:
        roots = self.probabilities.sqrt()
        block = torch.diag_embed(roots) - self.probabilities[:, :, None] * roots[:, None, :]
        return self.strength.sqrt()[..., None] * block
