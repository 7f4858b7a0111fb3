r"""The matrix :math:`J J^\top` of the Jacobian of all outputs: closed forms where there are, backward passes elsewhere.

Rows of the Jacobian are numbered block by block. A block is as much of the batch as does not depend on the rest of it:
a sample, if the layers keep samples apart. A closed form needs that, and is checked against autograd. Where it is not
so, and for parameters without a closed form, the Jacobian comes row by row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import gradient_edge, or_zeros
from lightning_plasticity.curvature.exact.jacobian_rows import fit_at_once, groups_that_fit, row_by_row_gram
from lightning_plasticity.curvature.exact.outputs import OutputRows, Outputs
from lightning_plasticity.curvature.exact.parameter_uses import Bias, LayerCall, ParameterUse, Rows, Weight
from lightning_plasticity.curvature.problem import normal

_RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""How far a closed form may be from autograd's own answer: far above rounding, far below any mistake worth the name."""

_CHUNK_ELEMENTS = 2**24
"""How many numbers of a Jacobian are held at a time: 64 MiB in float32."""

_COTANGENT_ELEMENTS = 2**26
"""How many gradients by layer outputs are held at a time, or those of one layer if these are more: 256 MiB."""

_DENSE_ELEMENTS = 2**27
"""How many gradients by layer outputs are held at most where samples are not independent: 512 MiB in float32."""

_STRIP = 128
"""How many rows of a symmetric product are computed at a time at least: fewer are no faster."""

_MIXES_SAMPLES = "its layer mixes samples"

_log = logging.getLogger("lightning_plasticity")


class TooManyPassesError(RuntimeError):
    """The Jacobian row by row would take more backward passes than allowed."""


@dataclass(frozen=True, eq=False)
class JacobianGram:
    r""":math:`J J^\top`, and the roots of the Hessian for its rows.

    Args:
        matrix: Shape ``(rows, rows)``, float64.
        roots: Roots of the Hessian, block by block, ``(blocks, columns, columns)``.
    """

    matrix: Tensor
    roots: Tensor


def jacobian_gram(
    calls: Sequence[LayerCall],
    outputs: list[Outputs],
    parameters: Mapping[str, nn.Parameter],
    without_closed_form: Mapping[str, str],
    *,
    combinations: Sequence[Tensor] | None = None,
    max_passes: float = math.inf,
) -> JacobianGram:
    r""":math:`J J^\top` over all parameters.

    Args:
        calls: The recorded layer calls.
        outputs: The network's outputs.
        parameters: The parameters, by name.
        without_closed_form: Names of the parameters that are used in other ways than by the calls, and which.
        combinations: Combinations of the outputs to take for rows, a tensor ``(columns, *shape)`` for each of the
            outputs, instead of all outputs. The roots are then those of the identity.
        max_passes: How many backward passes may be spent on Jacobians row by row.

    Raises:
        UnsupportedModelError: If the Jacobian of a parameter without a closed form is too large.
        TooManyPassesError: If there are too many of them.
    """
    like = next(iter(parameters.values()))
    blocks, mixed = _blocks(calls, outputs, parameters)
    reasons = {**dict.fromkeys(mixed, _MIXES_SAMPLES), **without_closed_form}
    while True:
        rows = OutputRows(outputs, blocks, combinations)
        count = rows.shape[0] * rows.shape[1]
        by_row = {name: parameter for name, parameter in parameters.items() if name in reasons}
        one_block_fits = count * sum(call.output_shape.numel() for call in calls) <= _DENSE_ELEMENTS
        if blocks > 1 and combinations is None and one_block_fits and not fit_at_once(count, by_row):
            blocks, reasons = 1, dict(without_closed_form)
            for call in calls:
                call.arrange(1)
            continue
        groups = groups_that_fit(count, by_row, reasons)
        named = ", ".join(f"{name!r} ({reasons[name]})" for name in by_row)
        if count * len(groups) > max_passes:
            raise TooManyPassesError(f"{count * len(groups)} backward passes for the Jacobian row by row by {named}")
        if combinations is None:
            by_output = zip(*[output.roots(blocks) for output in outputs], strict=True)
            roots = torch.stack([torch.block_diag(*parts) for parts in by_output])
        else:
            roots = torch.eye(rows.shape[1], dtype=torch.float64, device=like.device).expand(blocks, -1, -1)
        closed = {name: parameter for name, parameter in parameters.items() if name not in reasons}
        total, wrong = _closed_form_gram(calls, rows, closed, roots, like.dtype)
        if not wrong:
            break
        reasons.update(dict.fromkeys(wrong, _MIXES_SAMPLES))
    if groups:
        _log.info("%d backward passes for the Jacobian row by row by %s", count * len(groups), named)
        total += row_by_row_gram(rows, groups, like)
    return JacobianGram(total, roots)


def _blocks(
    calls: Sequence[LayerCall], outputs: list[Outputs], parameters: Mapping[str, nn.Parameter]
) -> tuple[int, list[str]]:
    """Into how many blocks the batch falls, and the parameters used in layers that do not keep these apart.

    Of all numbers that divide the outputs, the one that leaves the fewest parameter entries in such layers. The calls
    are arranged accordingly.
    """
    like = next(iter(parameters.values()))
    most = math.gcd(*[output.blocks for output in outputs])
    sizes = {most, *(math.gcd(most, size) for call in calls for size in call.output_shape)}
    best: tuple[int, int, list[int | None]] | None = None
    for blocks in sorted(sizes - {1} or {1}, reverse=True):
        arrangements = _arrangements(calls, OutputRows(outputs, blocks), like)
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


def _arrangements(calls: Sequence[LayerCall], rows: OutputRows, like: Tensor) -> list[int | None]:
    """Where the blocks are in each layer's output (``LayerCall.outer``); ``None`` if it does not keep them apart.

    Found out by a backward pass from the outputs of every other block. Whether those of the others depend on these
    blocks in turn is left to the check of the closed forms.
    """
    blocks = rows.shape[0]
    if blocks == 1 or not calls:
        return [1] * len(calls)
    vector = normal(rows.shape, like)
    vector[1::2] = 0
    gradients = rows.vjp([gradient_edge(call.output) for call in calls], vector)
    result: list[int | None] = []
    for call, gradient in zip(calls, gradients, strict=True):
        fitting = [
            outer
            for outer in call.arrangements(blocks)
            if gradient is None or not call.by_sample(gradient, blocks, outer)[1::2].any()
        ]
        result.append(fitting[0] if fitting else None)
    return result


@dataclass(frozen=True, eq=False)
class _Part:
    r"""What one parameter adds to :math:`J J^\top`, as far as it is needed for the check.

    Args:
        diagonal: The blocks on the diagonal, ``(blocks, columns, columns)``.
        pulled_back: :math:`J_p^\top u` of each direction ``u``, ``(directions, *shape)``.
    """

    diagonal: Tensor
    pulled_back: Tensor


def _closed_form_gram(
    calls: Sequence[LayerCall],
    rows: OutputRows,
    parameters: Mapping[str, nn.Parameter],
    roots: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, list[str]]:
    r"""Sum of :math:`J_p J_p^\top` over parameters with closed forms, and for which of them these are wrong.

    Checked is :math:`J_p^\top u` of every parameter against autograd, for a random :math:`u` and for :math:`S u`, where
    the loss-weighted kernel looks.
    """
    count = rows.shape[0] * rows.shape[1]
    total = torch.zeros(count, count, dtype=torch.float64, device=roots.device)
    if not parameters:
        return total, []
    noise = normal((2, *rows.shape, 1), roots)
    directions = torch.cat([noise[:1], roots @ noise[1:]])[..., 0].to(dtype)
    expected = [rows.vjp(list(parameters.values()), direction) for direction in directions]

    parts: dict[str, _Part] = {}
    for group in _groups(calls, parameters, rows):
        condensed = _condensed([use for unit in group for use in unit.uses], rows)
        for unit in group:
            parts.update(unit.add_to(total, condensed, directions))
    total = total.tril() + total.tril(-1).T

    tolerance = _RELATIVE_TOLERANCE[dtype]
    floor = 100 * torch.finfo(dtype).eps * _sizes(_diagonal(total, rows.shape), roots)
    wrong = []
    for number, (name, parameter) in enumerate(parameters.items()):
        part = parts[name]
        wanted = [or_zeros(gradients[number], parameter) for gradients in expected]
        gaps = [own.reshape(other.shape) - other for own, other in zip(part.pulled_back, wanted, strict=True)]
        gap = torch.stack([torch.linalg.vector_norm(each) for each in gaps]).double()
        if not bool((gap <= tolerance * _sizes(part.diagonal, roots) + floor).all()):
            wrong.append(name)
    return total, wrong


def _diagonal(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The blocks on the diagonal, ``(blocks, columns, columns)``."""
    return matrix.reshape(*shape, *shape).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _sizes(diagonal: Tensor, roots: Tensor) -> Tensor:
    r"""Root mean square of :math:`J_p^\top u` over random :math:`u`, and of :math:`J_p^\top S u`, shape ``(2,)``."""
    weighted = (roots.mT @ diagonal @ roots).diagonal(dim1=1, dim2=2).sum()
    return torch.stack([diagonal.diagonal(dim1=1, dim2=2).sum(), weighted]).clamp(min=0).sqrt()


@dataclass(eq=False)
class _Use:
    """One use of a parameter, and the call that it is a part of."""

    call: LayerCall
    use: ParameterUse

    def elements(self, rows: OutputRows) -> int:
        """How many numbers of the cotangents have to be held."""
        size = self.call.channels * rows.shape[0] if self.use.by_channel else self.call.output_shape.numel()
        return size * rows.shape[1]


@dataclass(eq=False)
class _Single:
    """One parameter with all of its uses."""

    name: str
    parameter: nn.Parameter
    uses: list[_Use]

    def add_to(self, total: Tensor, condensed: Mapping[int, Tensor], directions: Tensor) -> dict[str, _Part]:
        r"""Adds :math:`J_p J_p^\top`.

        Args:
            total: What to add to, ``(rows, rows)``, on and below the diagonal at least.
            condensed: The condensed cotangents, by ``id`` of the use; none for uses that the outputs do not depend on.
            directions: The directions ``u`` of the check, ``(directions, blocks, columns)``.
        """
        count, shape = len(total), (directions.shape[1], directions.shape[2])
        diagonal = total.new_zeros(shape[0], shape[1], shape[1])
        pulled_back = self.parameter.new_zeros(len(directions), *self.parameter.shape).detach()
        uses = [use.use for use in self.uses if id(use.use) in condensed]
        if uses:
            columns = self.parameter[0].numel() if self.parameter.dim() else 1
            flat = pulled_back.reshape(len(directions), -1, columns)
            builders = [use.jacobian(condensed[id(use)]) for use in uses]
            for chunk in _chunks(uses, len(self.parameter), max(1, _CHUNK_ELEMENTS // (count * columns))):
                jacobian = reduce(torch.add, [builder(chunk) for builder in builders]).reshape(count, -1)
                _add_product(total, jacobian)
                by_block = jacobian.reshape(*shape, -1)
                diagonal += by_block @ by_block.mT
                flat[:, chunk] = (directions.flatten(1) @ jacobian).reshape(len(directions), -1, columns)
        return {self.name: _Part(diagonal, pulled_back)}


def _chunks(uses: Sequence[ParameterUse], rows: int, size: int) -> Iterator[Rows]:
    """The rows of a parameter that any of the uses touches, ``size`` at a time."""
    active = [use.active_rows() for use in uses]
    touched = [own for own in active if own is not None]
    if len(touched) == len(active):
        yield from torch.cat(touched).unique().split(size)
    else:
        yield from (slice(first, first + size) for first in range(0, rows, size))


def _add_product(total: Tensor, jacobian: Tensor) -> None:
    r"""Adds :math:`J J^\top`, on and below the diagonal at least: a third less work than all of it."""
    size = max(_STRIP, len(jacobian) // 4)
    for first in range(0, len(jacobian), size):
        end = first + size
        total[first:end, :end] += jacobian[first:end] @ jacobian[:end].T


@dataclass(eq=False)
class _Linear:
    r"""The matrix of a linear layer used once a block, and its bias.

    No Jacobian is needed: :math:`\langle J_i, J_j\rangle = (x_i \cdot x_j + 1)(g_i \cdot g_j)`.
    """

    names: list[str]
    uses: list[_Use]

    def add_to(self, total: Tensor, condensed: Mapping[int, Tensor], directions: Tensor) -> dict[str, _Part]:
        """As of one parameter."""
        weight = self.uses[0].use
        assert isinstance(weight, Weight)
        shape = (directions.shape[1], directions.shape[2])
        inputs = weight.inputs(shape[0])[:, 0]
        if id(weight) in condensed:
            gradients = condensed[id(weight)][:, :, 0]
        else:
            gradients = inputs.new_zeros(*shape, len(weight.parameter))
        flat = gradients.flatten(0, 1)
        similarity = (flat @ flat.T).double()
        between_inputs = (inputs @ inputs.T).double()
        diagonal = _diagonal(similarity, shape).clone()
        summed = torch.einsum("dnq,nqo->dno", directions, gradients)
        parts = {
            self.names[0]: _Part(
                diagonal * between_inputs.diagonal()[:, None, None], torch.einsum("dno,ni->doi", summed, inputs)
            )
        }
        if len(self.names) > 1:
            parts[self.names[1]] = _Part(diagonal, summed.sum(1))
            between_inputs = between_inputs + 1
        similarity.view(*shape, *shape).mul_(between_inputs[:, None, :, None])
        total += similarity
        return parts


def _groups(
    calls: Sequence[LayerCall], parameters: Mapping[str, nn.Parameter], rows: OutputRows
) -> list[list[_Single | _Linear]]:
    """The parameters, as many at a time as their cotangents can be held of: each group has its own backward passes."""
    uses: dict[int, list[_Use]] = {id(parameter): [] for parameter in parameters.values()}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for call in calls:
        for use in call.uses:
            if id(use.parameter) in uses:
                uses[id(use.parameter)].append(_Use(call, use))

    def is_factored(key: int) -> bool:
        own = uses[key]
        positions = own[0].call.output_shape.numel() // own[0].call.channels // rows.shape[0] if own else 0
        return len(own) == 1 and isinstance(own[0].use, Weight) and positions == 1

    def bias_beside(key: int) -> list[int]:
        beside = [use.parameter for use in uses[key][0].call.uses if isinstance(use, Bias)]
        return [id(bias) for bias in beside if len(uses.get(id(bias), [])) == 1]

    biases = {bias for key in uses if is_factored(key) for bias in bias_beside(key)}
    groups: list[list[_Single | _Linear]] = []
    held = 0
    for key, own in uses.items():
        if key in biases:
            continue
        unit: _Single | _Linear = _Single(names[key], parameters[names[key]], own)
        if is_factored(key):
            unit = _Linear([names[key], *[names[bias] for bias in bias_beside(key)]], own)
        elements = sum(use.elements(rows) for use in own)
        if not groups or held + elements > _COTANGENT_ELEMENTS:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += elements
    return groups


def _condensed(uses: Sequence[_Use], rows: OutputRows) -> dict[int, Tensor]:
    """The condensed cotangents ``(blocks, columns, ...)`` by ``id`` of the use: one backward pass a column.

    Uses that the outputs do not depend on are left out.
    """
    calls = list({id(use.call): use.call for use in uses}.values())
    edges = [gradient_edge(call.output) for call in calls]
    blocks, columns = rows.shape
    result: dict[int, Tensor] = {}
    for column in range(columns if calls else 0):
        selector = calls[0].uses[0].parameter.new_zeros(rows.shape).detach()
        selector[:, column] = 1
        gradients = dict(zip(map(id, calls), rows.vjp(edges, selector), strict=True))
        cotangents = {
            id(call): call.by_sample(gradient, blocks, call.outer)
            for call in calls
            if (gradient := gradients[id(call)]) is not None
        }
        for use in uses:
            if id(use.call) in cotangents:
                condensed = use.use.condense(cotangents[id(use.call)])
                if id(use.use) not in result:
                    result[id(use.use)] = _room_for(condensed, columns)
                result[id(use.use)][:, column] = condensed
    return result


def _room_for(condensed: Tensor, columns: int) -> Tensor:
    """For ``columns`` tensors ``(n, ...)``, as ``(n, columns, ...)``, in memory as they are: copying is then cheap."""
    if condensed.dim() < 3:
        return condensed.new_empty(len(condensed), columns, *condensed.shape[1:])
    samples, positions, channels = condensed.shape
    if condensed.stride(1) == 1 and positions > 1:  # channels first
        return condensed.new_empty(samples, columns, channels, positions).transpose(2, 3)
    return condensed.new_empty(samples, positions, columns, channels).transpose(1, 2)
