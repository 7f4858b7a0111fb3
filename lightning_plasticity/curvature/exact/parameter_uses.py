"""Compute the closed-form Jacobian of the network outputs with respect to one parameter, for each way to use it.

Each class is one formula: a matrix product, a convolution kernel, a bias, a norm weight, an embedding table. The module
``layer_rules`` maps torch's layer functions to these classes.

Shapes: ``n`` samples; ``q`` rows of the Jacobian per sample; ``t`` positions (tokens, pixels) and ``c`` channels of the
layer's output per sample. A *cotangent* of a layer is the gradient of one row of each sample with respect to the
layer's output, shape ``(n, t, c)``. A parameter is seen as a matrix whose rows are its first dimension. Its Jacobian,
shape ``(n, q, rows, columns)``, is built for some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

Rows = Tensor | slice
"""Some rows of a parameter, ascending: their indices, or a slice, which avoids a copy."""

JacobianRows = Callable[[Rows], Tensor]
"""Maps rows of a parameter to the Jacobian with respect to them, shape ``(n, q, rows, columns)``."""


class ParameterUse(ABC):
    """One use of one parameter in one call of a layer function.

    Args:
        parameter: The parameter.
    """

    leading_positions = 1
    """Number of positions before the sample dimension in the layer's input and output: see :class:`LayerCall`."""

    sums_positions = False
    """``True`` if condensed cotangents have shape ``(n, c)`` instead of ``(n, t, c)``."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter

    def condense(self, cotangent: Tensor) -> Tensor:
        """Reduce a cotangent, ``(n, t, c)``, to what the Jacobian depends on, ``(n, ...)``; by default all of it."""
        return cotangent

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

    sums_positions = True

    @override
    def condense(self, cotangent: Tensor) -> Tensor:
        return cotangent.sum(1)

    @override
    def jacobian(self, condensed: Tensor) -> JacobianRows:
        return _channel_jacobian(condensed, self.parameter)


class NormWeight(ParameterUse):
    r"""The weight of a norm layer, :math:`y_t = \gamma \hat x_t`, with the normalised input :math:`\hat x_t`.

    :math:`\partial f / \partial \gamma = \sum_t g_t \hat x_t`.
    """

    sums_positions = True

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
