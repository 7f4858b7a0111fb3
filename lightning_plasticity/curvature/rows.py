r"""Jacobians row by row, one backward pass for each output number: right for any parameter, however it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.outputs import Outputs, UnsupportedModelError, vector_jacobian_products

_HELD_ELEMENTS = 2**28
"""How many numbers of a Jacobian are held at most: 1 GiB in float32."""

_CHUNK_ELEMENTS = 2**24
"""How many of them are multiplied at a time, between sums in float64."""


def fit_at_once(rows: int, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the Jacobian by all the parameters can be held, so that they share the backward passes."""
    return rows * sum(parameter.numel() for parameter in parameters.values()) <= _HELD_ELEMENTS


def row_by_row_gram(
    outputs: list[Outputs], parameters: Mapping[str, nn.Parameter], reasons: Mapping[str, str], like: Tensor
) -> Tensor:
    r"""Sum of :math:`J_p J_p^\top` over the given parameters, shape ``(m, m)``, float64.

    Args:
        outputs: The network's outputs.
        parameters: The parameters, by name.
        reasons: Why each of them has no closed form.
        like: A tensor of shape ``(blocks, m / blocks)``, of the model's kind: how the rows are numbered.

    Raises:
        UnsupportedModelError: If the Jacobian by one of the parameters is too large.
    """
    rows = like.numel()
    total = torch.zeros(rows, rows, dtype=torch.float64, device=like.device)
    for group in _groups(parameters, reasons, rows):
        jacobian = like.new_zeros(rows, sum(parameter.numel() for parameter in group))
        for row, into in enumerate(jacobian):
            selector = torch.zeros_like(like)
            selector.view(-1)[row] = 1
            places = into.split([parameter.numel() for parameter in group])
            gradients = vector_jacobian_products(outputs, group, selector)
            for place, gradient in zip(places, gradients, strict=True):
                if gradient is not None:
                    place.copy_(gradient.to_dense().flatten())
        for chunk in jacobian.split(max(1, _CHUNK_ELEMENTS // rows), dim=1):
            total += chunk @ chunk.T
    return total


def _groups(
    parameters: Mapping[str, nn.Parameter], reasons: Mapping[str, str], rows: int
) -> Iterator[list[nn.Parameter]]:
    """As many parameters at a time as can be held."""
    group: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        if not fit_at_once(rows, {name: parameter}):
            raise UnsupportedModelError(
                f"the parameter {name!r}, shape {tuple(parameter.shape)}, has no closed form ({reasons[name]}), and "
                f"its Jacobian, {rows} rows of {parameter.numel()} numbers, is too large to be held: probe fewer "
                "samples, or leave the parameter out with requires_grad_(False)"
            )
        if not fit_at_once(rows, {**group, name: parameter}):
            yield list(group.values())
            group = {}
        group[name] = parameter
    if group:
        yield list(group.values())
