"""Measure how far Hessian-vector products are from symmetry and from finite differences of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import dense_vjp, or_zeros, vjp
from lightning_plasticity.curvature.problem import NOT_FINITE, normal

MAX_ASYMMETRY = 1e-9
r"""Allowed :math:`|u^\top H v - v^\top H u|`, relative to the size of both.

All healthy models in the tests are below 1e-15. Wrong second derivatives are symmetric, or asymmetric by 5e-2 or more.
"""

MAX_DIFFERENCE = 1e-5
"""Allowed relative distance from finite differences.

The healthy models in the tests are at 2e-9 at most, wrong second derivatives at 0.24 or more.
"""

_MAX_ASYMMETRY_IN_FLOAT32, _MAX_DIFFERENCE_IN_FLOAT32 = 1e-4, 5e-2
"""The same limits for models that cast to float32 themselves: in a norm, in a softmax, or by ``logits.float()``."""

_STEPS = (1e-5, 1e-7, 1e-8)
"""Steps of the finite differences, relative to the parameters.

The first is the best for smooth models. Where it crosses the kink of a ReLU, the difference is far off; a hundredth of
the step crosses a hundredth of the kinks. Wrong second derivatives differ at every step.
"""

_PERTURBATION = 1e-2
"""Distance from the parameters to the point where second derivatives are checked, relative to the parameters.

At the parameters themselves, units can be exactly on their kink, such as units without bias on inputs of zero, and
layers can be zero. There is then no second derivative, or one that hides an error. The backward formulas are the same
at any other point.
"""


@dataclass(frozen=True)
class HessianErrors:
    r"""Errors of Hessian-vector products.

    Args:
        asymmetry: :math:`|u^\top H v - v^\top H u|`, relative to the size of both.
        difference: Relative distance of :math:`H u` from finite differences of the gradient.
        worst: Name of the parameter with the largest difference.
    """

    asymmetry: float
    difference: float
    worst: str

    def exceed_limits(self, *, in_float32: bool) -> bool:
        """Return whether second derivatives are wrong, by the limits for float64 or float32 arithmetic."""
        asymmetry, difference = MAX_ASYMMETRY, MAX_DIFFERENCE
        if in_float32:
            asymmetry, difference = _MAX_ASYMMETRY_IN_FLOAT32, _MAX_DIFFERENCE_IN_FLOAT32
        return not (self.asymmetry <= asymmetry and self.difference <= difference)

    def __str__(self) -> str:
        return (
            f"uᵀHv and vᵀHu differ by {self.asymmetry:.1e} of their scale and Hu is {self.difference:.0%} off "
            f"finite differences of the gradient, most at {self.worst!r}"
        )


def perturb(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """Move parameters in place to a random point nearby, where no unit is exactly on a kink."""
    parameters = list(parameters)
    mean_size = _norm(parameters) / sum(parameter.numel() for parameter in parameters) ** 0.5
    with torch.no_grad():
        for parameter in parameters:
            size = parameter.square().mean().sqrt().item() if parameter.numel() else 0.0
            parameter += _PERTURBATION * (size or mean_size or 1.0) * normal(parameter.shape, parameter, generator)


def measure_hessian_errors(
    loss: Callable[[], Tensor], value: Tensor, parameters: dict[str, nn.Parameter], generator: torch.Generator
) -> HessianErrors:
    r"""Measure the errors of Hessian-vector products with random vectors :math:`u` and :math:`v`.

    Args:
        loss: Computes the loss at the current parameters.
        value: The loss at the parameters, with its graph.
        parameters: The parameters by name, float64. They are moved and put back.
        generator: Draws :math:`u` and :math:`v`.

    Raises:
        ValueError: If a product is not finite.
    """
    tensors: list[Tensor] = list(parameters.values())
    # Entries without a gradient are left out. The loss may depend on them nonetheless, as on the padding row of an
    # embedding. Training does not move them, and to second derivatives they are constants.
    moving = [gradient != 0 for gradient in _backward(value, tensors, retain_graph=True)]
    u, v = ([normal(p.shape, p, generator) * m for p, m in zip(tensors, moving, strict=True)] for _ in range(2))
    gradients = vjp([value], tensors, [torch.ones_like(value)], create_graph=True)
    hu, hv = dense_vjp(gradients, tensors, u), dense_vjp(gradients, tensors, v)
    if not all(bool(product.isfinite().all()) for product in (*hu, *hv)):
        raise ValueError(NOT_FINITE)
    scale = (_norm(hu) * _norm(v) + _norm(hv) * _norm(u)) / 2
    asymmetry = abs(_dot(u, hv) - _dot(v, hu)) / scale if scale > 0 else 0.0
    difference, worst = _smallest_difference(loss, parameters, u, hu)
    return HessianErrors(asymmetry, difference, worst)


def _smallest_difference(
    loss: Callable[[], Tensor], parameters: dict[str, nn.Parameter], u: list[Tensor], hu: list[Tensor]
) -> tuple[float, str]:
    """Return the smallest relative distance of ``hu`` from finite differences over the steps, and the worst name."""
    tensors: list[Tensor] = list(parameters.values())
    smallest, worst = float("inf"), next(iter(parameters))
    for relative_step in _STEPS:
        step = relative_step * (_norm(tensors) or 1.0) / (_norm(u) or 1.0)
        forward, backward = _gradients_at(loss, tensors, u, step), _gradients_at(loss, tensors, u, -step)
        expected = [(a - b) / (2 * step) for a, b in zip(forward, backward, strict=True)]
        rounding = 100 * torch.finfo(torch.float64).eps * _norm(forward) / step
        gaps = [a - b for a, b in zip(hu, expected, strict=True)]
        size = max(_norm(hu), _norm(expected))
        difference = max(_norm(gaps) - rounding, 0.0) / size if size > 0 else 0.0
        if difference < smallest:
            smallest = difference
            worst = max(zip(gaps, parameters, strict=True), key=lambda pair: pair[0].norm().item())[1]
        if smallest <= MAX_DIFFERENCE:
            break
    return smallest, worst


def _gradients_at(loss: Callable[[], Tensor], parameters: list[Tensor], u: list[Tensor], step: float) -> list[Tensor]:
    """Return the gradients of training a step away along ``u``, and put the parameters back."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, u, strict=True):
            parameter += step * direction
    result = _backward(loss(), parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return result


def _backward(loss: Tensor, parameters: list[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    """Return the gradients that ``loss.backward()`` computes, and clear them."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=retain_graph)
    result = [or_zeros(parameter.grad, parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return result


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    return float(sum((x * y).sum().item() for x, y in zip(a, b, strict=True)))


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(tensor.detach().square().sum().item() for tensor in tensors))
