"""Regularizers that pull parameters back to where they began."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import Regularizer
from lightning_plasticity.interventions.weights.matrices import at_least_float32


class InitialValueRegularizer(Regularizer):
    """Remembers something of every trainable parameter at the start, and measures how far it has gone.

    Those to come implement :meth:`rollback_on_error` and :meth:`distance`. Tied parameters count once.
    """

    def __init__(self, coefficient: float) -> None:
        super().__init__(coefficient)
        self._initial: dict[str, Tensor] = {}

    @override
    def start(
        self,
        model: nn.Module,
        *,
        forward: Callable[[nn.Module], object] | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Remembers the parameters that are new, or have another shape than before."""
        for name, parameter in self.parameters(model).items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"{self.name}: parameter {name!r} is lazy: call the model once before start(model)")
            if name not in self._initial or not self._fits(name, parameter):
                self._initial[name] = self.remembered(parameter.detach()).clone()

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        terms = []
        for name, parameter in self.parameters(model).items():
            if name not in self._initial or not self._fits(name, parameter):
                before = f"it was {self._initial[name].numel()} numbers" if name in self._initial else "it is not known"
                raise RuntimeError(
                    f"{self.name} does not know where parameter {name!r} of shape {tuple(parameter.shape)} began "
                    f"({before}): call start(model) before training, and again when the model has changed"
                )
            initial = self._initial[name] = self._initial[name].to(parameter.device)
            wide = at_least_float32(parameter)
            terms.append(self.distance(wide, initial.to(wide.dtype)))
        if not terms:
            raise ValueError(f"{self.name}: {type(model).__name__} has no trainable parameter to regularize")
        return self.coefficient * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"initial": {name: value.cpu().clone() for name, value in self._initial.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial = {name: value.clone() for name, value in state["initial"].items()}

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters it acts on."""
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }

    def remembered(self, parameter: Tensor) -> Tensor:
        """What to remember of a parameter, with the same shape."""
        return parameter

    @abstractmethod
    def distance(self, parameter: Tensor, initial: Tensor) -> Tensor:
        """The term of one parameter without the coefficient."""

    def _fits(self, name: str, parameter: Tensor) -> bool:
        return self._initial[name].shape == parameter.shape
