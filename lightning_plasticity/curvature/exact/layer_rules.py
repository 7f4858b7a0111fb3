"""Map each torch layer function to the way in which it uses its parameters.

A rule receives the output and the arguments of one call and returns a :class:`LayerCall`. The formulas of the Jacobians
are in ``parameter_uses``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import edge_of
from lightning_plasticity.curvature.exact.layer_calls import LayerCall
from lightning_plasticity.curvature.exact.parameter_uses import (
    Bias,
    ConvolutionWeight,
    EmbeddingTable,
    NormWeight,
    ParameterUse,
    TransposedConvolutionWeight,
    Weight,
)

LayerRule = Callable[..., "LayerCall | None"]
"""Maps a layer function's output, followed by its arguments, to a record; ``None`` if this call has no closed form."""


def _layer_call(
    output: Tensor, channels: int, uses: Sequence[ParameterUse | None], *, channels_first: bool = False
) -> LayerCall:
    present = [use for use in uses if use is not None]
    return LayerCall(edge_of(output), output.shape, channels, channels_first, present)


def _bias(bias: Tensor | None) -> Bias | None:
    return None if bias is None else Bias(bias)


def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall | None:
    if weight.dim() != 2:
        return None
    return _layer_call(output, weight.shape[0], [Weight(weight, input), _bias(bias)])


def _convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> LayerCall | None:
    # The input has no batch dimension, so there are no samples to separate.
    if input.dim() != weight.dim():
        return None
    values = input.detach()
    kernel = weight.shape[2:]

    def patches() -> Tensor:
        return _patches(values, kernel, stride, padding, dilation)

    uses = [ConvolutionWeight(weight, patches, groups), _bias(bias)]
    return _layer_call(output, weight.shape[0], uses, channels_first=True)


def _per_dimension(value: int | Sequence[int], dimensions: int) -> Sequence[int]:
    if isinstance(value, int):
        return [value] * dimensions
    return list(value) * dimensions if len(value) == 1 else value


def _patches(
    input: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    """Return the input patch of every output position, shape ``(batch, *output positions, channels, *kernel)``."""
    dimensions = len(kernel)
    strides, dilations = _per_dimension(stride, dimensions), _per_dimension(dilation, dimensions)
    spans = [step * (size - 1) for size, step in zip(kernel, dilations, strict=True)]
    if padding == "same":
        margins = [(span // 2, span - span // 2) for span in spans]
    elif isinstance(padding, str):
        margins = [(0, 0)] * dimensions
    else:
        margins = [(margin, margin) for margin in _per_dimension(padding, dimensions)]
    result = F.pad(input, [side for margin in reversed(margins) for side in margin])
    for dimension in range(dimensions):
        windows = result.unfold(2 + dimension, spans[dimension] + 1, strides[dimension])
        result = windows[..., :: dilations[dimension]]
    return result.movedim(1, 1 + dimensions)


def _transposed_convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> LayerCall | None:
    # The input has no batch dimension, so there are no samples to separate.
    if input.dim() != weight.dim():
        return None
    values = input.detach()
    kernel = weight.shape[2:]
    settings = [_per_dimension(setting, len(kernel)) for setting in (stride, padding, output_padding, dilation)]

    def patches() -> Tensor:
        return _transposed_patches(values, kernel, *settings)

    uses = [TransposedConvolutionWeight(weight, patches, groups), _bias(bias)]
    return _layer_call(output, output.shape[1], uses, channels_first=True)


def _transposed_patches(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the input patch of every output position, shape ``(batch, *output positions, channels, *kernel)``.

    A transposed convolution is a convolution of the input, dilated by the stride, with the flipped kernel.
    """
    dilated = input.new_zeros(
        *input.shape[:2], *[(size - 1) * step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]
    )
    every_step = tuple(slice(None, None, step) for step in (1, 1, *stride))
    dilated[every_step] = input
    margins = [step * (size - 1) - crop for size, step, crop in zip(kernel, dilation, padding, strict=True)]
    sides = [(margin, margin + extra) for margin, extra in zip(margins, output_padding, strict=True)]
    padded = F.pad(dilated, [side for pair in reversed(sides) for side in pair])
    return _patches(padded, kernel, 1, 0, dilation).flip(list(range(-len(kernel), 0)))


def _norm(
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
    shape: Sequence[int] | None = None,
) -> LayerCall:
    """Build the record of a norm layer.

    Args:
        output: The layer's output.
        weight: The layer's weight, if any.
        bias: The layer's bias, if any.
        normalized: Returns the normalised input, without weight and bias.
        shape: Shape of the weight, if it covers the last dimensions; ``None`` if it has one entry per channel of
            dimension 1.
    """
    channels_first = shape is None
    channels = output.shape[1] if shape is None else torch.Size(shape).numel()
    norm_weight = None
    if weight is not None:
        norm_weight = NormWeight(weight, normalized(), channels_first=channels_first)
    return _layer_call(output, channels, [norm_weight, _bias(bias)], channels_first=channels_first)


def _batch_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> LayerCall | None:
    # Batch statistics couple the samples.
    if training or running_mean is None or running_var is None:
        return None
    mean, variance = running_mean, running_var
    return _norm(output, weight, bias, lambda: F.batch_norm(input.detach(), mean, variance, eps=eps))


def _instance_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> LayerCall:
    # Running statistics must not be passed along with use_input_stats, which would update them.
    statistics = (None, None) if use_input_stats else (running_mean, running_var)
    return _norm(
        output,
        weight,
        bias,
        lambda: F.instance_norm(input.detach(), *statistics, use_input_stats=use_input_stats, eps=eps),
    )


def _group_norm(
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> LayerCall:
    return _norm(output, weight, bias, lambda: F.group_norm(input.detach(), num_groups, eps=eps))


def _layer_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> LayerCall:
    shape = list(normalized_shape)
    return _norm(output, weight, bias, lambda: F.layer_norm(input.detach(), shape, eps=eps), shape)


def _rms_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> LayerCall:
    shape = list(normalized_shape)
    return _norm(output, weight, None, lambda: F.rms_norm(input.detach(), shape, eps=eps), shape)


def _embedding(
    output: Tensor, input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: object, **__: object
) -> LayerCall | None:
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _layer_call(output, weight.shape[1], [EmbeddingTable(weight, input, padding_idx)])


LAYER_RULES: dict[Callable[..., Tensor], LayerRule] = {
    F.linear: _linear,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.conv_transpose1d: _transposed_convolution,
    F.conv_transpose2d: _transposed_convolution,
    F.conv_transpose3d: _transposed_convolution,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.embedding: _embedding,
}
"""Every layer function with a closed form, and its rule."""
