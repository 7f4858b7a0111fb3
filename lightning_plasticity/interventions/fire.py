"""FIRE: replace weight matrices by the nearest ones that stretch all directions alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.interventions.base import Repair, Request, When
from lightning_plasticity.interventions.weights.linear_layers import LinearParameter, weights
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from lightning_plasticity.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS


class FIRE(Repair):
    r"""Frobenius-isometry re-initialisation: each weight matrix becomes a multiple of its polar factor.

    .. math:: W \leftarrow \sqrt{d_\mathrm{out} / d_\mathrm{in}}\; X_n, \qquad
        X_{i+1} = \tfrac32 X_i - \tfrac12 X_i X_i^\top X_i, \qquad X_0 = W / \|W\|_F

    The polar factor :math:`U V^\top` of :math:`W = U \Sigma V^\top` is the nearest matrix whose singular values are 1,
    and :math:`X_i` tends to it. Needs no data and draws no random numbers.

    * Linear layers: their weight, the last layer's too.
    * Convolutions: :math:`(d_\mathrm{out}, d_\mathrm{in})` for each spatial tap, and each group, on its own, divided by
      the number of taps.
    * ``nn.MultiheadAttention``: the projections to queries and keys, each on its own; those to values and outputs stay.
      Attention built of linear layers is not recognised: all its projections change.
    * Biases, norm layers, embeddings, recurrent layers, depthwise and transposed convolutions stay, and so does what is
      frozen.

    *Accuracy.* The iteration multiplies small singular values by 1.5 a time: after ten, what was
    :math:`\sigma / \|W\|_F` of 0.1 is 1.000, 0.03 is 0.97, 0.01 is 0.53 and 0.001 is 0.06. Zero stays zero: a
    matrix of lower rank keeps its rank, and a zero matrix stays as it is. Large square matrices have small
    :math:`\sigma / \|W\|_F`: of a fresh one of size 1000, ten iterations, the published number, bring 55 % of the
    singular values above 0.9.

    Optimizers forget what they know of the weights that change.

    Args:
        iterations: Number of iterations, at least 1.
        when: When the callback does it: on ``"collapse"`` or at every ``"task"``.

    Raises:
        ValueError: If ``iterations`` is less than 1; at the repair, if a weight is not finite.

    References:
        Han et al. 2026, arXiv 2602.08040.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        >>> report = FIRE().repair(model)
        >>> bool(torch.allclose(model.weight, torch.tensor([[1.0, 0.0], [0.0, -1.0]])))
        True
    """

    occasions = ("collapse", "task")

    def __init__(self, iterations: int = 10, when: When = "collapse") -> None:
        super().__init__(when)
        self._check_count(iterations=iterations)
        self.iterations = iterations

    @override
    def changes(self, model: nn.Module, request: Request) -> WeightUpdate:
        kept = {id(m.out_proj.weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        values: dict[Tensor, Tensor] = {}
        for name, weight in weights(model).items():
            if id(weight.parameter) in kept:
                continue
            if not bool(torch.isfinite(weight.parameter).all()):
                raise ValueError(f"FIRE: {name!r} holds values that are not finite")
            new = self._renewed(weight)
            if new is not None:
                values[weight.parameter] = new
        return WeightUpdate(values)

    def _renewed(self, weight: LinearParameter) -> Tensor | None:
        layer, old = weight.layer, weight.parameter.detach()
        if isinstance(layer, nn.Linear) or weight.key in ("q_proj_weight", "k_proj_weight"):
            return self._isometry(old)
        if weight.key == "in_proj_weight":
            queries, keys, values = old.chunk(3)
            return torch.cat([self._isometry(queries).to(old), self._isometry(keys).to(old), values])
        if isinstance(layer, CONVOLUTIONS) and not isinstance(layer, TRANSPOSED_CONVOLUTIONS):
            groups: int = layer.groups
            if groups > 1 and old.shape[1] == 1:  # depthwise
                return None
            kernels = old.reshape(groups, -1, old.shape[1], old[0, 0].numel())
            return (self._isometry(kernels.movedim(-1, 0)) / kernels.shape[-1]).movedim(0, -1).reshape(old.shape)
        return None

    def _isometry(self, matrices: Tensor) -> Tensor:
        """The scaled polar factor of each matrix, ``(..., outputs, inputs)``, in float32 at least."""
        outputs, inputs = matrices.shape[-2:]
        x = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        for size in (x.abs().amax((-2, -1), keepdim=True), None):  # first so that squares neither over- nor underflow
            size = torch.linalg.matrix_norm(x, keepdim=True) if size is None else size
            x = x / torch.where(size > 0, size, 1)
        x = x.mT if outputs < inputs else x  # the smaller of the two products
        for _ in range(self.iterations):
            x = 1.5 * x - 0.5 * x @ (x.mT @ x)
        return (x.mT if outputs < inputs else x) * math.sqrt(outputs / inputs)
