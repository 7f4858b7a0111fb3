"""Watching one forward pass: which layer functions used which parameters, which loss functions saw which outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_plasticity.curvature.layers import LAYER_RULES, LayerCall
from lightning_plasticity.curvature.losses import LOSS_RULES, LossCall


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
        result = func(*args, **kwargs)
        if not (isinstance(result, Tensor) and result.requires_grad):
            return result
        if func in LOSS_RULES:
            loss_call = LOSS_RULES[func](result, *args, **kwargs)
            if loss_call is not None and loss_call.outputs.requires_grad:
                self.loss_calls.append(loss_call)
            return result
        used = {name for tensor in _tensors((args, kwargs)) if (name := self._name_of.get(id(tensor))) is not None}
        if not used:
            return result
        layer_call = LAYER_RULES[func](result, *args, **kwargs) if func in LAYER_RULES else None
        if layer_call is not None:
            layer_call.uses = [use for use in layer_call.uses if id(use.parameter) in self._name_of]
            used -= {self._name_of[id(use.parameter)] for use in layer_call.uses}
            self.layer_calls.append(layer_call)
        for name in used:
            self.other_uses.setdefault(name, set()).add(getattr(func, "__name__", repr(func)))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def parameters_outside(loss: Tensor, outputs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that the loss depends on in another way than through the outputs.

    Walks the autograd graph from the loss and stops at the outputs. Exact: no tolerance is involved.
    """
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    stop = {output.grad_fn for output in outputs}
    found: set[str] = set()
    seen: set[torch.autograd.graph.Node] = set()
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node in stop:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in name_of:
            found.add(name_of[id(variable)])
        pending += [following for following, _ in node.next_functions]
    return [name for name in parameters if name in found]
