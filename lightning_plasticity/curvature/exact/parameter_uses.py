"""How a layer can use a parameter: closed forms of the Jacobian of the network's outputs by the parameters of a layer.

Shapes, in all of this file: ``n`` samples; ``q`` rows of the Jacobian per sample; ``t`` positions (tokens, pixels) and
``c`` channels of the layer's output per sample. A *cotangent* of a layer is the gradient of one row of each sample by
the layer's output, shape ``(n, t, c)``. A parameter is seen as a matrix whose rows are its first dimension, so that its
Jacobian, shape ``(n, q, rows, columns)``, can be built some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.curvature.autograd_graph import Edge

Rows = Tensor | slice
"""Some rows of a parameter, ascending: their indices, or a slice, which copies nothing."""

JacobianRows = Callable[[Rows], Tensor]
"""Takes rows of a parameter; returns the Jacobian by them, ``(n, q, rows, columns)``."""


class ParameterUse(ABC):
    """One use of one parameter in one call of a layer function.

    Args:
        parameter: The parameter.
    """

    outer = 1
    """How many positions come before the samples in what the layer took and returned: see :class:`LayerCall`."""

    by_channel = False
    """Whether condensed cotangents have one number a channel, rather than one a position and channel."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def condense(self, cotangent: Tensor) -> Tensor:
        """What of a cotangent, ``(n, t, c)``, the Jacobian depends on, ``(n, ...)``: all of it, or less."""
        return cotangent

    @abstractmethod
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        """Jacobian of the network's outputs by the parameter, through this use.

        Args:
            condensed: The condensed cotangents of ``q`` outputs, shape ``(n, q, ...)``.
        """

    def active_rows(self) -> Tensor | None:
        """The rows of the parameter that this use can touch, ascending; ``None`` stands for all."""
        return None


class Weight(ParameterUse):
    r"""The matrix of a linear layer, :math:`y_t = W x_t`: :math:`\partial f / \partial W = \sum_t g_t x_t^\top`."""

    def __init__(self, parameter: Tensor, inputs: Tensor) -> None:
        super().__init__(parameter)
        self._inputs = inputs.detach()

    def inputs(self, samples: int) -> Tensor:
        """What the matrix is applied to, shape ``(n, t, columns)``."""
        return by_sample(self._inputs, samples, self.parameter.shape[1], self.outer)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        inputs = self.inputs(len(condensed))
        return lambda rows: torch.einsum("nqto,nti->nqoi", condensed[..., rows], inputs)


class ConvolutionWeight(ParameterUse):
    """The kernel of a convolution: a matrix applied to the patch of the input under it, group by group."""

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
    """The kernel of a transposed convolution: each input channel has a matrix for what of it reaches an output."""

    def __init__(self, parameter: Tensor, patches: Callable[[], Tensor], groups: int) -> None:
        super().__init__(parameter)
        self._make_patches = patches
        self._groups = groups

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        samples, width = condensed.shape[:2]
        patches = self._make_patches().reshape(samples, -1, len(self.parameter), self.parameter[0, 0].numel())
        by_group = condensed.reshape(samples, width, -1, self._groups, self.parameter.shape[1])
        every_row = torch.arange(len(self.parameter), device=patches.device)
        size = len(self.parameter) // self._groups

        def jacobian(rows: Rows) -> Tensor:
            chosen = every_row[rows]
            parts = [
                torch.einsum(
                    "nqto,ntik->nqiok", by_group[..., group, :], patches[:, :, chosen[chosen // size == group]]
                )
                for group in (chosen // size).unique().tolist()
            ]
            return torch.cat(parts, dim=2).flatten(3)

        return jacobian


class Bias(ParameterUse):
    r"""A bias, :math:`y_t = \dots + b`: :math:`\partial f / \partial b = \sum_t g_t`."""

    by_channel = True

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        return cotangent.sum(1)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        return _rows_of_channels(condensed, self.parameter)


class NormWeight(ParameterUse):
    r"""The gain of a norm layer, :math:`y_t = \gamma \hat x_t`, with the normalised input :math:`\hat x_t`.

    :math:`\partial f / \partial \gamma = \sum_t g_t \hat x_t`.
    """

    by_channel = True

    def __init__(self, parameter: Tensor, normalized: Tensor, *, channels_first: bool) -> None:
        super().__init__(parameter)
        self._normalized = normalized.detach()
        self._channels_first = channels_first

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        channels = self.parameter.numel()
        normalized = by_sample(self._normalized, len(cotangent), channels, self.outer, self._channels_first)
        return (cotangent * normalized).sum(1)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        return _rows_of_channels(condensed, self.parameter)


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
        indices = by_sample(self._indices, len(condensed), 1, self.outer)

        every_row = torch.arange(len(self.parameter), device=indices.device)

        def jacobian(rows: Rows) -> Tensor:
            chosen = every_row[rows]
            hit = indices == chosen
            if self._padding_index is not None:
                hit &= chosen != self._padding_index
            return torch.einsum("nqtd,ntv->nqvd", condensed, hit.to(condensed.dtype))

        return jacobian


def by_sample(values: Tensor, samples: int, channels: int, outer: int, channels_first: bool = False) -> Tensor:
    """Turns what a layer took or returned into ``(n, t, c)``.

    Args:
        values: Shape ``(n * ..., c, ...)`` if channels are first, else ``(outer, n, ..., c)``, however it is flattened.
        samples: ``n``.
        channels: ``c``.
        outer: Number of positions before the samples, if channels are last.
        channels_first: Whether channels are dimension 1.
    """
    if channels_first:
        return values.reshape(samples, -1, channels, values[0, 0].numel()).transpose(2, 3).flatten(1, 2)
    return values.reshape(outer, samples, -1, channels).transpose(0, 1).flatten(1, 2)


def _rows_of_channels(by_channel: Tensor, parameter: Tensor) -> JacobianRows:
    """From ``(n, q, c)``, one number an entry of the parameter."""
    jacobian = by_channel.reshape(*by_channel.shape[:2], parameter.shape[0], -1)
    return lambda rows: jacobian[:, :, rows]


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
        if self.channels_first:
            return [1] if shape[0] % samples == 0 else []
        if samples == 1:
            return [1]
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
        return by_sample(cotangent, samples, self.channels, outer, self.channels_first)
