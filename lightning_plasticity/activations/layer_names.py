"""Name the hidden layers of a network after the modules that own their weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from lightning_plasticity.activations.compiled import without_wrappers
from lightning_plasticity.activations.origins import LayerCall
from lightning_plasticity.activations.torch_functions import ACTIVATION_NAMES
from lightning_plasticity.activations.unit_axes import is_weight
from lightning_plasticity.layers import LINEAR_LAYERS


class LayerNames:
    """The names of modules, parameters and activations in a network.

    Args:
        network: The network. Modules that are added to it later are unknown.
    """

    def __init__(self, network: nn.Module) -> None:
        self._paths: dict[int, list[str]] = {}
        for path, module in network.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(without_wrappers(path))
        # Tensors hash by identity. The references keep the ids from being reused.
        self._owners: dict[Tensor, str] = {p: parameter_owner(name) for name, p in network.named_parameters()}
        self._num_calls = itertools.count()
        self._places: dict[str, tuple[str, int]] = {}

    def path_of_call(self, module: nn.Module, caller: str) -> str:
        """Return the path by which a module is called here: the same module may have several."""
        # A module added to the network later is named after its class.
        paths = self._paths.get(id(module), [type(module).__name__.lower()])
        for path in paths:
            if path.rpartition(".")[0] == caller:
                return path
        inside = [path for path in paths if not caller or path.startswith(f"{caller}.")]
        if not inside and is_activation_module(module):
            return f"{caller}.{paths[0].rpartition('.')[2]}"
        return (inside or paths)[0]

    def call_of_layer(self, module: nn.Module, inputs: Sequence[Tensor] = ()) -> LayerCall | None:
        """Record a call of a layer with weights.

        Args:
            module: The module that is running. It is the layer if it is a linear, convolution, recurrent or attention
                layer. Otherwise the layer is the owner of the first weight matrix among the inputs.
            inputs: The inputs of the function that the module calls.

        Returns:
            The call; ``None`` if the layer has no name.
        """
        if isinstance(module, LINEAR_LAYERS):
            owner = self._paths.get(id(module), [""])[0]
        else:
            matrices = [tensor for tensor in inputs if is_weight(tensor) and tensor.ndim > 1]
            parameters = [matrix if isinstance(matrix, nn.Parameter) else matrix._base for matrix in matrices]
            owner = next((self._owners[p] for p in parameters if p in self._owners), "")
        return LayerCall(owner, next(self._num_calls)) if owner else None

    def activations(self, call: LayerCall, place: str, units: int) -> str:
        """Return the name of activations by the layer that they come from.

        Further activation functions behind the same call of the layer are numbered. So is a place that has another
        number of units than the place that got the name first.

        Args:
            call: The last call of a layer with weights before the activation function.
            place: The path of the activation module, or the path of the module that calls the function and its name.
            units: The number of units.
        """
        while True:
            call.num_activations += 1
            name = numbered(call.owner, call.num_activations)
            first_place, first_units = self._places.setdefault(name, (place, units))
            if place == first_place or units == first_units:
                return name


def numbered(name: str, number: int) -> str:
    """Return the name itself for the first of its uses, and with the number for further ones."""
    return name if number == 1 else f"{name}-{number}"


def parameter_owner(name: str) -> str:
    """Return the name of the layer whose weight is the parameter of this name.

    It is the path of the module, if the parameter is its ``weight``. Other parameters name their layer themselves,
    since a module may have several.

    Example:
        >>> parameter_owner("block.fc.weight"), parameter_owner("block.fc.parametrizations.weight.original")
        ('block.fc', 'block.fc')
        >>> parameter_owner("block.w1"), parameter_owner("weight")
        ('block.w1', 'weight')
    """
    path, parametrized, inner = without_wrappers(name).partition(".parametrizations.")
    if parametrized:
        key = inner.partition(".")[0]
    else:
        path, _, key = path.rpartition(".")
    return path if path and key == "weight" else f"{path}.{key}".lstrip(".")


def is_activation_module(module: nn.Module) -> bool:
    """Return whether a module that calls an activation function is an activation module, so that its output counts."""
    in_torch = type(module).__module__ == nn.ReLU.__module__
    return not module._modules and (in_torch or next(module.parameters(), None) is None)


def module_paths(network: nn.Module) -> set[str]:
    """Return the paths of all modules of a network; a module may have several."""
    return {without_wrappers(path) for path, _ in network.named_modules(remove_duplicate=False)}


def possible_names(network: nn.Module) -> set[str]:
    """Return the names that layers of a network may have, except those that end in the name of a function."""
    owners = {parameter_owner(name) for name, _ in network.named_parameters(remove_duplicate=False)}
    return owners | module_paths(network)


def may_match(pattern: str, names: Collection[str]) -> bool:
    """Return whether a pattern matches one of the names, or that of an activation function called in such a module.

    Example:
        >>> names = {"", "block", "block.fc1"}
        >>> may_match("block.fc1-2", names), may_match("block.relu", names), may_match("body.*", names)
        (True, True, False)
    """
    # A shared activation module keeps its name wherever it is called.
    functions = ACTIVATION_NAMES | {last for name in names if not (last := name.rpartition(".")[2]).isdigit()}
    start = re.split(r"[*?[]", pattern)[0]
    if start == pattern:
        name = re.sub(r"-\d+$", "", pattern)
        caller, _, function = name.rpartition(".")
        return name in names or (caller in names and function in functions)
    start = re.sub(r"-\d*$", "", start)
    caller, _, function = start.rpartition(".")
    known = any(name.startswith(start) for name in names)
    return known or (caller in names and any(name.startswith(function) for name in functions))
