"""Reset: draw weights anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from typing_extensions import override

from lightning_plasticity._validation import is_int, is_str_list
from lightning_plasticity.interventions.base import Repair, Request, When
from lightning_plasticity.interventions.weights.initialization import fresh_values
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import NORM_LAYERS


class Reset(Repair):
    """Draws the weights anew by each layer's own ``reset_parameters``: of the whole network, or of some layers.

    Norm layers go back to gain 1 and shift 0, running statistics to mean 0 and variance 1. Frozen parameters are left
    as they are.

    Args:
        layers: Names of modules, with ``*`` and ``?`` as wildcards; what lies inside a named module is reset with it.
            ``None`` resets the whole network, or what ``last`` says.
        last: Reset the last so many layers that hold parameters, in the order in which ``forward`` uses them (the order
            of registration says nothing about models with more than one path). Norm layers and PReLUs do not count, and
            those that are used after the first of these layers are reset with them. Of two heads, the one that is used
            last is the last layer: name such layers instead.
        when: When the callback does it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.

    Raises:
        ValueError: If ``layers`` is empty, ``last`` is less than 1, or both are given; at the repair, if a name matches
            nothing, ``last`` is given without ``forward``, or there are not as many layers.

    References:
        Nikishin et al. 2022, arXiv 2205.07802; the RESET baseline of arXiv 2509.22335.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Reset(layers=["2"]).repair(model).num_parameters_changed
        8
        >>> Reset(last=1).repair(model, forward=lambda model: model(torch.ones(1, 4))).num_parameters_changed
        8
    """

    def __init__(self, layers: Sequence[str] | None = None, last: int | None = None, when: When = "collapse") -> None:
        super().__init__(when)
        if layers is not None and not is_str_list(layers):
            raise ValueError(f"Reset(layers={layers!r}) must be a list of module names, or None for all")
        if last is not None and (not is_int(last) or last < 1):
            raise ValueError(f"Reset(last={last!r}) must be a number of layers, at least 1, or None")
        if layers is not None and last is not None:
            raise ValueError(f"Reset(layers={layers!r}, last={last}): give one of them, not both")
        self.layers, self.last = layers, last

    @override
    def changes(self, model: nn.Module, request: Request) -> WeightUpdate:
        chosen = self._named(model) if self.last is None else self._used_last(model, request.forward, self.last)
        return WeightUpdate(fresh_values(model, chosen, request.generator))

    def _named(self, model: nn.Module) -> dict[str, nn.Module]:
        modules = dict(model.named_modules())
        if self.layers is None:
            return modules
        chosen: dict[str, nn.Module] = {}
        for pattern in self.layers:
            matches = [name for name in modules if name and fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(f"Reset(layers=...): {pattern!r} matches no module; there are {list(modules)[1:]}")
            for match in matches:
                chosen |= {n: m for n, m in modules.items() if n == match or n.startswith(f"{match}.")}
        return chosen

    def _used_last(
        self, model: nn.Module, forward: Callable[[nn.Module], object] | None, last: int
    ) -> dict[str, nn.Module]:
        if forward is None:
            raise ValueError(
                "Reset(last=...) needs to see the model run: repair(model, forward=lambda model: model(inputs))"
            )
        used = _in_order_of_use(model, forward)
        layers = [module for module in used if not isinstance(module, (*NORM_LAYERS, nn.PReLU))]
        if len(layers) < last:
            raise ValueError(f"Reset(last={last}) must be at most {len(layers)}, the number of layers with parameters")
        chosen = {part for module in used[used.index(layers[-last]) :] for part in module.modules()}
        return {name: module for name, module in model.named_modules() if module in chosen}


def _in_order_of_use(model: nn.Module, forward: Callable[[nn.Module], object]) -> list[nn.Module]:
    """The modules that hold parameters directly, in the order of their last call."""
    calls: dict[nn.Module, None] = {}

    def note(module: nn.Module, args: object) -> None:
        calls.pop(module, None)
        calls[module] = None

    holders = [module for module in model.modules() if list(module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(note) for module in holders]
    try:
        with probe_mode(model), torch.no_grad():
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls)
