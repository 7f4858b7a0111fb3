r"""Compute the Hessian of a loss without a closed form by differentiating it twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lightning_plasticity.curvature.autograd_graph import edge_of, leaves
from lightning_plasticity.curvature.exact.hessian_factors import DenseFactor
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature, loss_call
from lightning_plasticity.curvature.exact.outputs import NoGaussNewtonMatrixError
from lightning_plasticity.curvature.problem import normal


def custom_loss(outputs: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Make any convex loss of the network's outputs usable with :func:`ggn_spectrum`, which differentiates it twice.

    Outside of a curvature measurement this is just ``function(outputs)``.

    Args:
        outputs: The network's outputs, shape ``(n, ...)``.
        function: Maps the outputs to a scalar. It must be convex and twice differentiable, and depend on parameters
            through its argument only.

    Returns:
        The value of the loss, a scalar.

    Example:
        >>> import torch
        >>> from lightning_plasticity.curvature import ggn_spectrum
        >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> spectrum = ggn_spectrum(model, x, lambda model, x: custom_loss(model(x), lambda f: f.square().mean()))
        >>> [round(value, 6) for value in spectrum.eigenvalues.tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
    """
    # An active recording intercepts the call.
    if has_torch_function_unary(outputs):
        value: Tensor = handle_torch_function(custom_loss, (outputs,), outputs, function)
        return value
    return function(outputs)


def custom_loss_rule(value: Tensor, outputs: Tensor, function: Callable[[Tensor], Tensor]) -> LossCall | None:
    """Record a call of :func:`custom_loss`, with one Hessian block per sample or a single block if samples interact.

    Raises:
        ValueError: If the function returns no scalar or depends on parameters in another way than through the outputs.
        NoGaussNewtonMatrixError: When the curvature is computed, if the function is not convex at these outputs.
    """
    if value.dim() or leaves([edge_of(value)], {edge_of(outputs): []}):
        raise ValueError(
            "custom_loss(outputs, function) needs a function that returns a scalar and depends on nothing with a "
            "gradient but the outputs: leave out penalties on weights, which are not part of the loss's curvature"
        )

    def curvature(upstream: Tensor) -> LossCurvature:
        point = outputs.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point), point, create_graph=True)
        gradient = gradient * upstream
        hessian = _block_diagonal_hessian(point, gradient, len(point) if point.dim() else 1)
        if hessian is None:
            hessian = _block_diagonal_hessian(point, gradient, 1)
        assert hessian is not None
        values, vectors = torch.linalg.eigh((hessian + hessian.mT).double() / 2)
        if values.min() < -(torch.finfo(point.dtype).eps ** 0.5) * values.abs().max():
            raise NoGaussNewtonMatrixError(
                "the function given to custom_loss is not convex at these outputs, so the Gauss-Newton matrix is not "
                f"positive semi-definite (eigenvalues of its Hessian from {values.min():.3g} to {values.max():.3g})"
            )
        residual = gradient.detach().double()
        factor = DenseFactor(vectors * values.clamp(min=0).sqrt()[:, None, :])
        return LossCurvature(residual, factor, residual.norm())

    call = loss_call(outputs, value, curvature)
    return None if call is None else replace(call, chooses_outputs=True)


def _block_diagonal_hessian(point: Tensor, gradient: Tensor, num_blocks: int) -> Tensor | None:
    """Return the diagonal blocks ``(num_blocks, b, b)`` of the Hessian, or ``None`` if it has other non-zero entries.

    Args:
        point: The leaf tensor at which the Hessian is taken.
        gradient: The gradient there, with a graph.
        num_blocks: Number of blocks.
    """
    block_size = point.numel() // num_blocks
    # The gradient of a linear function is constant.
    if not gradient.requires_grad:
        return point.detach().new_zeros(num_blocks, block_size, block_size)

    def hvp(vector: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            gradient, point, vector.reshape(point.shape), retain_graph=True, materialize_grads=True
        )
        return product.reshape(num_blocks, -1)

    basis = torch.eye(block_size).to(point)
    hessian = torch.stack([hvp(unit_vector.repeat(num_blocks)) for unit_vector in basis], dim=-1)
    if num_blocks == 1:
        return hessian
    direction = normal((num_blocks, block_size), like=point)
    deviation = hvp(direction) - (hessian @ direction[..., None])[..., 0]
    return None if deviation.norm() > torch.finfo(point.dtype).eps ** 0.5 * hessian.norm() else hessian
