r"""Represent the loss Hessian with respect to the network outputs by block-diagonal factors :math:`S`.

:math:`S S^\top = \partial^2 L / \partial f^2`, with blocks of size :math:`b \times b`. A factor multiplies vectors
without forming its blocks: for a vocabulary of fifty thousand, one block would have fifty thousand squared entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override


class HessianFactor(ABC):
    r"""A block-diagonal linear operator :math:`S` with :math:`S S^\top` the Hessian of a loss."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Number of blocks and size ``b`` of each block."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`S v` for vectors of shape ``(blocks, b)``."""

    @abstractmethod
    def rmatvec(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`S^\top v` for vectors of shape ``(blocks, b)``."""

    def hessian_matvec(self, vectors: Tensor) -> Tensor:
        r"""Return :math:`S S^\top v` for vectors of shape ``(blocks, b)``."""
        return self.matvec(self.rmatvec(vectors))

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the blocks as matrices, shape ``(blocks, b, b)``."""


@dataclass(frozen=True, eq=False)
class DenseFactor(HessianFactor):
    """A factor whose blocks are stored as matrices.

    Args:
        matrices: The blocks, shape ``(blocks, b, b)``.
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
    def rmatvec(self, vectors: Tensor) -> Tensor:
        return torch.einsum("nij,ni->nj", self.matrices, vectors)

    @override
    def dense(self) -> Tensor:
        return self.matrices


@dataclass(frozen=True, eq=False)
class DiagonalFactor(HessianFactor):
    """A diagonal factor, for losses without coupling between output entries.

    Args:
        values: The diagonal, any shape. Every entry is a block of size 1.
    """

    values: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.values.numel(), 1

    @override
    def matvec(self, vectors: Tensor) -> Tensor:
        return self.values.reshape(-1, 1) * vectors

    rmatvec = matvec

    @override
    def dense(self) -> Tensor:
        return self.values.reshape(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class SoftmaxFactor(HessianFactor):
    r"""The factor :math:`\sqrt s (\mathrm{diag} \sqrt p - p \sqrt p^\top)` of :math:`s (\mathrm{diag}(p) - p p^\top)`.

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
    def rmatvec(self, vectors: Tensor) -> Tensor:
        mean = (self.probabilities * vectors).sum(1, keepdim=True)
        return (self.strength * self.probabilities).sqrt() * (vectors - mean)

    @override
    def dense(self) -> Tensor:
        square_roots = self.probabilities.sqrt()
        blocks = torch.diag_embed(square_roots) - self.probabilities[:, :, None] * square_roots[:, None, :]
        return self.strength.sqrt()[..., None] * blocks
