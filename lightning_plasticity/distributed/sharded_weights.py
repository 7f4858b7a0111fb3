"""Gather parameters that ``fully_shard`` (FSDP2) shards, and shard gradients like them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_plasticity.distributed.agreement import all_or_none, fatal_if_unreachable, sync_errors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def unsupported_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are sharded in another way than :func:`gather_full_parameters` supports.

    All trainable parameters must be sharded by ``fully_shard``, over all ranks and in no other way besides.
    """
    managed = {id(parameter) for part in _resharded_modules(module) for parameter in part.parameters()}
    return [
        name
        for name, parameter in module.named_parameters()
        if not (_is_supported(parameter, managed) if _is_sharded(parameter) else not parameter.requires_grad)
    ]


@contextlib.contextmanager
def gather_full_parameters(module: nn.Module) -> Iterator[Mapping[Tensor, nn.Parameter]]:
    """Undo ``fully_shard`` on a module, inside the block.

    The module has full parameters, and no classes and hooks of FSDP, so it can be copied and run. Changes of these
    parameters are lost; hooks that are added or removed stay so. A module that is not sharded remains as it is.

    All ranks must enter at the same point, between an optimizer step and the next forward pass or between a backward
    pass and the optimizer step. Entering succeeds on all of them or on none.

    Yields:
        The full parameter for each sharded one.
    """
    if not _resharded_modules(module):
        yield {}
        return
    with contextlib.ExitStack() as stack:
        with all_or_none():
            full_parameters = _gather([parameter for parameter in module.parameters() if _is_sharded(parameter)])
            for part in list(module.modules()):
                stack.enter_context(_without_fsdp(part, full_parameters))
        yield full_parameters


def sharded_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return this rank's shard of a full gradient; the gradient itself if the parameter is not sharded."""
    if not _is_sharded(parameter):
        return gradient
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    replicated = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # Every rank has the full gradient and keeps its shard, so this does not communicate.
    return replicated.redistribute(placements=parameter.placements)


def is_device_mesh(value: object) -> bool:
    """Return whether the value is a ``DeviceMesh``, the layout of ranks that a module is sharded over."""
    return isinstance(value, _class_if_imported("torch.distributed.device_mesh", "DeviceMesh"))


def is_fsdp_internal(value: object) -> bool:
    """Return whether ``fully_shard`` has put this hook, method or state into a module.

    FSDP's public objects that a module may hold, such as a mixed-precision policy, are not internal: their
    ``__module__`` is ``torch.distributed.fsdp``.
    """
    # The __module__ of a wrapped method is that of the method it wraps; its globals are those of the wrapper.
    wrapper_globals: Any = getattr(value, "__globals__", {})
    origins = (getattr(value, "__module__", None), wrapper_globals.get("__name__"))
    return any(isinstance(name, str) and name.startswith("torch.distributed.fsdp._fully_shard.") for name in origins)


def _resharded_modules(module: nn.Module) -> list[Any]:
    """Return the submodules passed to ``fully_shard``, resharded: a forward pass may have left them gathered."""
    fsdp_module = _class_if_imported("torch.distributed.fsdp", "FSDPModule")
    parts: list[Any] = [part for part in module.modules() if isinstance(part, fsdp_module)]
    for part in parts:
        part.reshard()
    return parts


def _is_sharded(parameter: Tensor) -> TypeGuard[DTensor]:
    return isinstance(parameter, _class_if_imported("torch.distributed.tensor", "DTensor"))


def _class_if_imported(module: str, name: str) -> tuple[type, ...]:
    """Return a class for ``isinstance``, or no class if its module is not imported.

    In that case no instance exists, and the import would take seconds.
    """
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _is_supported(parameter: DTensor, managed: set[int]) -> bool:
    """Return whether FSDP alone shards the parameter, over all ranks, with or without replicas.

    Args:
        parameter: A sharded parameter.
        managed: The ids of the parameters of modules that were passed to ``fully_shard``.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh = parameter.device_mesh
    return (
        id(parameter) in managed
        and [type(placement) for placement in parameter.placements] in ([Shard], [Replicate, Shard])
        and mesh.size() == torch.distributed.get_world_size()
        and mesh.device_type == parameter.device.type
    )


def _gather(parameters: Sequence[DTensor]) -> dict[Tensor, nn.Parameter]:
    """Return the full parameter for each sharded one.

    A rank that lacks the memory raises before the others wait for its shards.
    """
    # Beside the full parameters, gathering one takes two buffers of its size.
    largest = max(parameters, key=Tensor.numel)
    reserved = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (*parameters, largest, largest)]
    # On a GPU the caching allocator keeps the freed memory for this process.
    del reserved
    sync_errors(point="a gather of full parameters")
    with fatal_if_unreachable():
        return {p: nn.Parameter(p.full_tensor().detach(), p.requires_grad) for p in parameters}


@contextlib.contextmanager
def _without_fsdp(part: nn.Module, full_parameters: Mapping[Tensor, nn.Parameter]) -> Iterator[None]:
    """Undo ``fully_shard`` on one submodule, without its children; restore it on exit."""
    kind, replacements = type(part), _unsharded_attributes(part, full_parameters)
    originals = {name: vars(part)[name] for name in replacements}
    registries = [(registry, hooks) for registry in _hook_registries(part) if (hooks := _fsdp_hooks(registry))]
    try:
        for registry, hooks in registries:
            # Placeholders keep the order among hooks of others, which may be registered before or after them meanwhile.
            # The registry stays the same dict, since handles remove their hooks from it.
            registry.update(dict.fromkeys(hooks, _do_nothing))
        vars(part).update(replacements)
        part.__class__ = _unsharded_class(kind)
        yield
    finally:
        part.__class__ = kind
        vars(part).update(originals)
        for registry, hooks in registries:
            registry.update(hooks)


def _unsharded_attributes(part: nn.Module, full_parameters: Mapping[Tensor, nn.Parameter]) -> dict[str, Any]:
    """Return the attributes of a module whose values differ without FSDP."""
    # Methods that register_fsdp_forward_method has wrapped.
    attributes = {name: value.__wrapped__ for name, value in vars(part).items() if is_fsdp_internal(value)}
    attributes["_parameters"] = {
        name: None if parameter is None else full_parameters.get(parameter, parameter)
        for name, parameter in part._parameters.items()
    }
    # Recurrent layers also keep lists of their weights, which copying updates.
    if isinstance(part, nn.RNNBase):
        flat_weights = part._flat_weights
        attributes["_flat_weights"] = [None if w is None else full_parameters.get(w, w) for w in flat_weights]
        attributes["_flat_weight_refs"] = list(part._flat_weight_refs)
    return attributes


def _unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard``: the next one behind FSDP's in the resolution order."""
    (fsdp_module,) = _class_if_imported("torch.distributed.fsdp", "FSDPModule")
    order: tuple[type, ...] = kind.__mro__
    return order[order.index(fsdp_module) + 1] if fsdp_module in order else kind


def _hook_registries(part: nn.Module) -> list[dict[Any, Any]]:
    return [value for name, value in vars(part).items() if isinstance(value, dict) and name != "_modules"]


def _fsdp_hooks(registry: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: hook for key, hook in registry.items() if is_fsdp_internal(hook)}


def _do_nothing(*_: object, **__: object) -> None:
    """Stand in for a hook of FSDP."""
