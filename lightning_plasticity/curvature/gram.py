r"""The exact spectra of the Gauss-Newton matrix and the tangent kernel, from a matrix as large as the batch.

With the Jacobian :math:`J` of all :math:`m` output numbers by all :math:`P` parameters and the Hessian of the loss by
the outputs :math:`H = S S^\top`, the Gauss-Newton matrix :math:`J^\top H J` (:math:`P \times P`) has the non-zero
eigenvalues of the *loss-weighted Gram matrix* :math:`K = S^\top J J^\top S` (:math:`m \times m`). :math:`J J^\top` is a
sum over parameters, and for each of them follows from the inputs of the layer and the gradients by its outputs: one
backward pass for each output number of a sample, and no :math:`J`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.graph import leaves, reached
from lightning_plasticity.curvature.jacobian import RELATIVE_TOLERANCE, jacobian_gram
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.outputs import Outputs, UnsupportedModelError, outputs_of
from lightning_plasticity.curvature.recording import Recording
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.isolation import probing

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""


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
        tangent_kernel: :math:`\Theta = \frac1n J J^\top`, shape ``(m, m)``.
        loss_weighted: :math:`K = S^\top J J^\top S`, shape ``(m, m)``.
        residual: :math:`r = \partial L / \partial f`, shape ``(m,)``.
        loss: The loss on the batch.
        num_parameters: :math:`P`.
    """

    tangent_kernel: Tensor
    loss_weighted: Tensor
    residual: Tensor
    loss: float
    num_parameters: int

    def spectrum(self) -> Spectrum:
        """Eigenvalues of the Gauss-Newton matrix and of the tangent kernel, and the residual's place in the latter."""
        values = torch.linalg.eigvalsh(self.loss_weighted).flip(0).clamp(min=0)[: self.num_parameters]
        bulk = self.num_parameters - len(values)  # the Gauss-Newton matrix has at most m eigenvalues that are not zero
        weights = torch.full_like(values, 1 / self.num_parameters)
        if bulk:
            values = torch.cat([values, values.new_zeros(1)])
            weights = torch.cat([weights, weights.new_full((1,), bulk / self.num_parameters)])
        kernel_values, vectors = torch.linalg.eigh(self.tangent_kernel)
        power = (vectors.T @ self.residual).square()
        total = power.sum()
        shares = power / total if total > 0 else torch.zeros_like(power)
        kernel = TangentKernel(kernel_values.flip(0).clamp(min=0).cpu(), shares.flip(0).cpu())
        return Spectrum(values.cpu(), weights.cpu(), self.num_parameters, exact=True, kernel=kernel, semidefinite=True)


def ggn_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    samples: int | None = None,
    max_rows: int | None = None,
) -> Spectrum:
    r"""Exact spectrum of the generalized Gauss-Newton matrix :math:`J^\top \frac{\partial^2 L}{\partial f^2} J`.

    The matrix is taken at the parameters that require gradients, with the model in evaluation mode (no dropout,
    BatchNorm with its running statistics). Any model will do; fast are the layers in ``LAYER_RULES``. The Jacobian by
    any other parameter costs a backward pass for each output number, which is logged. Losses are made of those in
    ``LOSS_RULES``: cross-entropy and its relatives, squared error, Huber's loss, and :func:`loss_of` for any other.
    Closed forms are checked against autograd before they are used.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        samples: Number of samples that the loss is a mean over: the :math:`n` of the tangent kernel, of no consequence
            for the Gauss-Newton matrix. By default the first dimension of what the first loss function was given.
        max_rows: Refuse a Gram matrix with more rows (samples times outputs a sample) than this.

    Returns:
        The spectrum, with the tangent kernel of the same batch in ``kernel``.

    Raises:
        UnsupportedModelError: If the curvature of a loss term is not known, or a Jacobian is too large to be held.
        TooManyRowsError: If ``max_rows`` is exceeded.
        ValueError: If the loss is not a finite scalar that depends on the parameters, or the model has half precision.

    References:
        Schraudolph 2002; arXiv 2509.22335 (loss-weighted Gram matrix).

    Example:
        >>> import torch.nn.functional as F
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> spectrum = ggn_spectrum(model, (x, y), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        >>> [round(value, 6) for value in spectrum.eigenvalues.tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
    """
    return gram(model, batch, loss_fn, samples=samples, max_rows=max_rows).spectrum()


def gram(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    samples: int | None = None,
    max_rows: int | None = None,
) -> Gram:
    """The Gram matrices behind :func:`ggn_spectrum`, which documents arguments and errors."""
    parameters = trainable_parameters(model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    with probing(model):
        recording = Recording(parameters)
        with recording:
            loss = loss_fn(model, batch)
        check_loss(loss)
        outputs = outputs_of(loss, recording.loss_calls, names)
        without_closed_form = _without_closed_form(outputs, recording, parameters)
        rows = sum(output.shape.numel() for output in outputs)
        if max_rows is not None and rows > max_rows:
            raise TooManyRowsError(rows, max_rows)
        kernel, roots = jacobian_gram(recording.layer_calls, outputs, parameters, without_closed_form)
    if not torch.isfinite(kernel).all():
        raise ValueError(
            "the gradients of the outputs on the probe batch are NaN or infinite although the loss is not: there is no "
            "curvature to measure. Look for a square root or a norm of zero in the model"
        )
    blocks, width = len(roots), roots.shape[-1]
    residual = torch.cat([output.residual.reshape(blocks, -1) for output in outputs], dim=1)
    by_block = kernel.reshape(blocks, width, blocks, width)
    weighted = torch.einsum("ipa,ipjq,jqb->iajb", roots, by_block, roots).reshape(rows, rows)
    return Gram(
        tangent_kernel=kernel / (samples if samples is not None else outputs[0].samples),
        loss_weighted=(weighted + weighted.T) / 2,
        residual=residual.flatten(),
        loss=loss.item(),
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name.

    Raises:
        ValueError: If there are none, or they are not all float32 or all float64.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to probe")
    if uninitialized := [n for n, p in parameters.items() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(f"{uninitialized[0]!r} is not initialised yet: run one forward pass before the probe")
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) > 1 or not dtypes <= RELATIVE_TOLERANCE.keys():
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"the parameters are {found}; curvature needs all of them in float32 or all in float64: probe model.float()"
        )
    return parameters


def check_loss(loss: Tensor) -> None:
    """What every probe needs of a loss.

    Raises:
        ValueError: If it is not a finite scalar with a graph.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn(model, batch) returned {found}; it must return the mean loss, a scalar tensor")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on any trainable parameter (was it detached, or under no_grad?)")
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss on the probe batch is {loss.item()}: there is no curvature to measure. Look for NaN or infinite "
            "values in the batch and the weights"
        )


def _without_closed_form(
    outputs: list[Outputs], recording: Recording, parameters: Mapping[str, nn.Parameter]
) -> dict[str, str]:
    """The parameters that the outputs depend on in other ways than through the recorded layer calls, and why."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    edges = [output.edge for output in outputs]
    if any(node.name() == "CheckpointFunctionBackward" for node in reached(edges, {})):
        raise UnsupportedModelError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, which hides the parameters inside from "
            "everything but loss.backward(): pass use_reentrant=False"
        )
    if not any(id(leaf) in name_of for leaf in leaves(edges, {})):
        raise ValueError("the loss does not depend on any trainable parameter (was it detached?)")
    others = leaves(edges, {call.output: call.inputs for call in recording.layer_calls})
    if foreign := [leaf for leaf in others if isinstance(leaf, nn.Parameter) and id(leaf) not in name_of]:
        raise UnsupportedModelError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not the model's own. Does the "
            "model, or a hook on it, call a function that holds on to another model, or to the one it was copied from?"
        )
    names = [name_of[id(leaf)] for leaf in others if id(leaf) in name_of]
    return {name: "used by " + (", ".join(sorted(recording.other_uses.get(name, ()))) or "something") for name in names}
