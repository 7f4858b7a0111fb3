"""Collect the network outputs that the loss depends on, with the residual and the Hessian of the loss there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of, gradient_edge, leaves
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature


class UnsupportedModelError(RuntimeError):
    """Raised when the exact curvature of a part of the model or the loss is unknown; the message names the part."""


@dataclass(eq=False)
class Outputs:
    """One tensor of network outputs and the loss calls that received it.

    Args:
        calls: The loss calls.
        curvatures: The derivatives of the total loss through each call.
    """

    calls: list[LossCall]
    curvatures: list[LossCurvature]

    @property
    def edge(self) -> Edge:
        """Autograd edge of the outputs."""
        return self.calls[0].outputs_edge

    @property
    def shape(self) -> torch.Size:
        """Shape of the outputs."""
        return self.calls[0].outputs_shape

    @property
    def num_samples(self) -> int:
        """First dimension of the outputs, or 1 if they have no sample dimension."""
        unbatched = not self.shape or self.calls[0].class_dim == 0
        return 1 if unbatched else self.shape[0]

    @property
    def num_blocks(self) -> int:
        """Largest number of equal blocks of consecutive samples without coupling by the loss."""
        return math.gcd(self.num_samples, *[curvature.factor.shape[0] for curvature in self.curvatures])

    @property
    def residual(self) -> Tensor:
        """Gradient of the loss with respect to the outputs, float64, in the shape of the outputs."""
        return torch.stack([curvature.residual for curvature in self.curvatures]).sum(0)

    def dense_factors(self, num_blocks: int) -> Tensor:
        r"""Return a factor :math:`S_i` of the Hessian :math:`S_i S_i^\top` of each block of samples.

        Args:
            num_blocks: Number of blocks of consecutive samples.

        Returns:
            Shape ``(num_blocks, q, q)``, float64, with the ``q`` outputs of a block in the order of the tensor.
        """
        factors = [
            self._scatter(curvature.factor.dense(), call.class_dim, num_blocks)
            for call, curvature in zip(self.calls, self.curvatures, strict=True)
        ]
        if len(factors) == 1:
            return factors[0]
        values, vectors = torch.linalg.eigh(torch.stack([factor @ factor.mT for factor in factors]).sum(0))
        combined: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
        return combined

    def hessian_matvec(self, vector: Tensor) -> Tensor:
        """Multiply the Hessian of the loss with respect to the outputs by a vector in their shape; returns float64."""
        products = [
            _apply_blockwise(curvature.factor.hessian_matvec, curvature.factor.shape, call.class_dim, vector)
            for call, curvature in zip(self.calls, self.curvatures, strict=True)
        ]
        return torch.stack(products).sum(0)

    def random_factor_columns(self, num_columns: int, generator: torch.Generator) -> Tensor:
        r"""Draw random combinations :math:`S w` of the columns of the factor, with entries of :math:`w` ±1.

        Their second moment is the Hessian, :math:`E[S w (S w)^\top] = S S^\top`.

        Returns:
            Shape ``(num_columns, *shape)``, float64.
        """
        columns = []
        for _ in range(num_columns):
            terms = []
            for call, curvature in zip(self.calls, self.curvatures, strict=True):
                signs = torch.randint(2, self.shape, generator=generator, device="cpu").to(curvature.residual) * 2 - 1
                factor = curvature.factor
                terms.append(_apply_blockwise(factor.matvec, factor.shape, call.class_dim, signs))
            columns.append(torch.stack(terms).sum(0))
        return torch.stack(columns)

    def _scatter(self, blocks: Tensor, class_dim: int, num_blocks: int) -> Tensor:
        """Write the blocks of a factor, ``(n, b, b)``, into one matrix per block of samples, ``(num_blocks, q, q)``."""
        entries = torch.arange(self.shape.numel(), device=blocks.device).reshape(self.shape)
        entries = entries.movedim(class_dim, -1).reshape(-1, blocks.shape[-1])
        size = self.shape.numel() // num_blocks
        dense = blocks.new_zeros(num_blocks, size, size)
        block, position = entries // size, entries % size
        dense[block[:, :, None], position[:, :, None], position[:, None, :]] = blocks
        return dense


def _apply_blockwise(
    function: Callable[[Tensor], Tensor], shape: tuple[int, int], class_dim: int, vector: Tensor
) -> Tensor:
    """Apply a function of vectors ``(blocks, b)`` to a vector in the shape of the outputs."""
    classes_last = vector.double().movedim(class_dim, -1)
    return function(classes_last.reshape(shape)).reshape(classes_last.shape).movedim(-1, class_dim)


class OutputRows:
    """The rows of the Jacobian of the network outputs, numbered block by block.

    Args:
        outputs: The network outputs.
        num_blocks: Number of blocks of the batch.
        combinations: Linear combinations of the outputs that take the place of the outputs as rows: a tensor
            ``(q, *shape)`` for each element of ``outputs``. ``None`` stands for the outputs themselves.
    """

    def __init__(self, outputs: list[Outputs], num_blocks: int, combinations: Sequence[Tensor] | None = None) -> None:
        self._outputs = outputs
        self._edges = [gradient_edge(output.edge) for output in outputs]
        self._widths = [output.shape.numel() // num_blocks for output in outputs]
        self._combinations: Tensor | None = None
        if combinations is not None:
            self._combinations = torch.cat([c.reshape(len(c), num_blocks, -1) for c in combinations], dim=2)
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
            [part.reshape(output.shape) for part, output in zip(cotangents, self._outputs, strict=True)],
            retain_graph=True,
            allow_unused=True,
        )


def outputs_of(loss: Tensor, calls: list[LossCall], names: Mapping[int, str]) -> list[Outputs]:
    """Collect the network outputs that the loss depends on, and check that it depends on parameters only through them.

    Args:
        loss: The loss.
        calls: Every recorded loss call.
        names: Names of the parameters, by ``id``.

    Raises:
        UnsupportedModelError: If the loss depends on parameters in another way, or not linearly on the loss calls.
    """
    upstream_gradients = (
        torch.autograd.grad(loss, [gradient_edge(c.value_edge) for c in calls], create_graph=True, allow_unused=True)
        if calls
        else ()
    )
    used = [(call, upstream) for call, upstream in zip(calls, upstream_gradients, strict=True) if upstream is not None]
    if not used:
        raise UnsupportedModelError(
            "the loss was not computed by torch.nn.functional.cross_entropy, nll_loss (right after log_softmax), "
            "binary_cross_entropy_with_logits, binary_cross_entropy (right after sigmoid), mse_loss, huber_loss or "
            "smooth_l1_loss (target of the same shape), or their modules, so its curvature is not known: pass a "
            "loss_fn(model, batch) that uses one of them, or custom_loss(outputs, function)"
        )
    _check_only_loss_calls(loss, [call for call, _ in used], names)
    if any(upstream.requires_grad for _, upstream in used):
        raise UnsupportedModelError(
            "the loss is not a weighted sum of its loss functions' values (it transforms or multiplies them), so its "
            "curvature is not known: pass a loss_fn(model, batch) that returns a plain weighted sum"
        )
    collected: dict[Edge, Outputs] = {}
    for call, upstream in used:
        curvature = call.curvature(upstream.detach())
        _check_residual(call, curvature, upstream)
        outputs = collected.setdefault(call.outputs_edge, Outputs([], []))
        outputs.calls.append(call)
        outputs.curvatures.append(curvature)
    return list(collected.values())


def _check_only_loss_calls(loss: Tensor, calls: list[LossCall], names: Mapping[int, str]) -> None:
    """Raise if the loss depends on any leaf tensor other than through the given loss calls."""
    values: dict[Edge, list[Edge]] = {call.value_edge: [] for call in calls}
    if not leaves([edge_of(loss)], values):
        return
    direct = leaves([edge_of(loss)], {**values, **{call.outputs_edge: [] for call in calls}})
    if direct:
        raise UnsupportedModelError(
            f"the loss depends on {_format_names(direct, names)} other than through the outputs that loss functions of "
            "known curvature took, such as cross_entropy and mse_loss (a penalty on weights, another loss?): pass a "
            "loss_fn(model, batch) that returns the loss of the data alone"
        )
    raise UnsupportedModelError(
        "the loss uses the network's outputs in another way besides loss functions of known curvature, such as "
        "cross_entropy and mse_loss (an entropy bonus, a consistency term?), whose curvature is not known: "
        "pass a loss_fn(model, batch) without it"
    )


def _check_residual(call: LossCall, curvature: LossCurvature, upstream: Tensor) -> None:
    """Compare the closed-form residual with autograd's gradient.

    They differ if a rule is wrong, does not support an option of its loss function, or if a hook changes the gradient.
    """
    (gradient,) = torch.autograd.grad(
        gradient_edge(call.value_edge),
        gradient_edge(call.outputs_edge),
        upstream.detach(),
        retain_graph=True,
    )
    eps = torch.finfo(gradient.dtype).eps
    tolerance = eps**0.5 * gradient.double().norm() + 100 * eps * curvature.scale
    if (curvature.residual - gradient).norm() > tolerance:
        raise UnsupportedModelError(
            "the closed form of the loss does not give autograd's gradient. If a tensor hook (register_hook) changes "
            "the gradient of the network's outputs, pass a loss_fn(model, batch) without it; otherwise pass one with a "
            "simpler loss, and please report this"
        )


def _format_names(tensors: list[Tensor], names: Mapping[int, str]) -> str:
    known = [repr(names[id(tensor)]) for tensor in tensors if id(tensor) in names]
    if not known:
        return "a tensor that is no parameter of the model"
    return ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
