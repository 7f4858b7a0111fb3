"""Define the records of layer function calls, and of tensors that are computed from parameters alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import Edge
from lightning_plasticity.curvature.exact.parameter_uses import ComputedParameter, ParameterUse, per_sample


@dataclass(eq=False)
class Computed:
    """A tensor that is computed from parameters and constants alone: a slice, a product, a normalised weight.

    Args:
        tensor: The tensor.
        edge: Its autograd edge.
        parameters: The trainable parameters among the arguments.
        sources: The computed tensors among the arguments.
        call: The layer call that computed it, if any. Where that call has a closed form for each sample, what is
            computed from the tensor needs none.
    """

    tensor: Tensor
    edge: Edge
    parameters: list[Tensor]
    sources: list[Computed]
    call: LayerCall | None = None

    def is_covered(self, active: Collection[LayerCall]) -> bool:
        """Return whether closed forms of the given calls include all that the outputs depend on through this tensor."""
        if self.call in active:
            return True
        return not self.parameters and all(source.is_covered(active) for source in self.sources)

    def roots(self, active: Collection[LayerCall] = ()) -> Iterator[Tensor]:
        """Yield the parameters that the tensor depends on other than through the given calls."""
        if not self.is_covered(active):
            yield from self.parameters
            for source in self.sources:
                yield from source.roots(active)


@dataclass(eq=False)
class LayerCall:
    """One call of a layer function that used trainable parameters, or tensors computed from them.

    Args:
        output: Autograd edge of the layer's output.
        output_shape: Shape of that output.
        channels: Number of channels ``c``.
        channels_first: Whether the channels are dimension 1 (convolutions, BatchNorm) instead of the last dimensions.
        uses: The uses of parameters in this call.
        inputs: Autograd edges of all other arguments that require gradients.
        leading_positions: Number of positions before the sample dimension: 1 if samples are the first dimension, the
            number of tokens if the tokens are.
        computed: The arguments that are computed from parameters, by ``id`` of the tensor.
        output_is_computed: Whether the output, too, is computed from parameters and constants alone.
    """

    output: Edge
    output_shape: torch.Size
    channels: int
    channels_first: bool
    uses: list[ParameterUse]
    inputs: list[Edge] = field(default_factory=list)
    leading_positions: int = 1
    computed: dict[int, Computed] = field(default_factory=dict)
    output_is_computed: bool = False

    def possible_leading_positions(self, num_samples: int) -> list[int]:
        """Return the values of ``leading_positions`` that fit the number of samples, the likely ones first."""
        positions, shape = self.output_shape.numel() // self.channels, self.output_shape
        if self.channels_first:
            return [1] if shape[0] % num_samples == 0 else []
        if num_samples == 1:
            return [1]
        dimensions = [(shape[:dim].numel(), size) for dim, size in enumerate(shape) if size % num_samples == 0]
        # Samples in a dimension of their own, or flattened with others that come after or before them.
        whole = [before for before, size in dimensions if size == num_samples]
        flattened = [first for before, size in dimensions for first in (before, before * size // num_samples)]
        candidates = dict.fromkeys([1, *whole, positions // num_samples, *flattened])
        return [leading for leading in candidates if leading and positions % (leading * num_samples) == 0]

    def per_sample(self, gradient: Tensor, num_samples: int, leading_positions: int) -> Tensor:
        """Reshape a gradient with respect to the layer's output to ``(n, t, c)``."""
        return per_sample(gradient, num_samples, self.channels, leading_positions, channels_first=self.channels_first)


@dataclass
class ActiveCalls:
    """The calls whose closed forms make up the Jacobian, for a number of blocks of samples.

    A call whose output is computed from parameters alone and has no dimension for the samples mixes them. The calls
    that use this output then take its place, and the chain rule leads from there to the parameters.

    Args:
        calls: These calls.
        mixing: The parameters in calls that mix blocks, by ``id``.
    """

    calls: list[LayerCall]
    mixing: set[int]

    @classmethod
    def among(cls, calls: Sequence[LayerCall], find_positions: Callable[[LayerCall], int | None]) -> ActiveCalls:
        """Choose from all recorded calls.

        Args:
            calls: The calls, in the order in which they were made.
            find_positions: Returns the ``leading_positions`` of a call; ``None`` if it mixes blocks.
        """
        chosen: list[LayerCall] = []
        active: set[LayerCall] = set()
        mixing: set[int] = set()
        for call in calls:
            uses = {use: roots for use in call.uses if (roots := _roots(use, call, active))}
            if not uses:
                continue
            leading = find_positions(replace(call, uses=list(uses)))
            if leading is not None:
                active.add(call)
                chosen.append(replace(call, uses=_uses_of_roots(uses, call, leading), leading_positions=leading))
            elif not call.output_is_computed:
                mixing |= {id(root) for roots in uses.values() for root in roots}
        return cls(chosen, mixing)


def _roots(use: ParameterUse, call: LayerCall, active: Collection[LayerCall]) -> list[Tensor]:
    """Return the parameters that the use belongs to: none if the closed forms of other calls include it."""
    computed = call.computed.get(id(use.parameter))
    if computed is None:
        return [use.parameter]
    return list({id(root): root for root in computed.roots(active)}.values())


def _uses_of_roots(
    uses: Mapping[ParameterUse, Sequence[Tensor]], call: LayerCall, leading_positions: int
) -> list[ParameterUse]:
    """Return the uses of parameters that uses of parameters or computed tensors amount to."""
    result: list[ParameterUse] = []
    for use, roots in uses.items():
        placed = copy.copy(use)
        placed.leading_positions = leading_positions
        computed = call.computed.get(id(use.parameter))
        if computed is None:
            result.append(placed)
        elif (direct := placed.of_base(roots[0])) is not None:
            result.append(direct)
        else:
            result += [ComputedParameter(root, computed.edge, placed) for root in roots]
    return result
