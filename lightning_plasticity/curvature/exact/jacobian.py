r"""Compute :math:`J J^\top` for the Jacobian of all network outputs with respect to all parameters.

Closed forms need samples, or blocks of samples, that do not interact in the layer. Parameters without a closed form,
and those whose closed form fails the check against autograd, take the row-by-row path. Rows of the Jacobian are
numbered block by block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.exact.jacobian_closed_form import closed_form_gram
from lightning_plasticity.curvature.exact.jacobian_rows import fit_at_once, groups_that_fit, row_by_row_gram
from lightning_plasticity.curvature.exact.layer_calls import ActiveCalls, LayerCall
from lightning_plasticity.curvature.exact.outputs import OutputRows, Outputs
from lightning_plasticity.curvature.exact.sample_blocks import divide_into_blocks

_DENSE_ELEMENTS = 2**27
"""Most entries of cotangents held where all samples are one block: 512 MiB in float32."""

_MIXES_SAMPLES = "its layer mixes samples"

_log = logging.getLogger("lightning_plasticity")


class TooManyPassesError(RuntimeError):
    """Raised when the row-by-row Jacobian would take more backward passes than allowed."""


@dataclass(frozen=True, eq=False)
class JacobianGram:
    r""":math:`J J^\top`, with its rows numbered block by block.

    Args:
        matrix: :math:`J J^\top`, shape ``(rows, rows)``, float64.
        num_blocks: Number of blocks.
    """

    matrix: Tensor
    num_blocks: int


def jacobian_gram(
    calls: Sequence[LayerCall],
    outputs: list[Outputs],
    parameters: Mapping[str, nn.Parameter],
    without_closed_form: Mapping[str, str],
    *,
    factors: Callable[[int], Tensor | None] = lambda num_blocks: None,
    combinations: Sequence[Tensor] | None = None,
    max_passes: float = math.inf,
) -> JacobianGram:
    r"""Return :math:`J J^\top` over all parameters.

    Args:
        calls: The recorded layer calls.
        outputs: The network outputs.
        parameters: The parameters, by name.
        without_closed_form: Names of the parameters that other functions than the recorded layers use, with the reason.
        factors: Maps a number of blocks to factors :math:`S` of the loss Hessian, shape ``(num_blocks, q, q)``, whose
            directions closed forms are checked along, or to ``None``.
        combinations: Linear combinations of the outputs to take as rows in place of the outputs: a tensor
            ``(q, *shape)`` for each element of ``outputs``.
        max_passes: Most backward passes for row-by-row Jacobians.

    Raises:
        UnsupportedModelError: If the Jacobian of a parameter without a closed form is too large.
        TooManyPassesError: If ``max_passes`` is exceeded.
    """
    like = next(iter(parameters.values()))
    num_blocks, active = divide_into_blocks(calls, outputs, parameters)
    mixing = [name for name, parameter in parameters.items() if id(parameter) in active.mixing]
    reasons = {**dict.fromkeys(mixing, _MIXES_SAMPLES), **without_closed_form}
    # Every further turn merges the blocks into one or gives up closed forms, so the loop ends.
    while True:
        rows = OutputRows(outputs, num_blocks, combinations)
        row_by_row = {name: parameter for name, parameter in parameters.items() if name in reasons}
        one_block_fits = len(rows) * sum(call.output_shape.numel() for call in calls) <= _DENSE_ELEMENTS
        # In a single block no layer mixes blocks: all layer calls have closed forms again, at the price of memory.
        if num_blocks > 1 and combinations is None and one_block_fits and not fit_at_once(len(rows), row_by_row):
            num_blocks, reasons, active = 1, dict(without_closed_form), ActiveCalls.among(calls, lambda _: 1)
            continue
        groups = groups_that_fit(len(rows), row_by_row, reasons)
        num_passes = len(rows) * len(groups)
        names = ", ".join(f"{name!r} ({reasons[name]})" for name in row_by_row)
        if num_passes > max_passes:
            raise TooManyPassesError(f"{num_passes} backward passes for the row-by-row Jacobian of {names}")
        checked = factors(num_blocks) if combinations is None else None
        closed_form = {name: parameter for name, parameter in parameters.items() if name not in reasons}
        total, wrong = closed_form_gram(
            active.calls, rows, closed_form, _identities(rows, like) if checked is None else checked
        )
        if not wrong:
            break
        reasons.update(dict.fromkeys(wrong, _MIXES_SAMPLES))
    if groups:
        _log.info("%d backward passes for the row-by-row Jacobian of %s", num_passes, names)
        total += row_by_row_gram(rows, groups, like)
    return JacobianGram(total, num_blocks)


def _identities(rows: OutputRows, like: Tensor) -> Tensor:
    """Return an identity matrix for each block, ``(num_blocks, q, q)``."""
    identity = torch.eye(rows.rows_per_block, dtype=torch.float64, device=like.device)
    return identity.expand(rows.num_blocks, -1, -1)
