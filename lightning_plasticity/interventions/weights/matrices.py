"""What layers are made of: the matrices they multiply by, what they add, and the gains of norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_plasticity.isolation.state import eval_mode
from lightning_plasticity.layers import EMBEDDINGS, NORM_LAYERS, RECURRENT_LAYERS, TRANSPOSED_CONVOLUTIONS


@dataclass(frozen=True)
class LayerWeights:
    """The trainable tensors of a layer, with their graph, in float32 at least.

    Args:
        matrices: Shape ``(out, in)`` each, by name.
        biases: What is added, as biases are: shape ``(out,)`` each.
        scales: What norm layers multiply by.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    biases: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)


def weight_matrices(model: nn.Module) -> dict[str, LayerWeights]:
    """Takes the layers of a model apart, in the order in which they are registered.

    Any module with a ``weight`` of two dimensions or more counts as a layer, and ``bias`` is what it adds. Kernels are
    flattened to ``(out, in · kh · kw)``. The queries, keys and values of ``nn.MultiheadAttention`` and the gates of
    recurrent layers are a matrix each. Of parametrized layers it is the weight that comes out. Tied weights are there
    once.

    Left out are frozen parameters, embeddings (they are looked up, not multiplied by, unless tied to a layer), layers
    with torch's old ``weight_norm`` and ``spectral_norm`` hooks, and the parameters of other modules, such as tokens,
    positions or the slope of PReLU.

    Args:
        model: The model.

    Returns:
        The layers that have something trainable, by name.

    Raises:
        ValueError: If there are none.
    """
    layers: dict[str, LayerWeights] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        layer = LayerWeights()
        for name, tensor in _trainable(module, seen):
            _add(layer, module, f"{path}.{name}" if path else name, name, tensor)
        if layer.matrices or layer.biases or layer.scales:
            layers[path] = layer
    if not layers:
        raise ValueError(f"{type(model).__name__} has no trainable layer with a weight of two dimensions or more")
    return layers


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, with its graph."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _trainable(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the module itself, and parametrized tensors, that are trained and new."""
    for name in _kinds(module):
        if parametrize.is_parametrized(module, name):
            originals = module.get_submodule(f"parametrizations.{name}")
            if any(parameter.requires_grad for parameter in originals.parameters()):
                with eval_mode(originals):  # spectral_norm would advance its own power iteration
                    yield name, getattr(module, name)
        else:
            parameter = module._parameters[name]
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def _kinds(module: nn.Module) -> list[str]:
    """Names of the tensors of a module that are matrices, shifts or gains."""
    held = [name for name, parameter in module._parameters.items() if parameter is not None]
    if parametrize.is_parametrized(module):
        held += [str(name) for name in module.get_submodule("parametrizations")._modules]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in held if name.startswith("in_proj") or name.endswith("_proj_weight")]
    if isinstance(module, RECURRENT_LAYERS):
        return [name for name in held if name.startswith(("weight_", "bias_"))]
    if isinstance(module, EMBEDDINGS) or "weight" not in held:
        return []
    if not isinstance(module, NORM_LAYERS) and _ndim(module, "weight") < 2:
        return []
    return [name for name in held if name in ("weight", "bias")]


def _ndim(module: nn.Module, name: str) -> int:
    parameter = module._parameters.get(name)
    if parameter is None:  # parametrized: what comes out has the dimensions of one of what goes in
        return max(original.ndim for original in module.get_submodule(f"parametrizations.{name}").parameters())
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(module).__name__} is lazy and was never called: call the model once first")
    return parameter.ndim


def _add(layer: LayerWeights, module: nn.Module, path: str, name: str, tensor: Tensor) -> None:
    tensor = at_least_float32(tensor)
    if isinstance(module, NORM_LAYERS):
        (layer.scales if name == "weight" else layer.biases).append(tensor)
        return
    blocks = tensor.chunk(_count(module, name, tensor))
    if "bias" in name:
        layer.biases.extend(blocks)
    else:
        for number, block in enumerate(blocks):
            matrix = _by_output(module, block) if isinstance(module, TRANSPOSED_CONVOLUTIONS) else block
            layer.matrices[path if len(blocks) == 1 else f"{path}[{number}]"] = matrix.flatten(1)


def _count(module: nn.Module, name: str, tensor: Tensor) -> int:
    """How many matrices are stacked in the tensor."""
    if isinstance(module, nn.MultiheadAttention) and name.startswith("in_proj"):
        return 3
    if isinstance(module, RECURRENT_LAYERS) and name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        return len(tensor) // int(module.hidden_size)
    return 1


def _by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """The kernel of a transposed convolution, ``(in, out / groups, ...)``, as ``(out, in / groups, ...)``."""
    groups: int = module.groups  # type: ignore[assignment]
    by_group: Tensor = weight.unflatten(0, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1)
