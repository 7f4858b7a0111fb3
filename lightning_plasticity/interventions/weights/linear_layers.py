"""Collect the weights that layers multiply their input by, and the biases that they add, as parameters."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_plasticity.interventions.weights.hooked_weights import weights_from_hooks
from lightning_plasticity.layers import EMBEDDINGS, LINEAR_LAYERS, is_conv1d

_KEYS = re.compile(r"((in|q|k|v)_proj_)?(weight|bias)|(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")


@dataclass(frozen=True)
class LinearParameter:
    """A weight or a bias.

    Args:
        layer: The layer that holds it.
        key: Its name in the layer.
        parameter: A weight, ``(outputs, inputs, ...)``, of transposed convolutions and of the ``Conv1D`` of
            transformers ``(inputs, outputs, ...)``; or a bias, ``(outputs,)``.
        fan_in: Number of inputs of each output, as ``torch.nn.init`` counts them (also for transposed convolutions).
    """

    layer: nn.Module
    key: str
    parameter: nn.Parameter
    fan_in: int

    @property
    def is_bias(self) -> bool:
        """``True`` if the parameter is a bias."""
        return "bias" in self.key


def linear_parameters(model: nn.Module, selected: Container[Tensor] | None = None) -> dict[str, LinearParameter]:
    """Return the weights and biases of linear, convolution, attention and recurrent layers, by name.

    ``Conv1D`` of transformers counts as linear. This leaves out parameters that are frozen, complex, empty, lazy
    or shared with an embedding, layers whose weights are computed from other tensors (:func:`computed_layers`), biases
    included, and layers of any other kind. Parameters that several layers share appear once.

    Args:
        model: The model.
        selected: The parameters to return; by default all.
    """
    result: dict[str, LinearParameter] = {}
    seen = {id(p) for m in model.modules() if isinstance(m, EMBEDDINGS) for p in m.parameters(recurse=False)}
    for prefix, layer in model.named_modules():
        if not _is_linear(layer) or is_computed(layer):
            continue
        for key, parameter in layer.named_parameters(recurse=False):
            weight = _weight_of(layer, key) if _KEYS.fullmatch(key) else None
            if weight is not None and id(parameter) not in seen and _is_trained(parameter, selected):
                seen.add(id(parameter))
                name = f"{prefix}.{key}" if prefix else key
                fan_in = len(weight) if is_conv1d(layer) else weight[0].numel()
                result[name] = LinearParameter(layer, key, parameter, fan_in)
    return result


def weights(model: nn.Module, selected: Container[Tensor] | None = None) -> dict[str, LinearParameter]:
    """Return the weights among :func:`linear_parameters`, by name."""
    return {name: weight for name, weight in linear_parameters(model, selected).items() if not weight.is_bias}


def is_computed(layer: nn.Module) -> bool:
    """Return whether a weight of a layer is computed from other tensors: by a parametrization, or by a hook.

    Hooks are those of :mod:`torch.nn.utils.prune` and of torch's old ``weight_norm`` and ``spectral_norm``. Reading
    such a weight may change it, and a new value would be lost at the next forward pass.

    Example:
        >>> from torch.nn.utils import prune
        >>> is_computed(nn.Linear(2, 2)), is_computed(prune.identity(nn.Linear(2, 2), "weight"))
        (False, True)
    """
    return is_parametrized(layer) or bool(_plain_weights(layer))


def computed_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of which a weight :func:`is_computed`."""
    return [name for name, layer in model.named_modules() if _is_linear(layer) and is_computed(layer)]


def opaque_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of which a weight is computed by a hook that is not of torch."""
    return [
        name
        for name, layer in model.named_modules()
        if _is_linear(layer) and not set(_plain_weights(layer)) <= weights_from_hooks(layer).keys()
    ]


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, LINEAR_LAYERS) or is_conv1d(layer)


def _plain_weights(layer: nn.Module) -> list[str]:
    # A hook that computes a weight assigns it as a plain attribute.
    return [key for key, value in vars(layer).items() if isinstance(value, Tensor) and _KEYS.fullmatch(key)]


def _weight_of(layer: nn.Module, key: str) -> Tensor | None:
    """Return the weight of the given name, or the weight that a bias belongs to; ``None`` if it is empty or lazy."""
    names = [key.replace("bias", "weight")]
    # Attention with separate projections has one bias for them all.
    if key == "in_proj_bias":
        names.append("q_proj_weight")
    candidates = (getattr(layer, name, None) for name in names)
    return next((w for w in candidates if isinstance(w, Tensor) and not is_lazy(w) and w.numel() > 0), None)


def _is_trained(parameter: Tensor, selected: Container[Tensor] | None) -> bool:
    if selected is not None and parameter not in selected:
        return False
    return parameter.requires_grad and parameter.is_floating_point() and not is_lazy(parameter)
