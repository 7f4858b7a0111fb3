"""Normalize-and-project: keep the norm of every weight matrix, and with it the effective learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.linear_layers import LinearParameter


class NormalizeAndProject(StepIntervention):
    r"""Rescale each weight matrix to its initial norm after each optimizer step.

    .. math:: W \leftarrow \frac{\|W_0\|_F}{\|W\|_F}\, W

    for the weights of linear, convolution, attention and recurrent layers, including the last layer. This is the
    *project* of the paper's method. The *normalize* is up to the model: the paper puts a norm layer before every
    non-linearity, which makes the output independent of the norm of the weights before it; without norm layers the
    projection restricts the functions that the network can represent. The paper also leaves out the scales and biases
    of norm layers, or pulls them back to 1 and 0; that is left to the user: here they, all other biases, embeddings and
    frozen parameters stay as they are.

    Weights that start at zero are not projected. A weight that is zero or not finite stays as it is, and so does the
    optimizer state.

    ``start(model)`` stores the norms: call it before the first training step, and again when a weight is new or has
    another shape.

    Args:
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: At the start, if a weight is not finite.

    References:
        Lyle et al. 2024, arXiv 2407.01800.

    Example:
        >>> model, intervention = nn.Linear(2, 1), NormalizeAndProject()
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[0.0, 5.0]]))
        ...     intervention.start(model)
        ...     _ = model.weight.copy_(torch.tensor([[6.0, 8.0]]))
        >>> intervention.after_step(model)
        >>> model.weight.data
        tensor([[3., 4.]])
    """

    runs_model = False

    acts_on = "weight of a linear, convolution, attention or recurrent layer"
    acts_on_computed = False

    def __init__(self, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(include, exclude)
        self.norms: dict[str, float] = {}
        self._shapes: dict[str, list[int]] = {}

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        matrices = self._weights(model, context)
        new = {name: w.parameter for name, w in matrices.items() if not self._fits(name, w.parameter)}
        norms = {name: _norm(parameter).item() for name, parameter in new.items()}
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise ValueError(f"{self.name}: {name!r} starts with values that are not finite")
        self.norms |= norms
        self._shapes |= {name: list(parameter.shape) for name, parameter in new.items()}

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        matrices = self._weights(model, context)
        self._require_start(matrices, {name for name, weight in matrices.items() if self._fits(name, weight.parameter)})
        for name, weight in matrices.items():
            if self.norms[name] > 0:
                norm = _norm(weight.parameter)
                # Select on the device, without a synchronisation.
                projectable = norm.isfinite() & (norm > 0)
                weight.parameter.mul_(torch.where(projectable, self.norms[name] / norm, 1))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self.norms), "shapes": dict(self._shapes)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms, self._shapes = dict(state["norms"]), dict(state["shapes"])

    def _weights(self, model: nn.Module, context: InterventionContext) -> dict[str, LinearParameter]:
        parameters = self.linear_parameters(model, context)
        weights = {name: parameter for name, parameter in parameters.items() if not parameter.is_bias}
        self.rest_without(weights, model, context)
        return weights

    def _fits(self, name: str, parameter: nn.Parameter) -> bool:
        return name in self.norms and self._shapes[name] == list(parameter.shape)


def _norm(parameter: nn.Parameter) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    return norm
