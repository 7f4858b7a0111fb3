"""The weights that layers multiply their input by, and the biases that they add."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_plasticity.layers import EMBEDDINGS, LINEAR_LAYERS

_KEYS = re.compile(r"((in|q|k|v)_proj_)?(weight|bias)|(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")


@dataclass(frozen=True)
class LinearParameter:
    """A weight or a bias.

    Args:
        layer: The layer that holds it.
        key: Its name in the layer.
        parameter: A weight, ``(outputs, inputs, ...)``, of a transposed convolution ``(inputs, outputs, ...)``; or a
            bias, ``(outputs,)``.
        fan_in: Number of inputs of each output, as ``torch.nn.init`` counts them.
    """

    layer: nn.Module
    key: str
    parameter: nn.Parameter
    fan_in: int

    @property
    def is_bias(self) -> bool:
        """Whether it is added, not multiplied with."""
        return "bias" in self.key


def linear_parameters(model: nn.Module) -> dict[str, LinearParameter]:
    """Weights and biases of linear, convolution, attention and recurrent layers, by name.

    Left out are parameters that are frozen, complex, empty, not there yet (lazy layers), or shared with an embedding,
    layers whose parameters are computed from others (:mod:`torch.nn.utils.parametrize`), and layers of any other kind.
    What several layers share is there once.
    """
    found: dict[str, LinearParameter] = {}
    taken = {id(p) for m in model.modules() if isinstance(m, EMBEDDINGS) for p in m.parameters(recurse=False)}
    for prefix, layer in model.named_modules():
        if not isinstance(layer, LINEAR_LAYERS) or is_parametrized(layer):  # to ask it for its weight may change it
            continue
        for key, parameter in layer.named_parameters(recurse=False):
            weight = _weight_of(layer, key) if _KEYS.fullmatch(key) else None
            if weight is not None and id(parameter) not in taken and _is_trained(parameter):
                taken.add(id(parameter))
                name = f"{prefix}.{key}" if prefix else key
                found[name] = LinearParameter(layer, key, parameter, weight[0].numel())
    return found


def weights(model: nn.Module) -> dict[str, LinearParameter]:
    """Those of :func:`linear_parameters` that are weights."""
    return {name: weight for name, weight in linear_parameters(model).items() if not weight.is_bias}


def _weight_of(layer: nn.Module, key: str) -> Tensor | None:
    """The weight itself, or that to which a bias belongs; ``None`` if it is empty."""
    names = [key.replace("bias", "weight")]
    if key == "in_proj_bias":
        names.append("q_proj_weight")  # attention with separate projections has one bias for them all
    found = (getattr(layer, name, None) for name in names)
    return next((w for w in found if isinstance(w, Tensor) and not is_lazy(w) and w.numel() > 0), None)


def _is_trained(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.is_floating_point() and not is_lazy(parameter)
