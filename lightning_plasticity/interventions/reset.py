"""Reset: draw weights anew."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from typing_extensions import override

from lightning_plasticity.interventions.base import Repair, Request, When
from lightning_plasticity.interventions.changes import Changes
from lightning_plasticity.interventions.initialization import fresh_values


class Reset(Repair):
    """Draws the weights anew by each layer's own ``reset_parameters``: of the whole network, or of named layers.

    Norm layers go back to gain 1 and shift 0, running statistics to mean 0 and variance 1. Frozen parameters are left
    as they are.

    Args:
        layers: Names of modules, with ``*`` and ``?`` as wildcards; what lies inside a named module is reset with it.
            ``None`` resets the whole network.
        when: When the callback does it: on ``"collapse"``, at every ``"task"``, or every so many optimizer steps.

    Raises:
        ValueError: If ``layers`` is empty, or at the repair if a name matches nothing.

    References:
        Nikishin et al. 2022, arXiv 2205.07802; the RESET baseline of arXiv 2509.22335.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> Reset(layers=["2"]).repair(model).num_parameters_changed
        8
    """

    def __init__(self, layers: Sequence[str] | None = None, when: When = "collapse") -> None:
        super().__init__(when)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"Reset(layers={layers!r}) must be a list of module names, or None for all")
        self.layers = layers

    @override
    def changes(self, model: nn.Module, request: Request) -> Changes:
        return Changes(fresh_values(model, self._selected(model), request.generator))

    def _selected(self, model: nn.Module) -> dict[str, nn.Module]:
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
