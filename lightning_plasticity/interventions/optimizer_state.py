"""What an optimizer remembers of weights that are no more is cleared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def plan_clearing(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Callable[[], Any]]:
    """The steps that make an optimizer treat parameters with entirely new values as parameters it has never seen.

    Args:
        optimizer: Any optimizer. Nothing in it changes until the steps are called.
        parameters: The parameters whose every entry is new. Those the optimizer does not hold are passed over.

    Returns:
        Functions without arguments, to be called once the parameters have their new values.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    affected = [parameter for parameter in parameters if id(parameter) in held and parameter in optimizer.state]
    if isinstance(optimizer, torch.optim.LBFGS):  # one flat state for all parameters, kept under the first
        return [optimizer.state.clear] if any(id(parameter) in held for parameter in parameters) else []
    actions: list[Callable[[], Any]] = []
    for parameter in affected:
        if isinstance(optimizer, torch.optim.Adagrad):  # makes its state when it is built, and never again
            actions.append(partial(_reset_adagrad, optimizer, parameter))
        elif type(optimizer).__module__.startswith("torch.optim."):  # makes its state at the first step
            actions.append(partial(optimizer.state.pop, parameter))
        else:
            actions += _plan_unknown(optimizer, parameter)
    return actions


def _reset_adagrad(optimizer: torch.optim.Adagrad, parameter: nn.Parameter) -> None:
    state = optimizer.state[parameter]
    state["step"].zero_()
    state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])


def _plan_unknown(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Callable[[], Any]]:
    """An optimizer from elsewhere: entries of the parameter's shape, and its step count, become zero."""
    actions: list[Callable[[], Any]] = []
    kept = []
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and (value.shape == parameter.shape or key == "step"):
            actions.append(value.zero_)
        else:
            kept.append(key)
    if kept:
        warnings.warn(
            f"{type(optimizer).__name__} keeps {', '.join(map(repr, kept))} for a parameter that was re-initialised: "
            "what that means is not known here, and it was left as it is",
            stacklevel=2,
        )
    return actions
