"""Draw fresh weights as each layer initialises its own, or from the distribution of given initial weights."""

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
    """Draw new values for the tensors that modules hold directly, as ``reset_parameters`` of each sets them.

    The reset of a module that contains others, such as ``nn.MultiheadAttention``, overrides theirs. The values are
    drawn on copies on the CPU and with a separate seed: the same generator gives the same values on every device. The
    global generators advance only if ``generator`` is ``None``.

    Args:
        model: The whole model.
        modules: Those of its modules to draw for, by name.
        generator: A CPU generator; by default one seeded from torch's global one.

    Returns:
        New value of each trainable parameter and each buffer, by the old tensor. Modules whose parameters are all
        frozen keep their buffers too.

    Raises:
        ValueError: If a module holds trainable parameters that no ``reset_parameters`` initialises.
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
    result: dict[Tensor, Tensor] = {}
    for name, module in modules.items():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            continue
        for key, tensor in _tensors(module, recurse=False).items():
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                continue
            if tensor in drawn:
                result[tensor] = drawn[tensor]
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(
                    f"{type(module).__name__} {name!r} holds the parameter {key!r} but has no reset_parameters() that "
                    "initialises it: add that method, or leave the layer out"
                )
    return result


def copy_initial(owner: str, initial: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Copy initial values to the CPU: a ``state_dict()`` shares its tensors with the model, which training changes.

    Args:
        owner: The class whose constructor takes ``initial``, for the message.
        initial: Initial values by name, or ``None``.

    Raises:
        ValueError: If ``initial`` is neither a mapping nor ``None``.
    """
    if initial is None:
        return None
    if not isinstance(initial, Mapping):
        raise ValueError(f"{owner}(initial={initial!r}) must be a state_dict(), or None")
    return {name: value.detach().cpu().clone() for name, value in initial.items()}


def resampled_values(
    tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[Tensor, Tensor]:
    """Draw each entry of each tensor, with replacement, from the initial entries of the tensor of that name.

    This also reproduces initialisations that were applied by hand, outside of ``reset_parameters``.

    Args:
        tensors: Parameters and buffers by name.
        initial: Initial values by name, such as a ``state_dict()`` from before training; shapes may differ.
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
        indices = torch.randint(values.numel(), (tensor.numel(),), generator=generator)
        result[tensor] = values[indices].view(tensor.shape)
    return result


def _reset_method(module: nn.Module) -> str | None:
    return next((name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)), None)


def _tensors(module: nn.Module, *, recurse: bool) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}


def _draw(module: nn.Module, reset: str, drawn: dict[Tensor, Tensor]) -> None:
    """Call a module's reset method on a copy, and add the values that it sets to ``drawn``, by the old tensor."""
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
    direct = _tensors(module, recurse=False)
    for key, tensor in tensors.items():
        # A reset may leave the values of its own module's tensors as they are, such as running statistics of zero.
        if (key in direct and tensor not in drawn) or not torch.equal(copies[key], before[key]):
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
