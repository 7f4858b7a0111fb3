"""Reset the optimizer state of re-initialised weights."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.weights.positions import unravel_index

ResetMasks = Mapping[nn.Parameter, Tensor | None]
"""The re-initialised entries of each parameter, on its device: a boolean mask of its shape, or indices into the
flattened parameter; ``None`` means all."""

_Index = Tensor | tuple[Tensor, ...]

_FACTORED_MOMENTS = ("row_var", "col_var")
"""State of torch's Adafactor that has one entry for many weights."""


def reset_state(optimizer: torch.optim.Optimizer, reset_masks: ResetMasks) -> None:
    """Reset the state of re-initialised entries of parameters, in place.

    A parameter that is re-initialised as a whole gets the state of a new parameter. If only some of its entries are:

    * moments, momentum and accumulators of exactly these entries get their initial value: zero, for Adagrad
      ``initial_accumulator_value``, for Rprop the learning rate as step size, for ASGD's average the new weight;
    * factored moments (Adafactor's row and column variances) become zero where *all* the weights that they summarise
      are re-initialised, and stay otherwise;
    * the step count, one number per tensor, stays.

    *Why Adam's second moment becomes zero although its step count stays.* The bias correction then takes the new
    moments for old ones, so that the first step is (1 - 0.9) / sqrt(1 - 0.999) = 3.2 learning rates.
    ``benchmarks/interventions.py`` resets 16 of 128 hidden units after 1000 steps and measures mean steps over a
    tensor, for three choices:

    * a second moment of zero: at most 2.5 learning rates. On new random labels the outgoing weights move 5.5 times as
      far as kept ones at the first step, 2.0 at the fifth, 1.2 at the thirtieth. On a noisy stream that is already
      learned, where kept weights move by only 0.2 learning rates, the ratios are 16, 15, 4.4, and 1.2 at the hundredth;
    * the mean second moment of the kept entries: new units are *inert*. Their incoming gradients are small as long as
      the outgoing weights are, and the mean is large and old: incoming weights move 0.00 times as far as kept ones at
      the fifth step, 0.03 to 0.04 at the thirtieth, 0.03 to 0.17 at the hundredth;
    * a step count of zero, which is one number for the whole tensor: *kept* weights move 3 to 4 times less far.

    The first choice is therefore used. (RMSprop, which corrects no bias, makes steps of up to 10 learning rates, as in
    a new network.)

    Args:
        optimizer: Any optimizer, or a wrapper with the optimizer in ``.optimizer`` or ``.optim``.
        reset_masks: The re-initialised entries; the parameters already have their new values. Parameters that the
            optimizer does not hold are ignored.

    Warns:
        UserWarning: If the optimizer is none of torch's, and state stays that may belong to re-initialised entries.
    """
    optimizer = _unwrapped(optimizer)
    with_state = _parameters_with_state(optimizer, reset_masks)
    affected = {parameter: mask for parameter, mask in reset_masks.items() if parameter in with_state}
    # LBFGS has one flat state for all parameters, stored under the first.
    if isinstance(optimizer, torch.optim.LBFGS):
        if affected:
            optimizer.state.clear()
        return
    partial = {p: mask for p, mask in affected.items() if mask is not None and not _covers(mask, p)}
    _reset_whole(optimizer, [parameter for parameter in affected if parameter not in partial])
    kept_keys = {key for parameter, mask in partial.items() for key in _reset_entries(optimizer, parameter, mask)}
    if kept_keys:
        warnings.warn(
            f"{type(optimizer).__name__} is unknown: its state {sorted(kept_keys)} stayed as it was, though it "
            "may belong to weights that were re-initialised",
            stacklevel=2,
        )


@contextlib.contextmanager
def rollback_on_error(optimizer: torch.optim.Optimizer, reset_masks: ResetMasks) -> Iterator[None]:
    """Restore the state of an optimizer, the same objects with the same values, if an exception leaves the block."""
    optimizer = _unwrapped(optimizer)
    states = dict(optimizer.state)
    saved = []
    for parameter in _parameters_with_state(optimizer, reset_masks):
        if parameter in states:
            state, index = states[parameter], _index(parameter, reset_masks[parameter])
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            # If few entries of a large parameter are reset, only these are saved.
            partial = [index is not None and tensor.shape == parameter.shape for tensor in tensors]
            values = [tensor[index] if part else tensor.clone() for tensor, part in zip(tensors, partial, strict=True)]
            saved.append((state, dict(state), index, list(zip(tensors, partial, values, strict=True))))
    try:
        yield
    except BaseException:
        for state, items, index, tensor_values in saved:
            state.clear()
            state.update(items)
            for tensor, part, value in tensor_values:
                if part:
                    tensor[index] = value
                else:
                    tensor.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(states)
        raise


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    candidates = [getattr(optimizer, name, None) for name in ("optimizer", "optim")]
    return next((inner for inner in candidates if isinstance(inner, torch.optim.Optimizer)), optimizer)


def _parameters_with_state(optimizer: torch.optim.Optimizer, reset_masks: ResetMasks) -> set[nn.Parameter]:
    """Return the parameters to reset that the optimizer holds state for."""
    affected = {p for group in optimizer.param_groups for p in group["params"] if p in reset_masks}
    if isinstance(optimizer, torch.optim.LBFGS):
        return affected
    return {parameter for parameter in affected if parameter in optimizer.state}


def _param_group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def _is_from_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is one of torch's, or derived from one."""
    ancestors = type(optimizer).__mro__
    derived = ancestors[: ancestors.index(torch.optim.Optimizer)]
    return any(f"{ancestor.__module__}.".startswith("torch.optim.") for ancestor in derived)


def _covers(mask: Tensor, parameter: nn.Parameter) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else len(mask) == parameter.numel()


def _index(parameter: nn.Parameter, mask: Tensor | None) -> _Index | None:
    """Return an index for tensors of the parameter's shape, valid for any memory layout."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return unravel_index(mask, parameter.shape)


def _as_bool(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    flat = torch.zeros(parameter.numel(), dtype=torch.bool, device=mask.device)
    return flat.index_fill_(0, mask, True).view(parameter.shape)


def _reset_whole(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters the state of new ones."""
    # Adagrad creates its state in the constructor only, and fails without it.
    if isinstance(optimizer, torch.optim.Adagrad):
        for parameter in parameters:
            optimizer.state[parameter]["step"].zero_()
            optimizer.state[parameter]["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
    elif parameters and not _is_from_torch(optimizer):
        _reset_unknown_optimizer(optimizer, parameters)
    else:
        for parameter in parameters:
            if isinstance(optimizer, torch.optim.SGD) and _param_group(optimizer, parameter).get("fused"):
                # torch's fused step needs a momentum buffer for all parameters of a group or for none. With a buffer of
                # zeros the first step is that of a new parameter, but for the factor (1 - dampening) of later steps.
                _reset_entries(optimizer, parameter, torch.ones_like(parameter, dtype=torch.bool))
            else:
                # The optimizer creates new state at the next step.
                del optimizer.state[parameter]


def _reset_entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Tensor) -> list[str]:
    """Reset the state of some entries of a parameter; return the names of unknown state that was kept."""
    from_torch = _is_from_torch(optimizer)
    kept = []
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor) or value.numel() == 1:
            if not from_torch and key != "step":
                kept.append(key)
            continue
        same_shape = value.shape == parameter.shape
        index = _index(parameter, mask) if same_shape else _summary_mask(_as_bool(parameter, mask), value.shape)
        known = same_shape or (from_torch and key in _FACTORED_MOMENTS)
        if index is None or not value.is_floating_point() or not known:
            kept.append(key)
            continue
        value[index] = _initial_value(optimizer, parameter, key, index)
    return kept


def _summary_mask(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Return the entries of a state that summarise masked weights only, or ``None`` for states of another layout.

    A summary has the dimensions of the parameter, some of them reduced to size 1.
    """
    if len(shape) != mask.ndim or any(size not in (1, full) for size, full in zip(shape, mask.shape, strict=True)):
        return None
    for dim, size in enumerate(shape):
        if size == 1:
            mask = mask.all(dim=dim, keepdim=True)
    return mask


def _initial_value(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, index: _Index
) -> Tensor | float:
    """Return the value of state entries before the first step."""
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(optimizer.defaults["initial_accumulator_value"])
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(_param_group(optimizer, parameter)["lr"])
    if isinstance(optimizer, torch.optim.ASGD) and key == "ax":
        return parameter.detach()[index]
    return 0.0


def _reset_unknown_optimizer(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters the state that a new optimizer of the same class has for them.

    If the class cannot be instantiated, entries of a parameter's shape and step counts become zero, with a warning.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    try:
        new = type(optimizer)(parameters, **options)
    except Exception:
        _zero_state(optimizer, parameters)
        return
    for parameter in parameters:
        optimizer.state.pop(parameter)
        if parameter in new.state:
            optimizer.state[parameter] = new.state[parameter]


def _zero_state(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    zeroed, kept = set(), set()
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and (value.shape == parameter.shape or key == "step"):
                value.zero_()
                zeroed.add(key)
            else:
                kept.add(key)
    warnings.warn(
        f"{type(optimizer).__name__} is unknown: of its state for the parameters that were re-initialised, "
        f"{sorted(zeroed)} became zero and {sorted(kept)} stayed",
        stacklevel=2,
    )
