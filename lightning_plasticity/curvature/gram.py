r"""The exact spectra of the Gauss-Newton matrix and the tangent kernel, from a matrix as large as the batch.

With the Jacobian :math:`J` of all :math:`m` output numbers by all :math:`P` parameters and the Hessian of the loss by
the outputs :math:`H = S S^\top`, the Gauss-Newton matrix :math:`J^\top H J` (:math:`P \times P`) has the non-zero
eigenvalues of the *loss-weighted Gram matrix* :math:`K = S^\top J J^\top S` (:math:`m \times m`). :math:`J J^\top` is a
sum over parameters, and for each of them follows from the inputs of the layer and the gradients by its outputs: one
backward pass for each output number of a sample, and no :math:`J`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.graph import gradient_edge, leaves
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.layers import LayerCall, ParameterUse, Weight
from lightning_plasticity.curvature.outputs import Outputs, UnsupportedModelError, outputs_of
from lightning_plasticity.curvature.recording import Recording
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.isolation import probing

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""

_CHUNK_ELEMENTS = 2**24
"""How many numbers of a Jacobian are held at a time: 64 MiB in float32."""

_DENSE_ELEMENTS = 2**27
"""How many gradients by layer outputs are held at most where samples are not independent: 512 MiB in float32."""

_RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""How far a closed form may be from autograd's own answer: far above rounding, far below any mistake worth the name."""


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
    BatchNorm with its running statistics). Supported are the layers Linear, Conv1d to Conv3d, BatchNorm, LayerNorm and
    Embedding, with any operations without parameters between them, and losses made of cross-entropy, squared error and
    binary cross-entropy with logits. Every result is checked against autograd before it is returned.

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
        UnsupportedModelError: If a parameter or loss term is used in a way without a closed form, or samples are mixed.
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
        _check_parameters(outputs, recording, parameters)
        rows = sum(output.shape.numel() for output in outputs)
        if max_rows is not None and rows > max_rows:
            raise TooManyRowsError(rows, max_rows)
        jacobian_gram, roots = _jacobian_gram(recording, outputs, parameters)
    blocks, width = len(roots), roots.shape[-1]
    residual = torch.cat([output.residual.reshape(blocks, -1) for output in outputs], dim=1)
    by_block = jacobian_gram.reshape(blocks, width, blocks, width)
    weighted = torch.einsum("ipa,ipjq,jqb->iajb", roots, by_block, roots).reshape(rows, rows)
    return Gram(
        tangent_kernel=jacobian_gram / (samples if samples is not None else outputs[0].samples),
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
    if len(dtypes) > 1 or not dtypes <= _RELATIVE_TOLERANCE.keys():
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


def _check_parameters(outputs: list[Outputs], recording: Recording, parameters: dict[str, nn.Parameter]) -> None:
    """The outputs depend on parameters through the recorded layer calls and in no other way."""
    known = {call.output: call.inputs for call in recording.layer_calls}
    other = leaves([output.edge for output in outputs], known)
    names = {id(parameter): name for name, parameter in parameters.items()}
    if unknown := [names[id(leaf)] for leaf in other if id(leaf) in names]:
        raise UnsupportedModelError(_unaccounted(unknown, parameters, recording))
    if foreign := [leaf for leaf in other if isinstance(leaf, nn.Parameter)]:
        raise UnsupportedModelError(
            f"the loss depends on a parameter of shape {tuple(foreign[0].shape)} that is not the model's own. Does the "
            "model, or a hook on it, call a function that holds on to another model, or to the one it was copied from?"
        )


def _jacobian_gram(
    recording: Recording, outputs: list[Outputs], parameters: dict[str, nn.Parameter]
) -> tuple[Tensor, Tensor]:
    r""":math:`J J^\top` over all parameters, shape ``(m, m)``, and the roots of the Hessian, block by block.

    A block is as much of the batch as does not depend on the rest of it: a sample, if the layers keep samples apart. It
    is checked that they do; if not, all of the batch is one block.
    """
    sizes = [output.samples for output in outputs] + [call.samples for call in recording.layer_calls]
    rows = sum(output.shape.numel() for output in outputs)
    candidates = [math.gcd(*sizes)]
    if candidates[0] > 1 and rows * sum(c.output_shape.numel() for c in recording.layer_calls) <= _DENSE_ELEMENTS:
        candidates.append(1)
    wrong: list[str] = []
    for blocks in candidates:
        roots = torch.stack(
            [torch.block_diag(*parts) for parts in zip(*[output.roots(blocks) for output in outputs], strict=True)]
        )
        result, wrong = _blockwise_gram(recording, outputs, parameters, roots)
        if not wrong:
            return result, roots
    raise UnsupportedModelError(_unaccounted(wrong, parameters, recording))


def _blockwise_gram(
    recording: Recording, outputs: list[Outputs], parameters: dict[str, nn.Parameter], roots: Tensor
) -> tuple[Tensor, list[str]]:
    r""":math:`J J^\top` if the blocks are independent, and the parameters that say they are not.

    Checked is :math:`J_p^\top u` of every parameter against autograd, for a random :math:`u` and for :math:`S u`, where
    the loss-weighted kernel looks.
    """
    calls, (blocks, width) = recording.layer_calls, roots.shape[:2]
    reference = next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, blocks, width, 1, generator=generator, dtype=torch.float64, device="cpu").to(roots.device)
    directions = torch.cat([noise[:1], roots @ noise[1:]])[..., 0].to(reference.dtype)
    expected = [_vector_jacobian_products(outputs, parameters, direction) for direction in directions]
    if all(gradient is None for gradients in expected for gradient in gradients):
        raise ValueError("the loss does not depend on any trainable parameter (was it detached?)")

    uses: dict[int, list[tuple[ParameterUse, Tensor]]] = {}
    for call, cotangent in zip(calls, _cotangents(calls, outputs, directions[0]), strict=True):
        for use in call.uses:
            uses.setdefault(id(use.parameter), []).append((use, cotangent))

    total = torch.zeros(blocks * width, blocks * width, dtype=torch.float64, device=reference.device)
    gaps: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        part, pulled_back = _parameter_gram(parameter, uses.get(id(parameter), []), directions)
        wanted = [_or_zeros(gradients[number], parameter) for gradients in expected]
        gaps[name] = (pulled_back - torch.stack(wanted)).double().flatten(1).norm(dim=1)
        parts[name] = _sizes(part, roots)
        total += part
    tolerance = _RELATIVE_TOLERANCE[reference.dtype]
    floor = 100 * torch.finfo(reference.dtype).eps * _sizes(total, roots)
    return total, [name for name in parameters if not bool((gaps[name] <= tolerance * parts[name] + floor).all())]


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient.to_dense()


def _sizes(part: Tensor, roots: Tensor) -> Tensor:
    r"""Root mean square of :math:`J_p^\top u` over random :math:`u`, and of :math:`J_p^\top S u`, shape ``(2,)``."""
    blocks, width = roots.shape[:2]
    diagonal = part.reshape(blocks, width, blocks, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    weighted = torch.einsum("npa,npq,nqa->", roots, diagonal, roots)
    return torch.stack([part.trace(), weighted]).clamp(min=0).sqrt()


def _split(vector: Tensor, outputs: list[Outputs]) -> list[Tensor]:
    """Takes ``(blocks, width)`` apart into tensors with the outputs' shapes."""
    pieces = vector.split([output.shape.numel() // len(vector) for output in outputs], dim=1)
    return [piece.reshape(output.shape) for piece, output in zip(pieces, outputs, strict=True)]


def _vector_jacobian_products(
    outputs: list[Outputs], parameters: dict[str, nn.Parameter], direction: Tensor
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(
        [gradient_edge(output.edge) for output in outputs],
        list(parameters.values()),
        _split(direction, outputs),
        retain_graph=True,
        allow_unused=True,
    )


def _cotangents(calls: list[LayerCall], outputs: list[Outputs], like: Tensor) -> Iterator[Tensor]:
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
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            [gradient_edge(output.edge) for output in outputs],
            [gradient_edge(call.output) for call in calls],
            _split(selector, outputs),
            retain_graph=True,
            allow_unused=True,
        )
        for into, call, gradient in zip(columns, calls, gradients, strict=True):
            if gradient is None:
                gradient = torch.zeros(call.output_shape, dtype=selector.dtype, device=selector.device)
            into.append(call.by_position(gradient, blocks))
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


def _unaccounted(names: list[str], parameters: dict[str, nn.Parameter], recording: Recording) -> str:
    lines = []
    for name in names:
        uses = ", ".join(sorted(recording.other_uses.get(name, ())))
        reason = f"used by {uses}" if uses else "its layer mixes samples, or it is used where this cannot be seen"
        lines.append(f"  {name!r}, shape {tuple(parameters[name].shape)}: {reason}")
    return (
        "the exact curvature cannot account for\n" + "\n".join(lines) + "\nIt knows Linear, Conv1d, Conv2d, Conv3d, "
        "BatchNorm in evaluation mode, LayerNorm and Embedding, each sample for itself. Leave such parameters out with "
        "requires_grad_(False), or pass a loss_fn(model, batch) that does without them"
    )
