"""Parseval regularization: keep weight matrices orthogonal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number
from lightning_plasticity.interventions.base import Regularizer
from lightning_plasticity.interventions.selection import Patterns


class Parseval(Regularizer):
    r"""Parseval regularization: pull all singular values of the hidden layers' weights to the same value.

    .. math:: R = \lambda \sum_\ell \lVert W_\ell W_\ell^\top - s I \rVert_F^2, \qquad s = \mathrm{gain}^2

    A matrix with more rows than columns cannot have orthogonal rows. The term uses the smaller one of
    :math:`W W^\top` and :math:`W^\top W`. Both differ by a constant, :math:`s^2 (\mathrm{out} - \mathrm{in})`, and have
    the same gradient; with the smaller one the minimum is zero. The matrices are those of
    :class:`~lightning_plasticity.interventions.SpectralRegularizer`; biases and norm layers are not touched.

    With ``decoupled=True`` it is the isometry term of AdamO (Rosseau, Müller and Nowé 2026): the gradient goes past the
    optimizer and its moments, as the weight decay of AdamW does,

    .. math:: \theta_{t+1} = \mathrm{step}(\theta_t) - \eta\,\nabla R(\theta_t)

    with the learning rate :math:`\eta` of the parameter's group. Only the abstract of that paper and its update rule
    could be had, not its :math:`\lambda`, nor the layers that it leaves out: they are those of the coupled term here.
    In a plain loop, call :meth:`descend` before the optimizer's step instead of adding :meth:`penalty` to the loss.

    Args:
        coefficient: Factor of the term, :math:`\lambda`. The paper's networks are 64 units wide; the term grows with
            the width.
        gain: The singular values at the minimum. The paper uses √2, the gain of its initialisation.
        exclude: Names of the modules to leave out, with wildcards. By default the last one that has a matrix, in the
            order of registration: name the output layers where that is another one, or several.
        include: Names of the modules and parameters that count, with wildcards; by default all.
        decoupled: Whether the gradient goes past the optimizer, as in AdamO, or is a part of that of the loss.

    Raises:
        ValueError: If ``coefficient`` is negative or ``gain`` is not positive; at the call, if the model has no such
            layer to exclude.

    References:
        Chung et al. 2024, arXiv 2412.07224. Rosseau, Müller and Nowé 2026, arXiv 2606.09762.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> Parseval(coefficient=1).penalty(model).item()  # (2² - 1)²
        9.0
        >>> Parseval(coefficient=1, decoupled=True).descend(model, [torch.optim.Adam(model.parameters(), lr=0.01)])
        >>> model[0].weight  # 2 - 0.01 · 4 · 2 (2² - 1)
        Parameter containing:
        tensor([[0.0000, 1.7600],
                [1.0000, 0.0000]], requires_grad=True)
    """

    acts_on = "matrix, apart from that of the last layer unless exclude= names others"

    def __init__(
        self,
        coefficient: float = 1e-3,
        gain: float = 1,
        exclude: Patterns = None,
        include: Patterns = None,
        *,
        decoupled: bool = False,
    ) -> None:
        super().__init__(coefficient, include=include, exclude=exclude, decoupled=decoupled)
        check_number("(0, inf)", self.name, "the singular values at the minimum", gain=gain)
        self.gain = gain

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        layers = [layer.matrices for layer in self.weight_matrices(model).values() if layer.matrices]
        kept = layers[:-1] if self.exclude is None else layers
        terms = [self._term(matrix) for matrices in kept for matrix in matrices.values()]
        return self.total(terms, model)

    def _term(self, matrix: Tensor) -> Tensor:
        rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        with torch.autocast(matrix.device.type, enabled=False):
            gram = rows @ rows.T
        target = self.gain**2 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return F.mse_loss(gram, target, reduction="sum")
