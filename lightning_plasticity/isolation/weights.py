"""Load weights into a copy of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def all_names(model: nn.Module) -> dict[Tensor, list[str]]:
    """Return all names of each parameter and buffer of a model: a tied one has several."""
    names: dict[Tensor, list[str]] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(tensor, []).append(name)
    return names


def trained_names(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    full_parameters: Mapping[Tensor, nn.Parameter] | None = None,
) -> set[str]:
    """Return the names of the parameters that optimizers hold; of all where they hold none of the model.

    A target network is not trained, although its parameters may require gradients.

    Args:
        model: The model.
        optimizers: The optimizers.
        full_parameters: The full parameter for each sharded one that the optimizers hold.
    """
    full_parameters = full_parameters or {}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(full_parameters.get(parameter, parameter)) for group in groups for parameter in group["params"]}
    names = {name: id(parameter) in held for name, parameter in model.named_parameters()}
    holds_none = not any(names.values())
    return {name for name, is_held in names.items() if is_held or holds_none}


def untrained_copies(model: nn.Module, trained: Collection[str]) -> list[str]:
    """Return the names of the networks in a model that are copies of a trained one, and not trained themselves.

    These are target and teacher networks: children of the model, or members of a container among its children, with the
    class and the parameters of another one that is trained. Single layers do not count, since frozen ones look alike.

    Args:
        model: The model.
        trained: The names of the parameters that are trained.

    Example:
        >>> model = nn.ModuleDict({n: nn.Sequential(nn.Linear(2, 2)) for n in ("online", "target")})
        >>> untrained_copies(model, ["online.0.weight", "online.0.bias"])
        ['target']
    """
    networks: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            networks |= {f"{name}.{member}": part for member, part in child.named_children()}
        elif any(True for _ in child.children()):
            networks[name] = child
    looks: dict[str, object] = {}
    are_trained: dict[str, bool] = {}
    for name, network in networks.items():
        parameters = dict(network.named_parameters())
        if parameters:
            looks[name] = type(network), [(key, parameter.shape) for key, parameter in parameters.items()]
            are_trained[name] = any(f"{name}.{key}" in trained for key in parameters)
    originals = [looks[name] for name in looks if are_trained[name]]
    return [name for name in looks if not are_trained[name] and looks[name] in originals]


def load_weights(copy: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set the parameters and buffers of a copy of a model, in the dtype and on the device that they have.

    Args:
        copy: The copy.
        model: The model that it is a copy of. Tensors that a custom ``__deepcopy__`` shares with it stay as they are.
        values: The values by name.
    """
    shared = {id(tensor) for tensor in named_tensors(model).values()}
    with torch.no_grad():
        for name, tensor in named_tensors(copy).items():
            if id(tensor) in shared:
                continue
            try:
                tensor.copy_(values[name])
            except RuntimeError:
                # A buffer that is expanded, or was made in inference mode, cannot be written to.
                if isinstance(tensor, nn.Parameter):
                    raise
                tensor.data = values[name].to(tensor, copy=True)


@contextlib.contextmanager
def with_weights_of(copy: nn.Module, model: nn.Module) -> Iterator[None]:
    """Give a copy of a model the parameters and buffers that the model has now, and its own ones back on exit.

    Parameters share the memory of the model's, buffers do not, since running the copy may change them.

    Args:
        copy: The copy.
        model: The model that it is a copy of.
    """
    own = {name: (tensor, tensor.data) for name, tensor in named_tensors(copy).items()}
    try:
        for name, value in named_tensors(model).items():
            tensor, _ = own[name]
            tensor.data = value.data if isinstance(tensor, nn.Parameter) else value.data.clone()
        yield
    finally:
        for tensor, data in own.values():
            tensor.data = data
