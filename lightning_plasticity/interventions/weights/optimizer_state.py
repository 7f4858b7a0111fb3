"""What an optimizer remembers of weights that are no more is cleared."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Renewed = Mapping[nn.Parameter, Tensor | None]
"""Which entries of each parameter are new: a boolean tensor of its shape, or their positions in the flattened
parameter, on its device; ``None`` means all."""

_Index = Tensor | tuple[Tensor, ...]

_SUMMARIES = ("row_var", "col_var")
"""State of torch's Adafactor that has one entry for many weights."""


def reset_state(optimizer: torch.optim.Optimizer, renewed: Renewed) -> None:
    """Makes an optimizer treat new entries of parameters as entries that it has never seen.

    A parameter that is new as a whole gets the state of a new parameter. Of one that is new in part:

    * moments, momentum and accumulators of exactly these entries become what they are at first: zero, for Adagrad
      ``initial_accumulator_value``, for Rprop the learning rate as step size, for ASGD's average the new weight;
    * factored moments (Adafactor's row and column variances) become zero where *all* the weights that they summarise
      are new, and stay where some are old;
    * the step count, one number a tensor, stays.

    *Why Adam's second moment becomes zero although its step count stays.* The bias correction then takes the new
    moments for old ones, so that the first step is (1 - 0.9) / sqrt(1 - 0.999) = 3.2 learning rates. Measured by
    ``benchmarks/interventions.py``, which recycles 16 of 128 hidden units after 1000 steps, mean steps over a tensor:

    * zero: at most 2.5 learning rates. On new random labels the outgoing weights move 5.5 times as far as kept ones at
      the first step, 2.0 at the fifth, 1.2 at the thirtieth. On a noisy stream that is already learned, where kept
      weights move by 0.2 learning rates only, it is 16, 15, 4.4, and 1.2 at the hundredth;
    * the mean second moment of the kept entries: new units are *inert*. Their incoming gradients are small as long as
      the outgoing weights are, and the mean is large and old: incoming weights move 0.00 times as far as kept ones at
      the fifth step, 0.03 to 0.04 at the thirtieth, 0.03 to 0.17 at the hundredth;
    * a step count of zero, which is one number for the whole tensor: *kept* weights move 3 to 4 times less far.

    So the first. (RMSprop, which corrects no bias, makes steps of up to 10 learning rates, as in a new network.)

    Args:
        optimizer: Any optimizer, or a wrapper with the optimizer in ``.optimizer`` or ``.optim``.
        renewed: The new entries; the parameters already have their new values. Parameters that the optimizer does not
            hold are passed over.

    Warns:
        UserWarning: If the optimizer is none of torch's, and state stays that may belong to new entries.
    """
    optimizer = _unwrapped(optimizer)
    held = _affected(optimizer, renewed)
    affected = {parameter: mask for parameter, mask in renewed.items() if parameter in held}
    if isinstance(optimizer, torch.optim.LBFGS):  # one flat state for all parameters, kept under the first
        if affected:
            optimizer.state.clear()
        return
    partly = {p: entries for p, entries in affected.items() if entries is not None and not _is_all(p, entries)}
    whole = [parameter for parameter in affected if parameter not in partly]
    if isinstance(optimizer, torch.optim.Adagrad):  # makes its state when it is built, and never again
        for parameter in whole:
            optimizer.state[parameter]["step"].zero_()
            optimizer.state[parameter]["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
    elif whole and not _is_torchs_own(optimizer):
        _renew_unknown(optimizer, whole)
    else:
        for parameter in whole:
            if isinstance(optimizer, torch.optim.SGD) and _group(optimizer, parameter).get("fused"):
                # torch's fused step wants a buffer of all parameters of a group or of none. One of zeros makes the
                # first step of a new parameter, but for the factor (1 - dampening) of all later ones.
                _clear_entries(optimizer, parameter, torch.ones_like(parameter, dtype=torch.bool))
            else:
                del optimizer.state[parameter]  # made anew at the next step
    stayed = {key for parameter, entries in partly.items() for key in _clear_entries(optimizer, parameter, entries)}
    if stayed:
        warnings.warn(
            f"{type(optimizer).__name__} is not known here: its state {sorted(stayed)} stayed as it was, though it may "
            "belong to weights that were re-initialised",
            stacklevel=2,
        )


@contextlib.contextmanager
def rollback_on_error(optimizer: torch.optim.Optimizer, renewed: Renewed) -> Iterator[None]:
    """Puts the state of an optimizer back as it was if an exception leaves the block: same objects, same values."""
    optimizer = _unwrapped(optimizer)
    everything = dict(optimizer.state)
    before = []
    for parameter in _affected(optimizer, renewed):
        if parameter in everything:
            state, index = everything[parameter], _index(parameter, renewed[parameter])
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            # A large parameter may be new in a few entries: then only these are kept aside.
            partial = [index is not None and value.shape == parameter.shape for value in tensors]
            kept = [value[index] if part else value.clone() for value, part in zip(tensors, partial, strict=True)]
            before.append((state, dict(state), index, list(zip(tensors, partial, kept, strict=True))))
    try:
        yield
    except BaseException:
        for state, items, index, values in before:
            state.clear()
            state.update(items)
            for value, part, kept_value in values:
                if part:
                    value[index] = kept_value
                else:
                    value.copy_(kept_value)
        optimizer.state.clear()
        optimizer.state.update(everything)
        raise


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    inner = [getattr(optimizer, name, None) for name in ("optimizer", "optim")]
    return next((one for one in inner if isinstance(one, torch.optim.Optimizer)), optimizer)


def _affected(optimizer: torch.optim.Optimizer, renewed: Renewed) -> set[nn.Parameter]:
    held = {parameter for group in optimizer.param_groups for parameter in group["params"] if parameter in renewed}
    if isinstance(optimizer, torch.optim.LBFGS):
        return held
    return {parameter for parameter in held if parameter in optimizer.state}


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _is_torchs_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is one of torch's optimizers, or derived from one."""
    ancestors = type(optimizer).__mro__
    before = ancestors[: ancestors.index(torch.optim.Optimizer)]
    return any(f"{ancestor.__module__}.".startswith("torch.optim.") for ancestor in before)


def _is_all(parameter: nn.Parameter, entries: Tensor) -> bool:
    return bool(entries.all()) if entries.dtype == torch.bool else len(entries) == parameter.numel()


def _index(parameter: nn.Parameter, entries: Tensor | None) -> _Index | None:
    """What picks the entries of a tensor of the parameter's shape, however it lies in memory."""
    if entries is None or entries.dtype == torch.bool:
        return entries
    return torch.unravel_index(entries, parameter.shape)


def _mask(parameter: nn.Parameter, entries: Tensor) -> Tensor:
    if entries.dtype == torch.bool:
        return entries
    flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=entries.device)
    return flat.index_fill_(0, entries, True).view(parameter.shape)


def _clear_entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, entries: Tensor) -> list[str]:
    """Clears the state of some entries of a parameter; returns the names of what is not known and stayed."""
    own = _is_torchs_own(optimizer)
    stayed = []
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            if not own and key != "step":
                stayed.append(key)
            continue
        same_shape = value.shape == parameter.shape
        index = (
            _index(parameter, entries) if same_shape else _entries_of_summary(_mask(parameter, entries), value.shape)
        )
        known = same_shape or (own and key in _SUMMARIES)
        if index is None or not value.is_floating_point() or not known:
            stayed.append(key)
            continue
        value[index] = _at_first(optimizer, parameter, key, index)
    return stayed


def _entries_of_summary(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Which entries of a state summarise new weights only; ``None`` if it is no summary over whole dimensions."""
    if len(shape) != mask.ndim or any(size not in (1, full) for size, full in zip(shape, mask.shape, strict=True)):
        return None
    for dim, size in enumerate(shape):
        if size == 1:
            mask = mask.all(dim=dim, keepdim=True)
    return mask


def _at_first(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, index: _Index) -> Tensor | float:
    """What entries of a state are before the first step."""
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(optimizer.defaults["initial_accumulator_value"])
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(_group(optimizer, parameter)["lr"])
    if isinstance(optimizer, torch.optim.ASGD) and key == "ax":
        return parameter.detach()[index]
    return 0.0


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
