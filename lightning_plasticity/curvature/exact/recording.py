"""Record the operations of one forward pass, and its layer and loss function calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of, has_edge
from lightning_plasticity.curvature.exact.layer_calls import LayerCall
from lightning_plasticity.curvature.exact.layer_recorder import LayerRecorder
from lightning_plasticity.curvature.exact.loss_calls import LossCall
from lightning_plasticity.curvature.exact.loss_rules import LOSS_RULES
from lightning_plasticity.curvature.exact.operations import Operation, OperationRecorder
from lightning_plasticity.isolation.batches import tensors_in

_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    # The original would pass its own call to the active mode again, in an endless recursion.
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _is_recordable(func: Callable[..., Any]) -> bool:
    """Return whether the result of a function, if it has an edge, is computed from its arguments alone.

    A derivative is not. Without gradients, as inside of a custom autograd.Function, and inside of torch.func there are
    no edges.
    """
    if func is torch.autograd.grad or not torch.is_grad_enabled():
        return False
    return torch._C._functorch.maybe_current_level() is None


class Recording(TorchFunctionMode):
    """A mode that records every operation, and every call of a layer or loss function with a closed form.

    Uses of a parameter without a closed form are recorded by function name, for logs and error messages.

    Args:
        model: The model.
        parameters: Its parameters whose uses to track, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.loss_calls: list[LossCall] = []
        self._recorder = OperationRecorder(model)
        self._layers = LayerRecorder(parameters, self._recorder)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Attention is composed of layer functions. They are recorded one by one.
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        if not _is_recordable(func):
            return func(*args, **kwargs)
        # Other modes would be called for each attribute of a tensor.
        with torch._C.DisableTorchFunction():
            args, kwargs = self._layers.expand_parameters(func, args, kwargs)
            tensors = list(tensors_in((args, kwargs)))
            inputs = {id(tensor): tensor for tensor in tensors if has_edge(tensor)}
            # The function may change its arguments in place.
            edges = {key: edge_of(tensor) for key, tensor in inputs.items()}
            weights_only = self._recorder.is_weights_only(func, args, tensors)
            tracked = self._layers.tracked(inputs.values())
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if any(tensor.requires_grad for tensor in tensors_in(result)):
                if func in LOSS_RULES:
                    # Weights or targets that depend on parameters add curvature that the rules do not include.
                    loss_call = LOSS_RULES[func](result, *args, **kwargs) if len(inputs) == 1 else None
                    if loss_call is not None:
                        self.loss_calls.append(loss_call)
                elif tracked:
                    result = self._layers.record(func, args, kwargs, result, tracked, edges, weights_only=weights_only)
            self._recorder.record(func, list(edges.values()), result, weights_only=weights_only)
        return result

    @property
    def operations(self) -> Mapping[Edge, Operation]:
        """All operations whose result requires gradients, by the edge of the result."""
        return self._recorder.operations

    @property
    def layer_calls(self) -> list[LayerCall]:
        """All calls of layer functions with a closed form."""
        return self._layers.calls

    @property
    def other_uses(self) -> Mapping[str, set[str]]:
        """Names of the functions that used a parameter without a closed form, by name of the parameter."""
        return self._layers.other_uses
