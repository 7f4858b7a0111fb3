"""Second derivatives by differentiating twice: what makes them possible, and whether they are right.

Some operations have no second derivative in torch, and say so. Others have a wrong one, and do not.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.autograd_graph import edge_of, gradients, or_zeros, reached, vector_products
from lightning_plasticity.curvature.problem import (
    NOT_FINITE,
    Batch,
    LossFunction,
    check_loss,
    full_precision,
    normal,
    trainable_parameters,
)
from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.state import differentiable_recurrence, isolated_rng, probe_mode

_MAX_ASYMMETRY = 1e-9
r"""Allowed :math:`|u^\top H v - v^\top H u|`, relative to their size.

Of the healthy models in the tests all are below 1e-15. Of wrong ones some are symmetric, others at 5e-2 and more.
"""

_MAX_DIFFERENCE = 1e-5
"""Allowed relative distance from finite differences. Tested healthy models: at most 2e-9; wrong ones: 0.24 and more."""

_STEPS = (1e-5, 1e-7, 1e-8)
"""Steps of the finite differences, relative to the parameters.

The first is the best for smooth models. Where it crosses the kink of a ReLU the difference is far off; a hundredth of
the step crosses a hundredth of the kinks. Wrong second derivatives are wrong for all of them.
"""

_JITTER = 1e-2
"""How far from the parameters the check is made, relative to them.

Units that are exactly on their kink, as those without bias that see only zeros, and layers that start at zero have no
second derivative there, or one that hides a mistake. The formulas that are checked are the same at any other point.
"""

REENTRANT = (
    "reentrant checkpointing hides the parameters of its block and allows no second derivatives: pass "
    "use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
"""Said of what has not even first derivatives for the Gauss-Newton matrix."""

_MAX_ASYMMETRY_IN_FLOAT32, _MAX_DIFFERENCE_IN_FLOAT32 = 1e-4, 5e-2
"""The same where the model itself turns to float32 on the way: a norm or a softmax written so, logits.float()."""

_NOT_IMPLEMENTED = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


class DoubleBackwardError(RuntimeError):
    """The loss cannot be differentiated twice, or torch's second derivatives of it are wrong: the message says why."""


@contextlib.contextmanager
def double_backward_ready(model: nn.Module) -> Iterator[None]:
    """Chooses implementations that can be differentiated twice, where torch has several.

    Needed while the graph is built: around the computation of the loss, not around what is done with it afterwards.

    * Attention runs in its plain form: the fused kernels have no second derivative.
    * LSTM, GRU and RNN run without cuDNN, which has none; cuDNN stays on for models without such layers.

    Args:
        model: The module that will be called. Nothing in it is changed.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation; it is named.

    Example:
        >>> import torch.nn.functional as F
        >>> x = torch.rand(1, 1, 2, 2, requires_grad=True)
        >>> with double_backward_ready(nn.Identity()):
        ...     loss = F.scaled_dot_product_attention(x, x, x).sum()
        >>> (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        >>> torch.autograd.grad(gradient.sum(), x)[0].shape
        torch.Size([1, 1, 2, 2])
    """
    with explained_errors(), sdpa_kernel(SDPBackend.MATH), differentiable_recurrence(model):
        yield


@contextlib.contextmanager
def second_derivatives(model: nn.Module) -> Iterator[None]:
    """What a graph that is differentiated twice is built in, and differentiated in: checkpoints are computed again.

    Args:
        model: The model.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
    """
    with probe_mode(model), explained_errors(), double_backward_ready(model), composed_weight_norm(), full_precision():
        yield


@contextlib.contextmanager
def twice_differentiable_loss(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], watching: TorchFunctionMode | None = None
) -> Iterator[Tensor]:
    """The loss, with a graph that can be differentiated twice within this context.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: The loss.
        watching: Sees the computation of the loss.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: If the loss is not a finite scalar with a graph, or depends on parameters of another model.
    """
    with second_derivatives(model):
        with watching or contextlib.nullcontext():
            loss = loss_fn(model, batch)
        check_loss(loss)
        nodes = list(reached([edge_of(loss)], {}))
        _check_no_other_parameters(nodes, model)
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            raise DoubleBackwardError(REENTRANT)
        yield loss


class composed_weight_norm(TorchFunctionMode):  # noqa: N801 (a context manager, as its neighbours)
    r"""Computes normalised weights as :math:`g \, v / \lVert v \rVert` from operations with right second derivatives.

    The fused kernel behind :func:`torch.nn.utils.parametrizations.weight_norm` and the older
    :func:`torch.nn.utils.weight_norm` treats the norm as a constant when it is differentiated twice: Hessians are 24 %
    to 38 % off and not symmetric, and nothing is said. Modules are not touched: what is replaced is the call, in this
    thread, for as long as the context lasts.

    Example:
        >>> v, g = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[10.0]])
        >>> with composed_weight_norm():
        ...     weight = torch._weight_norm(v, g, 0)
        >>> weight, type(weight.grad_fn).__name__
        (tensor([[6., 8.]], grad_fn=<MulBackward0>), 'MulBackward0')
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every torch function."""
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Says what to do about an operation that torch cannot differentiate twice.

    Raises:
        DoubleBackwardError: In place of torch's own error, which is its cause. Other errors pass.

    Example:
        >>> with explained_errors():
        ...     raise RuntimeError("derivative for aten::_ctc_loss_backward is not implemented")
        Traceback (most recent call last):
        lightning_plasticity.curvature.double_backward.DoubleBackwardError: torch has no second derivative of ...
    """
    try:
        yield
    except RuntimeError as error:
        advice = _advice(str(error))
        if advice is None:
            raise
        raise DoubleBackwardError(advice) from error


def _advice(message: str) -> str | None:
    if found := _NOT_IMPLEMENTED.search(message):
        operation = found[1]
        what = f"torch has no second derivative of {operation!r}: "
        if "attention" in operation:
            return what + "compute the loss within double_backward_ready(model), which runs attention unfused"
        if "rnn" in operation:
            return what + "compute the loss within double_backward_ready(model), which runs recurrent layers unfused"
        return (
            what + "replace the operation, use it without gradients (freeze its parameters and detach its inputs), or "
            "measure the Gauss-Newton matrix by ggn_spectrum(method='gram'), which needs first derivatives only"
        )
    if "checkpoint" in message and "use_reentrant" in message:
        return REENTRANT
    if "once_differentiable" in message:
        return (
            "a custom autograd.Function is marked once_differentiable, so there is no second derivative: write its "
            "backward with differentiable operations"
        )
    if "double backward" in message and ("aot_autograd" in message or "compile" in message):
        return (
            "a compiled model has no second derivatives: build the loss within "
            'torch.compiler.set_stance("force_eager"), or pass the model uncompiled'
        )
    return None


def check_double_backward(model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, copy: bool = True) -> None:
    r"""Checks that differentiating this loss twice gives its Hessian :math:`H`.

    On a float64 copy of the model, in evaluation mode, for random :math:`u` and :math:`v`:

    * symmetry, :math:`|u^\top H v - v^\top H u|` against the size of :math:`H u` and :math:`H v`,
    * :math:`H u` against the central difference :math:`(g(\theta + h u) - g(\theta - h u)) / 2h` of the gradients
      :math:`g` that ``loss.backward()`` gives: those that training uses.

    It takes about five gradients in float64, so a few samples are enough, and once for each model. The check is made at
    a random point one percent away from the parameters, where no unit is exactly on the kink of its ReLU.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes. Floating point tensors in it are converted to float64.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a scalar with a graph.
        copy: Whether a copy of the model is checked. ``False`` checks the model itself, which is used up.

    Raises:
        DoubleBackwardError: If second derivatives are wrong or missing. The message names the likely cause:
            weight_norm, a custom autograd.Function or reentrant checkpointing.
        ValueError: If the loss is not a finite scalar that depends on the parameters of the model that it is given, or
            cannot be computed in float64.
        UncopyableError: If the model cannot be copied.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> def loss_fn(model, x):
        ...     return model(x).exp().mean()
        >>> check_double_backward(nn.Linear(3, 2), torch.ones(4, 3), loss_fn)
        >>> normalised = weight_norm(nn.Linear(3, 2))
        >>> with composed_weight_norm():
        ...     check_double_backward(normalised, torch.ones(4, 3), loss_fn)
        >>> check_double_backward(normalised, torch.ones(4, 3), loss_fn)
        Traceback (most recent call last):
        lightning_plasticity.curvature.double_backward.DoubleBackwardError: torch's second ... weight_norm ...
    """
    model = copy_module(model) if copy else model
    double_batch = apply_to_collection(batch, Tensor, _double)
    generator = torch.Generator().manual_seed(0)

    precision = _Precision()

    def loss() -> Tensor:
        with isolated_rng(), double_backward_ready(model), precision:
            return loss_fn(model, double_batch)

    with _in_float64(model), probe_mode(model):
        parameters = trainable_parameters(model)
        _jitter(parameters.values(), generator)
        try:
            value = loss()
        except DoubleBackwardError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the loss cannot be computed on a float64 copy of the model and the batch: {error}. Does the loss "
                "function hold a model or tensors of its own?"
            ) from error
        check_loss(value)
        nodes = list(reached([edge_of(value)], {}))  # kept: a graph cannot be walked once it is freed
        _check_no_other_parameters(nodes, model)
        with explained_errors():
            measured = _measure(loss, value, parameters, generator)
    if measured.is_wrong(in_float32=precision.is_float32):
        cause = _likely_cause(model, nodes)
        raise DoubleBackwardError(
            f"torch's second derivatives of this loss are wrong: {measured}. Likely cause: {cause}"
        )


class _Precision(TorchFunctionMode):
    """Sees whether anything with a gradient is computed in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.is_float32 = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.requires_grad:
            self.is_float32 = True
        return result


@contextlib.contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Converts a model, and back: parts whose ``__deepcopy__`` returns themselves are the original's in a copy too."""
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    parts = [part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule)]
    buffers = [(part, dict(part._buffers)) for part in parts]
    try:
        model.double()
        yield
    finally:
        for parameter, value in values:
            parameter.data = value
        for part, own in buffers:
            part._buffers.update(own)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _jitter(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    parameters = list(parameters)
    typical = _norm(parameters) / sum(parameter.numel() for parameter in parameters) ** 0.5
    with torch.no_grad():
        for parameter in parameters:
            size = parameter.square().mean().sqrt().item() if parameter.numel() else 0.0
            parameter += _JITTER * (size or typical or 1.0) * normal(parameter.shape, parameter, generator)


@dataclass(frozen=True)
class _Measurement:
    asymmetry: float
    difference: float
    worst: str

    def is_wrong(self, *, in_float32: bool) -> bool:
        asymmetry, difference = _MAX_ASYMMETRY, _MAX_DIFFERENCE
        if in_float32:
            asymmetry, difference = _MAX_ASYMMETRY_IN_FLOAT32, _MAX_DIFFERENCE_IN_FLOAT32
        return not (self.asymmetry <= asymmetry and self.difference <= difference)

    def __str__(self) -> str:
        return (
            f"uᵀHv and vᵀHu differ by {self.asymmetry:.1e} of their scale and Hu is {self.difference:.0%} off "
            f"finite differences of the gradient, most at {self.worst!r}"
        )


def _measure(
    loss: Callable[[], Tensor], value: Tensor, parameters: dict[str, nn.Parameter], generator: torch.Generator
) -> _Measurement:
    tensors: list[Tensor] = list(parameters.values())
    # Not along entries without a gradient. The loss may depend on them nonetheless, as on the padding row of an
    # embedding; training does not move them, and to second derivatives they are constants.
    moving = [gradient != 0 for gradient in _backward(value, tensors, retain_graph=True)]
    u, v = ([normal(p.shape, p, generator) * m for p, m in zip(tensors, moving, strict=True)] for _ in range(2))
    slopes = gradients([value], tensors, [torch.ones_like(value)], create_graph=True)
    hu, hv = vector_products(slopes, tensors, u), vector_products(slopes, tensors, v)
    if not all(bool(image.isfinite().all()) for image in (*hu, *hv)):
        raise ValueError(NOT_FINITE)
    scale = (_norm(hu) * _norm(v) + _norm(hv) * _norm(u)) / 2
    asymmetry = abs(_dot(u, hv) - _dot(v, hu)) / scale if scale > 0 else 0.0

    difference, worst = float("inf"), next(iter(parameters))
    for relative_step in _STEPS:
        step = relative_step * (_norm(tensors) or 1.0) / (_norm(u) or 1.0)
        ahead, behind = _gradients_at(loss, tensors, u, step), _gradients_at(loss, tensors, u, -step)
        expected = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        rounding = 100 * torch.finfo(torch.float64).eps * _norm(ahead) / step
        gaps = [a - b for a, b in zip(hu, expected, strict=True)]
        size = max(_norm(hu), _norm(expected))
        here = max(_norm(gaps) - rounding, 0.0) / size if size > 0 else 0.0
        if here < difference:
            difference = here
            worst = max(zip(gaps, parameters, strict=True), key=lambda pair: pair[0].norm().item())[1]
        if difference <= _MAX_DIFFERENCE:
            break
    return _Measurement(asymmetry, difference, worst)


def _gradients_at(loss: Callable[[], Tensor], parameters: list[Tensor], u: list[Tensor], step: float) -> list[Tensor]:
    """The gradients that training would use, a step away along a direction."""
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
    """What ``loss.backward()`` leaves in ``grad``."""
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


def _check_no_other_parameters(nodes: list[Node], model: nn.Module) -> None:
    """Such as those of the original, to which the copy's gradients say nothing, and which ``backward`` would change."""
    own = {id(parameter) for parameter in model.parameters()}
    variables = [getattr(node, "variable", None) for node in nodes]  # of the nodes of leaves
    if foreign := [v for v in variables if isinstance(v, nn.Parameter) and id(v) not in own]:
        raise ValueError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not of the model that the "
            "loss function was given: let loss_fn(model, batch) call its argument, not a model that it holds on to"
        )


def _likely_cause(model: nn.Module, nodes: list[Node]) -> str:
    names = {node.name() for node in nodes}
    custom = {type(node).__name__ for node in nodes if issubclass(type(node), BackwardCFunction)}
    causes = []
    if any(name.startswith("WeightNorm") for name in names):
        where = ", ".join(repr(name) for name in _weight_normed(model)) or "a weight"
        causes.append(
            f"weight_norm of {where}, whose fused kernel has a wrong second derivative: compute the loss within "
            "composed_weight_norm()"
        )
    if "CheckpointFunctionBackward" in custom:
        causes.append(REENTRANT)
    if own := sorted(name.removesuffix("Backward") for name in custom - {"CheckpointFunctionBackward"}):
        causes.append(
            f"custom autograd.Function {', '.join(own)}: its backward must be made of differentiable operations on "
            "tensors from ctx.save_for_backward, without once_differentiable"
        )
    return "; or ".join(causes) or (
        "unknown. No weight_norm, custom autograd.Function or reentrant checkpoint was found: does the loss change "
        "from call to call, or a hook on the model change gradients?"
    )


def _weight_normed(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        if type(module).__name__ == "_WeightNorm":
            found.append(re.sub(r"(^|\.)parametrizations\.(\w+)\.\d+$", r"\1\2", name))
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ == "WeightNorm":
                found.append(f"{name}.{hook.name}" if name else hook.name)
    return found
