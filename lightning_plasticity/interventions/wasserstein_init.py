"""Wasserstein regularization: pull the distribution of each tensor's entries, not each entry, to the initial one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_plasticity.interventions.initial_values import InitialValueRegularizer
from lightning_plasticity.interventions.selection import Patterns


class WassersteinInit(InitialValueRegularizer):
    r"""Pull the distribution of the entries of every parameter to the initial one.

    .. math:: R = \lambda \sum_\ell \lVert \operatorname{sort}(\theta_\ell) - \operatorname{sort}(\theta_{0,\ell})
        \rVert^2

    the squared 2-Wasserstein distance of the two empirical distributions times the number of entries. All trainable
    parameters count, each by itself, including those of norm layers. The values at :meth:`start` are kept, sorted, in
    the state. Parameters that are added later, or get another shape, need another :meth:`start`. Sorting costs much
    more than a training step on large layers.

    Args:
        coefficient: Factor of the term, :math:`\lambda`.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If ``coefficient`` is negative.
        RuntimeError: At the call, if the model had no such parameter at the last :meth:`start`.

    References:
        Lewandowski et al. 2024, arXiv 2406.06811v1; Lewandowski et al. 2023, arXiv 2312.00246.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model, regularizer = nn.Linear(3, 2), WassersteinInit()
        >>> regularizer.start(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(model.weight.flip(0, 1))
        >>> regularizer.penalty(model).item()
        0.0
    """

    def __init__(self, coefficient: float = 1e-2, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(coefficient, include=include, exclude=exclude)

    @override
    def reference(self, parameter: Tensor) -> Tensor:
        return parameter.flatten().sort().values.view(parameter.shape)

    @override
    def distance(self, parameter: Tensor, initial: Tensor) -> Tensor:
        return F.mse_loss(parameter.flatten().sort().values, initial.flatten(), reduction="sum")
