"""Compute the closed-form Jacobian of the network outputs with respect to one parameter, for each way to use it.

Each class is one formula: a matrix product, a convolution kernel, a bias, a norm weight, an embedding table, a factor
of an einsum. The module ``layer_rules`` maps torch's layer functions to these classes. ``ComputedParameter`` extends
them to tensors that are computed from parameters, such as slices and normalised weights.

Shapes: ``n`` samples; ``q`` rows of the Jacobian per sample; ``t`` positions (tokens, pixels) and ``c`` channels of the
layer's output per sample. A *cotangent* of a layer is the gradient of one row of each sample with respect to the
layer's output, shape ``(n, t, c)``. A parameter is seen as a matrix whose rows are its first dimension. Its Jacobian,
shape ``(n, q, rows, columns)``, is built for some rows at a time.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from typing_extensions import override

from lightning_plasticity.curvature.autograd_graph import Edge, gradient_edge

Rows = Tensor | slice
"""Some rows of a parameter, ascending: their indices, or a slice, which avoids a copy."""

JacobianRows = Callable[[Rows], Tensor]
"""Maps rows of a parameter to the Jacobian with respect to them, shape ``(n, q, rows, columns)``."""


_CHUNK_ELEMENTS = 2**24
"""Most entries of a computed tensor's Jacobian held at once: 64 MiB in float32."""

_HELD_ELEMENTS = 2**26
"""Most entries of a parameter's Jacobian kept in between; a larger one is computed anew for each group of rows."""


class ParameterUse(ABC):
    """One use of one parameter in one call of a layer function.

    Args:
        parameter: The parameter.
    """

    leading_positions = 1
    """Number of positions before the sample dimension in the layer's input and output: see :class:`LayerCall`."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def condense(self, cotangent: Tensor) -> Tensor:
        """Reduce a cotangent, ``(n, t, c)``, to what the Jacobian depends on, ``(n, ...)``; by default all of it."""
        return cotangent

    def condensed_elements(self, cotangent_elements: int) -> int:
        """Return the number of entries per sample of a condensed cotangent, given those of the cotangent."""
        return cotangent_elements

    def separates(self, num_samples: int, leading_positions: int) -> bool:
        """Return whether the formula holds for samples at these positions."""
        return True

    def of_base(self, base: Tensor) -> ParameterUse | None:
        """Return this use of a view as a use of the tensor below; ``None`` if it needs the chain rule."""
        return None

    @abstractmethod
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        """Return the Jacobian of the network outputs through this use, as a function of the parameter's rows.

        Args:
            condensed: The condensed cotangents of all rows of the Jacobian, shape ``(n, q, ...)``.
        """

    def active_rows(self) -> Tensor | None:
        """Return the ascending indices of the parameter's rows that the outputs can depend on; ``None`` for all."""
        return None


class Weight(ParameterUse):
    r"""The matrix of a linear layer, :math:`y_t = W x_t`: :math:`\partial f / \partial W = \sum_t g_t x_t^\top`."""

    def __init__(self, parameter: Tensor, inputs: Tensor) -> None:
        super().__init__(parameter)
        self._inputs = inputs.detach()

    def inputs(self, num_samples: int) -> Tensor:
        """Return the layer's inputs, shape ``(n, t, columns)``."""
        return per_sample(self._inputs, num_samples, self.parameter.shape[1], self.leading_positions)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        inputs = self.inputs(len(condensed))
        return lambda rows: torch.einsum("nqto,nti->nqoi", condensed[..., rows], inputs)


class ConvolutionWeight(ParameterUse):
    """The kernel of a convolution: for each group of channels, a matrix that multiplies input patches.

    Args:
        parameter: The kernel, shape ``(out_channels, in_channels / groups, *kernel)``.
        patches: Returns the input patches, shape ``(batch, *output positions, in_channels, *kernel)``.
        groups: Number of groups.
    """

    def __init__(self, parameter: Tensor, patches: Callable[[], Tensor], groups: int) -> None:
        super().__init__(parameter)
        self._make_patches = patches
        self._groups = groups

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        patches = self._make_patches().reshape(len(condensed), -1, self._groups, self.parameter[0].numel())
        if self._groups == 1:
            return lambda rows: torch.einsum("nqto,nti->nqoi", condensed[..., rows], patches[:, :, 0])
        group_of_row = torch.arange(self._groups, device=patches.device).repeat_interleave(
            self.parameter.shape[0] // self._groups
        )
        return lambda rows: torch.einsum("nqto,ntoi->nqoi", condensed[..., rows], patches[:, :, group_of_row[rows]])


class TransposedConvolutionWeight(ParameterUse):
    """The kernel of a transposed convolution: each row maps patches of one input channel to the outputs of its group.

    Args:
        parameter: The kernel, shape ``(in_channels, out_channels / groups, *kernel)``.
        patches: Returns the input patches, shape ``(batch, *output positions, in_channels, *kernel)``.
        groups: Number of groups.
    """

    def __init__(self, parameter: Tensor, patches: Callable[[], Tensor], groups: int) -> None:
        super().__init__(parameter)
        self._make_patches = patches
        self._groups = groups

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        num_samples, num_rows = condensed.shape[:2]
        in_channels = len(self.parameter)
        patches = self._make_patches().reshape(num_samples, -1, in_channels, self.parameter[0, 0].numel())
        by_group = condensed.reshape(num_samples, num_rows, -1, self._groups, self.parameter.shape[1])
        channels = torch.arange(in_channels, device=patches.device)
        group_size = in_channels // self._groups

        def jacobian(rows: Rows) -> Tensor:
            selected = channels[rows]
            group_of_row = selected // group_size
            parts = [
                torch.einsum(
                    "nqto,ntik->nqiok", by_group[..., group, :], patches[:, :, selected[group_of_row == group]]
                )
                for group in group_of_row.unique().tolist()
            ]
            return torch.cat(parts, dim=2).flatten(3)

        return jacobian


class Bias(ParameterUse):
    r"""A bias, :math:`y_t = \dots + b`: :math:`\partial f / \partial b = \sum_t g_t`."""

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        return cotangent.sum(1)

    @override
    def condensed_elements(self, cotangent_elements: int) -> int:
        return self.parameter.numel()

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        return _channel_jacobian(condensed, self.parameter)


class NormWeight(ParameterUse):
    r"""The weight of a norm layer, :math:`y_t = \gamma \hat x_t`, with the normalised input :math:`\hat x_t`.

    :math:`\partial f / \partial \gamma = \sum_t g_t \hat x_t`.
    """

    def __init__(self, parameter: Tensor, normalized: Tensor, *, channels_first: bool) -> None:
        super().__init__(parameter)
        self._normalized = normalized.detach()
        self._channels_first = channels_first

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        channels = self.parameter.numel()
        normalized = per_sample(
            self._normalized, len(cotangent), channels, self.leading_positions, channels_first=self._channels_first
        )
        return (cotangent * normalized).sum(1)

    @override
    def condensed_elements(self, cotangent_elements: int) -> int:
        return self.parameter.numel()

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        return _channel_jacobian(condensed, self.parameter)


class EmbeddingTable(ParameterUse):
    r"""The table of an embedding, :math:`y_t = E_{i_t}`: :math:`\partial f / \partial E_v = \sum_{t : i_t = v} g_t`."""

    def __init__(self, parameter: Tensor, indices: Tensor, padding_index: int | None) -> None:
        super().__init__(parameter)
        self._indices = indices.detach()
        self._padding_index = padding_index

    @override
    def active_rows(self) -> Tensor | None:
        used: Tensor = self._indices.unique()
        return used if self._padding_index is None else used[used != self._padding_index]

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        indices = per_sample(self._indices, len(condensed), 1, self.leading_positions)
        vocabulary = torch.arange(len(self.parameter), device=indices.device)

        def jacobian(rows: Rows) -> Tensor:
            selected = vocabulary[rows]
            one_hot = indices == selected
            if self._padding_index is not None:
                one_hot &= selected != self._padding_index
            return torch.einsum("nqtd,ntv->nqvd", condensed, one_hot.to(condensed.dtype))

        return jacobian


class Product(ParameterUse):
    r"""A factor of a sum of products as in :func:`torch.einsum`, :math:`y = \sum p\, x\, x' \cdots + \dots`.

    The Jacobian is a sum of products, too, over all labels that :math:`p` does not have:
    :math:`\partial f / \partial p = \sum g\, x\, x' \cdots`. Without other factors, :math:`p` is broadcast.

    Args:
        parameter: The parameter :math:`p`.
        labels: A number for each dimension of the parameter: its dimension in the output, or one that the output does
            not have, over which the products are summed.
        factors: The other factors :math:`x`, with their labels.
        output_shape: Shape of the output, whose dimensions have the labels 0, 1, ...
    """

    def __init__(
        self,
        parameter: Tensor,
        labels: Sequence[int],
        factors: Sequence[tuple[Tensor, Sequence[int]]],
        output_shape: Sequence[int],
    ) -> None:
        super().__init__(parameter)
        self._output_shape = torch.Size(output_shape)
        self._labels = _without_ones(parameter.shape, labels)
        self._factors = [(factor.detach().squeeze(), _without_ones(factor.shape, own)) for factor, own in factors]
        # Labels of the parameter alone: all of its entries along them have the same derivative.
        present = {*range(len(output_shape)), *[label for _, own in self._factors for label in own]}
        for size, label in zip(parameter.shape, labels, strict=True):
            if size != 1 and label not in present:
                self._factors.append((parameter.new_ones(size).detach(), [label]))

    @override
    def separates(self, num_samples: int, leading_positions: int) -> bool:
        axes = _axes(self._output_shape, num_samples, leading_positions)
        if axes is None:
            return False
        with_samples = {dim for dim, own in enumerate(axes) if any(holds_samples for _, holds_samples in own)}
        return not with_samples.intersection(self._labels)

    @override
    def of_base(self, base: Tensor) -> ParameterUse | None:
        view = self.parameter
        if view._base is not base or view.numel() != base.numel():
            return None
        # The same strides in another order: a transposition.
        strides = [stride for size, stride in zip(view.shape, view.stride(), strict=True) if size != 1]
        label_of_stride = dict(zip(strides, self._labels, strict=True))
        base_strides = [stride for size, stride in zip(base.shape, base.stride(), strict=True) if size != 1]
        if sorted(strides) != sorted(base_strides):
            return None
        result = copy.copy(self)
        vars(result).update(parameter=base, _labels=[label_of_stride[stride] for stride in base_strides])
        return result

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        if not self._condenses(len(cotangent)):
            return cotangent
        return self._contract(cotangent.flatten(1)[:, None], slice(None))[:, 0].flatten(1)

    @override
    def condensed_elements(self, cotangent_elements: int) -> int:
        return min(self.parameter.numel(), cotangent_elements)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        if self._condenses(len(condensed)):
            jacobian = condensed.reshape(
                *condensed.shape[:2], self.parameter.shape[0] if self.parameter.dim() else 1, -1
            )
            return lambda rows: jacobian[:, :, rows]
        return lambda rows: self._contract(condensed.flatten(2), rows)

    def _condenses(self, num_samples: int) -> bool:
        """Return whether the Jacobian of a row has no more entries than its cotangent."""
        return self.parameter.numel() * num_samples <= self._output_shape.numel()

    def _contract(self, cotangents: Tensor, rows: Rows) -> Tensor:
        """Return the Jacobian ``(n, q, rows, columns)`` of cotangents ``(n, q, outputs of a sample)``."""
        num_samples, num_rows = cotangents.shape[:2]
        axes = _axes(self._output_shape, num_samples, self.leading_positions)
        assert axes is not None
        numbers = itertools.count(1)
        # Label 0 is the row of the Jacobian. Output dimensions have a label for each of their axes.
        axis_labels = [[next(numbers) for _ in own] for own in axes]
        summed = {label: next(numbers) for _, own in self._factors for label in own if label >= len(axes)}
        flat = [
            (size, label, samples)
            for own, names in zip(axes, axis_labels, strict=True)
            for (size, samples), label in zip(own, names, strict=True)
        ]
        in_samples = [(size, label) for size, label, samples in flat if samples]
        in_positions = [(size, label) for size, label, samples in flat if not samples]

        def relabel(labels: Sequence[int]) -> list[int]:
            return [new for label in labels for new in (axis_labels[label] if label < len(axes) else [summed[label]])]

        shape = [size for size, _ in in_samples] + [num_rows] + [size for size, _ in in_positions]
        operands = [
            (cotangents.reshape(shape), [label for _, label in in_samples] + [0] + [label for _, label in in_positions])
        ]
        for factor, own in self._factors:
            sizes = [
                new
                for size, label in zip(factor.shape, own, strict=True)
                for new in ([s for s, _ in axes[label]] if label < len(axes) else [size])
            ]
            operands.append((factor.reshape(sizes), relabel(own)))
        labels = relabel(self._labels)
        if self.parameter.dim() and self.parameter.shape[0] != 1:
            operands = [
                (operand[(slice(None),) * own.index(labels[0]) + (rows,)] if labels[0] in own else operand, own)
                for operand, own in operands
            ]
        arguments = [argument for pair in operands for argument in pair]
        jacobian = torch.einsum(*arguments, [*[label for _, label in in_samples], 0, *labels])
        columns = self.parameter[0].numel() if self.parameter.dim() else 1
        return jacobian.reshape(num_samples, num_rows, -1, columns)


class ComputedParameter(ParameterUse):
    r"""The use of a tensor :math:`\phi` computed from a parameter: :math:`\partial f / \partial p` by the chain rule.

    Args:
        parameter: The parameter :math:`p`.
        edge: Autograd edge of :math:`\phi`.
        use: The use of :math:`\phi`.
    """

    def __init__(self, parameter: Tensor, edge: Edge, use: ParameterUse) -> None:
        super().__init__(parameter)
        self._edge = edge
        self._use = use

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        return self._use.condense(cotangent)

    @override
    def condensed_elements(self, cotangent_elements: int) -> int:
        return self._use.condensed_elements(cotangent_elements)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        num_samples, num_rows = condensed.shape[:2]
        if num_samples * num_rows * self.parameter.numel() > _HELD_ELEMENTS:
            return lambda rows: self._chain(condensed, rows)
        jacobian = self._chain(condensed, slice(None))
        return lambda rows: jacobian[:, :, rows]

    def _chain(self, condensed: Tensor, rows: Rows) -> Tensor:
        """Return the Jacobian ``(n, q, rows, columns)`` by batched backward passes from the computed tensor."""
        num_samples = len(condensed)
        size = max(self.parameter.numel(), self._use.parameter.numel()) * num_samples
        parts = []
        for chunk in condensed.split(max(1, _CHUNK_ELEMENTS // size), dim=1):
            cotangents = self._use.jacobian(chunk)(slice(None)).reshape(-1, *self._use.parameter.shape)
            products = _products_with(gradient_edge(self._edge), self.parameter, cotangents)
            by_row = products.reshape(*chunk.shape[:2], self.parameter.shape[0] if self.parameter.dim() else 1, -1)
            parts.append(by_row[:, :, rows])
        return torch.cat(parts, dim=1)


def _products_with(edge: GradientEdge, parameter: Tensor, cotangents: Tensor) -> Tensor:
    """Return the products of each cotangent with the Jacobian of a tensor, ``(cotangents, *shape)``."""
    try:
        (products,) = torch.autograd.grad(
            edge, parameter, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    # A backward pass without a batched form, such as that of a sparse embedding.
    except RuntimeError:
        return torch.stack(
            [torch.autograd.grad(edge, parameter, one, retain_graph=True)[0].to_dense() for one in cotangents]
        )
    return parameter.new_zeros(len(cotangents), *parameter.shape) if products is None else products


def _without_ones(shape: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Return the labels of the dimensions that are not of size one, which are broadcast."""
    return [label for size, label in zip(shape, labels, strict=True) if size != 1]


def _axes(shape: Sequence[int], num_samples: int, leading_positions: int) -> list[list[tuple[int, bool]]] | None:
    """Divide each dimension of a shape where the samples, after ``leading_positions``, begin and end.

    Returns:
        For each dimension, the sizes of its parts and whether they count samples; ``None`` if samples begin or end
        between the multiples of later dimensions.
    """
    axes: list[list[tuple[int, bool]]] = []
    start = 1
    first, last = leading_positions, leading_positions * num_samples
    for size in shape:
        end = start * size
        own: list[tuple[int, bool]] = []
        for cut in [*sorted({cut for cut in (first, last) if start < cut < end}), end]:
            if cut % start:
                return None
            own.append((cut // start, first < cut <= last and cut > start))
            start = cut
        axes.append(own)
    return axes


def per_sample(
    values: Tensor, num_samples: int, channels: int, leading_positions: int, *, channels_first: bool = False
) -> Tensor:
    """Reshape a layer's input or output to ``(n, t, c)``.

    Args:
        values: Shape ``(n * ..., c, ...)`` if channels are first, else ``(leading_positions, n, ..., c)``, where
            neighbouring dimensions may be flattened.
        num_samples: ``n``.
        channels: ``c``.
        leading_positions: Number of positions before the sample dimension, if channels are last.
        channels_first: Whether channels are dimension 1.
    """
    if channels_first:
        return values.reshape(num_samples, -1, channels, values[0, 0].numel()).transpose(2, 3).flatten(1, 2)
    return values.reshape(leading_positions, num_samples, -1, channels).transpose(0, 1).flatten(1, 2)


def _channel_jacobian(gradients: Tensor, parameter: Tensor) -> JacobianRows:
    """Return the Jacobian with respect to a parameter with one entry per channel, given its gradients ``(n, q, c)``."""
    jacobian = gradients.reshape(*gradients.shape[:2], parameter.shape[0], -1)
    return lambda rows: jacobian[:, :, rows]
