r"""Losses without a closed form: the Hessian by the network's outputs from differentiating the loss twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_plasticity.curvature.autograd_graph import edge_of, leaves
from lightning_plasticity.curvature.exact.hessian_factors import DenseFactor
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature, loss_call
from lightning_plasticity.curvature.problem import normal


def custom_loss(outputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Any loss of the network's outputs, for :func:`ggn_spectrum`: its curvature comes from differentiating it twice.

    Outside of a probe this is ``function(outputs)`` and nothing else.

    Args:
        outputs: The network's outputs, shape ``(n, ...)``.
        function: Takes the outputs, returns a scalar. It depends on parameters through its argument only, can be
            differentiated twice, and is convex.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import ggn_spectrum
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> spectrum = ggn_spectrum(model, x, lambda model, x: custom_loss(model(x), lambda f: f.square().mean()))
        >>> [round(value, 6) for value in spectrum.eigenvalues.tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
    """
    if has_torch_function_unary(outputs):  # a recording is under way
        value: Tensor = handle_torch_function(custom_loss, (outputs,), outputs, function)
        return value
    return function(outputs)


def custom_loss_rule(value: Tensor, outputs: Tensor, function: Callable[[Tensor], Tensor]) -> LossCall | None:
    """The Hessian block by block if the samples are independent, else as one block."""
    if value.dim() or leaves([edge_of(value)], {edge_of(outputs): []}):
        raise ValueError(
            "custom_loss(outputs, function) needs a function that returns a scalar and depends on nothing with a "
            "gradient but the outputs: a penalty on weights, say, has no place in the curvature of the loss"
        )

    def curvature(gradient: Tensor) -> LossCurvature:
        at = outputs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at), at, create_graph=True)
        slope = slope * gradient
        hessian = _blockwise_hessian(at, slope, len(at) if at.dim() else 1)
        if hessian is None:
            hessian = _blockwise_hessian(at, slope, 1)
        assert hessian is not None
        values, vectors = torch.linalg.eigh((hessian + hessian.mT).double() / 2)
        if values.min() < -(torch.finfo(at.dtype).eps ** 0.5) * values.abs().max():
            raise ValueError(
                "the function given to custom_loss is not convex at these outputs, so the Gauss-Newton matrix is not "
                f"positive semi-definite (eigenvalues of its Hessian from {values.min():.3g} to {values.max():.3g})"
            )
        residual = slope.detach().double()
        root = DenseFactor(vectors * values.clamp(min=0).sqrt()[:, None, :])
        return LossCurvature(residual, root, residual.norm())

    return loss_call(outputs, value, curvature)


def _blockwise_hessian(at: Tensor, slope: Tensor, blocks: int) -> Tensor | None:
    """Diagonal blocks ``(blocks, b, b)`` of the derivative of the slope; ``None`` if there is anything beside them."""
    if not slope.requires_grad:  # linear
        return at.detach().new_zeros(blocks, at.numel() // blocks, at.numel() // blocks)

    def product(vector: Tensor) -> Tensor:
        (result,) = torch.autograd.grad(slope, at, vector.reshape(at.shape), retain_graph=True, materialize_grads=True)
        return result.reshape(blocks, -1)

    width = at.numel() // blocks
    hessian = torch.stack([product(unit.repeat(blocks)) for unit in torch.eye(width).to(at)], dim=-1)
    if blocks == 1:
        return hessian
    direction = normal((blocks, width), like=at)
    gap = product(direction) - (hessian @ direction[..., None])[..., 0]
    return None if gap.norm() > torch.finfo(at.dtype).eps ** 0.5 * hessian.norm() else hessian
