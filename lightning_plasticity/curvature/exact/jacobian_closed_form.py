r"""Compute :math:`J J^\top` from the closed-form Jacobians of layers, and check these against autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.autograd_graph import gradient_edge, or_zeros
from lightning_plasticity.curvature.exact.layer_calls import LayerCall
from lightning_plasticity.curvature.exact.outputs import OutputRows
from lightning_plasticity.curvature.exact.parameter_uses import Bias, ParameterUse, Rows, Weight
from lightning_plasticity.curvature.problem import normal

_RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest deviation of a closed form from autograd: far above rounding errors, far below the effect of a mistake."""

_CHUNK_ELEMENTS = 2**24
"""Most entries of a Jacobian held at once: 64 MiB in float32."""

_COTANGENT_ELEMENTS = 2**26
"""Most entries of cotangents held at once, unless those of a single parameter are more: 256 MiB in float32."""

_MIN_STRIP_ROWS = 128
"""Fewest rows of a symmetric product computed at once: smaller strips are no faster."""


def closed_form_gram(
    calls: Sequence[LayerCall], rows: OutputRows, parameters: Mapping[str, nn.Parameter], factors: Tensor
) -> tuple[Tensor, list[str]]:
    r"""Return the sum of :math:`J_p J_p^\top` over the parameters, and the names of those whose closed form is wrong.

    The check compares :math:`J_p^\top u` of every parameter with autograd, for a random :math:`u` and for :math:`S u`,
    the directions that the loss-weighted Gram matrix depends on.

    Args:
        calls: The recorded layer calls.
        rows: The rows of the Jacobian.
        parameters: The parameters, by name.
        factors: Factors :math:`S` of the Hessian, shape ``(num_blocks, q, q)``, float64.

    Returns:
        A matrix of shape ``(rows, rows)``, float64, and a list of names.
    """
    total = factors.new_zeros(len(rows), len(rows))
    if not parameters:
        return total, []
    dtype = next(iter(parameters.values())).dtype
    noise = normal((2, *rows.shape, 1), factors)
    directions = torch.cat([noise[:1], factors @ noise[1:]])[..., 0].to(dtype)

    contributions: dict[str, _Contribution] = {}
    for group in _groups(_terms(calls, parameters, rows.num_blocks), rows):
        condensed = _condensed_cotangents([use for term in group for use in term.uses], rows)
        for term in group:
            contributions.update(term.add_to(total, condensed, directions))
    total = total.tril() + total.tril(-1).T

    expected = [rows.vjp(list(parameters.values()), direction) for direction in directions]
    rounding = 100 * torch.finfo(dtype).eps * _typical_norms(_diagonal_blocks(total, rows.shape), factors)
    wrong = []
    for index, (name, parameter) in enumerate(parameters.items()):
        contribution = contributions[name]
        deviations = torch.stack(
            [
                torch.linalg.vector_norm(vjp.reshape(parameter.shape) - or_zeros(gradients[index], parameter))
                for vjp, gradients in zip(contribution.vjps, expected, strict=True)
            ]
        ).double()
        tolerances = _RELATIVE_TOLERANCE[dtype] * _typical_norms(contribution.diagonal, factors) + rounding
        # A NaN fails the comparison and so counts as a deviation.
        if not bool((deviations <= tolerances).all()):
            wrong.append(name)
    return total, wrong


def _diagonal_blocks(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the blocks on the diagonal of a matrix over rows of the given shape, ``(num_blocks, q, q)``."""
    return matrix.reshape(*shape, *shape).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def _typical_norms(diagonal: Tensor, factors: Tensor) -> Tensor:
    r"""Return the root mean square of :math:`J_p^\top u` and of :math:`J_p^\top S u` over random u, shape ``(2,)``."""
    weighted = (factors.mT @ diagonal @ factors).diagonal(dim1=1, dim2=2).sum()
    return torch.stack([diagonal.diagonal(dim1=1, dim2=2).sum(), weighted]).clamp(min=0).sqrt()


@dataclass(frozen=True, eq=False)
class _Contribution:
    r"""The contribution of one parameter to :math:`J J^\top`, reduced to what the check needs.

    Args:
        diagonal: The blocks on the diagonal, shape ``(num_blocks, q, q)``.
        vjps: :math:`J_p^\top u` for each direction ``u``, shape ``(directions, *shape)``.
    """

    diagonal: Tensor
    vjps: Tensor


@dataclass(eq=False)
class _UseInCall:
    """One use of a parameter, and the layer call that contains it."""

    call: LayerCall
    use: ParameterUse

    def cotangent_elements(self, rows: OutputRows) -> int:
        """Return the number of entries of the condensed cotangents."""
        per_block = self.use.condensed_elements(self.call.output_shape.numel() // rows.num_blocks)
        return per_block * len(rows)

    def is_single_product(self, num_blocks: int) -> bool:
        """Return whether this is one matrix-vector product per block."""
        positions = self.call.output_shape.numel() // self.call.channels // num_blocks
        return isinstance(self.use, Weight) and positions == 1


@dataclass(eq=False)
class _ParameterTerm:
    r"""The term :math:`J_p J_p^\top` of one parameter, from its Jacobian summed over all uses."""

    name: str
    parameter: nn.Parameter
    uses: list[_UseInCall]

    def add_to(self, total: Tensor, condensed: Mapping[int, Tensor], directions: Tensor) -> dict[str, _Contribution]:
        r"""Add the term to a matrix, and return what the check needs, by name of the parameter.

        Args:
            total: The sum of terms, shape ``(rows, rows)``. Only the entries on and below the diagonal are valid.
            condensed: The condensed cotangents, by ``id`` of the use. Uses without influence on the outputs are absent.
            directions: The directions ``u`` of the check, shape ``(directions, num_blocks, q)``.
        """
        num_rows, shape = len(total), (directions.shape[1], directions.shape[2])
        diagonal = total.new_zeros(shape[0], shape[1], shape[1])
        vjps = self.parameter.new_zeros(len(directions), *self.parameter.shape).detach()
        uses = [use.use for use in self.uses if id(use.use) in condensed]
        if uses:
            columns = self.parameter[0].numel() if self.parameter.dim() else 1
            vjp_rows = vjps.reshape(len(directions), -1, columns)
            jacobians = [use.jacobian(condensed[id(use)]) for use in uses]
            for chunk in _row_chunks(uses, len(vjp_rows[0]), max(1, _CHUNK_ELEMENTS // (num_rows * columns))):
                jacobian = reduce(torch.add, [jacobian_rows(chunk) for jacobian_rows in jacobians])
                jacobian = jacobian.reshape(num_rows, -1)
                _add_lower_gram(total, jacobian)
                by_block = jacobian.reshape(*shape, -1)
                diagonal += by_block @ by_block.mT
                vjp_rows[:, chunk] = (directions.flatten(1) @ jacobian).reshape(len(directions), -1, columns)
        return {self.name: _Contribution(diagonal, vjps)}


def _row_chunks(uses: Sequence[ParameterUse], num_rows: int, size: int) -> Iterator[Rows]:
    """Yield the rows of a parameter that any of the uses can touch, ``size`` at a time."""
    active = [use.active_rows() for use in uses]
    restricted = [indices for indices in active if indices is not None]
    if len(restricted) == len(active):
        yield from torch.cat(restricted).unique().split(size)
    else:
        yield from (slice(start, start + size) for start in range(0, num_rows, size))


def _add_lower_gram(total: Tensor, jacobian: Tensor) -> None:
    r"""Add :math:`J J^\top` on and below the diagonal, which saves a third of the work."""
    size = max(_MIN_STRIP_ROWS, len(jacobian) // 4)
    for start in range(0, len(jacobian), size):
        end = start + size
        total[start:end, :end] += jacobian[start:end] @ jacobian[:end].T


@dataclass(eq=False)
class _LinearTerm:
    r"""The terms of the weight of a linear layer with one position per block, and of its bias if that is used once.

    They follow from inputs and cotangents without a Jacobian:
    :math:`\langle J_i, J_j\rangle = (x_i \cdot x_j + 1)(g_i \cdot g_j)`.

    Args:
        names: Name of the weight, then of the bias if it is included.
        uses: The only use of the weight.
    """

    names: list[str]
    uses: list[_UseInCall]

    def add_to(self, total: Tensor, condensed: Mapping[int, Tensor], directions: Tensor) -> dict[str, _Contribution]:
        """Add the terms to a matrix: see :meth:`_ParameterTerm.add_to`."""
        weight = self.uses[0].use
        assert isinstance(weight, Weight)
        shape = (directions.shape[1], directions.shape[2])
        inputs = weight.inputs(shape[0])[:, 0]
        if id(weight) in condensed:
            gradients = condensed[id(weight)][:, :, 0]
        else:
            gradients = inputs.new_zeros(*shape, len(weight.parameter))
        flat = gradients.flatten(0, 1)
        gradient_products = (flat @ flat.T).double()
        input_products = (inputs @ inputs.T).double()
        diagonal = _diagonal_blocks(gradient_products, shape).clone()
        summed = torch.einsum("dnq,nqo->dno", directions, gradients)
        contributions = {
            self.names[0]: _Contribution(
                diagonal * input_products.diagonal()[:, None, None], torch.einsum("dno,ni->doi", summed, inputs)
            )
        }
        if len(self.names) > 1:
            contributions[self.names[1]] = _Contribution(diagonal, summed.sum(1))
            input_products = input_products + 1
        gradient_products.view(*shape, *shape).mul_(input_products[:, None, :, None])
        total += gradient_products
        return contributions


_Term = _ParameterTerm | _LinearTerm


def _terms(calls: Sequence[LayerCall], parameters: Mapping[str, nn.Parameter], num_blocks: int) -> list[_Term]:
    r"""Divide :math:`J J^\top` into terms: one per linear layer used once, one per remaining parameter."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    uses: dict[int, list[_UseInCall]] = {key: [] for key in names}
    for call in calls:
        for use in call.uses:
            if id(use.parameter) in uses:
                uses[id(use.parameter)].append(_UseInCall(call, use))

    biases_of_weight: dict[int, list[int]] = {}
    for key, parameter_uses in uses.items():
        if len(parameter_uses) == 1 and parameter_uses[0].is_single_product(num_blocks):
            biases = [id(use.parameter) for use in parameter_uses[0].call.uses if isinstance(use, Bias)]
            biases_of_weight[key] = [bias for bias in biases if len(uses.get(bias, [])) == 1]

    included = {bias for biases in biases_of_weight.values() for bias in biases}
    terms: list[_Term] = []
    for key, name in names.items():
        if key in biases_of_weight:
            terms.append(_LinearTerm([name, *[names[bias] for bias in biases_of_weight[key]]], uses[key]))
        elif key not in included:
            terms.append(_ParameterTerm(name, parameters[name], uses[key]))
    return terms


def _groups(terms: Sequence[_Term], rows: OutputRows) -> list[list[_Term]]:
    """Divide the terms into groups whose cotangents can be held at once: each group has its own backward passes."""
    groups: list[list[_Term]] = []
    num_elements = 0
    for term in terms:
        elements = sum(use.cotangent_elements(rows) for use in term.uses)
        if not groups or num_elements + elements > _COTANGENT_ELEMENTS:
            groups.append([])
            num_elements = 0
        groups[-1].append(term)
        num_elements += elements
    return groups


def _condensed_cotangents(uses: Sequence[_UseInCall], rows: OutputRows) -> dict[int, Tensor]:
    """Compute the condensed cotangents ``(num_blocks, q, ...)`` by ``id`` of the use, with ``q`` backward passes.

    Uses without influence on the outputs are left out.
    """
    calls = list({id(use.call): use.call for use in uses}.values())
    edges = [gradient_edge(call.output) for call in calls]
    result: dict[int, Tensor] = {}
    for row in range(rows.rows_per_block if calls else 0):
        selector = calls[0].uses[0].parameter.new_zeros(rows.shape).detach()
        selector[:, row] = 1
        gradients = rows.vjp(edges, selector)
        cotangents = {
            id(call): call.per_sample(gradient, rows.num_blocks, call.leading_positions)
            for call, gradient in zip(calls, gradients, strict=True)
            if gradient is not None
        }
        for use in uses:
            if id(use.call) in cotangents:
                condensed = use.use.condense(cotangents[id(use.call)])
                if id(use.use) not in result:
                    result[id(use.use)] = _empty_stack(condensed, rows.rows_per_block)
                result[id(use.use)][:, row] = condensed
    return result


def _empty_stack(condensed: Tensor, num_rows: int) -> Tensor:
    """Allocate ``(n, num_rows, ...)`` for tensors ``(n, ...)``, in the same memory order so that copying is cheap."""
    if condensed.dim() < 3:
        return condensed.new_empty(len(condensed), num_rows, *condensed.shape[1:])
    samples, positions, channels = condensed.shape
    channels_first = condensed.stride(1) == 1 and positions > 1
    if channels_first:
        return condensed.new_empty(samples, num_rows, channels, positions).transpose(2, 3)
    return condensed.new_empty(samples, positions, num_rows, channels).transpose(1, 2)
