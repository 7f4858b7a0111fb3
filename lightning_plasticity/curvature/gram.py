r"""The exact spectra of the Gauss-Newton matrix and the tangent kernel, from a matrix as large as the batch.

With the Jacobian :math:`J` of all :math:`m` output numbers by all :math:`P` parameters and the Hessian of the loss by
the outputs :math:`H = S S^\top`, the Gauss-Newton matrix :math:`J^\top H J` (:math:`P \times P`) has the non-zero
eigenvalues of the *loss-weighted Gram matrix* :math:`K = S^\top J J^\top S` (:math:`m \times m`). :math:`J J^\top` is a
sum over parameters, and for each of them follows from the inputs of the layer and the gradients by its outputs: one
backward pass for each output number of a sample, and no :math:`J`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_plasticity.curvature.layers import LayerCall, ParameterUse, Weight
from lightning_plasticity.curvature.losses import LossCall
from lightning_plasticity.curvature.recording import Recording, parameters_outside
from lightning_plasticity.curvature.spectrum import Spectrum, TangentKernel
from lightning_plasticity.isolation import probing

Batch = TypeVar("Batch")
LossFunction = Callable[[Any, Batch], Tensor]
"""Takes the model and a batch, returns the mean loss as a scalar tensor with a graph."""

_CHUNK_ELEMENTS = 2**24
"""How many numbers of a Jacobian are held at a time: 64 MiB in float32."""

_RELATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""How far a closed form may be from autograd's own answer: far above rounding, far below any mistake worth the name."""


class UnsupportedModelError(RuntimeError):
    """The model or the loss has a part whose exact curvature is not known: the message names it."""


class TooManyRowsError(ValueError):
    """The Gram matrix of this batch would be larger than allowed.

    Args:
        samples: Number of samples in the batch.
        rows: Number of rows ``m`` of the Gram matrix.
        max_rows: The number allowed.
    """

    def __init__(self, samples: int, rows: int, max_rows: int) -> None:
        super().__init__(
            f"{samples} samples with {rows // samples} outputs each make a Gram matrix of {rows} rows, more than "
            f"max_rows={max_rows}: probe fewer samples or raise max_rows"
        )
        self.samples, self.rows, self.max_rows = samples, rows, max_rows


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
        return Spectrum(values.cpu(), weights.cpu(), self.num_parameters, exact=True, kernel=kernel)


def ggn_spectrum(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, max_rows: int | None = None
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
    return gram(model, batch, loss_fn, max_rows=max_rows).spectrum()


def gram(model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, max_rows: int | None = None) -> Gram:
    """The Gram matrices behind :func:`ggn_spectrum`, which documents arguments and errors."""
    parameters = trainable_parameters(model)
    with probing(model):
        recording = Recording(parameters)
        with recording:
            loss = loss_fn(model, batch)
        _check_loss(loss)
        outputs = _outputs_of(loss, recording.loss_calls, parameters)
        samples = math.gcd(*[output.samples for output in outputs], *[c.output_shape[0] for c in recording.layer_calls])
        rows = sum(output.tensor.numel() for output in outputs)
        if max_rows is not None and rows > max_rows:
            raise TooManyRowsError(outputs[0].samples, rows, max_rows)
        jacobian_gram = _jacobian_gram(recording, outputs, samples, parameters)
    # _jacobian_gram orders rows by sample, then by output number: so do these.
    residual = torch.cat([output.residual.reshape(samples, -1) for output in outputs], dim=1)
    roots = torch.stack(
        [torch.block_diag(*blocks) for blocks in zip(*[o.roots(samples) for o in outputs], strict=True)]
    )
    width = roots.shape[-1]
    by_sample = jacobian_gram.reshape(samples, width, samples, width)
    weighted = torch.einsum("ipa,ipjq,jqb->iajb", roots, by_sample, roots).reshape(rows, rows)
    return Gram(
        tangent_kernel=jacobian_gram / outputs[0].samples,
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


def _check_loss(loss: Tensor) -> None:
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


@dataclass(eq=False)
class _Outputs:
    """One tensor of network outputs, the residual there, and the Hessian blocks of the loss calls that took it."""

    tensor: Tensor
    calls: list[LossCall]
    residual: Tensor
    blocks: list[Tensor]

    @property
    def samples(self) -> int:
        unbatched = self.tensor.dim() == 0 or self.calls[0].class_dim == 0
        return 1 if unbatched else self.tensor.shape[0]

    def roots(self, samples: int) -> Tensor:
        """A root of the Hessian for each sample, shape ``(samples, q, q)``, in the order of the tensor's entries."""
        dense = [self._dense(call, block, samples) for call, block in zip(self.calls, self.blocks, strict=True)]
        if len(dense) == 1:
            return dense[0]
        values, vectors = torch.linalg.eigh(torch.stack([root @ root.mT for root in dense]).sum(0))
        root: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
        return root

    def _dense(self, call: LossCall, block: Tensor, samples: int) -> Tensor:
        size = block.shape[-1]
        entries = torch.arange(self.tensor.numel(), device=block.device).reshape(self.tensor.shape)
        if size > 1:
            entries = entries.movedim(call.class_dim, -1)
        entries = entries.reshape(-1, size)  # of which entries of the tensor each block is about
        width = self.tensor.numel() // samples
        dense = block.new_zeros(samples, width, width)
        sample, place = entries // width, entries % width
        dense[sample[:, :, None], place[:, :, None], place[:, None, :]] = block
        return dense


def _outputs_of(loss: Tensor, calls: list[LossCall], parameters: dict[str, nn.Parameter]) -> list[_Outputs]:
    """What of the network the loss depends on, and how, checked to be all there is."""
    gradients = (
        torch.autograd.grad(
            loss, [call.value for call in calls], create_graph=True, allow_unused=True, materialize_grads=False
        )
        if calls
        else ()
    )
    reached = [(call, gradient) for call, gradient in zip(calls, gradients, strict=True) if gradient is not None]
    if not reached:
        raise UnsupportedModelError(
            "the loss was not computed by torch.nn.functional.cross_entropy, mse_loss or "
            "binary_cross_entropy_with_logits (or their modules), so its curvature is not known: "
            "pass a loss_fn(model, batch) that uses one of them"
        )
    if any(gradient.requires_grad for _, gradient in reached):
        raise UnsupportedModelError(
            "the loss is not a weighted sum of its loss functions' values (it transforms or multiplies them), so its "
            "curvature is not known: pass a loss_fn(model, batch) that returns a plain weighted sum"
        )
    tensors = {id(call.outputs): call.outputs for call, _ in reached}
    if outside := parameters_outside(loss, list(tensors.values()), parameters):
        raise UnsupportedModelError(
            f"the loss depends on {_quoted(outside)} other than through the network's outputs (a penalty on weights?): "
            "pass a loss_fn(model, batch) that returns the loss of the data alone"
        )
    result = []
    for key, tensor in tensors.items():
        (gradient,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        here = [(call, call.curvature(factor)) for call, factor in reached if id(call.outputs) == key]
        gap = (sum((curvature.residual for _, curvature in here), torch.zeros(())) - gradient).norm()
        allowed = _RELATIVE_TOLERANCE.get(gradient.dtype, 1e-3) * gradient.norm()
        allowed = allowed + 100 * torch.finfo(gradient.dtype).eps * sum(curvature.scale for _, curvature in here)
        if gap > allowed:
            raise UnsupportedModelError(
                "the loss uses the network's outputs in another way besides cross_entropy, mse_loss and "
                "binary_cross_entropy_with_logits (an entropy bonus, a consistency term?), whose curvature is not "
                "known: pass a loss_fn(model, batch) without it"
            )
        result.append(
            _Outputs(tensor, [call for call, _ in here], gradient.double(), [curvature.root for _, curvature in here])
        )
    return result


def _jacobian_gram(
    recording: Recording, outputs: list[_Outputs], samples: int, parameters: dict[str, nn.Parameter]
) -> Tensor:
    r""":math:`J J^\top` over all parameters, shape ``(m, m)``, checked against autograd along a random direction."""
    calls = recording.layer_calls
    cotangents = _cotangents(calls, outputs, samples)
    width = sum(output.tensor.numel() for output in outputs) // samples
    reference = next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(samples, width, generator=generator, dtype=reference.dtype).to(reference.device)
    parts = direction.split([output.tensor.numel() // samples for output in outputs], dim=1)
    expected = torch.autograd.grad(
        [output.tensor for output in outputs],
        list(parameters.values()),
        [part.reshape(output.tensor.shape) for part, output in zip(parts, outputs, strict=True)],
        allow_unused=True,
    )

    uses: dict[int, list[tuple[ParameterUse, Tensor]]] = {}
    for call, cotangent in zip(calls, cotangents, strict=True):
        for use in call.uses:
            uses.setdefault(id(use.parameter), []).append((use, cotangent))

    total = torch.zeros(samples * width, samples * width, dtype=torch.float64, device=reference.device)
    gaps: dict[str, tuple[float, float]] = {}
    for (name, parameter), wanted in zip(parameters.items(), expected, strict=True):
        part, pulled_back = _parameter_gram(parameter, uses.get(id(parameter), []), direction)
        gap = pulled_back if wanted is None else pulled_back - wanted.to_dense()
        gaps[name] = gap.double().norm().item(), math.sqrt(max(part.trace().item(), 0.0))
        total += part
    tolerance = _RELATIVE_TOLERANCE[reference.dtype]
    floor = 100 * torch.finfo(reference.dtype).eps * math.sqrt(max(total.trace().item(), 0.0))
    if wrong := [name for name, (gap, size) in gaps.items() if not gap <= tolerance * size + floor]:
        raise UnsupportedModelError(_unaccounted(wrong, parameters, recording))
    return total


def _cotangents(calls: list[LayerCall], outputs: list[_Outputs], samples: int) -> list[Tensor]:
    """Gradient of each output number by each layer's output, ``(samples, q, t, c)``: one backward pass a number."""
    columns: list[list[Tensor]] = [[] for _ in calls]
    for output in outputs:
        width = output.tensor.numel() // samples
        for column in range(width):
            selector = torch.zeros(samples, width, dtype=output.tensor.dtype, device=output.tensor.device)
            selector[:, column] = 1
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                output.tensor,
                [call.output for call in calls],
                selector.reshape(output.tensor.shape),
                retain_graph=True,
                allow_unused=True,
            )
            for into, call, gradient in zip(columns, calls, gradients, strict=True):
                if gradient is None:
                    gradient = torch.zeros(call.output_shape, dtype=selector.dtype, device=selector.device)
                into.append(call.by_position(gradient, samples))
    return [torch.stack(column, dim=1) for column in columns]


def _parameter_gram(
    parameter: Tensor, uses: list[tuple[ParameterUse, Tensor]], direction: Tensor
) -> tuple[Tensor, Tensor]:
    r"""One parameter's part :math:`J_p J_p^\top` (float64) and its pull-back :math:`J_p^\top u` of the direction."""
    rows = direction.numel()
    result = torch.zeros(rows, rows, dtype=torch.float64, device=direction.device)
    pulled_back = torch.zeros_like(parameter)
    if len(uses) == 1 and isinstance(uses[0][0], Weight) and uses[0][1].shape[2] == 1:
        return _linear_gram(uses[0][0], uses[0][1], direction)
    if not uses:
        return result, pulled_back
    active = torch.cat([use.active_rows() for use, _ in uses]).unique()
    columns = parameter[0].numel() if parameter.dim() else 1
    flat = pulled_back.reshape(-1, columns)
    for chunk in active.split(max(1, _CHUNK_ELEMENTS // (rows * columns))):
        jacobian = torch.stack([use.jacobian(cotangents, chunk) for use, cotangents in uses]).sum(0)
        jacobian = jacobian.reshape(rows, -1)
        result += jacobian @ jacobian.T
        flat[chunk] = (direction.flatten() @ jacobian).reshape(-1, columns)
    return result, flat.reshape(parameter.shape)


def _linear_gram(use: Weight, cotangents: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same for a matrix used once a sample: :math:`\langle J_i, J_j\rangle = (x_i \cdot x_j)(g_i \cdot g_j)`."""
    samples, width = direction.shape
    inputs, gradients = use.inputs(samples)[:, 0], cotangents[:, :, 0]
    flat = gradients.reshape(samples * width, -1)
    similarity = (flat @ flat.T).double().reshape(samples, width, samples, width)
    similarity *= (inputs @ inputs.T).double()[:, None, :, None]
    pulled_back = torch.einsum("nq,nqo,ni->oi", direction, gradients, inputs)
    return similarity.reshape(samples * width, samples * width), pulled_back


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


def _quoted(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
