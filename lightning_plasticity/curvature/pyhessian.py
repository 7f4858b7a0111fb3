"""Estimate the spectrum, top eigenvalues and trace of the Hessian by PyHessian 0.1, an independent implementation.

The algorithms are PyHessian's, run unchanged on the gradients and products of :mod:`.pyhessian_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.estimates import Estimate, Quadrature
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress
from lightning_plasticity.curvature.pyhessian_adapter import adapted_hessian
from lightning_plasticity.curvature.spectrum import Spectrum

_MIN_WEIGHT = 1e-10
"""Weight below which a node is an artefact of PyHessian's regulariser.

PyHessian adds ``1e-6`` to the norm of every Lanczos vector. When the Krylov space is exhausted, the next vector is
noise divided by ``1e-6``. PyHessian continues with it and produces spurious nodes, up to twice the largest eigenvalue.
Their weights are squares of the regulariser's part in a vector, about ``1e-12``: omitting them does not change the
measure.
"""


def pyhessian_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    num_probes: int = 1,
    num_steps: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Spectrum:
    r"""Estimate the spectrum of the Hessian by PyHessian's stochastic Lanczos quadrature.

    The Hessian is that of the parameters that require gradients, with the model in evaluation mode. Arithmetic is in
    the precision of the parameters.

    PyHessian adds ``1e-6`` to every norm that it divides by. For a loss with a curvature far below one this is not
    small: the Lanczos vectors lose their unit length, and the nodes are wrong. In one network they were 27 % off with
    the loss times ``1e-5`` and 66 % off with ``1e-6``; collapsed networks have such Hessians. For the same reason,
    spurious nodes appear when a run continues after the Krylov space is exhausted. Nodes with a weight below 1e-10 are
    therefore omitted. PyHessian bounds no errors, so brackets are infinite.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of random start vectors, with entries ±1.
        num_steps: Number of products with the Hessian for each, at most the number of parameters.
        seed: Seed of the start vectors, which are the same on every device.
        progress: Called as ``progress(done, total)`` after each product with the Hessian.

    Returns:
        The estimate, with a quadrature for each start vector.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: If the loss is not a finite scalar that depends on the parameters or its Hessian is not finite, the
            model has half precision, or a number of probes or steps is less than one.

    References:
        Yao, Gholami, Keutzer and Mahoney 2020, arXiv 1912.07145 (PyHessian).

    Example:
        >>> import torch.nn.functional as F
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> spectrum = pyhessian_spectrum(model, (x, y), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        >>> [round(value, 4) for value in spectrum.eigenvalues.tolist()]  # of (2/n) xᵀx
        [1.0, 4.0]
    """
    check_positive_ints(num_probes=num_probes, num_steps=num_steps)
    with adapted_hessian(model, batch, loss_fn, seed) as hessian:
        steps = min(num_steps, hessian.num_parameters)
        hessian.report_to(progress, num_probes * steps)
        quadratures = []
        for _ in range(num_probes):
            (nodes,), (weights,) = hessian.density(iter=steps, n_v=1)
            quadratures.append(_quadrature(nodes, weights))
        return Spectrum.from_quadratures(quadratures, hessian.num_parameters)


def pyhessian_top_eigenvalues(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    k: int = 1,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Tensor:
    r"""Estimate the ``k`` eigenvalues of the Hessian with the largest absolute values, by PyHessian's power iteration.

    The iteration stops when two consecutive Rayleigh quotients differ by less than ``tolerance``, relatively. This does
    not bound the error. With PyHessian's default of ``1e-3``, the largest eigenvalue of a network of two hidden layers
    at the start of a new task was 21 % too low, and the five largest were out of order, some with the wrong sign. At
    ``1e-6`` the error was ``1e-3``, for 1600 products with the Hessian; :func:`pyhessian_spectrum` needs 40. The rule
    adds ``1e-6`` to the eigenvalue, so far smaller ones count as converged at once. Eigenvalues of nearly the same size
    and opposite sign do not converge.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        k: Number of eigenvalues, at most the number of parameters.
        max_steps: Maximum number of products with the Hessian for each eigenvalue. Reaching it is not an error.
        tolerance: Relative difference of consecutive Rayleigh quotients at which the iteration stops.
        seed: Seed of the start vectors.

    Returns:
        The eigenvalues in the order found, roughly of falling absolute value, shape ``(k,)``, float64.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: For the reasons of :func:`pyhessian_spectrum`, or if there are fewer than ``k`` parameters.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> values = pyhessian_top_eigenvalues(model, x, lambda m, x: F.mse_loss(m(x), torch.zeros(2, 1)), k=2)
        >>> [round(value, 3) for value in values.tolist()]
        [4.0, 1.0]
    """
    check_positive_ints(k=k, max_steps=max_steps)
    with adapted_hessian(model, batch, loss_fn, seed) as hessian:
        if k > hessian.num_parameters:
            raise ValueError(f"k={k} is more than the {hessian.num_parameters} parameters have eigenvalues")
        values, _ = hessian.eigenvalues(maxIter=max_steps, tol=tolerance, top_n=k)
    return torch.tensor(values, dtype=torch.float64)


def pyhessian_trace(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, num_probes: int = 100, seed: int = 0
) -> Estimate:
    r"""Estimate the trace of the Hessian by PyHessian's Hutchinson estimator.

    :math:`\operatorname{tr} H = E[v^\top H v]` for vectors :math:`v` of random signs.

    PyHessian's stopping rule is not used. It compares consecutive means, which does not measure their error, and stops
    as soon as the mean is negative. All probes are evaluated instead, and the standard error measures their accuracy.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of random vectors, one product with the Hessian each.
        seed: Seed of the random vectors.

    Returns:
        The trace with its standard error.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: For the reasons of :func:`pyhessian_spectrum`.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> trace = pyhessian_trace(model, x, lambda m, x: F.mse_loss(m(x), torch.zeros(2, 1)))
        >>> round(trace, 4), round(trace.standard_error, 4)  # a diagonal matrix has no sampling error
        (5.0, 0.0)
    """
    check_positive_ints(num_probes=num_probes)
    with adapted_hessian(model, batch, loss_fn, seed) as hessian:
        traces = torch.tensor([hessian.trace(maxIter=1, tol=0.0)[0] for _ in range(num_probes)], dtype=torch.float64)
    error = traces.std().item() / math.sqrt(num_probes) if num_probes > 1 else math.nan
    return Estimate(traces.mean().item(), standard_error=error)


def _quadrature(nodes: Sequence[float], weights: Sequence[float]) -> Quadrature:
    values = torch.tensor([float(node) for node in nodes], dtype=torch.float64)
    shares = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    kept = shares >= _MIN_WEIGHT
    values, shares = values[kept], shares[kept] / shares[kept].sum()
    order = values.argsort()
    return Quadrature(values[order], shares[order], torch.full((len(order),), math.inf).double())
