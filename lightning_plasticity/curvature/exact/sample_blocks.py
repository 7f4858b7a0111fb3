"""Divide the batch into blocks of samples that do not interact in the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import gradient_edge
from lightning_plasticity.curvature.exact.layer_calls import ActiveCalls, LayerCall
from lightning_plasticity.curvature.exact.outputs import OutputRows, Outputs
from lightning_plasticity.curvature.problem import normal


def divide_into_blocks(
    calls: Sequence[LayerCall], outputs: list[Outputs], parameters: Mapping[str, nn.Parameter]
) -> tuple[int, ActiveCalls]:
    """Return the number of independent blocks, and the calls with a closed form for each block.

    Tries every number of blocks that divides the samples, those that the shapes of the layers suggest and higher ones
    first, and takes the one with the fewest parameter entries in layers that mix blocks.
    """
    like = next(iter(parameters.values()))
    most = math.gcd(*[output.num_samples for output in outputs])
    lowest_cost, num_blocks, best = math.inf, 1, ActiveCalls([], set())
    suggested = {most, *(math.gcd(most, size) for call in calls for size in call.output_shape)}
    divisors = [number for number in range(most, 1, -1) if most % number == 0] or [1]
    for candidate in sorted(divisors, key=lambda number: number not in suggested):
        active = _active_calls(calls, OutputRows(outputs, candidate), like)
        cost = sum(parameter.numel() for parameter in parameters.values() if id(parameter) in active.mixing)
        if cost < lowest_cost:
            lowest_cost, num_blocks, best = cost, candidate, active
        if cost == 0:
            break
    return num_blocks, best


def _active_calls(calls: Sequence[LayerCall], rows: OutputRows, like: Tensor) -> ActiveCalls:
    """Find where the blocks are in each layer's output, and the calls with a closed form for each block.

    The gradient of the outputs of every other block is zero at the remaining blocks of a layer that keeps blocks apart.
    The opposite direction needs no test here, because the closed forms are checked against autograd.
    """
    num_blocks = rows.num_blocks
    if num_blocks == 1 or not calls:
        return ActiveCalls.among(calls, lambda _: 1)
    vector = normal(rows.shape, like)
    vector[1::2] = 0
    gradients = dict(
        zip(
            [call.output for call in calls],
            rows.vjp([gradient_edge(call.output) for call in calls], vector),
            strict=True,
        )
    )

    def leading_positions(call: LayerCall) -> int | None:
        gradient = gradients[call.output]
        possible = [
            leading
            for leading in call.possible_leading_positions(num_blocks)
            if all(use.separates(num_blocks, leading) for use in call.uses)
        ]
        if gradient is None:
            return next(iter(possible), None)
        reached = {leading: call.per_sample(gradient, num_blocks, leading).flatten(1).any(1) for leading in possible}
        apart = [leading for leading in possible if not reached[leading][1::2].any()]
        # Where the outputs depend on the first token alone, tokens look like blocks, but like few.
        return max(apart, key=lambda leading: int(reached[leading].sum()), default=None)

    return ActiveCalls.among(calls, leading_positions)
