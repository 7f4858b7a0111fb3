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
    Product,
    TransposedConvolutionWeight,
    Weight,
)

LayerRule = Callable[..., "LayerCall | None"]
"""Maps a layer function's output, followed by its arguments, to a record; ``None`` if this call has no closed form."""


def _functions(*names: str) -> list[Callable[..., Tensor]]:
    """Return the functions and the methods of tensors with these names."""
    return [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]


IN_PLACE_FUNCTIONS = frozenset(
    _functions("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__")
)
"""The broadcasting functions that change their first argument."""

BROADCASTING_FUNCTIONS = IN_PLACE_FUNCTIONS.union(
    _functions("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "__pow__"),
    _functions("where", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "logaddexp"),
)
"""Functions of single entries, which broadcast their arguments to a common shape.

Their parameters are expanded to this shape in a call of its own, whose closed form is a sum over the copies, whatever
the function is.
"""


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


def _products(output: Tensor, uses: Sequence[ParameterUse | None]) -> LayerCall:
    return _layer_call(output, 1, uses)


def broadcast(output: Tensor, parameter: Tensor, *_: object, **__: object) -> LayerCall:
    """Build the record of an expansion of a parameter to the shape of the output."""
    return _products(output, [Product(parameter, _last_labels(output, parameter), [], output.shape)])


def _last_labels(output: Tensor, operand: Tensor) -> range:
    """Return the dimensions of the output that those of an operand are broadcast to."""
    return range(output.dim() - operand.dim(), output.dim())


def _repeat(output: Tensor, parameter: Tensor, *_: object, **__: object) -> LayerCall | None:
    padded = (1,) * (output.dim() - parameter.dim()) + parameter.shape
    if any(size not in (1, total) for size, total in zip(padded, output.shape, strict=True)):
        return None
    return broadcast(output, parameter)


def _stack(output: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> LayerCall | None:
    if any(tensor is not tensors[0] for tensor in tensors):
        return None
    labels = [label for label in range(output.dim()) if label != dim % output.dim()]
    return _products(output, [Product(tensors[0], labels, [], output.shape)])


def _index(output: Tensor, parameter: Tensor, index: object) -> LayerCall | None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype in (torch.bool, torch.uint8):
        return None
    return _layer_call(output, parameter[0].numel(), [EmbeddingTable(parameter, index % len(parameter), None)])


def _index_select(output: Tensor, input: Tensor, dim: int, index: Tensor) -> LayerCall | None:
    return _index(output, input, index) if dim == 0 else None


def _sum_of_products(output: Tensor, operands: Sequence[tuple[Tensor, Sequence[int]]]) -> LayerCall:
    """Build the record of an einsum, given every operand with its labels: see :class:`Product`."""
    uses = [
        Product(operand, labels, [*operands[:position], *operands[position + 1 :]], output.shape)
        for position, (operand, labels) in enumerate(operands)
        if operand.requires_grad
    ]
    return _products(output, uses)


def _factors_of_matmul(output: Tensor, input: Tensor, other: Tensor) -> list[tuple[Tensor, Sequence[int]]]:
    """Return the operands of :func:`torch.matmul` with their labels in an einsum."""
    rows, columns = min(input.dim() - 1, 1), min(other.dim() - 1, 1)
    summed, batch = output.dim(), range(output.dim() - rows - columns)
    input_batch, other_batch = (batch[len(batch) - max(operand.dim() - 2, 0) :] for operand in (input, other))
    return [
        (input, [*input_batch, *[len(batch)] * rows, summed]),
        (other, [*other_batch, summed, *[summed - 1] * columns]),
    ]


def _matmul(output: Tensor, input: Tensor, other: Tensor) -> LayerCall:
    return _sum_of_products(output, _factors_of_matmul(output, input, other))


def _addmm(
    output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> LayerCall:
    product = _sum_of_products(output, [*_factors_of_matmul(output, mat1, mat2), *_scale(mat1, alpha)])
    summand = _sum_of_products(output, [(input, _last_labels(output, input)), *_scale(input, beta)])
    return _products(output, [*product.uses, *summand.uses])


def _scale(like: Tensor, scale: float) -> list[tuple[Tensor, Sequence[int]]]:
    """Return a constant factor of an einsum."""
    return [] if scale == 1 else [(like.new_tensor(scale), [])]


def _einsum(output: Tensor, equation: object, *operands: object) -> LayerCall | None:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if not isinstance(equation, str) or len(tensors) != len(operands):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        result = "..." * ("..." in inputs) + "".join(sorted(c for c in inputs if c.isalpha() and inputs.count(c) == 1))
    labels = {symbol: dim for dim, symbol in enumerate(_symbols(result, output.dim()))}
    terms = [_symbols(term, tensor.dim()) for term, tensor in zip(inputs.split(","), tensors, strict=True)]
    # A diagonal.
    if any(len(set(term)) < len(term) for term in terms):
        return None
    numbered = [[labels.setdefault(symbol, len(labels)) for symbol in term] for term in terms]
    return _sum_of_products(output, list(zip(tensors, numbered, strict=True)))


def _symbols(term: str, dims: int) -> list[str | int]:
    """Return a symbol for each dimension of an operand: its letter, or its place in the ellipsis from the right."""
    left, _, right = term.partition("...")
    return [*left, *range(len(left) + len(right) - dims, 0), *right]


def _prelu(output: Tensor, input: Tensor, weight: Tensor) -> LayerCall:
    negative = (input.detach().clamp(max=0), range(input.dim()))
    labels = [1] if input.dim() > 1 else [0]
    return _products(output, [Product(weight, labels, [negative], output.shape)])


def _bilinear(output: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    last = output.dim() - 1
    positions = range(last)
    factors = [(input1, [*positions, last + 1]), (input2, [*positions, last + 2])]
    uses = [Product(weight, [last, last + 1, last + 2], factors, output.shape)]
    if bias is not None:
        uses.append(Product(bias, [last], [], output.shape))
    return _products(output, uses)


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
    F.prelu: _prelu,
    F.bilinear: _bilinear,
    torch.einsum: _einsum,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.stack: _stack,
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
    Tensor.__getitem__: _index,
    Tensor.expand: broadcast,
    Tensor.expand_as: broadcast,
    torch.broadcast_to: broadcast,
    Tensor.broadcast_to: broadcast,
    Tensor.repeat: _repeat,
    torch.tile: _repeat,
    Tensor.tile: _repeat,
    **dict.fromkeys(_functions("matmul", "__matmul__", "mm", "bmm", "mv"), _matmul),
}
"""Every layer function with a closed form, and its rule."""
