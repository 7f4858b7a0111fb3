r"""Map each loss function to its closed-form gradient and Hessian with respect to the network outputs.

A rule receives the value and the arguments of one call. It returns a :class:`LossCall`, which computes in float64 the
residual :math:`\partial L / \partial f` and a factor :math:`S_i` of the Hessian of each sample,
:math:`S_i S_i^\top = \partial^2 L / \partial f_i^2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from lightning_plasticity.curvature.exact.custom_losses import custom_loss, custom_loss_rule
from lightning_plasticity.curvature.exact.hessian_factors import DiagonalFactor, SoftmaxFactor
from lightning_plasticity.curvature.exact.loss_calls import LossCall, LossCurvature, LossRule, loss_call
from lightning_plasticity.curvature.exact.outputs import NoGaussNewtonMatrixError


def _term_weight(reduction: str, upstream: Tensor, denominator: Tensor | float) -> Tensor:
    """Return the weight of each term of the loss, given the upstream gradient of the reduced value."""
    return upstream / denominator if reduction == "mean" else upstream


def _cross_entropy(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossCall | None:
    r"""Softmax cross-entropy, :math:`L = -\sum_i a_i \sum_c y_{ic} \log p_{ic}`.

    With :math:`s_i = a_i \sum_c y_{ic}` the residual is :math:`s_i p_i - a_i y_i` and the Hessian
    :math:`s_i (\mathrm{diag}(p_i) - p_i p_i^\top)`, with the factor
    :math:`\sqrt{s_i} (\mathrm{diag} \sqrt{p_i} - p_i \sqrt{p_i}^\top)`.
    """
    if size_average is not None or reduce is not None or target.requires_grad:
        return None
    class_dim = 0 if input.dim() == 1 else 1

    def curvature(upstream: Tensor) -> LossCurvature:
        logits = input.detach().double().movedim(class_dim, -1)
        classes = logits.shape[-1]
        class_weight = torch.ones(classes, dtype=logits.dtype, device=logits.device)
        if weight is not None:
            class_weight = weight.detach().double()
        if target.is_floating_point():
            labels = target.detach().double().movedim(class_dim, -1)
            labels = class_weight * (labels * (1 - label_smoothing) + label_smoothing / classes)
            denominator = torch.tensor(float(logits[..., 0].numel()), device=logits.device, dtype=logits.dtype)
        else:
            kept = (target != ignore_index).double()
            one_hot = F.one_hot(torch.where(kept.bool(), target, 0), classes).double()
            labels = class_weight * (one_hot * (1 - label_smoothing) + label_smoothing / classes) * kept[..., None]
            denominator = ((one_hot * class_weight).sum(-1) * kept).sum()
        weights = _term_weight(reduction, upstream.double(), denominator).expand(logits.shape[:-1])
        labels = labels * weights[..., None]
        strength = labels.sum(-1, keepdim=True)
        probabilities = logits.softmax(-1)
        _check_nonnegative(strength)
        return LossCurvature(
            residual=(strength * probabilities - labels).movedim(-1, class_dim),
            factor=SoftmaxFactor(strength.reshape(-1, 1), probabilities.reshape(-1, classes)),
            scale=labels.norm(),
        )

    return loss_call(input, value, curvature, class_dim)


def _nll_loss(value: Tensor, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossCall | None:
    """Cross-entropy in two steps: the outputs are the input of the log-softmax.

    The log-probabilities can replace this input in the formulas. They differ from it by a constant per sample, to which
    the softmax is invariant.
    """
    softmax = input.grad_fn
    if softmax is None or softmax.name() != "LogSoftmaxBackward0":
        return None
    call = _cross_entropy(value, input, target, *args, **kwargs)
    class_dim = getattr(softmax, "_saved_dim", None)
    # torch stores a negative dimension as an unsigned 64-bit integer.
    if call is None or class_dim not in {call.class_dim, (call.class_dim - input.dim()) % 2**64}:
        return None
    return _before_activation(softmax, call)


def _before_activation(activation: Node, call: LossCall) -> LossCall | None:
    """Move the outputs of a call from the output of an activation to its input."""
    node, output_nr = activation.next_functions[0]
    return None if node is None else replace(call, outputs_edge=(node, output_nr))


def _huber_family(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mean_over: Callable[[Tensor], Tensor | float] | None,
    second_derivative: float,
    half_width: float = math.inf,
) -> LossCall | None:
    r"""Build the record of a loss that is quadratic in small differences :math:`d = f - y` and linear in large ones.

    With :math:`L = \sum_i a_i \ell(f_i - y_i)`, the residual is :math:`a_i b\, \mathrm{clamp}(d_i, \pm w)` and the
    Hessian :math:`a_i b [|d_i| < w]`.

    Args:
        value: Value of the loss.
        input: First argument of the loss function. It may be exchanged with the target.
        target: Second argument.
        weight: Weights of the differences.
        mean_over: Maps the weights to the denominator of the mean; ``None`` for a sum.
        second_derivative: Second derivative :math:`b` of the quadratic part.
        half_width: Half-width :math:`w` of the quadratic part.
    """
    if target.requires_grad and not input.requires_grad:
        input, target = target, input
    if target.requires_grad or input.shape != target.shape:
        return None

    def curvature(upstream: Tensor) -> LossCurvature:
        outputs, labels = input.detach().double(), target.detach().double()
        strength = torch.ones_like(outputs) if weight is None else weight.detach().double().expand(outputs.shape)
        strength = second_derivative * strength * upstream.double() / (1 if mean_over is None else mean_over(strength))
        difference = outputs - labels
        return LossCurvature(
            residual=strength * difference.clamp(-half_width, half_width),
            factor=_diagonal_factor(strength * (difference.abs() < half_width)),
            scale=(strength * (outputs.abs() + labels.abs())).norm(),
        )

    return loss_call(input, value, curvature)


def _mse_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossCall | None:
    """Squared error."""
    if size_average is not None or reduce is not None:
        return None
    mean_over = Tensor.sum if reduction == "mean" else None
    return _huber_family(value, input, target, weight, mean_over, second_derivative=2)


def _huber_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossCall | None:
    """Huber loss: half the squared error up to ``delta``, linear beyond."""
    mean_over = Tensor.numel if reduction == "mean" else None
    return _huber_family(value, input, target, weight, mean_over, second_derivative=1, half_width=delta)


def _smooth_l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossCall | None:
    """Smooth L1 loss: the Huber loss divided by its half-width ``beta``."""
    if size_average is not None or reduce is not None or beta == 0:
        return None
    mean_over = Tensor.numel if reduction == "mean" else None
    return _huber_family(value, input, target, None, mean_over, second_derivative=1 / beta, half_width=beta)


def _bce_with_logits(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossCall | None:
    r"""Binary cross-entropy, :math:`L = -\sum_i a_i [w y_i \log \sigma_i + (1 - y_i) \log (1 - \sigma_i)]`.

    With :math:`s_i = a_i (w y_i + 1 - y_i)` the residual is :math:`s_i \sigma_i - a_i w y_i`, the Hessian
    :math:`s_i \sigma_i (1 - \sigma_i)`.
    """
    if size_average is not None or reduce is not None or target.requires_grad:
        return None

    def curvature(upstream: Tensor) -> LossCurvature:
        outputs, labels = input.detach().double(), target.detach().double()
        strength = _term_weight(reduction, upstream.double(), float(outputs.numel())).expand(outputs.shape)
        if weight is not None:
            strength = strength * weight.detach().double()
        positive = strength * labels
        if pos_weight is not None:
            positive = positive * pos_weight.detach().double()
        total = positive + strength * (1 - labels)
        sigmoid, complement = outputs.sigmoid(), (-outputs).sigmoid()
        return LossCurvature(
            total * sigmoid - positive, _diagonal_factor(total * sigmoid * complement), strength.norm()
        )

    return loss_call(input, value, curvature)


def _binary_cross_entropy(value: Tensor, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossCall | None:
    """Binary cross-entropy in two steps: the outputs are the input of the sigmoid."""
    sigmoid = input.grad_fn
    if sigmoid is None or sigmoid.name() != "SigmoidBackward0":
        return None
    call = _bce_with_logits(value, input.double().logit(), target, *args, **kwargs)
    return None if call is None else _before_activation(sigmoid, call)


def _diagonal_factor(strength: Tensor) -> DiagonalFactor:
    _check_nonnegative(strength)
    return DiagonalFactor(strength.sqrt())


def _check_nonnegative(strength: Tensor) -> None:
    if (strength < 0).any():
        raise NoGaussNewtonMatrixError(
            "the loss counts some samples negatively (weight, target or factor below zero), so the Gauss-Newton matrix "
            "is not positive semi-definite; give the probe a loss_fn without negative weights"
        )


LOSS_RULES: dict[Callable[..., Tensor], LossRule] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
    F.smooth_l1_loss: _smooth_l1_loss,
    custom_loss: custom_loss_rule,
    F.binary_cross_entropy_with_logits: _bce_with_logits,
    F.binary_cross_entropy: _binary_cross_entropy,
}
"""Every loss function with a known curvature, and its rule."""
