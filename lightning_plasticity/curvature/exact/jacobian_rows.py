r"""Jacobians row by row, one backward pass for each output number: right for any parameter, however it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.exact.outputs import OutputRows, UnsupportedModelError

_HELD_ELEMENTS = 2**28
"""How many numbers of a Jacobian are held at most: 1 GiB in float32."""

_CHUNK_ELEMENTS = 2**24
"""How many of them are multiplied at a time, between sums in float64."""


class JacobianTooLargeError(UnsupportedModelError):
    """The Jacobian by a parameter without a closed form does not fit into memory."""


def fit_at_once(rows: int, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether the Jacobian by all the parameters can be held, so that they share the backward passes."""
    return rows * sum(parameter.numel() for parameter in parameters.values()) <= _HELD_ELEMENTS


def groups_that_fit(
    rows: int, parameters: Mapping[str, nn.Parameter], reasons: Mapping[str, str]
) -> list[dict[str, nn.Parameter]]:
    """As many parameters at a time as can be held.

    Args:
        rows: Number of rows of the Jacobian.
        parameters: The parameters, by name.
        reasons: Why each of them has no closed form.

    Raises:
        JacobianTooLargeError: If the Jacobian by one of the parameters is too large.
    """
    groups: list[dict[str, nn.Parameter]] = []
    for name, parameter in parameters.items():
        if not fit_at_once(rows, {name: parameter}):
            raise JacobianTooLargeError(
                f"the parameter {name!r}, shape {tuple(parameter.shape)}, has no closed form ({reasons[name]}), and "
                f"its Jacobian, {rows} rows of {parameter.numel()} numbers, is too large to be held: probe fewer "
                "samples, leave the parameter out with requires_grad_(False), or take ggn_spectrum(method='lanczos')"
            )
        if not groups or not fit_at_once(rows, {**groups[-1], name: parameter}):
            groups.append({})
        groups[-1][name] = parameter
    return groups


def row_by_row_gram(rows: OutputRows, groups: Sequence[Mapping[str, nn.Parameter]], like: Tensor) -> Tensor:
    r"""Sum of :math:`J_p J_p^\top` over groups of parameters, shape ``(rows, rows)``, float64.

    Args:
        rows: The rows.
        groups: Parameters that share their backward passes.
        like: A tensor of the model's kind.
    """
    count = rows.shape[0] * rows.shape[1]
    total = torch.zeros(count, count, dtype=torch.float64, device=like.device)
    for group in groups:
        parameters = list(group.values())
        sizes = [parameter.numel() for parameter in parameters]
        jacobian = like.new_zeros(count, sum(sizes))
        for number, row in enumerate(jacobian):
            selector = like.new_zeros(rows.shape)
            selector.view(-1)[number] = 1
            for place, gradient in zip(row.split(sizes), rows.vjp(parameters, selector), strict=True):
                if gradient is not None:
                    place.copy_(gradient.to_dense().flatten())
        for chunk in jacobian.split(max(1, _CHUNK_ELEMENTS // count), dim=1):
            total += chunk @ chunk.T
    return total
