"""Hold the network outputs that a loss is a function of, and the rows of their Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_plasticity.curvature.autograd_graph import Edge, gradient_edge


class UnsupportedModelError(RuntimeError):
    """Raised when the exact curvature of a part of the model or the loss is unknown; the message names the part."""


class NoGaussNewtonMatrixError(UnsupportedModelError):
    """Raised when a loss has no positive semi-definite Hessian with respect to the outputs; the message says why."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """One tensor of network outputs.

    Args:
        edge: Its autograd edge.
        shape: Its shape.
        residual: Gradient of the loss with respect to the outputs, float64, in their shape.
        sample_dim: The dimension whose entries belong to different samples; ``None`` if there is none.
    """

    edge: Edge
    shape: torch.Size
    residual: Tensor
    sample_dim: int | None = 0

    @property
    def num_samples(self) -> int:
        """Size of the sample dimension, 1 without one."""
        return 1 if self.sample_dim is None else self.shape[self.sample_dim]

    def by_block(self, values: Tensor, num_blocks: int) -> Tensor:
        """Reshape values in the shape of the outputs, ``(..., *shape)``, to blocks of samples.

        Returns:
            Shape ``(..., num_blocks, q)``.
        """
        leading = values.shape[: values.dim() - len(self.shape)]
        if self.sample_dim:
            values = values.movedim(len(leading) + self.sample_dim, len(leading))
        return values.reshape(*leading, num_blocks, self.shape.numel() // num_blocks)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Reshape blocks of samples, ``(..., num_blocks, q)``, to the shape of the outputs."""
        leading = blocks.shape[:-2]
        if not self.sample_dim:
            return blocks.reshape((*leading, *self.shape))
        samples_first = [self.num_samples, *self.shape[: self.sample_dim], *self.shape[self.sample_dim + 1 :]]
        return blocks.reshape(*leading, *samples_first).movedim(len(leading), len(leading) + self.sample_dim)


class OutputRows:
    """The rows of the Jacobian of the network outputs, numbered block by block.

    Args:
        outputs: The network outputs.
        num_blocks: Number of blocks of the batch.
        combinations: Linear combinations of the outputs that take the place of the outputs as rows: a tensor
            ``(q, *shape)`` for each element of ``outputs``. ``None`` stands for the outputs themselves.
    """

    def __init__(
        self, outputs: Sequence[Outputs], num_blocks: int, combinations: Sequence[Tensor] | None = None
    ) -> None:
        self._outputs = outputs
        self._edges = [gradient_edge(output.edge) for output in outputs]
        self._widths = [output.shape.numel() // num_blocks for output in outputs]
        self._combinations: Tensor | None = None
        if combinations is not None:
            by_block = [output.by_block(part, num_blocks) for output, part in zip(outputs, combinations, strict=True)]
            self._combinations = torch.cat(by_block, dim=2)
        self.num_blocks = num_blocks
        self.rows_per_block = sum(self._widths) if self._combinations is None else len(self._combinations)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks and of rows in each, ``(num_blocks, q)``."""
        return self.num_blocks, self.rows_per_block

    def __len__(self) -> int:
        return self.num_blocks * self.rows_per_block

    def vjp(self, inputs: Sequence[Tensor] | Sequence[GradientEdge], vector: Tensor) -> Sequence[Tensor | None]:
        r"""Return the vector-Jacobian product :math:`J^\top u` for each input, ``None`` for one without influence.

        Args:
            inputs: Tensors or autograd edges.
            vector: :math:`u`, shape ``(num_blocks, q)``.
        """
        cotangent = vector
        if self._combinations is not None:
            cotangent = torch.einsum("bc,cbw->bw", vector, self._combinations.to(vector.dtype))
        cotangents = cotangent.split(self._widths, dim=1)
        return torch.autograd.grad(
            self._edges,
            inputs,
            [output.from_blocks(part) for part, output in zip(cotangents, self._outputs, strict=True)],
            retain_graph=True,
            allow_unused=True,
        )
