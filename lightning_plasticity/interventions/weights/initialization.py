"""Fresh weights, drawn the way each layer draws its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.state import isolated_rng


def fresh_values(
    model: nn.Module, modules: Mapping[str, nn.Module], generator: torch.Generator | None
) -> dict[Tensor, Tensor]:
    """Draws new values for what the given modules hold directly, as ``reset_parameters`` of each would set them.

    A module that contains others (``nn.MultiheadAttention``, say) has the last word on what is inside it. The draw is
    made on copies on the CPU, under random numbers of its own: the same generator gives the same values on every
    device, and the global generators are not touched unless ``generator`` is ``None``.

    Args:
        model: The whole model.
        modules: The modules of it to draw for, by name.
        generator: A CPU generator; by default one seeded from torch's global one.

    Returns:
        New value of each trainable parameter and each buffer, by the old tensor.

    Raises:
        ValueError: If a module holds trainable parameters but does not say how they are initialised.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn: dict[Tensor, Tensor] = {}
    with isolated_rng():
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would seed the GPU too
        for module in reversed(list(model.modules())):  # what is inside first
            if (reset := _reset_method(module)) is not None:
                _draw(module, reset, drawn)
    result: dict[Tensor, Tensor] = {}
    for name, module in modules.items():
        own = dict(module.named_parameters(recurse=False)).values()
        if own and not any(parameter.requires_grad for parameter in own):
            continue  # frozen: its running statistics are too
        for key, tensor in _tensors(module, recurse=False).items():
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                continue
            if tensor in drawn:
                result[tensor] = drawn[tensor]
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(
                    f"{type(module).__name__} {name!r} holds the parameter {key!r} but has no reset_parameters() that "
                    "says how to draw it anew: add that method, or leave the layer out"
                )
    return result


def resampled_values(
    tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[Tensor, Tensor]:
    """Draws new values for tensors from the distribution of their initial entries: with replacement, one by one.

    For initialisations that were applied by hand, and that no layer knows of.

    Args:
        tensors: Parameters and buffers by name.
        initial: What they, or others of that name, were before training; such as an early ``state_dict()``.
        generator: A CPU generator; by default one seeded from torch's global one.

    Returns:
        New value of each tensor, on the CPU, by the old tensor.

    Raises:
        ValueError: If ``initial`` lacks one of the tensors.
    """
    missing = [name for name in tensors if name not in initial]
    if missing:
        raise ValueError(f"initial has no {missing}: it must be the state_dict() of the same model before training")
    result: dict[Tensor, Tensor] = {}
    for name, tensor in tensors.items():
        values = initial[name].detach().cpu().flatten()
        picks = torch.randint(values.numel(), (tensor.numel(),), generator=generator)
        result[tensor] = values[picks].view(tensor.shape)
    return result


def _reset_method(module: nn.Module) -> str | None:
    return next((name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)), None)


def _tensors(module: nn.Module, *, recurse: bool) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}


def _draw(module: nn.Module, reset: str, drawn: dict[Tensor, Tensor]) -> None:
    fresh = copy_module(module).to("cpu")
    tensors, copies = _tensors(module, recurse=True), _tensors(fresh, recurse=True)
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor in drawn:
                copies[key].copy_(drawn[tensor])
            before[key] = copies[key].detach().clone()
    call: Callable[[], object] = getattr(fresh, reset)
    call()
    own = _tensors(module, recurse=False)
    for key, tensor in tensors.items():
        if (key in own and tensor not in drawn) or not torch.equal(copies[key], before[key]):
            drawn[tensor] = copies[key].detach()


class PicklableGenerator(torch.Generator):
    """A generator on the CPU that can be sent to a spawned process.

    torch's own is pickled with a tensor that nobody keeps: it is gone before the other process can open it.
    """

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _with_state, (self.get_state().numpy(),)


def _with_state(state: Any) -> PicklableGenerator:
    generator = PicklableGenerator()
    generator.set_state(torch.from_numpy(state))
    return generator
