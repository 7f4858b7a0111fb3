"""Measure the neural tangent kernel: exact with the Gauss-Newton matrix, or by products at any number of outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_choice, check_positive_ints, check_seed
from lightning_plasticity.curvature.cost import Budget, Cost, TooCostlyError
from lightning_plasticity.curvature.double_backward import DoubleBackwardError, explained_errors
from lightning_plasticity.curvature.exact.gram import TooManyRowsError, gram_of
from lightning_plasticity.curvature.exact.jacobian import TooManyPassesError
from lightning_plasticity.curvature.exact.jacobian_rows import JacobianTooLargeError
from lightning_plasticity.curvature.exact.outputs import Outputs
from lightning_plasticity.curvature.exact.recorded_loss import RecordedLoss, differentiation_mode, recorded_loss
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.matrix_free.tangent_kernel import TangentKernelOperator, kernel_by_lanczos
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress
from lightning_plasticity.curvature.spectrum import Spectrum

_FEWEST_PRODUCTS = 9
"""Products below which the bracket of the learnable fraction is often too wide for a verdict."""

_MOST_POSITIONS = 4096
"""Output positions of all samples together that are taken by default: more hardly change the learnable fraction."""

_MOST_OUTPUTS = 2**19
"""Outputs at these positions: the basis of Lanczos takes 100 MiB for 25 products."""

_MOST_PRODUCTS = 60
"""Products after which the bracket hardly narrows for the default horizon."""


@dataclass(frozen=True, eq=False)
class KernelMeasurement:
    """The tangent kernel of a batch, and what was measured with it.

    Args:
        kernel: The kernel.
        loss: The loss on the batch.
        num_outputs: Number of network outputs.
        spectrum: The spectrum of the Gauss-Newton matrix, if it was computed.
        no_gauss_newton: Why it was not.
        positions: Number of output positions of a sample that were taken, and of all; ``None`` if all were taken.
        couples_samples: Whether the loss of a sample depends on the outputs of another.
        held_constant: Names of the parameters that the loss depends on besides the outputs.
        products: Number of products with the kernel, 0 if it is exact.
        over_budget: Whether it cost more than the budget.
        readiness: Optimization readiness of the samples; ``nan`` if it was not computed.
        parts: The same for parts of the parameters, by name, without the parts that the outputs do not depend on.
    """

    kernel: TangentKernel
    loss: float
    num_outputs: int
    spectrum: Spectrum | None = None
    no_gauss_newton: str | None = None
    positions: tuple[int, int] | None = None
    couples_samples: bool = False
    held_constant: list[str] = field(default_factory=list)
    products: int = 0
    over_budget: bool = False
    readiness: float = math.nan
    parts: dict[str, KernelMeasurement] = field(default_factory=dict)


def tangent_kernel(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    method: Literal["auto", "exact", "lanczos"] = "auto",
    parameters: str | Collection[str] | None = None,
    samples: int | None = None,
    max_rows: int = 2048,
    max_products: int = 30,
    positions: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TangentKernel:
    r"""Measure the neural tangent kernel :math:`\Theta = \frac1n J J^\top` of the network outputs of a batch.

    The outputs are the results of the last operations that use parameters, found in the autograd graph, so any loss can
    be used. The model is in evaluation mode.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        method: ``"exact"``: from a matrix with a row for each output number of the batch. ``"lanczos"``: by at most
            ``max_products`` products, for any number of outputs; the learnable fraction is then a bracket, and other
            eigenvalues than the largest are unknown. ``"auto"``: exact up to ``max_rows``.
        parameters: A name or pattern of parameters, or several, as for :func:`ggn_spectrum`.
        samples: Number of samples :math:`n`; by default the first dimension of the outputs.
        max_rows: Largest number of rows of the matrix.
        max_products: Largest number of products, each about two gradients of the batch.
        positions: Number of output positions (tokens, pixels) of all samples together to take, drawn at random and the
            same for each sample. By default 4096, or fewer if they have more than half a million outputs together. It
            has no effect on the exact kernel.
        seed: Seed of the positions and of a start vector.
        progress: Called after each product with the number of products done and the total.

    Returns:
        The kernel, with the share of the residual along its eigenvectors.

    Raises:
        DoubleBackwardError: If products are wrong because a custom autograd.Function hides derivatives.
        TooManyRowsError: If ``max_rows`` is exceeded, with ``method="exact"``.
        UnsupportedModelError: If a Jacobian exceeds the memory limit, with ``method="exact"``.
        ValueError: If an argument or the loss is invalid.

    References:
        Jacot et al. 2018, arXiv 1806.07572.

    Example:
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> kernel = tangent_kernel(model, x, lambda model, x: (model(x) - 1).abs().mean())
        >>> [round(value, 6) for value in kernel.eigenvalues.tolist()]  # of ½ xxᵀ
        [2.0, 0.5]
    """
    check_choice(("auto", "exact", "lanczos"), method=method)
    check_positive_ints(max_rows=max_rows, max_products=max_products)
    check_positive_ints(optional=True, samples=samples, positions=positions)
    check_seed(seed)
    with recorded_loss(model, batch, loss_fn, parameters=parameters, samples=samples) as recorded:
        if method != "lanczos":
            try:
                kernel = gram_of(recorded, max_rows=max_rows, gauss_newton=False).kernel
                assert kernel is not None
                return kernel
            except (TooManyRowsError, JacobianTooLargeError):
                if method == "exact":
                    raise
        return _by_products(recorded, max_products, positions=positions, seed=seed, progress=progress).kernel


def measure_within_budget(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    samples: int | None,
    max_rows: int,
    positions: int | None,
    budget: Budget,
    fewest_products: bool = False,
    fewest_exact: float = math.inf,
    parts: Mapping[str, Collection[str]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> KernelMeasurement:
    """Measure the kernel in the cheapest way that is right: exact if that is affordable, else by products.

    Parts are measured in the same way, whatever they cost.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: Computes the mean loss.
        samples: Number of samples.
        max_rows: Largest number of rows of the exact matrix.
        positions: Largest number of output positions of all samples together.
        budget: Largest cost.
        fewest_products: Whether to exceed the budget where it is too small for a bracket that says something.
        fewest_exact: Number of samples that make exact spectra worth more than products on all samples.
        parts: Names of the parameters of each part to measure beside the whole.
        seed: Seed of the positions and of a start vector.
        progress: Called after each product, and after each exact part.

    Raises:
        TooCostlyError: If the budget is too small, unless ``fewest_products``, or if it suffices for exact spectra of
            ``fewest_exact`` samples.
    """
    with recorded_loss(model, batch, loss_fn, samples=samples) as recorded:
        selections = {part: recorded.select(names) for part, names in (parts or {}).items()}
        selections = {part: selected for part, selected in selections.items() if selected.depends_on_parameters}
        count = 1 + len(selections)

        def measure_exactly(selected: RecordedLoss, place: int) -> KernelMeasurement:
            measurement = _exact(selected)
            # One kernel matrix is held at a time.
            measurement.kernel.compact()
            if progress is not None:
                progress(place + 1, count)
            return measurement

        def multiply(selected: RecordedLoss, place: int) -> KernelMeasurement:
            def advance(done: int, total: int) -> None:
                if progress is not None:
                    progress(place * total + done, count * total)

            return _by_products(selected, products, positions=positions, seed=seed, progress=advance)

        reason = None
        try:
            whole, measure_part = _exact(recorded, max_rows=max_rows, budget=budget), measure_exactly
        except (TooManyRowsError, TooManyPassesError, JacobianTooLargeError, TooCostlyError) as error:
            if isinstance(error, TooCostlyError) and error.affordable * recorded.num_samples >= fewest_exact:
                raise
            reason = f"the exact spectra would be too costly ({error})"
        if reason is not None:
            steps, products = _affordable_products(recorded.cost, recorded.num_outputs, budget)
            fixed = _fewest_products_in_steps(recorded.cost, replace(recorded.cost, flops=0), 0, budget)
            # Fewer samples do not help where the products of a small network are too costly on any.
            if fixed < budget.steps < steps and not fewest_products:
                raise TooCostlyError(steps, budget, (budget.steps - fixed) / (steps - fixed))
            try:
                with explained_errors():
                    whole, measure_part = multiply(recorded, 0), multiply
                whole = replace(whole, no_gauss_newton=reason, over_budget=steps > budget.steps)
            except DoubleBackwardError as error:
                # The exact matrix needs no second derivatives of the network, whatever it costs.
                try:
                    whole, measure_part = _exact(recorded, max_rows=max_rows), measure_exactly
                except (TooManyRowsError, JacobianTooLargeError):
                    raise error from None
        measured = {part: measure_part(selected, place) for place, (part, selected) in enumerate(selections.items(), 1)}
        return replace(whole, parts=measured)


def _exact(recorded: RecordedLoss, *, max_rows: int | None = None, budget: Budget | None = None) -> KernelMeasurement:
    """Measure the kernel and the Gauss-Newton matrix by their Gram matrices."""
    exact = gram_of(recorded, max_rows=max_rows, budget=budget)
    kernel = exact.kernel
    assert kernel is not None
    return KernelMeasurement(
        kernel,
        exact.loss,
        exact.num_outputs,
        spectrum=None if exact.no_gauss_newton else exact.spectrum(),
        no_gauss_newton=exact.no_gauss_newton,
        couples_samples=exact.couples_samples,
        held_constant=exact.held_constant,
        readiness=exact.readiness,
    )


def _by_products(
    recorded: RecordedLoss, max_products: int, *, positions: int | None, seed: int, progress: Progress | None
) -> KernelMeasurement:
    """Measure the kernel by at most ``max_products`` products."""
    outputs = recorded.derivatives.outputs
    taken = _Positions.draw(outputs, recorded.num_samples, positions, seed)
    residual = torch.cat([output.residual.flatten() for output in outputs])
    with differentiation_mode():
        operator = TangentKernelOperator(
            [output.edge for output in outputs],
            [output.shape for output in outputs],
            list(recorded.parameters.values()),
            recorded.num_samples,
            None if taken is None else taken.entries,
        )
    kernel = kernel_by_lanczos(
        _InMode(operator),
        residual if taken is None else residual[taken.entries],
        max_products=max_products,
        seed=seed,
        squared_residual=recorded.num_samples * residual.double().square().sum().item(),
        progress=progress,
    )
    return KernelMeasurement(
        kernel,
        recorded.loss.item(),
        operator.dimension,
        positions=None if taken is None else (taken.count, taken.total),
        couples_samples=recorded.derivatives.couples_samples,
        held_constant=recorded.derivatives.held_constant,
        products=operator.products,
    )


def _affordable_products(cost: Cost, rows: int, budget: Budget) -> tuple[float, int]:
    """Return the training steps of the fewest products, and the number of products to take, at least as many."""
    steps = _fewest_products_in_steps(cost, cost, rows, budget)
    # The first forward pass and the graph of the products take as long as two of them.
    affordable = int(budget.steps / steps * (_FEWEST_PRODUCTS + 2)) - 2
    return steps, min(max(affordable, _FEWEST_PRODUCTS), _MOST_PRODUCTS)


def _fewest_products_in_steps(cost: Cost, cost_of_products: Cost, rows: int, budget: Budget) -> float:
    """Return the training steps, by one cost, of the fewest products, by another."""
    return (_FEWEST_PRODUCTS + 2) * cost.in_steps(cost_of_products.kernel_product(rows), budget)


@dataclass(frozen=True, eq=False)
class _Positions:
    """A random subset of output positions, the same for each sample.

    Args:
        count: Number of positions of a sample that were taken.
        total: Number of positions of a sample.
        entries: Indices of the entries there, among all outputs flattened one tensor after the other.
    """

    count: int
    total: int
    entries: Tensor

    @classmethod
    def draw(cls, outputs: Sequence[Outputs], num_samples: int, positions: int | None, seed: int) -> _Positions | None:
        """Draw positions, ``positions`` for all samples together; return ``None`` if there are no more."""
        counts = [_num_positions(output, num_samples) for output in outputs]
        allowed = []
        for output, count in zip(outputs, counts, strict=True):
            most = positions or min(_MOST_POSITIONS, _MOST_OUTPUTS * count * num_samples // output.shape.numel())
            allowed.append(min(count, max(1, most // num_samples)))
        if allowed == counts:
            return None
        generator = torch.Generator().manual_seed(seed)
        entries, start = [], 0
        for output, count, most in zip(outputs, counts, allowed, strict=True):
            chosen = torch.randperm(count, generator=generator, device="cpu")[:most].sort().values
            indices = start + torch.arange(output.shape.numel(), device="cpu").reshape(output.shape)
            entries.append(_by_position(output, indices, num_samples)[:, chosen].flatten())
            start += output.shape.numel()
        return cls(sum(allowed), sum(counts), torch.cat(entries).to(outputs[0].residual.device))


@dataclass(frozen=True, eq=False)
class _InMode:
    """A kernel operator whose products, and nothing else, run in the modes of differentiation."""

    operator: TangentKernelOperator

    @property
    def dimension(self) -> int:
        return self.operator.dimension

    @property
    def rounding(self) -> float:
        return self.operator.rounding

    def __call__(self, vector: Tensor) -> Tensor:
        with differentiation_mode():
            return self.operator(vector)


def _by_position(output: Outputs, values: Tensor, num_samples: int) -> Tensor:
    """Reshape values in the shape of the outputs to ``(samples, positions, channels)``.

    Channels are the last dimension of sequences, and the one after the samples of images. Positions may be numbered
    along with the samples, ``(samples * positions, channels)``.
    """
    if output.sample_dim is None or len(output.shape) < 2 or output.num_samples % num_samples:
        return values.reshape(1, 1, -1)
    samples_first = values.movedim(output.sample_dim, 0)
    channels_last = samples_first.movedim(1, -1) if len(output.shape) > 3 else samples_first
    return channels_last.reshape(num_samples, -1, channels_last.shape[-1])


def _num_positions(output: Outputs, num_samples: int) -> int:
    return _by_position(output, torch.empty(output.shape, device="meta"), num_samples).shape[1]
