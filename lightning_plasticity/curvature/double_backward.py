"""Make second derivatives by double backward possible, and check that they are right.

Some operations have no second derivative in torch, which raises an error. Others have a wrong one, without an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.autograd_graph import edge_of, reached
from lightning_plasticity.curvature.double_backward_causes import REENTRANT, explanation_of, likely_cause
from lightning_plasticity.curvature.finite_differences import measure_hessian_errors, perturb
from lightning_plasticity.curvature.problem import Batch, LossFunction, check_loss, full_precision, trainable_parameters
from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.state import differentiable_recurrence, isolated_rng, probe_mode


class DoubleBackwardError(RuntimeError):
    """A loss that cannot be differentiated twice, or whose second derivatives by torch are wrong."""


@contextlib.contextmanager
def double_backward_ready(model: nn.Module) -> Iterator[None]:
    """Select implementations that can be differentiated twice, where torch has several.

    Only the computation of the loss, which builds the graph, must run within this context.

    * Attention runs unfused: the fused kernels have no second derivative.
    * LSTM, GRU and RNN run without cuDNN, which has none. For models without such layers cuDNN stays on.

    Args:
        model: The module that will be called. It is not changed.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation; the message names it.

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
def second_derivative_mode(model: nn.Module) -> Iterator[None]:
    """Enter the mode for building a graph and differentiating it twice.

    Both steps must run in this mode because differentiation recomputes checkpointed blocks.

    Args:
        model: The model. Its mode and buffers are restored on exit.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
    """
    with probe_mode(model), explained_errors(), double_backward_ready(model), composed_weight_norm(), full_precision():
        yield


@contextlib.contextmanager
def twice_differentiable_loss(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], recorder: TorchFunctionMode | None = None
) -> Iterator[Tensor]:
    """Compute the loss with a graph that can be differentiated twice within this context.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: Computes the mean loss.
        recorder: A function mode that is active during the computation of the loss.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: If the loss is not a finite scalar with a graph, or depends on parameters of another model.
    """
    with second_derivative_mode(model):
        with recorder or contextlib.nullcontext():
            loss = loss_fn(model, batch)
        check_loss(loss)
        nodes = list(reached([edge_of(loss)], {}))
        _check_own_parameters(nodes, model)
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            raise DoubleBackwardError(REENTRANT)
        yield loss


class composed_weight_norm(TorchFunctionMode):  # noqa: N801 (a context manager, as its neighbours)
    r"""Compute normalised weights as :math:`g \, v / \lVert v \rVert` from operations with right second derivatives.

    The fused kernel behind :func:`torch.nn.utils.parametrizations.weight_norm` and the older
    :func:`torch.nn.utils.weight_norm` treats the norm as a constant when it is differentiated twice. Hessians are then
    24 % to 38 % off and not symmetric, without an error. This context replaces the call of the kernel in the current
    thread. It does not change modules.

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
        """Replace the call of the fused kernel and pass all others on."""
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Replace torch's errors about missing second derivatives by errors that suggest a solution.

    Raises:
        DoubleBackwardError: In place of torch's error, which becomes its cause. Other errors pass unchanged.

    Example:
        >>> with explained_errors():
        ...     raise RuntimeError("derivative for aten::_ctc_loss_backward is not implemented")
        Traceback (most recent call last):
        lightning_plasticity.curvature.double_backward.DoubleBackwardError: torch has no second derivative of ...
    """
    try:
        yield
    except RuntimeError as error:
        is_of_torch = type(error) in (RuntimeError, NotImplementedError)
        explanation = explanation_of(str(error)) if is_of_torch else None
        if explanation is None:
            raise
        raise DoubleBackwardError(explanation) from error


def check_double_backward(model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, copy: bool = True) -> None:
    r"""Check that differentiating this loss twice gives its Hessian :math:`H`.

    The check compares, on a float64 copy of the model in evaluation mode, for random :math:`u` and :math:`v`,

    * :math:`u^\top H v` with :math:`v^\top H u`, relative to the size of :math:`H u` and :math:`H v`,
    * :math:`H u` with the central difference :math:`(g(\theta + h u) - g(\theta - h u)) / 2h` of the gradients
      :math:`g` that ``loss.backward()`` computes, as in training.

    It costs about five gradients in float64. A few samples are enough, and one check for each model. The check runs at
    a random point one percent away from the parameters, where no unit is exactly on the kink of its ReLU.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type. Floating point tensors in it are converted to float64.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a scalar with a graph.
        copy: Whether to check a copy. With ``False`` the check runs on the model itself, which must not be used after.

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
    precision = _PrecisionRecorder()

    def loss() -> Tensor:
        with isolated_rng(), double_backward_ready(model), precision:
            return loss_fn(model, double_batch)

    with _in_float64(model), probe_mode(model):
        parameters = trainable_parameters(model)
        perturb(parameters.values(), generator)
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
        # The list keeps the nodes: the backward passes of the measurement free the graph, which cannot be walked then.
        nodes = list(reached([edge_of(value)], {}))
        _check_own_parameters(nodes, model)
        with explained_errors():
            errors = measure_hessian_errors(loss, value, parameters, generator)
    if errors.exceed_limits(in_float32=precision.is_float32):
        cause = likely_cause(model, nodes)
        raise DoubleBackwardError(f"torch's second derivatives of this loss are wrong: {errors}. Likely cause: {cause}")


class _PrecisionRecorder(TorchFunctionMode):
    """A function mode that records whether a tensor with a gradient is computed in float32."""

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
    """Convert a model to float64 and restore its tensors on exit.

    A copy needs this too: modules whose ``__deepcopy__`` returns themselves are shared with the original model.
    """
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(module, dict(module._buffers)) for module in modules]
    try:
        model.double()
        yield
    finally:
        for parameter, value in values:
            parameter.data = value
        for module, originals in buffers:
            module._buffers.update(originals)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _check_own_parameters(nodes: list[Node], model: nn.Module) -> None:
    """Check that the loss depends on parameters of the model only.

    Parameters of another model, such as the original of a copy, are constants to the curvature, and a backward pass
    would write into their gradients.

    Raises:
        ValueError: If the loss depends on another parameter.
    """
    parameter_ids = {id(parameter) for parameter in model.parameters()}
    # Only the nodes of leaf tensors have a variable.
    variables = [getattr(node, "variable", None) for node in nodes]
    if foreign := [v for v in variables if isinstance(v, nn.Parameter) and id(v) not in parameter_ids]:
        raise ValueError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not of the model that the "
            "loss function was given: let loss_fn(model, batch) call its argument, not another model that it refers to"
        )
