"""Interventions that draw fresh values from the initial weights of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import Intervention, InterventionContext
from lightning_plasticity.interventions.weights.initial_distribution import fresh_values
from lightning_plasticity.isolation.weights import named_tensors


class RemembersInitialWeights(Intervention):
    """An intervention that draws fresh values, from the first initial weights that are known of these.

    * ``initial`` of the constructor;
    * those that the callback has stored;
    * those at the first :meth:`start`, in a plain loop. They are part of the state.

    Where there are none, each layer's ``reset_parameters`` draws.
    """

    initial: dict[str, Tensor] | None = None
    _of_run: Mapping[str, Tensor] | None = None
    _at_start: dict[str, Tensor] | None = None

    def remember_given(self, initial: Mapping[str, Tensor] | None) -> None:
        """Copy the weights that the constructor was given, since training changes those of a ``state_dict()``.

        Raises:
            ValueError: If ``initial`` is neither a mapping nor ``None``.
        """
        if initial is None:
            return
        if not isinstance(initial, Mapping):
            raise ValueError(f"{self.name}(initial={initial!r}) must be a state_dict(), or None")
        self.initial = {name: value.detach().cpu().clone() for name, value in initial.items()}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.remember(named_tensors(model), context)

    def remember(self, tensors: Mapping[str, Tensor], context: InterventionContext) -> None:
        """Keep the values of tensors that are new, or have another shape than before, unless initial ones are given."""
        self._of_run = context.initial
        if self.initial is not None or context.initial is not None:
            return
        known = self._at_start or {}
        new = {n: tensor.detach().cpu().clone() for n, tensor in tensors.items() if not _fits(known.get(n), tensor)}
        self._at_start = known | new

    def initial_weights(self, context: InterventionContext) -> Mapping[str, Tensor] | None:
        """Return the initial weights by name; ``None`` if none are known."""
        return next((x for x in (self.initial, context.initial, self._of_run, self._at_start) if x is not None), None)

    def fresh_values(
        self, model: nn.Module, tensors: Mapping[str, Tensor], context: InterventionContext
    ) -> dict[Tensor, Tensor]:
        """Draw new values for parameters and buffers, by :func:`~.weights.initial_distribution.fresh_values`."""
        return fresh_values(model, tensors, self.initial_weights(context), context.generator)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._at_start is None else {"initial": dict(self._at_start)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._at_start = dict(state["initial"]) if "initial" in state else None


def _fits(known: Tensor | None, tensor: Tensor) -> bool:
    return known is not None and known.shape == tensor.shape
