r"""The matrix :math:`J J^\top` of the Jacobian of all outputs: closed forms where there are, backward passes elsewhere.

Rows of the Jacobian are numbered block by block. A block is as much of the batch as does not depend on the rest of it:
a sample, if the layers keep samples apart. A closed form needs that, and is checked against autograd. Where it is not
so, and for parameters without a closed form, the Jacobian comes row by row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.graph import gradient_edge
from lightning_plasticity.curvature.layers import LayerCall, ParameterUse, Weight
from lightning_plasticity.curvature.outputs import Outputs, vector_jacobian_products
from lightning_plasticity.curvature.rows import fit_at_once, row_by_row_gram

RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""How far a closed form may be from autograd's own answer: far above rounding, far below any mistake worth the name."""

_CHUNK_ELEMENTS = 2**24
"""How many numbers of a Jacobian are held at a time: 64 MiB in float32."""

_DENSE_ELEMENTS = 2**27
"""How many gradients by layer outputs are held at most where samples are not independent: 512 MiB in float32."""

_MIXES_SAMPLES = "its layer mixes samples"

_log = logging.getLogger("lightning_plasticity")


def jacobian_gram(
    calls: Sequence[LayerCall],
    outputs: list[Outputs],
    parameters: Mapping[str, nn.Parameter],
    without_closed_form: Mapping[str, str],
) -> tuple[Tensor, Tensor]:
    r""":math:`J J^\top` over all parameters, shape ``(m, m)``, and the roots of the Hessian, block by block.

    Args:
        calls: The recorded layer calls.
        outputs: The network's outputs.
        parameters: The parameters, by name.
        without_closed_form: Names of the parameters that are used in other ways than by the calls, and which.

    Raises:
        UnsupportedModelError: If the Jacobian of a parameter without a closed form is too large.
    """
    rows = sum(output.shape.numel() for output in outputs)
    one_block_fits = rows * sum(call.output_shape.numel() for call in calls) <= _DENSE_ELEMENTS
    like = next(iter(parameters.values()))
    blocks, mixed = _blocks(calls, outputs, parameters, like.new_zeros(rows))
    reasons = {**dict.fromkeys(mixed, _MIXES_SAMPLES), **without_closed_form}
    while True:
        by_row = {name: parameter for name, parameter in parameters.items() if name in reasons}
        if blocks > 1 and one_block_fits and not fit_at_once(rows, by_row):
            blocks, reasons = 1, dict(without_closed_form)
            for call in calls:
                call.arrange(1)
            continue
        roots = torch.stack(
            [torch.block_diag(*parts) for parts in zip(*[output.roots(blocks) for output in outputs], strict=True)]
        )
        closed = {name: parameter for name, parameter in parameters.items() if name not in reasons}
        total, wrong = _closed_form_gram(calls, outputs, closed, roots, like.dtype)
        if not wrong:
            break
        reasons.update(dict.fromkeys(wrong, _MIXES_SAMPLES))
    if by_row:
        named = ", ".join(f"{name!r} ({reasons[name]})" for name in by_row)
        _log.info("%d backward passes for the Jacobian row by row by %s", rows, named)
    total += row_by_row_gram(outputs, by_row, reasons, like.new_zeros(blocks, rows // blocks))
    return total, roots


def _blocks(
    calls: Sequence[LayerCall], outputs: list[Outputs], parameters: Mapping[str, nn.Parameter], like: Tensor
) -> tuple[int, list[str]]:
    """Into how many blocks the batch falls, and the parameters used in layers that do not keep these apart.

    Of all numbers that divide the outputs, the one that leaves the fewest parameter entries in such layers. The calls
    are arranged accordingly.
    """
    most = math.gcd(*[output.blocks for output in outputs])
    sizes = {most, *(math.gcd(most, size) for call in calls for size in call.output_shape)}
    best: tuple[int, int, list[int | None]] | None = None
    for blocks in sorted(sizes - {1} or {1}, reverse=True):
        arrangements = _arrangements(calls, outputs, like.reshape(blocks, -1))
        mixed = _used_where(calls, [arrangement is None for arrangement in arrangements])
        cost = sum(parameter.numel() for parameter in parameters.values() if id(parameter) in mixed)
        if best is None or cost < best[0]:
            best = cost, blocks, arrangements
        if cost == 0:
            break
    assert best is not None
    _, blocks, arrangements = best
    for call, outer in zip(calls, arrangements, strict=True):
        call.arrange(outer or 1)
    mixed = _used_where(calls, [arrangement is None for arrangement in arrangements])
    return blocks, [name for name, parameter in parameters.items() if id(parameter) in mixed]


def _used_where(calls: Sequence[LayerCall], chosen: Sequence[bool]) -> set[int]:
    return {id(use.parameter) for call, is_chosen in zip(calls, chosen, strict=True) if is_chosen for use in call.uses}


def _arrangements(calls: Sequence[LayerCall], outputs: list[Outputs], like: Tensor) -> list[int | None]:
    """Where the blocks are in each layer's output (``LayerCall.outer``); ``None`` if it does not keep them apart.

    Found out by two backward passes: from the outputs of half of the blocks, then from those of the others.
    """
    blocks, half = len(like), len(like) // 2
    if blocks == 1 or not calls:
        return [1] * len(calls)
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    first, second = noise.to(like).clone(), noise.to(like).clone()
    first[half:], second[:half] = 0, 0
    edges = [gradient_edge(call.output) for call in calls]
    by_first = vector_jacobian_products(outputs, edges, first)
    by_second = vector_jacobian_products(outputs, edges, second)
    result: list[int | None] = []
    for call, one, other in zip(calls, by_first, by_second, strict=True):
        fitting = [
            outer
            for outer in call.arrangements(blocks)
            if (one is None or not call.by_sample(one, blocks, outer)[half:].any())
            and (other is None or not call.by_sample(other, blocks, outer)[:half].any())
        ]
        result.append(fitting[0] if fitting else None)
    return result


def _closed_form_gram(
    calls: Sequence[LayerCall],
    outputs: list[Outputs],
    parameters: Mapping[str, nn.Parameter],
    roots: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, list[str]]:
    r"""Sum of :math:`J_p J_p^\top` over parameters with closed forms, and for which of them these are wrong.

    Checked is :math:`J_p^\top u` of every parameter against autograd, for a random :math:`u` and for :math:`S u`, where
    the loss-weighted kernel looks.
    """
    blocks, width = roots.shape[:2]
    total = torch.zeros(blocks * width, blocks * width, dtype=torch.float64, device=roots.device)
    if not parameters:
        return total, []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, blocks, width, 1, generator=generator, dtype=torch.float64, device="cpu").to(roots.device)
    directions = torch.cat([noise[:1], roots @ noise[1:]])[..., 0].to(dtype)
    expected = [vector_jacobian_products(outputs, list(parameters.values()), direction) for direction in directions]

    wanted_uses = {id(parameter) for parameter in parameters.values()}
    calls = [call for call in calls if any(id(use.parameter) in wanted_uses for use in call.uses)]
    uses: dict[int, list[tuple[ParameterUse, Tensor]]] = {}
    for call, cotangent in zip(calls, _cotangents(calls, outputs, directions[0]), strict=True):
        for use in call.uses:
            uses.setdefault(id(use.parameter), []).append((use, cotangent))

    gaps: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        part, pulled_back = _parameter_gram(parameter, uses.get(id(parameter), []), directions)
        wanted = [_or_zeros(gradients[number], parameter) for gradients in expected]
        gaps[name] = (pulled_back - torch.stack(wanted)).double().flatten(1).norm(dim=1)
        parts[name] = _sizes(part, roots)
        total += part
    tolerance = RELATIVE_TOLERANCE[dtype]
    floor = 100 * torch.finfo(dtype).eps * _sizes(total, roots)
    return total, [name for name in parameters if not bool((gaps[name] <= tolerance * parts[name] + floor).all())]


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense()


def _sizes(part: Tensor, roots: Tensor) -> Tensor:
    r"""Root mean square of :math:`J_p^\top u` over random :math:`u`, and of :math:`J_p^\top S u`, shape ``(2,)``."""
    blocks, width = roots.shape[:2]
    diagonal = part.reshape(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    weighted = torch.einsum("npa,npq,nqa->", roots, diagonal, roots)
    return torch.stack([part.trace(), weighted]).clamp(min=0).sqrt()


def _cotangents(calls: Sequence[LayerCall], outputs: list[Outputs], like: Tensor) -> Iterator[Tensor]:
    """Gradient of each output number by each layer's output, ``(blocks, q, t, c)``: one backward pass a number.

    ``like`` has the shape ``(blocks, q)``.
    """
    if not calls:
        return
    blocks, width = like.shape
    columns: list[list[Tensor]] = [[] for _ in calls]
    for column in range(width):
        selector = torch.zeros_like(like)
        selector[:, column] = 1
        gradients = vector_jacobian_products(outputs, [gradient_edge(call.output) for call in calls], selector)
        for into, call, gradient in zip(columns, calls, gradients, strict=True):
            if gradient is None:
                gradient = torch.zeros(call.output_shape, dtype=selector.dtype, device=selector.device)
            into.append(call.by_sample(gradient, blocks, call.outer))
    for column_of_call in columns:
        yield torch.stack(column_of_call, dim=1)


def _parameter_gram(
    parameter: Tensor, uses: list[tuple[ParameterUse, Tensor]], directions: Tensor
) -> tuple[Tensor, Tensor]:
    r"""One parameter's part :math:`J_p J_p^\top` (float64), and :math:`J_p^\top u` of each direction ``u``."""
    rows = directions[0].numel()
    result = torch.zeros(rows, rows, dtype=torch.float64, device=directions.device)
    if len(uses) == 1 and isinstance(uses[0][0], Weight) and uses[0][1].shape[2] == 1:
        return _linear_gram(uses[0][0], uses[0][1], directions)
    pulled_back = parameter.new_zeros(len(directions), *parameter.shape).detach()
    if not uses:
        return result, pulled_back
    active = torch.cat([use.active_rows() for use, _ in uses]).unique()
    columns = parameter[0].numel() if parameter.dim() else 1
    flat = pulled_back.reshape(len(directions), -1, columns)
    for chunk in active.split(max(1, _CHUNK_ELEMENTS // (rows * columns))):
        jacobian = torch.stack([use.jacobian(cotangents, chunk) for use, cotangents in uses]).sum(0)
        jacobian = jacobian.reshape(rows, -1)
        result += jacobian @ jacobian.T
        flat[:, chunk] = (directions.flatten(1) @ jacobian).reshape(len(directions), -1, columns)
    return result, flat.reshape(pulled_back.shape)


def _linear_gram(use: Weight, cotangents: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same for a matrix used once a block: :math:`\langle J_i, J_j\rangle = (x_i \cdot x_j)(g_i \cdot g_j)`."""
    blocks, width = directions.shape[1:]
    inputs, gradients = use.inputs(blocks)[:, 0], cotangents[:, :, 0]
    flat = gradients.reshape(blocks * width, -1)
    similarity = (flat @ flat.T).double().reshape(blocks, width, blocks, width)
    similarity *= (inputs @ inputs.T).double()[:, None, :, None]
    pulled_back = torch.einsum("dnq,nqo,ni->doi", directions, gradients, inputs)
    return similarity.reshape(blocks * width, blocks * width), pulled_back
