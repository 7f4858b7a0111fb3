"""Kinds of layers, and which dimension of their tensors counts units."""

from __future__ import annotations

from torch import nn

CONVOLUTIONS = nn.modules.conv._ConvNd
TRANSPOSED_CONVOLUTIONS = nn.modules.conv._ConvTransposeNd
RECURRENT_LAYERS = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

LINEAR_LAYERS = (nn.Linear, CONVOLUTIONS, nn.MultiheadAttention, *RECURRENT_LAYERS)
"""Layers that multiply their input by a weight."""

BATCH_NORMS = nn.modules.batchnorm._NormBase
"""Norm layers with running statistics: batch and instance norm."""

NORM_LAYERS = (BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters are a scale around 1 and a bias around 0."""


def input_channel_dim(layer: nn.Module) -> int:
    """Return the dimension of the input of a linear or convolution layer that counts channels, from the end.

    Example:
        >>> input_channel_dim(nn.Linear(3, 2)), input_channel_dim(nn.Conv2d(3, 2, kernel_size=1))
        (-1, -3)
    """
    # A kernel has one dimension more than an image: (out, in, *spatial) against (channels, *spatial).
    return -1 if isinstance(layer, nn.Linear) else 1 - next(layer.parameters()).ndim


def output_channel_dim(layer: nn.Module) -> int:
    """Return the dimension of the weight of a linear or convolution layer that counts output channels.

    Example:
        >>> output_channel_dim(nn.Conv1d(3, 2, kernel_size=1)), output_channel_dim(nn.ConvTranspose1d(3, 2, 1))
        (0, 1)
    """
    # A transposed convolution keeps its weight as (in, out / groups, *spatial).
    return 1 if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else 0
