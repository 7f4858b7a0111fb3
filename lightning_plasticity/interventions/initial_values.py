"""Regularizers that pull parameters back to their initial values."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import InterventionContext, Regularizer
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.matrices import at_least_float32


class InitialValueRegularizer(Regularizer):
    """A penalty on the distance of every trainable parameter from its value at the start.

    Subclasses implement :meth:`distance`, and :meth:`reference` to compare with something else than the initial value.
    Tied parameters count once.
    """

    def __init__(self, coefficient: float, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(coefficient, include=include, exclude=exclude)
        self._initial: dict[str, Tensor] = {}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        """Store the parameters that are new, or have another shape than before."""
        for name, parameter in self.parameters(model).items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{self.name}: parameter {name!r} is lazy: call the model once before start(model)")
            if name not in self._initial or not self._fits(name, parameter):
                self._initial[name] = self.reference(parameter.detach()).clone()

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        terms = []
        for parameter, initial in self.pairs(model):
            wide = at_least_float32(parameter)
            terms.append(self.distance(wide, initial.to(wide.dtype)))
        return self.total(terms, model)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"initial": {name: value.cpu().clone() for name, value in self._initial.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial = {name: value.clone() for name, value in state["initial"].items()}

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters to regularize, by name."""
        return {
            name: parameter
            for name, parameter in self.selected_parameters(model).items()
            if parameter.is_floating_point()
        }

    def pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter to regularize, with what :meth:`reference` has stored of it.

        Raises:
            RuntimeError: If nothing is stored of a parameter of this shape.
        """
        result = []
        for name, parameter in self.parameters(model).items():
            if name not in self._initial or not self._fits(name, parameter):
                stored = f"one of shape {tuple(self._initial[name].shape)}" if name in self._initial else "none"
                raise RuntimeError(
                    f"{self.name} has no initial value of parameter {name!r} of shape {tuple(parameter.shape)} "
                    f"({stored} is stored): call start(model) before training, and again when the model has changed"
                )
            initial = self._initial[name] = self._initial[name].to(parameter.device)
            result.append((parameter, initial))
        return result

    def reference(self, parameter: Tensor) -> Tensor:
        """Return the values to store of an initial parameter, in the same shape."""
        return parameter

    @abstractmethod
    def distance(self, parameter: Tensor, initial: Tensor) -> Tensor:
        """Compute the term of one parameter, without the coefficient."""

    def _fits(self, name: str, parameter: Tensor) -> bool:
        return self._initial[name].shape == parameter.shape
