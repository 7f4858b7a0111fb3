"""What an optimizer remembers of weights that are no more is cleared."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def plan_clearing(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Callable[[], Any]]:
    """The steps that make an optimizer treat parameters with entirely new values as parameters it has never seen.

    Args:
        optimizer: Any optimizer, or a wrapper with the optimizer in ``.optimizer``. Nothing changes until the steps are
            called, and they are to be called once the parameters have their new values.
        parameters: The parameters whose every entry is new. Those the optimizer does not hold are passed over.

    Returns:
        Functions without arguments.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        optimizer = inner
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if isinstance(optimizer, torch.optim.LBFGS):  # one flat state for all parameters, kept under the first
        return [optimizer.state.clear] if any(id(parameter) in held for parameter in parameters) else []
    affected = [parameter for parameter in parameters if id(parameter) in held and parameter in optimizer.state]
    if isinstance(optimizer, torch.optim.Adagrad):  # makes its state when it is built, and never again
        return [partial(_reset_adagrad, optimizer, parameter) for parameter in affected]
    if affected and not _is_torchs_own(optimizer):
        return [partial(_renew_unknown, optimizer, affected)]
    return [partial(optimizer.state.pop, parameter, None) for parameter in affected]  # made anew at the next step


def _is_torchs_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's optimizers, or derived from one."""
    ancestors = type(optimizer).__mro__
    before = ancestors[: ancestors.index(torch.optim.Optimizer)]
    return any(f"{ancestor.__module__}.".startswith("torch.optim.") for ancestor in before)


def _reset_adagrad(optimizer: torch.optim.Adagrad, parameter: nn.Parameter) -> None:
    state = optimizer.state[parameter]
    state["step"].zero_()
    state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])


def _renew_unknown(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """An optimizer from elsewhere: its state becomes what a new one of its kind has for these parameters.

    If no new one can be made, entries of a parameter's shape and step counts become zero, and a warning says so.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        new = type(optimizer)(parameters, **options)
    except Exception:
        _zero(optimizer, parameters)
        return
    for parameter in parameters:
        optimizer.state.pop(parameter)
        if parameter in new.state:
            optimizer.state[parameter] = new.state[parameter]


def _zero(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    zeroed, kept = set(), set()
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and (value.shape == parameter.shape or key == "step"):
                value.zero_()
                zeroed.add(key)
            else:
                kept.add(key)
    warnings.warn(
        f"{type(optimizer).__name__} is not known here: of its state for the parameters that were re-initialised, "
        f"{sorted(zeroed)} became zero and {sorted(kept)} stayed",
        stacklevel=2,
    )
