r"""Compute :math:`J J^\top` from a Jacobian built row by row, for parameters without a closed form.

Each row costs one backward pass. This holds for any use of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.exact.outputs import OutputRows, UnsupportedModelError

_HELD_ELEMENTS = 2**28
"""Most entries of a Jacobian held at once: 1 GiB in float32."""

_CHUNK_ELEMENTS = 2**24
"""Most entries of a Jacobian multiplied at once, before the products are summed in float64."""


class JacobianTooLargeError(UnsupportedModelError):
    """Raised when the Jacobian with respect to a parameter without a closed form does not fit into memory."""


def fit_at_once(num_rows: int, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Return whether the Jacobian with respect to all the parameters can be held at once."""
    return num_rows * sum(parameter.numel() for parameter in parameters.values()) <= _HELD_ELEMENTS


def groups_that_fit(
    num_rows: int, parameters: Mapping[str, nn.Parameter], reasons: Mapping[str, str]
) -> list[dict[str, nn.Parameter]]:
    """Divide parameters into groups whose Jacobians can be held at once.

    Args:
        num_rows: Number of rows of the Jacobian.
        parameters: The parameters, by name.
        reasons: Why each of them has no closed form, by name.

    Raises:
        JacobianTooLargeError: If the Jacobian with respect to one of the parameters is too large.
    """
    groups: list[dict[str, nn.Parameter]] = []
    for name, parameter in parameters.items():
        if not fit_at_once(num_rows, {name: parameter}):
            raise JacobianTooLargeError(
                f"the parameter {name!r}, shape {tuple(parameter.shape)}, has no closed form ({reasons[name]}), and "
                f"its Jacobian, {num_rows} rows of {parameter.numel()} numbers, is too large to hold: probe fewer "
                "samples, leave the parameter out with requires_grad_(False), or take ggn_spectrum(method='lanczos')"
            )
        if not groups or not fit_at_once(num_rows, {**groups[-1], name: parameter}):
            groups.append({})
        groups[-1][name] = parameter
    return groups


def row_by_row_gram(rows: OutputRows, groups: Sequence[Mapping[str, nn.Parameter]], like: Tensor) -> Tensor:
    r"""Return the sum of :math:`J_p J_p^\top` over groups of parameters, shape ``(rows, rows)``, float64.

    Args:
        rows: The rows of the Jacobian.
        groups: Groups of parameters that share their backward passes.
        like: A tensor with the model's dtype and device.
    """
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=like.device)
    for group in groups:
        parameters = list(group.values())
        sizes = [parameter.numel() for parameter in parameters]
        jacobian = like.new_zeros(len(rows), sum(sizes))
        for index, row in enumerate(jacobian):
            selector = like.new_zeros(rows.shape)
            selector.view(-1)[index] = 1
            for entries, gradient in zip(row.split(sizes), rows.vjp(parameters, selector), strict=True):
                if gradient is not None:
                    entries.copy_(gradient.to_dense().flatten())
        for chunk in jacobian.split(max(1, _CHUNK_ELEMENTS // len(rows)), dim=1):
            total += chunk @ chunk.T
    return total
