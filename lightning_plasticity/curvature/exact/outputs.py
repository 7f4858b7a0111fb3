"""What of the network the loss depends on, and how: its outputs, the residual and the Hessian there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of, gradient_edge, leaves
from lightning_plasticity.curvature.exact.hessian_factors import HessianFactor
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature


class UnsupportedModelError(RuntimeError):
    """The model or the loss has a part whose exact curvature is not known: the message names it."""


@dataclass(eq=False)
class Outputs:
    """One tensor of network outputs and the loss calls that took it.

    Args:
        calls: The loss calls.
        curvatures: The first and second derivative of each.
    """

    calls: list[LossCall]
    curvatures: list[LossCurvature]

    @property
    def edge(self) -> Edge:
        """Where the outputs stand in the graph."""
        return self.calls[0].outputs_edge

    @property
    def shape(self) -> torch.Size:
        """Shape of the outputs."""
        return self.calls[0].outputs_shape

    @property
    def samples(self) -> int:
        """First dimension of the outputs; 1 if they have no dimension for samples."""
        unbatched = not self.shape or self.calls[0].class_dim == 0
        return 1 if unbatched else self.shape[0]

    @property
    def blocks(self) -> int:
        """Into how many blocks the samples fall that the loss does not couple."""
        return math.gcd(self.samples, *[curvature.root.shape[0] for curvature in self.curvatures])

    @property
    def residual(self) -> Tensor:
        """Gradient of the loss by the outputs, float64, the shape of the outputs."""
        return torch.stack([curvature.residual for curvature in self.curvatures]).sum(0)

    def roots(self, samples: int) -> Tensor:
        """A root of the Hessian for each sample, shape ``(samples, q, q)``, in the order of the tensor's entries."""
        dense = [
            self._dense(call, c.root.dense(), samples) for call, c in zip(self.calls, self.curvatures, strict=True)
        ]
        if len(dense) == 1:
            return dense[0]
        values, vectors = torch.linalg.eigh(torch.stack([root @ root.mT for root in dense]).sum(0))
        root: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
        return root

    def hessian_matvec(self, vector: Tensor) -> Tensor:
        """The Hessian of the loss by the outputs times a vector of the shape of the outputs, float64."""
        parts = [
            self._by_block(call, curvature.root, vector, lambda root, v: root.matvec(root.transposed_matvec(v)))
            for call, curvature in zip(self.calls, self.curvatures, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def random_root_columns(self, columns: int, generator: torch.Generator) -> Tensor:
        r"""Random combinations :math:`S w` of the columns of the root, entries of :math:`w` ±1.

        Their second moment is the Hessian, :math:`E[S w (S w)^\top] = S S^\top`.

        Returns:
            Shape ``(columns, *shape)``, float64.
        """
        result = []
        for _ in range(columns):
            parts = []
            for call, curvature in zip(self.calls, self.curvatures, strict=True):
                signs = torch.randint(2, self.shape, generator=generator, device="cpu").to(curvature.residual) * 2 - 1
                parts.append(self._by_block(call, curvature.root, signs, lambda root, v: root.matvec(v)))
            result.append(torch.stack(parts).sum(0))
        return torch.stack(result)

    def _by_block(
        self, call: LossCall, root: HessianFactor, vector: Tensor, function: Callable[[HessianFactor, Tensor], Tensor]
    ) -> Tensor:
        by_class = vector.double().movedim(call.class_dim if root.shape[1] > 1 else -1, -1)
        image = function(root, by_class.reshape(root.shape)).reshape(by_class.shape)
        return image.movedim(-1, call.class_dim) if root.shape[1] > 1 else image

    def _dense(self, call: LossCall, block: Tensor, samples: int) -> Tensor:
        size = block.shape[-1]
        entries = torch.arange(self.shape.numel(), device=block.device).reshape(self.shape)
        if size > 1:
            entries = entries.movedim(call.class_dim, -1)
        entries = entries.reshape(-1, size)  # of which entries of the tensor each block is about
        width = self.shape.numel() // samples
        dense = block.new_zeros(samples, width, width)
        sample, place = entries // width, entries % width
        dense[sample[:, :, None], place[:, :, None], place[:, None, :]] = block
        return dense


class OutputRows:
    """The rows of a Jacobian: which combinations of the outputs they stand for, block by block.

    Args:
        outputs: The network's outputs.
        blocks: Number of blocks of the batch.
        combinations: The combinations for each of the outputs, ``(columns, *shape)``; ``None`` stands for the outputs
            themselves.
    """

    def __init__(self, outputs: list[Outputs], blocks: int, combinations: Sequence[Tensor] | None = None) -> None:
        self._outputs = outputs
        self._edges = [gradient_edge(output.edge) for output in outputs]
        self._widths = [output.shape.numel() // blocks for output in outputs]
        self._combinations: Tensor | None = None
        if combinations is not None:
            self._combinations = torch.cat([c.reshape(len(c), blocks, -1) for c in combinations], dim=2)
        columns = sum(self._widths) if self._combinations is None else len(self._combinations)
        self.shape = (blocks, columns)

    def vjp(self, by: Sequence[Tensor] | Sequence[GradientEdge], coefficients: Tensor) -> Sequence[Tensor | None]:
        r""":math:`J^\top u`, the gradient of the sum of rows by each of ``by``; ``None`` where there is none.

        Args:
            by: Tensors, or places in the graph.
            coefficients: :math:`u`, shape ``(blocks, columns)``.
        """
        vector = coefficients
        if self._combinations is not None:
            vector = torch.einsum("bc,cbw->bw", coefficients, self._combinations.to(coefficients.dtype))
        pieces = vector.split(self._widths, dim=1)
        return torch.autograd.grad(
            self._edges,
            by,
            [piece.reshape(output.shape) for piece, output in zip(pieces, self._outputs, strict=True)],
            retain_graph=True,
            allow_unused=True,
        )


def outputs_of(loss: Tensor, calls: list[LossCall], names: Mapping[int, str]) -> list[Outputs]:
    """The network's outputs that the loss depends on, checked to be all that it depends on.

    Args:
        loss: The loss.
        calls: Every call of a loss function with a closed form.
        names: Names of the parameters, by ``id``.

    Raises:
        UnsupportedModelError: If the loss depends on parameters in another way.
    """
    factors = (
        torch.autograd.grad(loss, [gradient_edge(c.value_edge) for c in calls], create_graph=True, allow_unused=True)
        if calls
        else ()
    )
    reached = [(call, factor) for call, factor in zip(calls, factors, strict=True) if factor is not None]
    if not reached:
        raise UnsupportedModelError(
            "the loss was not computed by torch.nn.functional.cross_entropy, nll_loss (right after log_softmax), "
            "binary_cross_entropy_with_logits, binary_cross_entropy (right after sigmoid), mse_loss, huber_loss or "
            "smooth_l1_loss (target of the same shape), or their modules, so its curvature is not known: pass a "
            "loss_fn(model, batch) that uses one of them, or custom_loss(outputs, function)"
        )
    _check_nothing_else(loss, [call for call, _ in reached], names)
    if any(factor.requires_grad for _, factor in reached):
        raise UnsupportedModelError(
            "the loss is not a weighted sum of its loss functions' values (it transforms or multiplies them), so its "
            "curvature is not known: pass a loss_fn(model, batch) that returns a plain weighted sum"
        )
    result: dict[Edge, Outputs] = {}
    for call, factor in reached:
        curvature = call.curvature(factor.detach())
        _check_residual(call, curvature, factor)
        outputs = result.setdefault(call.outputs_edge, Outputs([], []))
        outputs.calls.append(call)
        outputs.curvatures.append(curvature)
    return list(result.values())


def _check_nothing_else(loss: Tensor, calls: list[LossCall], names: Mapping[int, str]) -> None:
    values: dict[Edge, list[Edge]] = {call.value_edge: [] for call in calls}
    if not leaves([edge_of(loss)], values):
        return
    direct = leaves([edge_of(loss)], {**values, **{call.outputs_edge: [] for call in calls}})
    if direct:
        raise UnsupportedModelError(
            f"the loss depends on {_named(direct, names)} other than through the outputs that loss functions of known "
            "curvature took, such as cross_entropy and mse_loss (a penalty on weights, another loss?): pass a "
            "loss_fn(model, batch) that returns the loss of the data alone"
        )
    raise UnsupportedModelError(
        "the loss uses the network's outputs in another way besides loss functions of known curvature, such as "
        "cross_entropy and mse_loss (an entropy bonus, a consistency term?), whose curvature is not known: "
        "pass a loss_fn(model, batch) without it"
    )


def _check_residual(call: LossCall, curvature: LossCurvature, factor: Tensor) -> None:
    """The closed form against autograd: a mistake of ours, or an option of a loss function that it does not know."""
    (gradient,) = torch.autograd.grad(
        gradient_edge(call.value_edge),
        gradient_edge(call.outputs_edge),
        factor.detach(),
        retain_graph=True,
    )
    eps = torch.finfo(gradient.dtype).eps
    allowed = eps**0.5 * gradient.double().norm() + 100 * eps * curvature.scale
    if (curvature.residual - gradient).norm() > allowed:
        raise UnsupportedModelError(
            "the closed form of the loss does not give autograd's gradient. If a tensor hook (register_hook) changes "
            "the gradient of the network's outputs, pass a loss_fn(model, batch) without it; otherwise pass one with a "
            "plainer loss, and please report this"
        )


def _named(tensors: list[Tensor], names: Mapping[int, str]) -> str:
    known = [repr(names[id(tensor)]) for tensor in tensors if id(tensor) in names]
    if not known:
        return "a tensor that is no parameter of the model"
    return ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
