r"""The loss functions whose curvature by the network's outputs is known in closed form.

A loss function takes *outputs* of the network, a tensor of any shape, here seen as rows of ``q`` numbers, one row a
sample. What is needed of it is the residual, its gradient by the outputs, and a root :math:`S_i` of its Hessian,
:math:`S_i S_i^\top = \partial^2 L / \partial f_i^2`, sample by sample. Both are computed in float64.
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


def _mean_weight(reduction: str, gradient: Tensor, denominator: Tensor | float) -> Tensor:
    return gradient / denominator if reduction == "mean" else gradient


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
    :math:`s_i (\mathrm{diag}(p_i) - p_i p_i^\top)`, whose root is
    :math:`\sqrt{s_i} (\mathrm{diag} \sqrt{p_i} - p_i \sqrt{p_i}^\top)`.
    """
    if size_average is not None or reduce is not None or target.requires_grad:
        return None
    class_dim = 0 if input.dim() == 1 else 1

    def curvature(gradient: Tensor) -> LossCurvature:
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
        labels = labels * _mean_weight(reduction, gradient.double(), denominator).expand(logits.shape[:-1])[..., None]
        strength = labels.sum(-1, keepdim=True)
        probabilities = logits.softmax(-1)
        _check_not_negative(strength)
        return LossCurvature(
            residual=(strength * probabilities - labels).movedim(-1, class_dim),
            root=SoftmaxFactor(strength.reshape(-1, 1), probabilities.reshape(-1, classes)),
            scale=labels.norm(),
        )

    return loss_call(input, value, curvature, class_dim)


def _nll_loss(value: Tensor, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossCall | None:
    """Cross-entropy in two steps: the outputs are what the log-softmax was taken of.

    The log-probabilities stand in for them: they differ by a constant from each other, which no softmax sees.
    """
    softmax = input.grad_fn
    if softmax is None or softmax.name() != "LogSoftmaxBackward0":
        return None
    call = _cross_entropy(value, input, target, *args, **kwargs)
    class_dim = getattr(softmax, "_saved_dim", None)  # minus one comes as an unsigned integer
    if call is None or class_dim not in {call.class_dim, (call.class_dim - input.dim()) % 2**64}:
        return None
    return _before(softmax, call)


def _before(activation: Node, call: LossCall) -> LossCall | None:
    """The same call, about what a function at the end of the network was given."""
    node, number = activation.next_functions[0]
    return None if node is None else replace(call, outputs_edge=(node, number))


def _squared_or_linear(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mean_over: Callable[[Tensor], Tensor | float] | None,
    bend: float,
    width: float = math.inf,
) -> LossCall | None:
    r"""A loss of each difference :math:`d = f - y` that is a parabola up to a width, and goes on straight.

    With :math:`L = \sum_i a_i \ell(f_i - y_i)`, the residual is :math:`a_i b\, \mathrm{clamp}(d_i, \pm w)` and the
    Hessian :math:`a_i b [|d_i| < w]`.

    Args:
        value: Value of the loss.
        input: The one side.
        target: The other.
        weight: Weights of the differences.
        mean_over: What the sum is divided by, given the weights; ``None`` if by nothing.
        bend: Second derivative :math:`b` of the parabola.
        width: Its half-width :math:`w`.
    """
    if target.requires_grad and not input.requires_grad:
        input, target = target, input
    if target.requires_grad or input.shape != target.shape:
        return None

    def curvature(gradient: Tensor) -> LossCurvature:
        outputs, labels = input.detach().double(), target.detach().double()
        strength = torch.ones_like(outputs) if weight is None else weight.detach().double().expand(outputs.shape)
        strength = bend * strength * gradient.double() / (1 if mean_over is None else mean_over(strength))
        difference = outputs - labels
        return LossCurvature(
            residual=strength * difference.clamp(-width, width),
            root=_diagonal_root(strength * (difference.abs() < width)),
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
    return _squared_or_linear(value, input, target, weight, mean_over, bend=2)


def _huber_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossCall | None:
    """Half the squared error where it is below delta, linear beyond."""
    mean_over = Tensor.numel if reduction == "mean" else None
    return _squared_or_linear(value, input, target, weight, mean_over, bend=1, width=delta)


def _smooth_l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossCall | None:
    """Huber's loss divided by its width."""
    if size_average is not None or reduce is not None or beta == 0:
        return None
    mean_over = Tensor.numel if reduction == "mean" else None
    return _squared_or_linear(value, input, target, None, mean_over, bend=1 / beta, width=beta)


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

    def curvature(gradient: Tensor) -> LossCurvature:
        outputs, labels = input.detach().double(), target.detach().double()
        strength = _mean_weight(reduction, gradient.double(), float(outputs.numel())).expand(outputs.shape)
        if weight is not None:
            strength = strength * weight.detach().double()
        positive = strength * labels
        if pos_weight is not None:
            positive = positive * pos_weight.detach().double()
        total = positive + strength * (1 - labels)
        sigmoid, complement = outputs.sigmoid(), (-outputs).sigmoid()
        return LossCurvature(total * sigmoid - positive, _diagonal_root(total * sigmoid * complement), strength.norm())

    return loss_call(input, value, curvature)


def _binary_cross_entropy(value: Tensor, input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> LossCall | None:
    """The same in two steps: the outputs are what the sigmoid was taken of."""
    sigmoid = input.grad_fn
    if sigmoid is None or sigmoid.name() != "SigmoidBackward0":
        return None
    call = _bce_with_logits(value, input.double().logit(), target, *args, **kwargs)
    return None if call is None else _before(sigmoid, call)


def _diagonal_root(strength: Tensor) -> DiagonalFactor:
    _check_not_negative(strength)
    return DiagonalFactor(strength.sqrt())


def _check_not_negative(strength: Tensor) -> None:
    if (strength < 0).any():
        raise ValueError(
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
"""Every loss function with a closed form, and the rule that says what its curvature is."""
