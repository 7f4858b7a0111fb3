"""Draw fresh weights from the distribution of a network's initial weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_plasticity.interventions.weights.initialization import reset_values
from lightning_plasticity.isolation.weights import all_names, named_tensors
from lightning_plasticity.layers import norm_parameters

_COMMON = 0.1
"""Share of a tensor's entries from which on equal ones count as constants. The forget gate is a quarter of an LSTM's
bias; the top values of a uniform distribution in bfloat16 have 1/512 each."""

_SAMPLE = 1000
"""Number of entries among which common values are looked for: one of 10 % is at least 5 % of them but for one in 10⁷
tensors."""

_VECTORS, _ANGLE = 32, 1e-3
"""Number of rows or columns that are compared, and the largest cosine between orthogonal ones. Of random vectors it is
0.02 even in 30000 dimensions, as for the columns of an embedding."""


def fresh_values(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> dict[Tensor, Tensor]:
    """Draw new values for parameters and buffers of a model, from its initial weights where they are known.

    A parameter gets a random permutation of its initial entries, by :class:`InitialDistribution`: whatever initialised
    it, the distribution is the same, and so are mean and standard deviation, to the last digit. This includes
    parameters that no layer initialises, such as tokens, positions and scales, and those that a weight is computed
    from, such as by a parametrization or a pruning mask. Norm layers and buffers start from values that are not random:
    they get their initial values back, each its own. Without initial weights, :func:`reset_values` draws the values.

    Args:
        model: The whole model.
        tensors: Those of its parameters and buffers to draw for, by name. Tied tensors may have any of their names.
        initial: The initial values by name, such as a ``state_dict()`` from before training.
        generator: A CPU generator; by default one seeded from torch's global one.

    Returns:
        New value of each tensor, on the CPU, by the old tensor.

    Raises:
        ValueError: If ``initial`` lacks one of the tensors; without ``initial``, if no ``reset_parameters`` initialises
            one of the parameters.
    """
    if not tensors:
        return {}
    result = reset_values(model, tensors, generator) if initial is None else _drawn(model, tensors, initial, generator)
    # Parameters that are views of the same memory must not be written to with different values.
    first = {(tensor.data_ptr(), tensor.shape): tensor for tensor in reversed(result)}
    return {tensor: result[first[tensor.data_ptr(), tensor.shape]] for tensor in result}


def fresh_entries(
    model: nn.Module,
    positions: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
    known: dict[str, InitialDistribution] | None = None,
) -> dict[str, Tensor]:
    """Draw new values for some entries of parameters and buffers, such as those of a unit.

    The values are distributed as those of :func:`fresh_values`. The cost is proportional to the number of entries,
    unless ``reset_parameters`` must draw whole layers.

    Args:
        model: The whole model.
        positions: Indices into the flattened tensors, by name.
        initial: As for :func:`fresh_values`.
        generator: As for :func:`fresh_values`.
        known: The distributions found in earlier calls; those of this call are added.

    Returns:
        The values at these positions, on the CPU, by name.
    """
    tensors = named_tensors(model)
    some = {name: tensors[name] for name in positions}
    if initial is None:
        drawn = fresh_values(model, some, None, generator)
        return {name: drawn[tensors[name]].flatten()[where] for name, where in positions.items()}
    norms = norm_parameters(model)
    values = initial_values(model, some, initial)
    known = {} if known is None else known
    result = {}
    for name, where in positions.items():
        tensor = tensors[name]
        before = values[tensor]
        if name not in known or known[name].initial.data_ptr() != before.data_ptr():
            known[name] = InitialDistribution(before)
        if _is_drawn(tensor, before, norms):
            result[name] = known[name].entries(where, tensor.shape, generator)
        else:
            result[name] = before.flatten()[where]
    return result


def _drawn(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> dict[Tensor, Tensor]:
    norms = norm_parameters(model)
    return {
        tensor: InitialDistribution(values).permuted(tensor.shape, generator)
        if _is_drawn(tensor, values, norms)
        else values.clone()
        for tensor, values in initial_values(model, tensors, initial).items()
    }


def _is_drawn(tensor: Tensor, initial: Tensor, norms: Container[Tensor]) -> bool:
    return (isinstance(tensor, nn.Parameter) and tensor not in norms) or initial.shape != tensor.shape


def initial_values(
    model: nn.Module, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    """Return the initial value of each tensor, on the CPU, by the tensor.

    Of a tied tensor any name counts. A weight that was pruned, or got a parametrization, after the initial weights were
    stored has the initial value of the weight under its former name, if it has that shape.

    Args:
        model: The whole model.
        tensors: Some of its parameters and buffers, by name.
        initial: Initial values by name.

    Raises:
        ValueError: If ``initial`` lacks one of the tensors.
    """
    names = all_names(model)
    result: dict[Tensor, Tensor] = {}
    missing = []
    for name, tensor in tensors.items():
        known = (initial[other] for other in _former_names(names[tensor]) if other in initial)
        values = next(known, None)
        if values is None:
            missing.append(name)
        else:
            result[tensor] = values.detach().cpu()
    if missing:
        raise ValueError(f"initial has no {missing}: it must be the state_dict() of the same model before training")
    return result


def _former_names(names: list[str]) -> list[str]:
    """Return the names that a weight may have had before it was computed from others, the oldest first."""
    former = [name.removesuffix("_orig") for name in names if name.endswith("_orig")]
    former += [
        name.replace("parametrizations.", "").removesuffix(".original") for name in names if name.endswith(".original")
    ]
    return former + names


@dataclass(frozen=True, eq=False)
class InitialDistribution:
    """The distribution that the initial entries of a tensor were drawn from.

    Common initialisations draw all entries of a tensor from one distribution, so that any selection of the entries,
    such as the row of a unit, has that distribution. The :func:`constants` among them stay in their places. The entries
    of an orthogonal matrix depend on each other: its rows and its columns are drawn instead. Kernels count as matrices
    with one row per output.

    Args:
        initial: The initial values, on the CPU.

    Example:
        >>> initial = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])  # the first row is a padding
        >>> InitialDistribution(initial).permuted(initial.shape)[0]
        tensor([0., 0., 0.])
    """

    initial: Tensor

    def permuted(self, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """Return the entries in random order; those of an orthogonal matrix keep its singular values.

        For a tensor that has another shape now, entries are drawn with replacement. A tensor of one entry gets its
        initial value.

        Args:
            shape: Shape of the tensor.
            generator: A CPU generator; by default one seeded from torch's global one.
        """
        if self.initial.shape != shape or self._is_orthogonal:
            return self.entries(torch.arange(shape.numel()), shape, generator).view(shape)
        order = torch.randperm(len(self._random), generator=generator)
        if self._fixed is None:
            return self._random[order].view(shape)
        result = self.initial.clone()
        result[~self._fixed] = self._random[order]
        return result

    def entries(self, positions: Tensor, shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
        """Return values for some entries: initial entries, drawn with replacement.

        Those of an orthogonal matrix come from rows and columns in random order.

        Args:
            positions: Indices into the flattened tensor, ``(count,)``.
            shape: Shape of the tensor.
            generator: A CPU generator; by default one seeded from torch's global one.
        """
        if self.initial.shape != shape:
            return self.initial.flatten()[_integers(self.initial.numel(), positions, generator)]
        if self._is_orthogonal:
            matrix = self.initial.flatten(1)
            rows, columns = (torch.randperm(size, generator=generator) for size in matrix.shape)
            return matrix[rows[positions // matrix.shape[1]], columns[positions % matrix.shape[1]]]
        if self._fixed is None:
            return self._random[_integers(len(self._random), positions, generator)]
        values = self.initial.flatten()[positions]
        drawn = ~self._fixed.flatten()[positions]
        values[drawn] = self._random[_integers(len(self._random), positions[drawn], generator)]
        return values

    @cached_property
    def _fixed(self) -> Tensor | None:
        return constants(self.initial)

    @cached_property
    def _random(self) -> Tensor:
        """The entries that are not constant, flattened."""
        return self.initial.flatten() if self._fixed is None else self.initial[~self._fixed]

    @cached_property
    def _is_orthogonal(self) -> bool:
        return self._fixed is None and _is_orthogonal(self.initial)


def _integers(stop: int, positions: Tensor, generator: torch.Generator | None) -> Tensor:
    # Without entries to draw from, there are none to draw.
    return torch.randint(max(stop, 1), positions.shape, generator=generator)


def constants(initial: Tensor) -> Tensor | None:
    """Return which entries of an initial tensor are not random, as a mask; ``None`` if there are none.

    These are the rows of a matrix, or slices of a larger tensor, that hold a single value, such as the padding of an
    embedding, and values that many entries share, such as zeros, or the ones of a forget gate or of an identity.

    Args:
        initial: The initial values, on the CPU.

    Example:
        >>> constants(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
        tensor([[ True,  True,  True],
                [False, False, False]])
    """
    fixed = torch.zeros(initial.shape, dtype=torch.bool)
    if initial.ndim > 1 and initial.numel() > len(initial):
        rows = initial.flatten(1)
        fixed |= (rows == rows[:, :1]).all(1).view(-1, *[1] * (initial.ndim - 1))
    for value in _common_values(initial.flatten()):
        fixed |= initial == value
    return fixed if bool(fixed.any()) else None


def _common_values(entries: Tensor) -> list[Tensor]:
    """Return the values that at least two entries and a tenth of all of them share."""
    sample = entries
    if len(entries) > _SAMPLE:
        # The same sample each time, so that it does not change the numbers that are drawn.
        sample = entries[torch.randint(len(entries), (_SAMPLE,), generator=torch.Generator().manual_seed(0))]
    if sample.is_complex():
        pairs, counts = torch.view_as_real(sample).unique(dim=0, return_counts=True)
        distinct = torch.view_as_complex(pairs)
    else:
        distinct, counts = sample.unique(return_counts=True)
    candidates = distinct[counts >= max(2, _COMMON / 2 * len(sample))]
    return [value for value in candidates if (entries == value).sum() >= max(2, _COMMON * len(entries))]


def _is_orthogonal(tensor: Tensor) -> bool:
    """Return whether the rows or the columns of a matrix are orthogonal and of the same length, by a few of them."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or min(tensor.flatten(1).shape) < 2:
        return False
    matrix = tensor.flatten(1)
    vectors = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)[:_VECTORS].double()
    gram = vectors @ vectors.T
    square = gram.diagonal().mean()
    return bool((gram - square * torch.eye(len(gram))).abs().max() < _ANGLE * square)
