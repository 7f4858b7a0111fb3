"""List the kinds of layers, and hide how each kind lays out its weight.

This module is about layer *classes*. The *functions* of :mod:`torch.nn.functional` that are layers are listed in
:mod:`lightning_plasticity.activations.torch_functions` (for activations) and
:mod:`lightning_plasticity.curvature.exact.layer_rules` (for derivatives).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CONVOLUTIONS = nn.modules.conv._ConvNd
"""All convolutions, transposed ones included."""

TRANSPOSED_CONVOLUTIONS = nn.modules.conv._ConvTransposeNd
"""Convolutions with weights of shape ``(in, out / groups, *spatial)`` instead of ``(out, in / groups, *spatial)``."""

RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

LINEAR_LAYERS = (nn.Linear, CONVOLUTIONS, nn.MultiheadAttention, *RECURRENT_LAYERS)
"""Layers that multiply their input by a weight."""

BATCH_NORMS = nn.modules.batchnorm._NormBase
"""Norm layers with running statistics: batch and instance norm."""

NORM_LAYERS = (BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters are a scale around 1 and a bias around 0."""


def is_norm_layer(module: nn.Module) -> bool:
    """Return whether a module is a norm layer: one of :data:`NORM_LAYERS`, or one of another package.

    Those are modules with "norm" in the name of their class and with parameters that are vectors.

    Example:
        >>> import torch
        >>> class LlamaRMSNorm(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(size))
        >>> is_norm_layer(LlamaRMSNorm(4)), is_norm_layer(nn.BatchNorm2d(4)), is_norm_layer(nn.Linear(4, 4))
        (True, True, False)
    """
    if isinstance(module, NORM_LAYERS):
        return True
    if "norm" not in type(module).__name__.lower():
        return False
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    return bool(shapes) and all(max(shape, default=1) == shape.numel() for shape in shapes)


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the norm layers of a model."""
    return {p for module in model.modules() if is_norm_layer(module) for p in module.parameters(recurse=False)}


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is the ``Conv1D`` of transformers: linear, with a weight of shape ``(in, out)``.

    It is recognised by its name and its attribute ``nf``, the number of outputs.
    """
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution that computes each of its outputs from one input."""
    return isinstance(layer, CONVOLUTIONS) and not layer.transposed and layer.groups == layer.in_channels > 1


def is_grouped_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is a transposed convolution in groups."""
    return isinstance(layer, TRANSPOSED_CONVOLUTIONS) and layer.groups > 1


def has_units(layer: nn.Module) -> bool:
    """Return whether a layer is of a kind that computes units: linear, or a convolution that mixes channels."""
    if isinstance(layer, CONVOLUTIONS):
        return not (is_depthwise(layer) or is_grouped_transposed(layer))
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def input_channel_dim(layer: nn.Module) -> int:
    """Return the dimension of the input of a linear or convolution layer that counts channels, from the end.

    Example:
        >>> input_channel_dim(nn.Linear(3, 2)), input_channel_dim(nn.Conv2d(3, 2, kernel_size=1))
        (-1, -3)
    """
    return -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else -1


def weight_output_dim(layer: nn.Module) -> int:
    """Return the dimension of the weight of a layer that counts output channels (of one group, if transposed).

    Example:
        >>> weight_output_dim(nn.Conv1d(3, 2, kernel_size=1)), weight_output_dim(nn.ConvTranspose1d(3, 2, 1))
        (0, 1)
    """
    return 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) or is_conv1d(layer) else 0


def weight_by_output(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, or a tensor of its shape, with one row per output: ``(out, in / groups, *spatial)``.

    Only the weights of transposed convolutions and of ``Conv1D`` have another layout; the others are returned as they
    are.

    Example:
        >>> layer = nn.ConvTranspose1d(4, 6, kernel_size=5, groups=2)
        >>> layer.weight.shape, weight_by_output(layer, layer.weight).shape
        (torch.Size([4, 3, 5]), torch.Size([6, 2, 5]))
    """
    if is_conv1d(layer):
        return weight.T
    if not isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        return weight
    by_group: Tensor = weight.unflatten(0, (layer.groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1)


def broadcast_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Reshape one value per input channel, ``(in,)``, so that it broadcasts to the weight of the layer.

    Returns:
        A tensor that holds at each entry of the weight the value of the input channel that the entry multiplies.

    Example:
        >>> import torch
        >>> broadcast_inputs(nn.Conv1d(3, 2, kernel_size=5), torch.arange(3)).shape
        torch.Size([1, 3, 1])
        >>> broadcast_inputs(nn.Conv1d(4, 2, kernel_size=5, groups=2), torch.arange(4)).flatten(1)
        tensor([[0, 1],
                [2, 3]])
    """
    weight: Any = layer.weight
    trailing = [1] * (weight.ndim - 2)
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS) or is_conv1d(layer):
        return values.view(-1, 1, *trailing)
    groups: Any = getattr(layer, "groups", 1)
    # All outputs of a group read the same inputs; without groups, one row stands for all of them.
    rows = values.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0) if groups > 1 else values[None]
    return rows.view(*rows.shape, *trailing)
