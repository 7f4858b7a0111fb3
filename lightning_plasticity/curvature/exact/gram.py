r"""The Gram matrix: exact spectra of the Gauss-Newton matrix and the tangent kernel, as large as the batch's outputs.

With the Jacobian :math:`J` of all :math:`m` output numbers by all :math:`P` parameters and the Hessian of the loss by
the outputs :math:`H = S S^\top`, the Gauss-Newton matrix :math:`J^\top H J` (:math:`P \times P`) has the non-zero
eigenvalues of the *loss-weighted Gram matrix* :math:`K = S^\top J J^\top S` (:math:`m \times m`). :math:`J J^\top` is a
sum over parameters, and for each of them follows from the inputs of the layer and the gradients by its outputs: one
backward pass for each output number of a sample, and no :math:`J`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.autograd_graph import leaves, reached
from lightning_plasticity.curvature.exact.jacobian import jacobian_gram
from lightning_plasticity.curvature.exact.outputs import Outputs, UnsupportedModelError, outputs_of
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.problem import (
    NOT_FINITE,
    Batch,
    LossFunction,
    check_loss,
    full_precision,
    trainable_parameters,
)
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.isolation.state import probe_mode


class TooManyRowsError(ValueError):
    """The Gram matrix of this batch would be larger than allowed.

    Args:
        rows: Number of rows ``m`` of the Gram matrix.
        max_rows: The number allowed.
    """

    def __init__(self, rows: int, max_rows: int) -> None:
        super().__init__(
            f"the outputs of the network on this batch are {rows} numbers and the Gram matrix has a row for each, more "
            f"than max_rows={max_rows}: probe fewer samples or raise max_rows"
        )
        self.rows, self.max_rows = rows, max_rows


@dataclass(frozen=True, eq=False)
class Gram:
    r"""The Gram matrices of one batch, float64.

    Args:
        loss_weighted: :math:`K = S^\top J J^\top S`, shape ``(m, m)``. Of a sketch: shape ``(n s, n s)``.
        loss: The loss on the batch.
        num_parameters: :math:`P`.
        tangent_kernel: :math:`\Theta = \frac1n J J^\top`, shape ``(m, m)``; ``None`` if this is a sketch.
        residual: :math:`r = \partial L / \partial f`, shape ``(m,)``; ``None`` if this is a sketch.
        trace_standard_error: Standard error of the trace of a sketch.
    """

    loss_weighted: Tensor
    loss: float
    num_parameters: int
    tangent_kernel: Tensor | None = None
    residual: Tensor | None = None
    trace_standard_error: float = 0.0

    def spectrum(self) -> Spectrum:
        """Eigenvalues of the Gauss-Newton matrix and of the tangent kernel, and the residual's place in the latter."""
        values = torch.linalg.eigvalsh(self.loss_weighted).flip(0).clamp(min=0)[: self.num_parameters]
        bulk = self.num_parameters - len(values)  # the Gauss-Newton matrix has at most m eigenvalues that are not zero
        weights = torch.full_like(values, 1 / self.num_parameters)
        if bulk:
            values = torch.cat([values, values.new_zeros(1)])
            weights = torch.cat([weights, weights.new_full((1,), bulk / self.num_parameters)])
        kernel = None
        if self.tangent_kernel is not None and self.residual is not None:
            kernel = TangentKernel.of(self.tangent_kernel, self.residual)
        return Spectrum(
            values.cpu(),
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
    parameters: str | None = None,
    samples: int | None = None,
    max_rows: int | None = None,
    max_passes: float = math.inf,
    sketch: int | None = None,
    seed: int = 0,
) -> Gram:
    """The Gram matrices behind :func:`~lightning_plasticity.curvature.ggn_spectrum`, which documents the arguments.

    Raises:
        TooManyPassesError: If Jacobians row by row would take more than ``max_passes`` backward passes.
    """
    check_positive_ints(optional=True, samples=samples, max_rows=max_rows, sketch=sketch)
    selected = trainable_parameters(model, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with probe_mode(model):
        recording = Recording(selected)
        with full_precision(), recording:
            loss = loss_fn(model, batch)
        check_loss(loss)
        outputs = outputs_of(loss, recording.loss_calls, names)
        without_closed_form = _without_closed_form(outputs, recording, selected, names)
        combinations = None
        if sketch is not None:
            generator = torch.Generator().manual_seed(seed)
            combinations = [output.random_root_columns(sketch, generator) for output in outputs]
        rows = sum(output.shape.numel() for output in outputs) if sketch is None else outputs[0].blocks * sketch
        if max_rows is not None and rows > max_rows:
            raise TooManyRowsError(rows, max_rows)
        jacobian = jacobian_gram(
            recording.layer_calls,
            outputs,
            selected,
            without_closed_form,
            combinations=combinations,
            max_passes=max_passes,
        )
    kernel = jacobian.matrix
    if not torch.isfinite(kernel).all():
        raise ValueError(NOT_FINITE)
    num_parameters = sum(parameter.numel() for parameter in selected.values())
    blocks, width = jacobian.roots.shape[:2]
    if sketch is not None:
        traces = kernel.diagonal().reshape(blocks, width).sum(0)
        error = traces.std().item() / math.sqrt(width) if width > 1 else math.nan
        return Gram(kernel / sketch, loss.item(), num_parameters, trace_standard_error=error)
    by_block = kernel.reshape(blocks, width, blocks, width)
    weighted = torch.einsum("ipa,ipjq,jqb->iajb", jacobian.roots, by_block, jacobian.roots).reshape(kernel.shape)
    return Gram(
        loss_weighted=(weighted + weighted.T) / 2,
        loss=loss.item(),
        num_parameters=num_parameters,
        tangent_kernel=kernel / (samples if samples is not None else outputs[0].samples),
        residual=torch.cat([output.residual.reshape(blocks, -1) for output in outputs], dim=1).flatten(),
    )


def _without_closed_form(
    outputs: list[Outputs], recording: Recording, parameters: Mapping[str, nn.Parameter], names: Mapping[int, str]
) -> dict[str, str]:
    """The parameters that the outputs depend on in other ways than through the recorded layer calls, and why."""
    edges = [output.edge for output in outputs]
    if any(node.name() == "CheckpointFunctionBackward" for node in reached(edges, {})):
        raise UnsupportedModelError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from "
            "everything but loss.backward(): pass use_reentrant=False"
        )
    if not any(id(leaf) in names for leaf in leaves(edges, {})):
        raise ValueError("the loss does not depend on any trainable parameter (was it detached?)")
    others = leaves(edges, {call.output: call.inputs for call in recording.layer_calls})
    if foreign := [leaf for leaf in others if isinstance(leaf, nn.Parameter) and id(leaf) not in names]:
        raise UnsupportedModelError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not the model's own. Does the "
            "model, or a hook on it, call a function that holds on to another model, or to the one it was copied from?"
        )
    used = {names[id(leaf)] for leaf in others if id(leaf) in names} & parameters.keys()
    return {name: "used by " + (", ".join(sorted(recording.other_uses.get(name, ()))) or "something") for name in used}
