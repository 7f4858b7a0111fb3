r"""Compute the Gram matrices whose eigenvalues are the exact spectra of the Gauss-Newton matrix and tangent kernel.

The Jacobian :math:`J` has a row for each of the :math:`m` network outputs and a column for each of the :math:`P`
parameters. With the Hessian of the loss with respect to the outputs, :math:`H = S S^\top`, the Gauss-Newton matrix
:math:`J^\top H J` (:math:`P \times P`) has the non-zero eigenvalues of the *loss-weighted Gram matrix*
:math:`K = S^\top J J^\top S` (:math:`m \times m`). :math:`J J^\top` is a sum over parameters. Each term follows from
the inputs of a layer and the gradients with respect to its outputs, which takes one backward pass per output of a
sample and does not form :math:`J`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.autograd_graph import leaves
from lightning_plasticity.curvature.cost import Budget, TooCostlyError
from lightning_plasticity.curvature.exact.jacobian import JacobianGram, jacobian_gram
from lightning_plasticity.curvature.exact.loss_derivatives import LossDerivatives
from lightning_plasticity.curvature.exact.loss_hessian import LossHessian
from lightning_plasticity.curvature.exact.outputs import NoGaussNewtonMatrixError, Outputs, UnsupportedModelError
from lightning_plasticity.curvature.exact.recorded_loss import RecordedLoss, recorded_loss
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.problem import (
    NOT_FINITE,
    Batch,
    LossFunction,
)
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.functional.gradients import readiness


class TooManyRowsError(ValueError):
    """Raised when the Gram matrix of a batch would be larger than allowed.

    Args:
        rows: Number of rows ``m`` of the Gram matrix.
        max_rows: The largest number allowed.
    """

    def __init__(self, rows: int, max_rows: int) -> None:
        super().__init__(
            f"the network has {rows} outputs on this batch and the Gram matrix a row for each, more than "
            f"max_rows={max_rows}: probe fewer samples or raise max_rows"
        )
        self.rows, self.max_rows = rows, max_rows


@dataclass(frozen=True, eq=False)
class Gram:
    r"""The Gram matrices of one batch, float64.

    Args:
        loss_weighted: :math:`K = S^\top J J^\top S`, shape ``(m, m)``; ``(n s, n s)`` for a sketch with ``s``
            combinations per sample; ``None`` if the loss has no positive semi-definite Hessian.
        loss: The loss on the batch.
        num_parameters: :math:`P`.
        num_samples: :math:`n`.
        tangent_kernel: :math:`\Theta = \frac1n J J^\top`, shape ``(m, m)``; ``None`` for a sketch.
        residual: :math:`r = \partial L / \partial f`, shape ``(m,)``; ``None`` for a sketch.
        trace_standard_error: Standard error of the trace; zero unless this is a sketch.
        readiness: Optimization readiness, with samples as the minibatches; ``nan`` where it is not known.
        no_gauss_newton: Why there is no Gauss-Newton matrix.
        couples_samples: Whether the loss of a sample depends on the outputs of another.
        held_constant: Names of the parameters that the loss depends on besides the outputs.
    """

    loss_weighted: Tensor | None
    loss: float
    num_parameters: int
    num_samples: int
    tangent_kernel: Tensor | None = None
    residual: Tensor | None = None
    trace_standard_error: float = 0.0
    readiness: float = math.nan
    no_gauss_newton: str | None = None
    couples_samples: bool = False
    held_constant: list[str] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        """Number of network outputs :math:`m` on the batch; for a sketch, of their combinations."""
        matrix = self.loss_weighted if self.tangent_kernel is None else self.tangent_kernel
        return 0 if matrix is None else len(matrix)

    @cached_property
    def kernel(self) -> TangentKernel | None:
        """The tangent kernel; ``None`` for a sketch."""
        if self.tangent_kernel is None or self.residual is None:
            return None
        squared = self.num_samples * self.residual.square().sum().item()
        return TangentKernel.from_matrix(self.tangent_kernel, self.residual, squared)

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the Gauss-Newton matrix, with the tangent kernel unless this is a sketch.

        Raises:
            NoGaussNewtonMatrixError: If the loss has no positive semi-definite Hessian.
        """
        if self.loss_weighted is None:
            raise NoGaussNewtonMatrixError(self.no_gauss_newton)
        eigenvalues = torch.linalg.eigvalsh(self.loss_weighted).flip(0).clamp(min=0)[: self.num_parameters]
        weights = torch.full_like(eigenvalues, 1 / self.num_parameters)
        # All other eigenvalues of the Gauss-Newton matrix are zero.
        num_zeros = self.num_parameters - len(eigenvalues)
        if num_zeros:
            eigenvalues = torch.cat([eigenvalues, eigenvalues.new_zeros(1)])
            weights = torch.cat([weights, weights.new_full((1,), num_zeros / self.num_parameters)])
        kernel = self.kernel
        return Spectrum(
            eigenvalues.cpu(),
            weights.cpu(),
            self.num_parameters,
            exact=kernel is not None,
            kernel=kernel,
            semidefinite=True,
            trace_standard_error=self.trace_standard_error,
        )


def gram(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    parameters: str | Collection[str] | None = None,
    samples: int | None = None,
    max_rows: int | None = None,
    max_passes: float = math.inf,
    sketch: int | None = None,
    seed: int = 0,
) -> Gram:
    """Compute the Gram matrices of a batch: see :func:`~lightning_plasticity.curvature.ggn_spectrum` for the arguments.

    Raises:
        TooManyRowsError: If the matrix would have more than ``max_rows`` rows.
        TooManyPassesError: If row-by-row Jacobians would take more than ``max_passes`` backward passes.
        UnsupportedModelError: If the curvature of a loss term is unknown, or a Jacobian is too large.
        ValueError: If an argument, the loss or a gradient is invalid.
    """
    check_positive_ints(optional=True, samples=samples, max_rows=max_rows, sketch=sketch)
    with recorded_loss(model, batch, loss_fn, parameters=parameters, samples=samples) as recorded:
        return gram_of(
            recorded,
            max_rows=max_rows,
            max_passes=max_passes,
            sketch=sketch,
            seed=seed,
        )


def gram_of(
    recorded: RecordedLoss,
    *,
    max_rows: int | None = None,
    max_passes: float = math.inf,
    budget: Budget | None = None,
    sketch: int | None = None,
    seed: int = 0,
    gauss_newton: bool = True,
) -> Gram:
    """Compute the Gram matrices of a recorded loss: see :func:`gram`.

    Args:
        recorded: The loss.
        max_rows: Largest number of rows.
        max_passes: Largest number of backward passes for row-by-row Jacobians.
        budget: Largest cost, of which row-by-row Jacobians and the Hessian of the loss get what the rest leaves.
        sketch: Number of random combinations of each sample's outputs to take instead of all.
        seed: Seed of the combinations.
        gauss_newton: Whether to compute the loss-weighted matrix, too.

    Raises:
        TooCostlyError: If the matrix would cost more than ``budget``.
    """
    recording, outputs = recorded.recording, recorded.derivatives.outputs
    _check_rows(outputs, sketch, max_rows)
    if budget is not None:
        remaining = _remaining_steps(recorded, budget)
        max_passes = min(max_passes, remaining / recorded.cost.in_steps(recorded.cost.backward_pass, budget))
    without_closed_form = _without_closed_form(outputs, recording, recorded.parameters, recorded.names)
    combinations = None
    if sketch is not None:
        generator = torch.Generator().manual_seed(seed)
        hessian = recorded.derivatives.hessian
        blocks = 1 if hessian.couples(recorded.derivatives.num_samples) else recorded.derivatives.num_samples
        combinations = hessian.random_factor_columns(sketch, blocks, generator)
    factors = _Factors(recorded.derivatives if gauss_newton else None)
    if budget is not None and gauss_newton and not recorded.derivatives.has_closed_form:
        count = recorded.num_outputs // (
            1 if recorded.derivatives.couples_samples else recorded.derivatives.num_samples
        )
        steps = recorded.cost.in_steps(recorded.cost.hessian_products(count), budget)
        if steps > remaining:
            factors.leave_out(
                f"{count} products with the Hessian of the loss would take {steps:.0f} training steps, of which the "
                f"budget has {remaining:.0f} left"
            )
    jacobian = jacobian_gram(
        recording.layer_calls,
        outputs,
        recorded.parameters,
        without_closed_form,
        factors=factors,
        combinations=combinations,
        max_passes=max_passes,
    )
    if not torch.isfinite(jacobian.matrix).all():
        raise ValueError(NOT_FINITE)
    if sketch is not None:
        return Gram(
            loss_weighted=jacobian.matrix / sketch,
            loss=recorded.loss.item(),
            num_parameters=recorded.num_parameters,
            num_samples=recorded.num_samples,
            trace_standard_error=_trace_standard_error(jacobian, sketch),
        )
    return Gram(
        loss_weighted=factors.weight(jacobian),
        loss=recorded.loss.item(),
        num_parameters=recorded.num_parameters,
        num_samples=recorded.num_samples,
        tangent_kernel=jacobian.matrix / recorded.num_samples,
        residual=_residual(factors.outputs or outputs, jacobian.num_blocks),
        readiness=math.nan if recorded.derivatives.couples_samples else _readiness(recorded, jacobian),
        no_gauss_newton=factors.no_gauss_newton,
        couples_samples=recorded.derivatives.couples_samples,
        held_constant=recorded.derivatives.held_constant,
    )


class _Factors:
    r"""The factors :math:`S` of the loss Hessian, as far as it is known and positive semi-definite.

    Args:
        derivatives: The derivatives of the loss; ``None`` for none.
    """

    def __init__(self, derivatives: LossDerivatives | None) -> None:
        self.no_gauss_newton: str | None = None
        self._hessian: LossHessian | None = None
        self._factors: dict[int, Tensor] = {}
        if derivatives is not None:
            try:
                self._hessian = derivatives.hessian
            except NoGaussNewtonMatrixError as error:
                self.no_gauss_newton = str(error)
        self.outputs = None if self._hessian is None else self._hessian.outputs

    def leave_out(self, reason: str) -> None:
        """Leave the Gauss-Newton matrix out, for a reason."""
        self._hessian, self.no_gauss_newton = None, reason

    def __call__(self, num_blocks: int) -> Tensor | None:
        """Return one factor for each block, ``(num_blocks, q, q)``; ``None`` if the loss couples blocks."""
        return None if self._hessian is None or self._hessian.couples(num_blocks) else self._factor(num_blocks)

    def weight(self, jacobian: JacobianGram) -> Tensor | None:
        r"""Return :math:`S^\top J J^\top S`, symmetric despite rounding; ``None`` if there is none."""
        if self._hessian is None:
            return None
        num_blocks, matrix = jacobian.num_blocks, jacobian.matrix
        if self._hessian.couples(num_blocks):
            # One block, whose rows are numbered in another order.
            matrix, num_blocks = matrix[(order := self._hessian.row_order(num_blocks))][:, order], 1
        factors = self._factor(num_blocks)
        if factors is None:
            return None
        q = factors.shape[1]
        by_block = matrix.reshape(num_blocks, q, num_blocks, q)
        weighted = torch.einsum("ipa,ipjq,jqb->iajb", factors, by_block, factors).reshape(matrix.shape)
        return (weighted + weighted.T) / 2

    def _factor(self, num_blocks: int) -> Tensor | None:
        if self._hessian is not None and num_blocks not in self._factors:
            try:
                self._factors[num_blocks] = self._hessian.dense_factors(num_blocks)
            except NoGaussNewtonMatrixError as error:
                self._hessian, self.no_gauss_newton = None, str(error)
        return self._factors.get(num_blocks)


def _without_closed_form(
    outputs: list[Outputs], recording: Recording, parameters: Mapping[str, nn.Parameter], names: Mapping[int, str]
) -> dict[str, str]:
    """Find the parameters that the outputs depend on other than through the recorded layer calls, with the reason.

    Raises:
        UnsupportedModelError: If the outputs depend on parameters of another model.
        ValueError: If the outputs do not depend on any parameter.
    """
    edges = [output.edge for output in outputs]
    if not any(id(leaf) in names for leaf in leaves(edges, {})):
        raise ValueError("the loss does not depend on any trainable parameter (was it detached?)")
    other_leaves = leaves(edges, {call.output: call.inputs for call in recording.layer_calls})
    if foreign := [leaf for leaf in other_leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in names]:
        raise UnsupportedModelError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not the model's own. Does the "
            "model, or a hook on it, call a function that refers to another model, or to the one it was copied from?"
        )
    used = {names[id(leaf)] for leaf in other_leaves if id(leaf) in names} & parameters.keys()
    return {
        name: "used by " + (", ".join(sorted(recording.other_uses.get(name, ()))) or "an unknown function")
        for name in used
    }


def _check_rows(outputs: list[Outputs], sketch: int | None, max_rows: int | None) -> None:
    """Raise if the Gram matrix would have too many rows."""
    num_outputs = sum(output.shape.numel() for output in outputs)
    num_rows = num_outputs if sketch is None else outputs[0].num_samples * sketch
    if max_rows is not None and num_rows > max_rows:
        raise TooManyRowsError(num_rows, max_rows)


def _remaining_steps(recorded: RecordedLoss, budget: Budget) -> float:
    """Return the training steps that are left of a budget after the parts of the matrix that have closed forms.

    Raises:
        TooCostlyError: If these cost more.
    """
    num_samples = recorded.derivatives.num_samples
    shared = {
        id(use.parameter): use.parameter.numel()
        for call in recorded.recording.layer_calls
        for use in call.uses
        if call.output_shape.numel() > call.channels * num_samples
        and use.condensed_elements(call.output_shape.numel() // num_samples) != use.parameter.numel()
    }
    seconds = recorded.cost.exact(recorded.num_outputs, recorded.num_outputs // num_samples, sum(shared.values()))
    steps = recorded.cost.in_steps(seconds, budget)
    if steps > budget.steps:
        # The cost of eigenvalues grows with the third power of the number of samples, that of passes not at all.
        raise TooCostlyError(steps, budget, math.sqrt(budget.steps / steps))
    return budget.steps - steps


def _trace_standard_error(sketched: JacobianGram, num_combinations: int) -> float:
    """Return the standard error of the trace, from its values for each of the combinations."""
    if num_combinations == 1:
        return math.nan
    traces = sketched.matrix.diagonal().reshape(sketched.num_blocks, num_combinations).sum(0)
    return traces.std().item() / math.sqrt(num_combinations)


def _readiness(recorded: RecordedLoss, jacobian: JacobianGram) -> float:
    r"""Return the optimization readiness from the gradients of single samples.

    The gradient of a sample's loss is :math:`g_i = n J^\top r_i` with the residual :math:`r_i` of that sample and zeros
    elsewhere, so :math:`\lVert g_i \rVert^2 = n^2 \, r_i^\top J J^\top r_i`.

    Returns:
        A number ≥ 0; ``nan`` if the loss is negative, or it is not known which outputs belong to a sample, as where
        positions are numbered along with the samples.
    """
    outputs, count = recorded.derivatives.outputs, recorded.num_samples
    if recorded.loss < 0 or any(output.sample_dim is None or output.num_samples != count for output in outputs):
        return math.nan
    residual = _residual(outputs, jacobian.num_blocks)
    columns = torch.cat([_sample_of_each_row(output, count, jacobian.num_blocks) for output in outputs], dim=1)
    by_sample = residual.new_zeros(len(residual), count)
    by_sample.scatter_(1, columns.flatten()[:, None], residual[:, None])
    squares = count**2 * (by_sample * (jacobian.matrix @ by_sample)).sum(0)
    whole = residual @ jacobian.matrix @ residual
    return readiness(recorded.loss.detach().double(), whole, squares.mean()).item()


def _sample_of_each_row(output: Outputs, num_samples: int, num_blocks: int) -> Tensor:
    """Return the index of the sample of each output, by block as the rows of the Jacobian are."""
    indices = torch.arange(output.shape.numel(), device=output.residual.device).reshape(output.shape)
    samples = torch.empty_like(indices).flatten()
    for sample, entries in enumerate(output.by_block(indices, num_samples)):
        samples[entries] = sample
    return output.by_block(samples.reshape(output.shape), num_blocks)


def _residual(outputs: Sequence[Outputs], num_blocks: int) -> Tensor:
    """Return the gradient of the loss with respect to all outputs in the order of the Jacobian's rows, ``(m,)``."""
    return torch.cat([output.by_block(output.residual, num_blocks) for output in outputs], dim=1).flatten()
