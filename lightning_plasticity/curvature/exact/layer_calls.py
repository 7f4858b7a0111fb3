"""Define the record of one layer function call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge
from lightning_plasticity.curvature.exact.parameter_uses import ParameterUse, per_sample


@dataclass(eq=False)
class LayerCall:
    """One call of a layer function that used trainable parameters.

    Args:
        output: Autograd edge of the layer's output.
        output_shape: Shape of that output.
        channels: Number of channels ``c``.
        channels_first: Whether the channels are dimension 1 (convolutions, BatchNorm) instead of the last dimensions.
        uses: The uses of parameters in this call.
        inputs: Autograd edges of all other arguments that require gradients.
        leading_positions: Number of positions before the sample dimension: 1 if samples are the first dimension, the
            number of tokens if the tokens are.
    """

    output: Edge
    output_shape: torch.Size
    channels: int
    channels_first: bool
    uses: list[ParameterUse]
    inputs: list[Edge] = field(default_factory=list)
    leading_positions: int = 1

    def possible_leading_positions(self, num_samples: int) -> list[int]:
        """Return the values of ``leading_positions`` that fit the number of samples, the likely ones first."""
        positions, shape = self.output_shape.numel() // self.channels, self.output_shape
        if self.channels_first:
            return [1] if shape[0] % num_samples == 0 else []
        if num_samples == 1:
            return [1]
        before_sample_dim = [shape[:dim].numel() for dim, size in enumerate(shape[:-1]) if size == num_samples]
        # Samples in the first, in a middle or in the last dimension before the channels.
        candidates = dict.fromkeys([1, *before_sample_dim, positions // num_samples])
        return [leading for leading in candidates if leading and positions % (leading * num_samples) == 0]

    def set_leading_positions(self, leading_positions: int) -> None:
        """Set ``leading_positions`` of the call and of its uses."""
        self.leading_positions = leading_positions
        for use in self.uses:
            use.leading_positions = leading_positions

    def per_sample(self, gradient: Tensor, num_samples: int, leading_positions: int) -> Tensor:
        """Reshape a gradient with respect to the layer's output to ``(n, t, c)``."""
        return per_sample(gradient, num_samples, self.channels, leading_positions, channels_first=self.channels_first)
