r"""Multiply by the Hessian of the loss with respect to the network outputs, and factorise it by blocks of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.curvature.autograd_graph import partial_vjp
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature
from lightning_plasticity.curvature.exact.outputs import NoGaussNewtonMatrixError, Outputs
from lightning_plasticity.curvature.problem import NOT_FINITE, normal

_ROUNDING = 1e-5
"""Share of the Hessian that may be rounding error: far above that of float32, far below the effect of a coupling."""


class LossHessian(ABC):
    r"""The Hessian :math:`\partial^2 L / \partial f^2` of the loss with respect to the network outputs.

    Args:
        outputs: The network outputs.
    """

    def __init__(self, outputs: Sequence[Outputs]) -> None:
        self.outputs = list(outputs)

    @abstractmethod
    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Multiply by vectors in the shapes of the outputs, float64."""

    def couples(self, num_blocks: int) -> bool:
        """Return whether the loss of a block of samples depends on the outputs of another block."""
        if num_blocks == 1:
            return False
        like = self.outputs[0].residual
        blocks = [normal((num_blocks, output.shape.numel() // num_blocks), like) for output in self.outputs]
        for block in blocks:
            block[1::2] = 0
        images = self._by_block(self._times_blocks(blocks), num_blocks)
        return bool(images[1::2].norm() > _ROUNDING * images.norm())

    def dense_factors(self, num_blocks: int) -> Tensor:
        r"""Return a factor :math:`S_i` of the Hessian :math:`S_i S_i^\top` of each block of samples.

        Args:
            num_blocks: Number of blocks, which the loss must not couple.

        Returns:
            Shape ``(num_blocks, q, q)``, float64.

        Raises:
            NoGaussNewtonMatrixError: If the Hessian is zero or has negative eigenvalues.
            ValueError: If it is not finite.
        """
        hessian = self._dense(num_blocks)
        if not torch.isfinite(hessian).all():
            raise ValueError(NOT_FINITE)
        values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
        largest = values.abs().max()
        if largest == 0:
            raise NoGaussNewtonMatrixError(
                "the loss is linear in the network's outputs, as the absolute error is almost everywhere (or a custom "
                "autograd.Function hides its second derivatives), so its Gauss-Newton matrix is zero"
            )
        if values.min() < -_ROUNDING * largest:
            raise NoGaussNewtonMatrixError(
                "the loss is not convex in the network's outputs (eigenvalues of its Hessian from "
                f"{values.min():.3g} to {largest:.3g}), so its Gauss-Newton matrix is not positive semi-definite"
            )
        factors: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
        return factors

    def row_order(self, num_blocks: int) -> Tensor:
        """Return where the rows of a single block are among the rows of blocks of samples, shape ``(m,)``."""
        count = sum(output.shape.numel() for output in self.outputs)
        rows = torch.arange(count, device=self.outputs[0].residual.device).reshape(num_blocks, -1)
        in_shape = self._from_blocks(rows.split(self._widths(num_blocks), dim=1))
        return self._by_block(in_shape, 1).flatten()

    def random_factor_columns(self, num_columns: int, num_blocks: int, generator: torch.Generator) -> list[Tensor]:
        r"""Draw random combinations :math:`S w` of the columns of the factor, with entries of :math:`w` ±1.

        Their second moment is the Hessian, :math:`E[S w (S w)^\top] = S S^\top`.

        Returns:
            A tensor ``(num_columns, *shape)`` for each output, float64.
        """
        factors = self.dense_factors(num_blocks)
        signs = torch.randint(2, (num_columns, *factors.shape[:2], 1), generator=generator, device="cpu") * 2 - 1
        columns = (factors @ signs.to(factors))[..., 0]
        return self._from_blocks(list(columns.split(self._widths(num_blocks), dim=-1)))

    def _dense(self, num_blocks: int) -> Tensor:
        """Return the Hessian of each block, ``(num_blocks, q, q)``, from a product for each of the ``q`` outputs."""
        widths = self._widths(num_blocks)
        columns = []
        for index in range(sum(widths)):
            unit = torch.zeros(num_blocks, sum(widths), dtype=torch.float64, device=self.outputs[0].residual.device)
            unit[:, index] = 1
            columns.append(self._by_block(self._times_blocks(unit.split(widths, dim=1)), num_blocks))
        return torch.stack(columns, dim=-1)

    def _times_blocks(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return self.matvec(self._from_blocks(blocks))

    def _from_blocks(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return [output.from_blocks(block) for output, block in zip(self.outputs, blocks, strict=True)]

    def _by_block(self, tensors: Sequence[Tensor], num_blocks: int) -> Tensor:
        pairs = zip(self.outputs, tensors, strict=True)
        return torch.cat([output.by_block(tensor, num_blocks) for output, tensor in pairs], dim=1)

    def _widths(self, num_blocks: int) -> list[int]:
        return [output.shape.numel() // num_blocks for output in self.outputs]


class AutogradHessian(LossHessian):
    """The Hessian of any loss, by differentiating it twice.

    Args:
        loss: The loss.
        outputs: The network outputs.

    Raises:
        NoGaussNewtonMatrixError: If torch has no second derivative of the loss.
    """

    def __init__(self, loss: Tensor, outputs: Sequence[Outputs]) -> None:
        super().__init__(outputs)
        self._edges = [output.edge for output in outputs]
        try:
            gradients = partial_vjp([loss], self._edges, [torch.ones_like(loss)], create_graph=True)
            self._gradients = [gradient for gradient in gradients if gradient.requires_grad]
            self._differentiable = [gradient.requires_grad for gradient in gradients]
            self._check_symmetry()
        except RuntimeError as error:
            if isinstance(error, NoGaussNewtonMatrixError | torch.OutOfMemoryError):
                raise
            raise NoGaussNewtonMatrixError(
                f"the loss cannot be differentiated twice with respect to the network's outputs ({error})"
            ) from error

    @override
    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        if not self._gradients:
            return [torch.zeros_like(vector) for vector in vectors]
        used = [vector for vector, kept in zip(vectors, self._differentiable, strict=True) if kept]
        used = [vector.to(gradient.dtype) for vector, gradient in zip(used, self._gradients, strict=True)]
        return [product.double() for product in partial_vjp(self._gradients, self._edges, used)]

    def _check_symmetry(self) -> None:
        first, second = ([normal(output.shape, output.residual) for output in self.outputs] for _ in range(2))
        images = self.matvec(first), self.matvec(second)
        one, other = _dot(images[0], second), _dot(images[1], first)
        size = (_dot(images[0], images[0]) * _dot(second, second)) ** 0.5
        if abs(one - other) > 1e-3 * size:
            raise NoGaussNewtonMatrixError(
                "torch's second derivatives of the loss are wrong (its Hessian is not symmetric), as they are if a "
                "custom autograd.Function works on detached tensors"
            )


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum((a * b).sum().item() for a, b in zip(first, second, strict=True))


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A term of the loss whose Hessian has a closed form.

    Args:
        call: The call of its loss function.
        curvature: The derivatives of the total loss through the call.
        output: Index of the outputs that the call received.
    """

    call: LossCall
    curvature: LossCurvature
    output: int


class ClosedFormHessian(LossHessian):
    r"""The Hessian of a sum of losses in ``LOSS_RULES``, :math:`\sum_t S_t S_t^\top`.

    Args:
        terms: The terms.
        outputs: The network outputs, whose samples come first.
    """

    def __init__(self, terms: Sequence[LossTerm], outputs: Sequence[Outputs]) -> None:
        super().__init__(outputs)
        self._terms = list(terms)

    @override
    def couples(self, num_blocks: int) -> bool:
        return any(term.curvature.factor.shape[0] % num_blocks for term in self._terms)

    @override
    def matvec(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        products = [torch.zeros_like(vector) for vector in vectors]
        for term in self._terms:
            products[term.output] += _apply(term, term.curvature.factor.hessian_matvec, vectors[term.output])
        return products

    @override
    def dense_factors(self, num_blocks: int) -> Tensor:
        by_output = [
            _combine([_scatter(term, num_blocks) for term in self._terms if term.output == index])
            for index in range(len(self.outputs))
        ]
        if len(by_output) == 1:
            return by_output[0]
        return torch.stack([torch.block_diag(*factors) for factors in zip(*by_output, strict=True)])

    @override
    def random_factor_columns(self, num_columns: int, num_blocks: int, generator: torch.Generator) -> list[Tensor]:
        columns = []
        for _ in range(num_columns):
            column = [torch.zeros_like(output.residual) for output in self.outputs]
            for term in self._terms:
                signs = torch.randint(2, term.call.outputs_shape, generator=generator, device="cpu") * 2 - 1
                column[term.output] += _apply(term, term.curvature.factor.matvec, signs.to(column[term.output]))
            columns.append(column)
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]


def _apply(term: LossTerm, function: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """Apply a function of vectors ``(blocks, b)`` to a vector in the shape of the outputs."""
    classes_last = vector.movedim(term.call.class_dim, -1)
    blocks = function(classes_last.reshape(term.curvature.factor.shape))
    return blocks.reshape(classes_last.shape).movedim(-1, term.call.class_dim)


def _scatter(term: LossTerm, num_blocks: int) -> Tensor:
    """Write the blocks of a factor, ``(n, b, b)``, into one matrix per block of samples, ``(num_blocks, q, q)``."""
    blocks, shape = term.curvature.factor.dense(), term.call.outputs_shape
    entries = torch.arange(shape.numel(), device=blocks.device).reshape(shape)
    entries = entries.movedim(term.call.class_dim, -1).reshape(-1, blocks.shape[-1])
    size = shape.numel() // num_blocks
    dense = blocks.new_zeros(num_blocks, size, size)
    block, position = entries // size, entries % size
    dense[block[:, :, None], position[:, :, None], position[:, None, :]] = blocks
    return dense


def _combine(factors: Sequence[Tensor]) -> Tensor:
    r"""Return one factor of the sum :math:`\sum_t S_t S_t^\top`."""
    if len(factors) == 1:
        return factors[0]
    values, vectors = torch.linalg.eigh(torch.stack([factor @ factor.mT for factor in factors]).sum(0))
    combined: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return combined
