"""Explain why a loss has no second derivatives by double backward, or wrong ones, and name a remedy."""

from __future__ import annotations

import re

from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

REENTRANT = (
    "reentrant checkpointing hides the parameters of its block and allows no second derivatives: pass "
    "use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
"""Error message for reentrant checkpointing, which also hides first derivatives from all but ``loss.backward()``."""

_NOT_IMPLEMENTED = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


def remedy_for(message: str) -> str | None:
    """Return a message with the remedy for an error of torch, or ``None`` for other errors."""
    if match := _NOT_IMPLEMENTED.search(message):
        operation = match[1]
        problem = f"torch has no second derivative of {operation!r}: "
        if "attention" in operation:
            return problem + "compute the loss within double_backward_ready(model), which runs attention unfused"
        if "rnn" in operation:
            return problem + "compute the loss within double_backward_ready(model), which runs recurrent layers unfused"
        return (
            f"{problem}replace the operation, use it without gradients (freeze its parameters and detach its inputs), "
            "or measure the Gauss-Newton matrix by ggn_spectrum(method='gram'), which needs first derivatives only"
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


def likely_cause(model: nn.Module, nodes: list[Node]) -> str:
    """Name the operations in a graph that are known to have wrong second derivatives, and their remedy."""
    names = {node.name() for node in nodes}
    custom = {type(node).__name__ for node in nodes if issubclass(type(node), BackwardCFunction)}
    causes = []
    if any(name.startswith("WeightNorm") for name in names):
        weights = ", ".join(repr(name) for name in _weight_normed(model)) or "a weight"
        causes.append(
            f"weight_norm of {weights}, whose fused kernel has a wrong second derivative: compute the loss within "
            "composed_weight_norm()"
        )
    if "CheckpointFunctionBackward" in custom:
        causes.append(REENTRANT)
    if functions := sorted(name.removesuffix("Backward") for name in custom - {"CheckpointFunctionBackward"}):
        causes.append(
            f"custom autograd.Function {', '.join(functions)}: its backward must be made of differentiable operations "
            "on tensors from ctx.save_for_backward, without once_differentiable"
        )
    return "; or ".join(causes) or (
        "unknown. No weight_norm, custom autograd.Function or reentrant checkpoint was found: does the loss change "
        "from call to call, or a hook on the model change gradients?"
    )


def _weight_normed(model: nn.Module) -> list[str]:
    """Return the names of the weights that weight_norm normalises, in its present and its older form."""
    weights = []
    for name, module in model.named_modules():
        if type(module).__name__ == "_WeightNorm":
            weights.append(re.sub(r"(^|\.)parametrizations\.(\w+)\.\d+$", r"\1\2", name))
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ == "WeightNorm":
                weights.append(f"{name}.{hook.name}" if name else hook.name)
    return weights
