"""Draw fresh weights as each layer initialises its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.state import isolated_rng


def reset_values(
    model: nn.Module, tensors: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[Tensor, Tensor]:
    """Draw new values for parameters and buffers, as ``reset_parameters`` of the modules that hold them sets them.

    The reset of a module that contains others, such as ``nn.MultiheadAttention``, overrides theirs. The values are
    drawn on copies on the CPU and with a separate seed: the same generator gives the same values on every device. The
    global generators advance only if ``generator`` is ``None``.

    Args:
        model: The whole model.
        tensors: Those of its parameters and buffers to draw for, by name.
        generator: A CPU generator; by default one seeded from torch's global one.

    Returns:
        New value of each tensor, by the old tensor. A buffer that no reset sets keeps its value.

    Raises:
        ValueError: If no ``reset_parameters`` initialises one of the parameters.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn: dict[Tensor, Tensor] = {}
    with isolated_rng():
        # torch.manual_seed would also seed a GPU that is initialised only later.
        torch.default_generator.manual_seed(seed)
        # From the inside out, so that an outer module's reset comes last.
        for module in reversed(list(model.modules())):
            if (reset := _reset_method(module)) is not None:
                _draw(module, reset, drawn)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor not in drawn:
            path, _, key = name.rpartition(".")
            holder = type(model.get_submodule(path)).__name__ + (f" {path!r}" if path else "")
            raise ValueError(
                f"{holder} holds the parameter {key!r}, which no "
                "reset_parameters() initialises: pass initial=model.state_dict() from before training, or "
                f"exclude=[{name!r}]"
            )
    return {tensor: drawn.get(tensor, tensor.detach()) for tensor in tensors.values()}


def _reset_method(module: nn.Module) -> str | None:
    return next((name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)), None)


def _tensors(module: nn.Module, *, recurse: bool) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}


def _draw(module: nn.Module, reset: str, drawn: dict[Tensor, Tensor]) -> None:
    """Call a module's reset method on a copy, and add the values that it sets to ``drawn``, by the old tensor."""
    fresh = copy_module(module).to("cpu")
    tensors, copies = _tensors(module, recurse=True), _tensors(fresh, recurse=True)
    direct = dict(module.named_parameters(recurse=False))
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor in drawn:
                copies[key].copy_(drawn[tensor])
            elif key in direct and (tensor.is_floating_point() or tensor.is_complex()):
                # A value that no reset leaves: one that stays was not set, such as where a weight is computed from it.
                copies[key].fill_(torch.nan)
            before[key] = copies[key].detach().clone()
    call: Callable[[], object] = getattr(fresh, reset)
    call()
    for key, tensor in tensors.items():
        same = (copies[key] == before[key]) | ((copies[key] != copies[key]) & (before[key] != before[key]))
        if not bool(same.all()):
            drawn[tensor] = copies[key].detach()


class PicklableGenerator(torch.Generator):
    """A generator on the CPU that can be sent to a spawned process.

    torch pickles a generator with its state as a tensor in shared memory, which is freed before the other process can
    open it. Here the state is pickled as a NumPy array.
    """

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _with_state, (self.get_state().numpy(),)


def _with_state(state: Any) -> PicklableGenerator:
    generator = PicklableGenerator()
    generator.set_state(torch.from_numpy(state))
    return generator
