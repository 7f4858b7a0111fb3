"""How a layer can use a parameter: closed forms of the Jacobian of the network's outputs by the parameters of a layer.

Shapes, in all of this file: ``n`` samples; ``q`` output numbers of the network per sample; ``t`` positions (tokens,
pixels) and ``c`` channels of the layer's output per sample. The *cotangents* of a layer are the gradients of every
output of the network by the layer's output, shape ``(n, q, t, c)``. A parameter is seen as a matrix whose rows are
its first dimension, so that its Jacobian, shape ``(n, q, rows, columns)``, can be built some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.curvature.graph import Edge


class ParameterUse(ABC):
    """One use of one parameter in one call of a layer function.

    Args:
        parameter: The parameter.
    """

    outer = 1
    """How many positions come before the samples in what the layer took and returned: see :class:`LayerCall`."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    @abstractmethod
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        """Jacobian of the network's outputs by the given rows of the parameter, through this use.

        Args:
            cotangents: Shape ``(n, q, t, c)``.
            rows: Indices of rows of the parameter, shape ``(k,)``.

        Returns:
            Shape ``(n, q, k, columns)``.
        """

    def active_rows(self) -> Tensor:
        """The rows of the parameter that this use can touch, ascending."""
        return torch.arange(self.parameter.shape[0], device=self.parameter.device)

    def _inputs_by_sample(self, inputs: Tensor, samples: int, channels: int) -> Tensor:
        return _by_sample(inputs, samples, channels, self.outer)


class Weight(ParameterUse):
    r"""The matrix of a linear layer, :math:`y_t = W x_t`: :math:`\partial f / \partial W = \sum_t g_t x_t^\top`."""

    def __init__(self, parameter: Tensor, inputs: Tensor) -> None:
        super().__init__(parameter)
        self._inputs = inputs.detach()

    def inputs(self, samples: int) -> Tensor:
        """What the matrix is applied to, shape ``(n, t, columns)``."""
        return self._inputs_by_sample(self._inputs, samples, self.parameter.shape[1])

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("nqto,nti->nqoi", cotangents[..., rows], self.inputs(len(cotangents)))


class ConvolutionWeight(ParameterUse):
    """The kernel of a convolution: a matrix applied to the patch of the input under it, group by group."""

    def __init__(self, parameter: Tensor, patches: Callable[[], Tensor], groups: int) -> None:
        super().__init__(parameter)
        self._make_patches = patches
        self._patches: Tensor | None = None
        self._groups = groups

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        if self._patches is None:
            self._patches = self._make_patches()
        samples = len(cotangents)
        patches = self._patches.reshape(samples, -1, self._groups, self.parameter[0].numel())
        if self._groups == 1:
            return torch.einsum("nqto,nti->nqoi", cotangents[..., rows], patches[:, :, 0])
        group_of_row = rows // (self.parameter.shape[0] // self._groups)
        return torch.einsum("nqto,ntoi->nqoi", cotangents[..., rows], patches[:, :, group_of_row])


class TransposedConvolutionWeight(ParameterUse):
    """The kernel of a transposed convolution: each input channel has a matrix for what of it reaches an output."""

    def __init__(self, parameter: Tensor, patches: Callable[[], Tensor], groups: int) -> None:
        super().__init__(parameter)
        self._make_patches = patches
        self._patches: Tensor | None = None
        self._groups = groups

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        if self._patches is None:
            self._patches = self._make_patches()
        samples, width = cotangents.shape[:2]
        patches = self._patches.reshape(samples, -1, len(self.parameter), self.parameter[0, 0].numel())
        by_group = cotangents.reshape(samples, width, -1, self._groups, self.parameter.shape[1])
        group_of_row = rows // (len(self.parameter) // self._groups)
        parts = [
            torch.einsum("nqto,ntik->nqiok", by_group[..., group, :], patches[:, :, rows[group_of_row == group]])
            for group in group_of_row.unique().tolist()
        ]
        return torch.cat(parts, dim=2)


class Shift(ParameterUse):
    r"""A bias, :math:`y_t = \dots + b`: :math:`\partial f / \partial b = \sum_t g_t`."""

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        return _rows_of_channels(cotangents.sum(2), self.parameter, rows)


class Scale(ParameterUse):
    r"""The gain of a norm layer, :math:`y_t = \gamma \hat x_t`, with the normalised input :math:`\hat x_t`.

    :math:`\partial f / \partial \gamma = \sum_t g_t \hat x_t`.
    """

    def __init__(self, parameter: Tensor, normalized: Tensor) -> None:
        super().__init__(parameter)
        self._normalized = normalized.detach()

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        normalized = self._inputs_by_sample(self._normalized, len(cotangents), self.parameter.numel())
        return _rows_of_channels(torch.einsum("nqtc,ntc->nqc", cotangents, normalized), self.parameter, rows)


class Lookup(ParameterUse):
    r"""The table of an embedding, :math:`y_t = E_{i_t}`: :math:`\partial f / \partial E_v = \sum_{t : i_t = v} g_t`."""

    def __init__(self, parameter: Tensor, indices: Tensor, padding_index: int | None) -> None:
        super().__init__(parameter)
        self._indices = indices.detach()
        self._padding_index = padding_index

    @override
    def active_rows(self) -> Tensor:
        used: Tensor = self._indices.unique()
        return used if self._padding_index is None else used[used != self._padding_index]

    @override
    def jacobian(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        indices = self._inputs_by_sample(self._indices, len(cotangents), 1)
        hit = indices == rows
        if self._padding_index is not None:
            hit &= rows != self._padding_index
        return torch.einsum("nqtd,ntv->nqvd", cotangents, hit.to(cotangents.dtype))


def _by_sample(values: Tensor, samples: int, channels: int, outer: int) -> Tensor:
    """Turns ``(outer, n, inner, c)``, however it is flattened, into ``(n, t, c)``."""
    return values.reshape(outer, samples, -1, channels).transpose(0, 1).reshape(samples, -1, channels)


def _rows_of_channels(by_channel: Tensor, parameter: Tensor, rows: Tensor) -> Tensor:
    """Turns ``(n, q, c)``, one number an entry of the parameter, into ``(n, q, k, columns)``."""
    return by_channel.reshape(*by_channel.shape[:2], parameter.shape[0], -1)[:, :, rows]


@dataclass(eq=False)
class LayerCall:
    """One call of a layer function that used trainable parameters.

    Args:
        output: Where the layer's output stands in the autograd graph.
        output_shape: Shape of that output.
        channels: Number of channels ``c``.
        channels_first: Whether the channels are dimension 1 (convolutions, BatchNorm) rather than the last ones.
        uses: What was used in it.
        inputs: Where everything else stands that it took and that requires gradients.
        outer: How many positions come before the samples: 1 if these are the first dimension, the number of tokens if
            the tokens are.
    """

    output: Edge
    output_shape: torch.Size
    channels: int
    channels_first: bool
    uses: list[ParameterUse]
    inputs: list[Edge] = field(default_factory=list)
    outer: int = 1

    def arrangements(self, samples: int) -> list[int]:
        """What ``outer`` can be, given the number of samples: the likely first."""
        positions, shape = self.output_shape.numel() // self.channels, self.output_shape
        if self.channels_first or samples == 1:
            return [1] if positions % samples == 0 else []
        in_the_middle = [shape[:place].numel() for place, size in enumerate(shape[:-1]) if size == samples]
        possible = dict.fromkeys([1, *in_the_middle, positions // samples])
        return [outer for outer in possible if outer and positions % (outer * samples) == 0]

    def arrange(self, outer: int) -> None:
        """Sets ``outer``, here and for the uses."""
        self.outer = outer
        for use in self.uses:
            use.outer = outer

    def by_sample(self, cotangent: Tensor, samples: int, outer: int) -> Tensor:
        """Brings a gradient by the layer's output into the shape ``(n, t, c)``."""
        if self.channels_first:
            cotangent = cotangent.movedim(1, -1)
        return _by_sample(cotangent, samples, self.channels, outer)
