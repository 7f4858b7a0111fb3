"""Divide the batch into blocks of samples that do not interact in the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import gradient_edge
from lightning_plasticity.curvature.exact.layer_calls import LayerCall
from lightning_plasticity.curvature.exact.outputs import OutputRows, Outputs
from lightning_plasticity.curvature.problem import normal


def divide_into_blocks(
    calls: Sequence[LayerCall], outputs: list[Outputs], parameters: Mapping[str, nn.Parameter]
) -> tuple[int, list[str]]:
    """Return the number of independent blocks, and the names of the parameters in layers that mix blocks.

    Tries every number of blocks that the shapes of the layers suggest and takes the one with the fewest parameter
    entries in mixing layers. Sets ``leading_positions`` of the layer calls accordingly.
    """
    like = next(iter(parameters.values()))
    most = math.gcd(*[output.num_samples for output in outputs])
    candidates = {most, *(math.gcd(most, size) for call in calls for size in call.output_shape)}
    lowest_cost, num_blocks, leading_positions, mixing = math.inf, 1, [], []
    for candidate in sorted(candidates - {1} or {1}, reverse=True):
        candidate_positions = _leading_positions(calls, OutputRows(outputs, candidate), like)
        names = _mixing_parameters(calls, candidate_positions, parameters)
        cost = sum(parameters[name].numel() for name in names)
        if cost < lowest_cost:
            lowest_cost, num_blocks, leading_positions, mixing = cost, candidate, candidate_positions, names
        if cost == 0:
            break
    for call, leading in zip(calls, leading_positions, strict=True):
        call.set_leading_positions(leading or 1)
    return num_blocks, mixing


def _leading_positions(calls: Sequence[LayerCall], rows: OutputRows, like: Tensor) -> list[int | None]:
    """Find where the blocks are in each layer's output (``LayerCall.leading_positions``); ``None`` if it mixes them.

    The gradient of the outputs of every other block is zero at the remaining blocks of a layer that keeps blocks apart.
    The opposite direction needs no test here, because the closed forms are checked against autograd.
    """
    num_blocks = rows.num_blocks
    if num_blocks == 1 or not calls:
        return [1] * len(calls)
    vector = normal(rows.shape, like)
    vector[1::2] = 0
    gradients = rows.vjp([gradient_edge(call.output) for call in calls], vector)
    return [
        next(
            (
                leading
                for leading in call.possible_leading_positions(num_blocks)
                if gradient is None or not call.per_sample(gradient, num_blocks, leading)[1::2].any()
            ),
            None,
        )
        for call, gradient in zip(calls, gradients, strict=True)
    ]


def _mixing_parameters(
    calls: Sequence[LayerCall], leading_positions: Sequence[int | None], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Return the names of the parameters used in a call without known ``leading_positions``."""
    mixing_calls = [call for call, leading in zip(calls, leading_positions, strict=True) if leading is None]
    used = {id(use.parameter) for call in mixing_calls for use in call.uses}
    return [name for name, parameter in parameters.items() if id(parameter) in used]
