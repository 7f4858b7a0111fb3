"""Weights that ``fully_shard`` (FSDP2) keeps in pieces: made whole for a while, and gradients cut like them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plasticity._compat import has_full_weights, is_fsdp_internal, is_model_parallel
from lightning_plasticity.distributed.agreement import all_or_none, fatal_if_unreachable, sync_errors
from lightning_plasticity.interventions import Intervention, Repair, StepIntervention

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_strategy(strategy: Strategy, interventions: Sequence[Intervention]) -> None:
    """Whether the callback works with a strategy.

    Raises:
        MisconfigurationException: If it does not, or if an intervention does not.
    """
    if has_full_weights(strategy):
        return
    name = type(strategy).__name__
    if not is_model_parallel(strategy):
        raise MisconfigurationException(
            "SpectralCollapseCallback works where every device holds all weights, and where fully_shard (FSDP2) shards "
            f"them, not with {name}: use Trainer(devices=1) or Trainer(strategy='ddp'), or, to shard weights, "
            "ModelParallelStrategy(tensor_parallel_size=1) and fully_shard in configure_model"
        )
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationException(
            f"SpectralCollapseCallback does not work with {name}(tensor_parallel_size={size}): use "
            "tensor_parallel_size=1, and fully_shard in configure_model"
        )
    changing = [i.name for i in interventions if isinstance(i, Repair | StepIntervention)]
    if changing:
        raise MisconfigurationException(
            f"{' and '.join(changing)} cannot change weights that {name} shards: what works with it is to measure, and "
            "regularizers such as SpectralRegularizer. Use Trainer(devices=1) or Trainer(strategy='ddp') for the others"
        )


def check_sharding(module: nn.Module) -> None:
    """Whether the weights that a strategy shards can be made whole.

    Raises:
        MisconfigurationException: If not all trainable weights are sharded by ``fully_shard``, over all processes and
            in no other way besides.
    """
    managed = {id(parameter) for part in _sharded_parts(module) for parameter in part.parameters()}
    wrong = [
        name
        for name, parameter in module.named_parameters()
        if not (_is_sharded_well(parameter, managed) if _is_sharded(parameter) else not parameter.requires_grad)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise MisconfigurationException(
            "SpectralCollapseCallback works with ModelParallelStrategy if configure_model shards all trainable "
            "parameters by torch.distributed.fsdp.fully_shard over the data-parallel mesh, without tensor parallelism "
            f"or CPU offload: that is not so of {', '.join(wrong[:3])}{more}"
        )


@contextlib.contextmanager
def gather_full_parameters(module: nn.Module) -> Iterator[Mapping[Tensor, nn.Parameter]]:
    """While inside, the module is what it would be had ``fully_shard`` never seen it.

    Its parameters are whole, FSDP's classes and hooks are gone: it can be copied, and its weights can be computed with.
    What is done to these parameters is forgotten; hooks that are added or removed are so afterwards. Nothing happens to
    a module that is not sharded. To be entered by all processes at the same point, between an optimizer step and the
    next forward pass or between a backward pass and the optimizer step: it succeeds in all of them or in none.

    Yields:
        The whole parameter for each sharded one.
    """
    sharded = _sharded_parts(module)
    if not sharded:
        yield {}
        return
    before: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    try:
        with all_or_none():
            wholes = _gather([parameter for parameter in module.parameters() if _is_sharded(parameter)])
            for part in list(module.modules()):
                for registered in _dicts_with_hooks(part):
                    internal = {key: hook for key, hook in registered.items() if is_fsdp_internal(hook)}
                    hooks.append((registered, internal))
                    # In their places, before and behind which others register hooks, and in the same dicts, which
                    # handles remove them from.
                    registered.update(dict.fromkeys(internal, _nothing))
                changes = _unsharded(part, wholes)
                before.append((part, type(part), {name: vars(part)[name] for name in changes}))
                vars(part).update(changes)
                if part in sharded:
                    part.__class__ = _unsharded_class(type(part))
        yield wholes
    finally:
        for part, kind, attributes in before:
            part.__class__ = kind
            vars(part).update(attributes)
        for registered, internal in hooks:
            registered.update(internal)


def sharded_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The share of this process in a gradient that all processes have whole; all of it if the parameter is whole."""
    if not _is_sharded(parameter):
        return gradient
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(gradient, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)  # each keeps its part: nothing is sent


def is_device_mesh(value: object) -> bool:
    """Whether it is the layout of processes that a module shards by."""
    return isinstance(value, _imported("torch.distributed.device_mesh", "DeviceMesh"))


def _sharded_parts(module: nn.Module) -> set[Any]:
    """What was given to ``fully_shard``, with its parameters sharded: a forward pass may have left them gathered."""
    kind = _imported("torch.distributed.fsdp", "FSDPModule")
    parts: set[Any] = {part for part in module.modules() if isinstance(part, kind)}
    for part in parts:
        part.reshard()
    return parts


def _is_sharded(parameter: Tensor) -> TypeGuard[DTensor]:
    return isinstance(parameter, _imported("torch.distributed.tensor", "DTensor"))


def _imported(module: str, name: str) -> tuple[type, ...]:
    """A class, unless nobody has imported it: then nothing is of it, and to ask would take seconds."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _gather(parameters: Sequence[DTensor]) -> dict[Tensor, nn.Parameter]:
    """The whole parameter for each sharded one.

    A process that lacks the memory finds out, and says so, before the others wait for its share.
    """
    largest = max(parameters, key=Tensor.numel)
    room = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (*parameters, largest, largest)]
    del room  # which keeps it for us, where memory is that of a GPU
    sync_errors(at="weights that are made whole")
    with fatal_if_unreachable():
        return {p: nn.Parameter(p.full_tensor().detach(), p.requires_grad) for p in parameters}


def _is_sharded_well(parameter: DTensor, managed: set[int]) -> bool:
    """Whether a sharded parameter is one of FSDP's, with or without replicas, and of nobody else's."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = parameter.device_mesh
    return (
        id(parameter) in managed
        and [type(placement) for placement in parameter.placements] in ([Shard], [Replicate, Shard])
        and mesh.size() == torch.distributed.get_world_size()
        and mesh.device_type == parameter.device.type
    )


def _dicts_with_hooks(part: nn.Module) -> list[dict[Any, Any]]:
    """Of the dicts that a module keeps, those that hold something of FSDP's."""
    dicts = (value for name, value in vars(part).items() if isinstance(value, dict) and name != "_modules")
    return [value for value in dicts if any(is_fsdp_internal(item) for item in value.values())]


def _unsharded(part: nn.Module, wholes: Mapping[Tensor, nn.Parameter]) -> dict[str, Any]:
    """The attributes of a module that must be others without FSDP."""
    # A method that register_fsdp_forward_method has wrapped.
    changes = {name: value.__wrapped__ for name, value in vars(part).items() if is_fsdp_internal(value)}
    own = part._parameters
    changes["_parameters"] = {name: None if p is None else wholes.get(p, p) for name, p in own.items()}
    if isinstance(part, nn.RNNBase):  # keeps lists of its weights, which it brings up to date when it is copied
        changes["_flat_weights"] = [None if w is None else wholes.get(w, w) for w in part._flat_weights]
        changes["_flat_weight_refs"] = list(part._flat_weight_refs)
    return changes


def _nothing(*_: object, **__: object) -> None:
    """Stands in for a hook of FSDP's."""


def _unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    (fsdp,) = _imported("torch.distributed.fsdp", "FSDPModule")
    original: type[nn.Module] = kind.__mro__[kind.__mro__.index(fsdp) + 1]
    return original
