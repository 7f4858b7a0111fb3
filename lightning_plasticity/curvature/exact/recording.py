"""Record the operations of one forward pass, and its layer and loss function calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.autograd_graph import Edge, edge_of
from lightning_plasticity.curvature.exact.layer_calls import LayerCall
from lightning_plasticity.curvature.exact.layer_rules import LAYER_RULES
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


class Recording(TorchFunctionMode):
    """A mode that records every operation, and every call of a layer or loss function with a closed form.

    Uses of a parameter without a closed form are recorded by function name, for logs and error messages.

    Args:
        model: The model.
        parameters: Its parameters whose uses to track, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer_calls: list[LayerCall] = []
        self.loss_calls: list[LossCall] = []
        self.other_uses: dict[str, set[str]] = {}
        self._recorder = OperationRecorder(model)
        self._names = {id(parameter): name for name, parameter in parameters.items()}

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
        tensors = list(tensors_in((args, kwargs)))
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        # The function may change its arguments in place.
        input_edges = [edge_of(tensor) for tensor in inputs]
        weights_only = self._recorder.is_weights_only(func, args, tensors)
        result = self._record_call(func, args, kwargs, inputs)
        self._recorder.record(func, input_edges, result, weights_only=weights_only)
        return result

    @property
    def operations(self) -> Mapping[Edge, Operation]:
        """All operations whose result requires gradients, by the edge of the result."""
        return self._recorder.operations

    def _record_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Sequence[Tensor]
    ) -> Any:
        """Call a function, record the call if it is one of a layer or loss, and return its result."""
        result = func(*args, **kwargs)
        if not any(tensor.requires_grad for tensor in tensors_in(result)):
            return result
        if func in LOSS_RULES:
            # Weights or targets that depend on parameters add curvature that the rules do not include.
            loss_call = LOSS_RULES[func](result, *args, **kwargs) if len(inputs) == 1 else None
            if loss_call is not None:
                self.loss_calls.append(loss_call)
            return result
        used = {name for tensor in inputs if (name := self._names.get(id(tensor))) is not None}
        if used and func in LAYER_RULES:
            # An in-place change of a view would rewrite the graph around the recorded edge.
            if result._is_view():
                result = result.clone()
            layer_call = LAYER_RULES[func](result, *args, **kwargs)
            if layer_call is not None:
                used -= self._record_layer(layer_call, inputs)
        for name in used:
            self.other_uses.setdefault(name, set()).add(getattr(func, "__name__", repr(func)))
        return result

    def _record_layer(self, call: LayerCall, inputs: Sequence[Tensor]) -> set[str]:
        """Record the call and return the names of the tracked parameters whose use has a closed form."""
        call.uses = [use for use in call.uses if id(use.parameter) in self._names]
        covered = {id(use.parameter) for use in call.uses}
        call.inputs = [edge_of(tensor) for tensor in inputs if id(tensor) not in covered]
        self.layer_calls.append(call)
        return {self._names[key] for key in covered}
