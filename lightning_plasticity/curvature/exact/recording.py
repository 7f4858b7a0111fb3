"""Watching one forward pass: which layer functions used which parameters, which loss functions saw which outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.autograd_graph import edge_of
from lightning_plasticity.curvature.exact.layer_rules import LAYER_RULES
from lightning_plasticity.curvature.exact.loss_calls import LossCall
from lightning_plasticity.curvature.exact.loss_rules import LOSS_RULES
from lightning_plasticity.curvature.exact.parameter_uses import LayerCall
from lightning_plasticity.isolation.batches import tensors_in

_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    # It would hand itself over to the recording again, and so on without end.
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class Recording(TorchFunctionMode):
    """While active, records every call of a layer or loss function that has a closed form.

    Calls without one are recorded by name for each parameter they took, so that an error can say what went wrong.

    Args:
        parameters: The parameters to watch, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer_calls: list[LayerCall] = []
        self.loss_calls: list[LossCall] = []
        self.other_uses: dict[str, set[str]] = {}
        self._name_of = {id(parameter): name for name, parameter in parameters.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # made of layer functions, which are to be seen
            with self:
                return _attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if not any(tensor.requires_grad for tensor in tensors_in(result)):
            return result
        taken = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        if func in LOSS_RULES:
            # Weights or targets that depend on parameters too have a curvature of their own.
            loss_call = LOSS_RULES[func](result, *args, **kwargs) if len(taken) == 1 else None
            if loss_call is not None:
                self.loss_calls.append(loss_call)
            return result
        used = {name for tensor in taken if (name := self._name_of.get(id(tensor))) is not None}
        if not used:
            return result
        if func in LAYER_RULES:
            if result._is_view():  # an in-place change of a view would rewrite the graph around the recorded place
                result = result.clone()
            layer_call = LAYER_RULES[func](result, *args, **kwargs)
            if layer_call is not None:
                layer_call.uses = [use for use in layer_call.uses if id(use.parameter) in self._name_of]
                accounted = {id(use.parameter) for use in layer_call.uses}
                layer_call.inputs = [edge_of(tensor) for tensor in taken if id(tensor) not in accounted]
                self.layer_calls.append(layer_call)
                used -= {self._name_of[key] for key in accounted}
        for name in used:
            self.other_uses.setdefault(name, set()).add(getattr(func, "__name__", repr(func)))
        return result
