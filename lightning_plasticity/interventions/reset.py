"""Reset: re-initialise the network or some of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import is_int, is_str_list
from lightning_plasticity.interventions.base import InterventionContext, Repair, When
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.groups import Forward
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import BATCH_NORMS, is_norm_layer


class Reset(RemembersInitialWeights, Repair):
    """Re-initialise the whole network, or some layers.

    Each parameter gets a random permutation of its own initial entries; entries that do not start at random, such as
    biases of zero, get their initial value back, and so do norm layers and their running statistics: mostly scale 1 and
    bias 0, mean 0 and variance 1. Frozen parameters and other buffers are left as they are.

    Args:
        layers: Names of modules, with ``*`` and ``?`` as wildcards; submodules of a named module are reset with it.
            ``None`` resets the whole network, or the ``last`` layers.
        last: Number of layers with parameters to reset, counted from the last one that ``forward`` calls (the order of
            registration may differ from the order of calls). Norm layers and PReLUs do not count; those that are called
            after the first of the counted layers are reset with them. Of two heads, the one that is called last is the
            last layer: name such layers instead.
        when: When the callback runs it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.
        initial: ``state_dict()`` of the model before training, to draw from. By default the weights that the callback
            has stored at its first batch, or those at :meth:`start`; without either, ``reset_parameters`` draws.
        include: Names of the modules and parameters among them to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.
        also: Modules to copy others to after a repair, such as ``{"target": "online"}``.

    Raises:
        ValueError: If ``layers`` is empty, ``last`` is less than 1, or both are given; at the repair, if a name matches
            nothing, ``last`` is given without ``forward``, or the model has fewer layers.

    References:
        Nikishin et al. 2022, arXiv 2205.07802; the RESET baseline of arXiv 2509.22335.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Reset(layers=["2"]).repair(model).num_parameters_changed
        8
        >>> Reset(last=1).repair(model, forward=lambda model: model(torch.ones(1, 4))).num_parameters_changed
        8
    """

    acts_on = "parameter among the layers to reset"

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        last: int | None = None,
        when: When = "collapse",
        *,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        Repair.__init__(self, when, include=include, exclude=exclude, also=also)
        self.remember_given(initial)
        if layers is not None and not is_str_list(layers):
            raise ValueError(f"Reset(layers={layers!r}) must be a list of module names, or None for all")
        if last is not None and (not is_int(last) or last < 1):
            raise ValueError(f"Reset(last={last!r}) must be a number of layers, at least 1, or None")
        if layers is not None and last is not None:
            raise ValueError(f"Reset(layers={layers!r}, last={last}): give one of them, not both")
        self.layers, self.last = layers, last

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        if self.last is None:
            selected = self._named_layers(model)
        else:
            selected = _last_layers(model, context.require_forward("Reset(last=...)", "repair"), self.last)
        chosen = set(self.selected_parameters(model, context).values())
        tensors: dict[str, Tensor] = {}
        for path, module in selected.items():
            held = dict(module.named_parameters(recurse=False))
            is_frozen = bool(held) and not any(parameter in chosen for parameter in held.values())
            parts = {key: parameter for key, parameter in held.items() if parameter in chosen}
            statistics = {} if is_frozen or not isinstance(module, BATCH_NORMS) else dict(module.named_buffers())
            tensors |= {f"{path}.{key}" if path else key: tensor for key, tensor in {**parts, **statistics}.items()}
        return WeightUpdate(self.fresh_values(model, tensors, context))

    def _named_layers(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = dict(model.named_modules())
        if self.layers is None:
            return modules
        selected: dict[str, nn.Module] = {}
        for pattern in self.layers:
            matches = [name for name in modules if name and fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(f"Reset(layers=...): {pattern!r} matches no module; there are {list(modules)[1:]}")
            for match in matches:
                selected |= {n: m for n, m in modules.items() if n == match or n.startswith(f"{match}.")}
        return selected


def _last_layers(model: nn.Module, forward: Forward, last: int) -> dict[str, nn.Module]:
    called = _modules_in_call_order(model, forward)
    layers = [module for module in called if not (is_norm_layer(module) or isinstance(module, nn.PReLU))]
    if len(layers) < last:
        raise ValueError(f"Reset(last={last}) must be at most {len(layers)}, the number of layers with parameters")
    selected = {part for module in called[called.index(layers[-last]) :] for part in module.modules()}
    return {name: module for name, module in model.named_modules() if module in selected}


def _modules_in_call_order(model: nn.Module, forward: Forward) -> list[nn.Module]:
    """Return the modules that hold parameters directly, in the order of their last call."""
    # The keys of a dict serve as an ordered set.
    last_calls: dict[nn.Module, None] = {}

    def record(module: nn.Module, args: object) -> None:
        last_calls.pop(module, None)
        last_calls[module] = None

    holders = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(record) for module in holders]
    try:
        with probe_mode(model), torch.no_grad():
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(last_calls)
