"""DASH: shrink the weights that do not point along the negative gradient of the new data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.interventions.base import InterventionContext, Loss, Repair, When
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.linear_layers import LinearParameter
from lightning_plasticity.interventions.weights.updates import WeightUpdate, keep_optimizer_state
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.layers import CONVOLUTIONS, RECURRENT_LAYERS, is_conv1d


class DASH(Repair):
    r"""Direction-aware shrinking: weights that do not align with the negative gradient become shorter.

    .. math:: w \leftarrow \mathrm{clamp}(\cos(\bar g, w), \lambda, 1)\; w, \qquad
        \bar g \leftarrow (1 - \alpha)\,\bar g - \alpha\,\nabla_w L_b

    for each row :math:`w` of linear layers and of the projections of ``nn.MultiheadAttention``, for the kernel from
    each input to each output channel of convolutions (for 1×1 kernels the cosine is a sign), and for each bias as a
    whole, with mini-batches :math:`b` of the new data. A gradient of zero counts as a cosine of zero.

    Norm layers, embeddings, recurrent layers, frozen parameters and layers that the loss does not use stay as they are.
    Gradients are taken in evaluation mode and averaged over processes; ``.grad`` is not touched. Weights keep their
    direction, so that the optimizer state is kept, as in the authors' code.

    ::

        DASH().repair(model, loss=[lambda model, b=b: loss_fn(model(b[0]), b[1]) for b in batches])

    Args:
        alpha: :math:`\alpha`, the weight of the latest mini-batch, in (0, 1]. Without effect on a single mini-batch.
        shrinkage: :math:`\lambda`, the smallest factor, in [0, 1].
        when: When the callback runs it: on ``"collapse"`` or at every ``"task"``.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.
        also: Modules to copy others to after a repair, such as ``{"target": "online"}``.

    Raises:
        ValueError: If an argument is outside its range; at the repair, if ``loss`` is not given or gradients are not
            finite.

    References:
        Shin et al. 2024, arXiv 2410.23495.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[2.0, 0.0]]))
        >>> direction = torch.tensor([[3.0, 4.0]])
        >>> DASH().repair(model, loss=lambda model: -(model.weight * direction).sum()).num_parameters_changed
        1
        >>> model.weight.data  # the cosine is 3/5
        tensor([[1.2000, 0.0000]])
    """

    acts_on = "weight or bias of a linear, convolution or attention layer"
    acts_on_computed = False
    occasions = ("collapse", "task")

    def __init__(
        self,
        alpha: float = 0.3,
        shrinkage: float = 0.3,
        when: When = "collapse",
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(when, include=include, exclude=exclude, also=also)
        check_number("(0, 1]", self.name, "the weight of the latest mini-batch", alpha=alpha)
        check_number("[0, 1]", self.name, "the smallest factor", shrinkage=shrinkage)
        self.alpha, self.shrinkage = alpha, shrinkage

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        losses = context.require_losses(self.name)
        layers = self.linear_parameters(model, context)
        shrunk = {name: part for name, part in layers.items() if not isinstance(part.layer, RECURRENT_LAYERS)}
        directions = self._descent_directions(model, losses, [part.parameter for part in shrunk.values()])
        values: dict[Tensor, Tensor] = {}
        for name, part in shrunk.items():
            if part.parameter in directions:
                direction, old = directions[part.parameter], part.parameter.detach()
                if not bool(torch.isfinite(direction).all()):
                    raise ValueError(f"DASH: the gradient of {name!r} is not finite")
                factor = _cosine(direction, old, _vector_dims(part)).clamp(self.shrinkage, 1)
                values[part.parameter] = (old.double() * factor).to(old)
        return WeightUpdate(values, keep_optimizer_state(values))

    def _descent_directions(
        self, model: nn.Module, losses: Sequence[Loss], parameters: list[nn.Parameter]
    ) -> dict[Tensor, Tensor]:
        """Compute the moving average of the negative gradients of each parameter that the losses use."""
        averages: dict[Tensor, Tensor] = {}
        if not parameters:
            return averages
        with probe_mode(model):
            for loss in losses:
                gradients = torch.autograd.grad(loss(model), parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None and parameter not in averages:
                        averages[parameter] = torch.zeros_like(
                            gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)
                        )
                    if parameter in averages:
                        averages[parameter].mul_(1 - self.alpha)
                    if gradient is not None:
                        averages[parameter].sub_(gradient, alpha=self.alpha)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return {
            parameter: all_reduce_mean(average, names.get(parameter, "")) for parameter, average in averages.items()
        }


def _vector_dims(part: LinearParameter) -> tuple[int, ...]:
    """Return the dimensions of a parameter that make up one vector: a bias, a row or a kernel."""
    if is_conv1d(part.layer):
        # The weight has a column for each output.
        return (0,)
    first = 0 if part.is_bias else 2 if isinstance(part.layer, CONVOLUTIONS) else 1
    return tuple(range(first, part.parameter.ndim))


def _cosine(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Compute the cosine of the angle between vectors along these dimensions; 0 for zero vectors."""
    a, b = (_normalized(x.double(), dims) for x in (a, b))
    return (a * b).sum(dims, keepdim=True)


def _normalized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)
