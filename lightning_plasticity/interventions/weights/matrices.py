"""Collect the weight matrices, biases and norm scales of a model's layers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_plasticity.interventions.weights.hooked_weights import HookedWeight, weights_from_hooks
from lightning_plasticity.isolation.state import eval_mode
from lightning_plasticity.layers import EMBEDDINGS, NORM_LAYERS, RECURRENT_LAYERS, weight_by_output


@dataclass(frozen=True)
class LayerWeights:
    """The trainable tensors of a layer, with their graph, in float32 at least.

    Args:
        matrices: Weight matrices by name, shape ``(out, in)`` each.
        biases: Biases, shape ``(out,)`` each.
        scales: Factors of norm layers.
    """

    matrices: dict[str, Tensor] = field(default_factory=dict)
    biases: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.matrices.values(), *self.biases, *self.scales]


def weight_matrices(model: nn.Module, selected: Container[Tensor] | None = None) -> dict[str, LayerWeights]:
    """Return the weights of each layer of a model as matrices, in the order in which the layers are registered.

    Any module with a ``weight`` of two dimensions or more counts as a layer, and its ``bias`` as a bias. Kernels are
    flattened to ``(out, in · kh · kw)``. The queries, keys and values of ``nn.MultiheadAttention`` and the gates of
    recurrent layers are a matrix each. Of weights that are computed from other tensors, by a parametrization or by a
    hook of torch (:func:`weights_from_hooks`), the results count. Tied weights appear once.

    This leaves out frozen parameters, embeddings (which are tables, not matrices, unless tied to a layer), weights that
    other hooks compute, and the parameters of other modules, such as tokens, positions or the slope of PReLU.

    Args:
        model: The model.
        selected: The parameters that count; by default all.

    Returns:
        The layers that have trainable weights, by name.

    Raises:
        ValueError: If the model has lazy layers that were never called.
    """
    layers: dict[str, LayerWeights] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        layer = LayerWeights()
        for name, tensor in _trainable_tensors(module, seen, selected):
            _add(layer, module, f"{path}.{name}" if path else name, name, tensor)
        if layer.matrices or layer.biases or layer.scales:
            layers[path] = layer
    return layers


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, with its graph, and others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _trainable_tensors(
    module: nn.Module, seen: set[int], selected: Container[Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the trainable weights and biases of a module itself, without the ``id`` of any in ``seen``."""
    from_hooks = weights_from_hooks(module)
    for name in _tensor_names(module, from_hooks):
        if not any(_counts(source, selected) for source in _sources(module, name, from_hooks)):
            continue
        if name in from_hooks:
            yield name, from_hooks[name].compute()
        elif parametrize.is_parametrized(module, name):
            # In training mode, spectral_norm would advance its power iteration.
            with eval_mode(module.get_submodule(f"parametrizations.{name}")):
                yield name, getattr(module, name)
        elif id(module._parameters[name]) not in seen:
            seen.add(id(module._parameters[name]))
            yield name, getattr(module, name)


def _sources(module: nn.Module, name: str, from_hooks: Mapping[str, HookedWeight]) -> list[nn.Parameter]:
    """Return the parameter of a name, or those that the tensor of this name is computed from."""
    if name in from_hooks:
        return from_hooks[name].sources
    if parametrize.is_parametrized(module, name):
        return list(module.get_submodule(f"parametrizations.{name}").parameters())
    return [module.get_parameter(name)]


def _counts(parameter: Tensor, selected: Container[Tensor] | None) -> bool:
    return parameter.requires_grad and (selected is None or parameter in selected)


def _tensor_names(module: nn.Module, from_hooks: Mapping[str, HookedWeight]) -> list[str]:
    """Return the names of a module's weights, biases and scales, frozen ones included."""
    hooked = {id(source) for weight in from_hooks.values() for source in weight.sources}
    names = [name for name, p in module._parameters.items() if p is not None and id(p) not in hooked]
    names += from_hooks
    if parametrize.is_parametrized(module):
        names += [str(name) for name in module.get_submodule("parametrizations")._modules]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in names if name.startswith("in_proj") or name.endswith("_proj_weight")]
    if isinstance(module, RECURRENT_LAYERS):
        return [name for name in names if name.startswith(("weight_", "bias_"))]
    if isinstance(module, EMBEDDINGS) or "weight" not in names:
        return []
    sources = _sources(module, "weight", from_hooks)
    if any(is_lazy(source) for source in sources):
        raise ValueError(f"{type(module).__name__} is lazy and was never called: call the model once first")
    # A computed weight has as many dimensions as the largest of the tensors that it is computed from.
    if not isinstance(module, NORM_LAYERS) and max(source.ndim for source in sources) < 2:
        return []
    return [name for name in names if name in ("weight", "bias")]


def _add(layer: LayerWeights, module: nn.Module, path: str, name: str, tensor: Tensor) -> None:
    """Add a tensor of a module to the weights of its layer."""
    tensor = at_least_float32(tensor)
    if isinstance(module, NORM_LAYERS):
        (layer.scales if name == "weight" else layer.biases).append(tensor)
        return
    count = _num_blocks(module, name, tensor)
    blocks = tensor.chunk(count) if count > 1 else (tensor,)
    if "bias" in name:
        layer.biases.extend(blocks)
        return
    for number, block in enumerate(blocks):
        block_path = path if len(blocks) == 1 else f"{path}[{number}]"
        layer.matrices[block_path] = weight_by_output(module, block).flatten(1)


def _num_blocks(module: nn.Module, name: str, tensor: Tensor) -> int:
    """Return the number of matrices stacked in a tensor: projections of attention, gates of a recurrent layer."""
    if isinstance(module, nn.MultiheadAttention) and name.startswith("in_proj"):
        return 3
    if isinstance(module, RECURRENT_LAYERS) and name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        return len(tensor) // int(module.hidden_size)
    return 1
