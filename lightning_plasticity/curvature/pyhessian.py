r"""The spectrum of the Hessian as PyHessian 0.1 estimates it: a second opinion by an independent implementation.

The algorithms are PyHessian's own, run unchanged. What is replaced is what they stand on: the gradients, the products
with the Hessian, and a few functions of torch that are gone or have a fixed precision, device or random generator.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_positive_ints, check_seed
from lightning_plasticity.curvature.autograd_graph import or_zeros, vector_products
from lightning_plasticity.curvature.double_backward import twice_differentiable_loss
from lightning_plasticity.curvature.estimates import Estimate, Quadrature
from lightning_plasticity.curvature.problem import (
    NOT_FINITE,
    Batch,
    LossFunction,
    Progress,
    trainable_parameters,
)
from lightning_plasticity.curvature.spectrum import Spectrum

_NO_WEIGHT = 1e-10
"""Nodes with less weight than this are artefacts of PyHessian's regulariser.

It adds ``1e-6`` to the norm of every Lanczos vector. When a run has found all that its start vector can show, what is
left is noise over ``1e-6``, and PyHessian goes on with it and grows nodes anywhere, up to twice the largest eigenvalue.
Their weights are squares of the regulariser's part in a vector, some ``1e-12``; those left out weigh nothing together.
"""

# `pyhessian.hessian` is the class: the package shadows the module of that name.
_PyHessian: Any = importlib.import_module("pyhessian.hessian").hessian


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
    r"""Estimates the spectrum of the Hessian by PyHessian's stochastic Lanczos quadrature.

    The Hessian is taken at the parameters that require gradients, with the model in evaluation mode. Arithmetic is in
    the precision of the parameters.

    PyHessian adds ``1e-6`` to every norm that it divides by. For a loss whose curvature is far below one this is not
    small: the Lanczos vectors lose their unit length, and the nodes are wrong. In one network they were 27 % off with
    the loss times ``1e-5`` and 66 % off with ``1e-6``; collapsed networks have such Hessians. For the same reason nodes
    come out of nowhere when a run goes on after it has found all that its start vector can show. They are left out here
    by their weight, below 1e-10. There are no bounds on errors, so brackets are infinite.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of random start vectors, entries ±1.
        num_steps: Number of products with the Hessian for each, at most the number of parameters.
        seed: Of the start vectors; the same on every device.
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
    with _adapted(model, batch, loss_fn, seed) as hessian:
        steps = min(num_steps, hessian.num_parameters)
        hessian.report(progress, num_probes * steps)
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
    r"""The ``k`` eigenvalues of the Hessian that are largest in absolute value, by PyHessian's power iteration.

    It stops when two consecutive Rayleigh quotients differ by less than ``tolerance``, relatively. That is no bound on
    the error: with PyHessian's default of ``1e-3`` a network of two hidden layers at the start of a new task had its
    largest eigenvalue 21 % too low, and the five largest were out of order, some with the wrong sign. At ``1e-6`` the
    error was ``1e-3``, for 1600 products with the Hessian; :func:`pyhessian_spectrum` finds them with 40. The rule adds
    ``1e-6`` to the eigenvalue: far smaller ones are taken for converged at once. Eigenvalues of nearly the same size
    and opposite sign do not converge.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        k: How many, at most the number of parameters.
        max_steps: Number of products with the Hessian for each eigenvalue at most; reaching it is no error.
        tolerance: See above.
        seed: Of the start vectors.

    Returns:
        The eigenvalues in the order found, roughly of falling absolute value, shape ``(k,)``, float64.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: As of :func:`pyhessian_spectrum`, or if there are fewer than ``k`` parameters.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> values = pyhessian_top_eigenvalues(model, x, lambda m, x: F.mse_loss(m(x), torch.zeros(2, 1)), k=2)
        >>> [round(value, 3) for value in values.tolist()]
        [4.0, 1.0]
    """
    check_positive_ints(k=k, max_steps=max_steps)
    with _adapted(model, batch, loss_fn, seed) as hessian:
        if k > hessian.num_parameters:
            raise ValueError(f"k={k} is more than the {hessian.num_parameters} parameters have eigenvalues")
        values, _ = hessian.eigenvalues(maxIter=max_steps, tol=tolerance, top_n=k)
    return torch.tensor(values, dtype=torch.float64)


def pyhessian_trace(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], *, num_probes: int = 100, seed: int = 0
) -> Estimate:
    r"""The trace of the Hessian by PyHessian's Hutchinson estimator, the mean of :math:`v^\top H v` over random signs.

    PyHessian's rule for stopping is left out: it compares consecutive means, which says nothing of their error, and
    ends a run as soon as the mean is negative. All probes are made, and the standard error says how good they are.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of random vectors, one product with the Hessian each.
        seed: Of the random vectors.

    Returns:
        The trace with its standard error.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        ValueError: As of :func:`pyhessian_spectrum`.

    Example:
        >>> import torch.nn.functional as F
        >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> trace = pyhessian_trace(model, x, lambda m, x: F.mse_loss(m(x), torch.zeros(2, 1)))
        >>> round(trace, 4), round(trace.standard_error, 4)  # a diagonal matrix has no sampling error
        (5.0, 0.0)
    """
    check_positive_ints(num_probes=num_probes)
    with _adapted(model, batch, loss_fn, seed) as hessian:
        each = torch.tensor([hessian.trace(maxIter=1, tol=0.0)[0] for _ in range(num_probes)], dtype=torch.float64)
    error = each.std().item() / math.sqrt(num_probes) if num_probes > 1 else math.nan
    return Estimate(each.mean().item(), standard_error=error)


def _quadrature(nodes: Sequence[float], weights: Sequence[float]) -> Quadrature:
    values = torch.tensor([float(node) for node in nodes], dtype=torch.float64)
    shares = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    seen = shares >= _NO_WEIGHT
    values, shares = values[seen], shares[seen] / shares[seen].sum()
    order = values.argsort()
    return Quadrature(values[order], shares[order], torch.full((len(order),), math.inf).double())


class _Torch:
    """``torch`` as PyHessian's methods see it: in the precision and on the device of the parameters, and with ``eig``.

    Random numbers come from a generator of our own, on the CPU: the global ones stay as they are, and start vectors are
    the same on every device.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self._like = like
        self._generator = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, size: torch.Size) -> Tensor:
        return torch.randn(size, generator=self._generator, dtype=self._like.dtype).to(self._like.device)

    def randint_like(self, tensor: Tensor, high: int, device: torch.device) -> Tensor:
        return torch.randint(high, tensor.shape, generator=self._generator).to(device, self._like.dtype)

    def zeros(self, *size: Any) -> Tensor:
        """For the tridiagonal matrix, whose eigenvalues are then as precise as its entries."""
        double = self._like.device.type != "mps"  # which has none
        return torch.zeros(*size, dtype=torch.float64 if double else torch.float32)

    def eig(self, matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """Of a symmetric matrix, as ``torch.eig`` was until it was removed: real and imaginary parts, and vectors."""
        values, vectors = torch.linalg.eigh(matrix.cpu().double())
        return torch.stack([values, torch.zeros_like(values)], 1), vectors


class _NothingToClear:
    """In place of the model in PyHessian's loops, which would clear the gradients of the real one."""

    def zero_grad(self) -> None:
        pass


class _AdaptedHessian(_PyHessian):  # type: ignore[misc]
    """PyHessian's class for any batch and loss.

    Args:
        loss: The loss, with its graph.
        parameters: Those to differentiate by.
        seed: Of all random vectors.
    """

    def __init__(self, loss: Tensor, parameters: list[nn.Parameter], seed: int) -> None:
        # Not PyHessian's own, which calls model(inputs) and criterion(outputs, targets) and leaves the gradients, with
        # their graph, in the parameters. This sets all that its methods use.
        self.model, self.full_dataset, self.device = _NothingToClear(), False, parameters[0].device
        self.params = parameters
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError("the loss does not depend on any trainable parameter of the model (was it detached?)")
        self.gradsH = [or_zeros(gradient, p) for gradient, p in zip(gradients, parameters, strict=True)]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self._torch = _Torch(parameters[0], seed)
        self._done, self._total = 0, 0
        self._progress: Progress | None = None

    def report(self, progress: Progress | None, total: int) -> None:
        """From now on."""
        self._done, self._total, self._progress = 0, total, progress

    def density(self, iter: int, n_v: int) -> Any:
        return self._run(_PyHessian.density, iter=iter, n_v=n_v)

    def eigenvalues(self, maxIter: int, tol: float, top_n: int) -> Any:
        return self._run(_PyHessian.eigenvalues, maxIter=maxIter, tol=tol, top_n=top_n)

    def trace(self, maxIter: int, tol: float) -> Any:
        return self._run(_PyHessian.trace, maxIter=maxIter, tol=tol)

    def _run(self, method: FunctionType, **arguments: Any) -> Any:
        """Runs the code of one of PyHessian's methods with globals of its own.

        Neither torch nor PyHessian's module is changed for it, not even for a moment, so other threads and other users
        of PyHessian notice nothing, and there is nothing to restore.
        """
        names = {**method.__globals__, "torch": self._torch, "hessian_vector_product": self._product}
        return FunctionType(method.__code__, names)(self, **arguments)

    def _product(self, gradients: list[Tensor], parameters: list[nn.Parameter], vector: list[Tensor]) -> list[Tensor]:
        """Times the Hessian, in tensors that PyHessian may write into; gradients that are constant have none."""
        products = vector_products(gradients, parameters, vector)
        if not all(bool(product.isfinite().all()) for product in products):
            raise ValueError(NOT_FINITE)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        # Cloned: autograd may return a view of the vector itself, or one number spread over a whole tensor.
        return [product.clone(memory_format=torch.contiguous_format) for product in products]


@contextlib.contextmanager
def _adapted(model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], seed: int) -> Iterator[_AdaptedHessian]:
    check_seed(seed)
    parameters = list(trainable_parameters(model).values())
    with twice_differentiable_loss(model, batch, loss_fn) as loss:
        yield _AdaptedHessian(loss, parameters, seed)
