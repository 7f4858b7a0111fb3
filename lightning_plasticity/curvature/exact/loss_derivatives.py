"""Compute the derivatives of a loss with respect to the network outputs that it is a function of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_plasticity.curvature.autograd_graph import edge_of, gradient_edge, partial_vjp, reached
from lightning_plasticity.curvature.exact.loss_calls import LossCall
from lightning_plasticity.curvature.exact.loss_hessian import (
    AutogradHessian,
    ClosedFormHessian,
    LossHessian,
    LossTerm,
)
from lightning_plasticity.curvature.exact.output_edges import (
    NetworkEnd,
    find_network_end,
    is_rearranged,
    share_results,
)
from lightning_plasticity.curvature.exact.outputs import NoGaussNewtonMatrixError, Outputs
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.problem import normal


class LossDerivatives:
    """The network outputs that a recorded loss is a function of, and its derivatives with respect to them.

    Args:
        loss: The loss.
        recording: The recording of its forward pass.
        names: Names of the parameters, by ``id``.
        num_samples: Number of samples in the batch, if known.

    Raises:
        ValueError: If the loss does not depend on any parameter.
    """

    outputs: list[Outputs]
    """The outputs with the gradient of the loss, in the order of computation."""

    held_constant: list[str]
    """Names of the parameters that the loss depends on besides the outputs: derivatives with respect to them are left
    out."""

    def __init__(self, loss: Tensor, recording: Recording, names: Mapping[int, str], num_samples: int | None) -> None:
        self._loss = loss
        self._calls = _closed_form_calls(loss, recording)
        end = _network_end(loss, recording, self._calls, num_samples)
        if {call.outputs_edge for call, _ in self._calls} != set(end.edges):
            self._calls = []
        unbatched = {call.outputs_edge for call in recording.loss_calls if call.class_dim == 0}
        gradients = partial_vjp([loss], end.edges, [torch.ones_like(loss)])
        self.outputs = [
            Outputs(
                edge,
                shape,
                gradient.double(),
                # Closed forms number the entries as they are.
                None if edge in unbatched else 0 if self._calls and shape else _sample_dim(shape, num_samples),
            )
            for edge, shape, gradient in zip(end.edges, end.shapes, gradients, strict=True)
        ]
        if not any(output.shape.numel() for output in self.outputs):
            raise ValueError("the loss depends on no output of the network on this batch: nothing was selected")
        self.held_constant = sorted({names[id(tensor)] for tensor in end.held_constant if id(tensor) in names})
        self._dtype = gradients[0].dtype

    @property
    def num_samples(self) -> int:
        """Number of samples, or of groups of them, that all outputs can be divided into."""
        return math.gcd(*[output.num_samples for output in self.outputs])

    @property
    def has_closed_form(self) -> bool:
        """Whether the Hessian follows from closed forms, which take no products."""
        return bool(self._calls)

    @cached_property
    def hessian(self) -> LossHessian:
        """The Hessian of the loss. Where it has a closed form, so have the residuals of its outputs.

        Raises:
            NoGaussNewtonMatrixError: If it is not known, or known to be not positive semi-definite.
        """
        terms = [
            LossTerm(call, call.curvature(weight), [o.edge for o in self.outputs].index(call.outputs_edge))
            for call, weight in self._calls
        ]
        residuals = _closed_form_residuals(self.outputs, terms, self._dtype) if terms else None
        if residuals is None:
            return AutogradHessian(self._loss, self.outputs)
        # In single precision, the difference of large outputs and targets leaves few digits to the gradient.
        outputs = [replace(output, residual=r) for output, r in zip(self.outputs, residuals, strict=True)]
        return ClosedFormHessian(terms, outputs)

    @cached_property
    def couples_samples(self) -> bool:
        """Whether the loss of a sample depends on the outputs of another, as far as second derivatives tell."""
        if self._calls and not any(call.chooses_outputs for call, _ in self._calls):
            return False
        try:
            return self.hessian.couples(self.num_samples)
        except NoGaussNewtonMatrixError:
            return False


def _network_end(
    loss: Tensor, recording: Recording, calls: Sequence[tuple[LossCall, Tensor]], num_samples: int | None
) -> NetworkEnd:
    """Find where the network ends: with the last operations that use parameters, or with what known losses received.

    Args:
        loss: The loss.
        recording: The recording of its forward pass.
        calls: The known losses that it is a weighted sum of, with their weights.
        num_samples: Number of samples in the batch, if known.

    Raises:
        ValueError: If the loss does not depend on any parameter.
    """
    operations = recording.operations
    chosen = [call.outputs_edge for call in recording.loss_calls if call.chooses_outputs]
    end = find_network_end(loss, operations, num_samples, chosen)
    if not end.edges:
        raise ValueError("the loss does not depend on any trainable parameter (was it detached?)")
    received = list(dict.fromkeys(call.outputs_edge for call, _ in calls))
    if not received or set(received) == set(end.edges) or share_results(received, loss, operations, num_samples):
        return end
    are_rearranged = all(is_rearranged(edge, end.edges, operations) for edge in received)
    if are_rearranged or _are_computed_by_sample(calls, end, num_samples):
        # What follows the last operation with parameters is part of the network, such as a last activation.
        later = find_network_end(loss, operations, num_samples, received)
        # Another term of the loss may depend on earlier results.
        return later if set(received) == set(later.edges) else end
    return end


def _are_computed_by_sample(calls: Sequence[tuple[LossCall, Tensor]], end: NetworkEnd, num_samples: int | None) -> bool:
    """Return whether what loss functions received for a sample depends on results of the network for that sample alone.

    It does not for the similarities of contrastive losses. A sample may have several results, such as those of two
    views, side by side or one half of the batch after the other.
    """
    shapes = [call.outputs_shape for call, _ in calls]
    if not num_samples or any(not shape or shape[0] % num_samples for shape in end.shapes):
        return True
    if any(not shape or shape[0] % num_samples for shape in shapes):
        return False
    noise = [normal(call.outputs_shape, weight) for call, weight in calls]

    def depend_on_others(side_by_side: bool) -> bool:
        def of_even_samples(tensor: Tensor) -> Tensor:
            rows = torch.arange(len(tensor), device=tensor.device)
            sample = rows * num_samples // len(tensor) if side_by_side else rows % num_samples
            return tensor * (sample % 2 == 0).reshape(-1, *[1] * (tensor.dim() - 1))

        roots = [gradient_edge(call.outputs_edge) for call, _ in calls]
        images = partial_vjp(roots, end.edges, [of_even_samples(tensor) for tensor in noise])
        return any(bool((image - of_even_samples(image)).any()) for image in images)

    return not (depend_on_others(side_by_side=True) and depend_on_others(side_by_side=False))


def _sample_dim(shape: torch.Size, num_samples: int | None) -> int | None:
    """Return the dimension of the samples: the first one, unless another one alone has their number of entries."""
    if not shape:
        return None
    if num_samples and shape[0] % num_samples and num_samples in shape:
        return shape.index(num_samples)
    return 0


def _closed_form_calls(loss: Tensor, recording: Recording) -> list[tuple[LossCall, Tensor]]:
    """Return the loss calls with a rule that a loss is a weighted sum of, with their weights; none if it is another."""
    calls = recording.loss_calls
    if not calls:
        return []
    edges = [gradient_edge(call.value_edge) for call in calls]
    weights = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
    used = [(call, weight) for call, weight in zip(calls, weights, strict=True) if weight is not None]
    if any(weight.requires_grad for _, weight in used):
        return []
    # The loss must depend on what the functions received through these calls alone.
    received = {call.outputs_edge[0] for call, _ in used}
    others = reached([edge_of(loss)], {call.value_edge: [] for call, _ in used})
    return [] if any(node in received for node in others) else [(call, weight.detach()) for call, weight in used]


def _closed_form_residuals(
    outputs: Sequence[Outputs], terms: Sequence[LossTerm], dtype: torch.dtype
) -> list[Tensor] | None:
    """Return the residuals by closed forms, or ``None`` if they are not autograd's.

    They are not if a rule does not support an option of its loss function, or if a hook changes the gradient.
    """
    residuals = []
    eps = torch.finfo(dtype).eps
    for index, output in enumerate(outputs):
        curvatures = [term.curvature for term in terms if term.output == index]
        residual = torch.stack([curvature.residual for curvature in curvatures]).sum(0)
        scale = torch.stack([curvature.scale for curvature in curvatures]).sum()
        if (residual - output.residual).norm() > eps**0.5 * output.residual.norm() + 100 * eps * scale:
            return None
        residuals.append(residual)
    return residuals
