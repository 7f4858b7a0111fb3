"""Run PyHessian's algorithms on any batch, loss and device, without its side effects.

PyHessian's code is not changed. The adapter replaces the gradients, the products with the Hessian, and a few functions
of torch that no longer exist or that fix the precision, the device or the random generator.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_seed
from lightning_plasticity.curvature.autograd_graph import dense_vjp, or_zeros
from lightning_plasticity.curvature.double_backward import twice_differentiable_loss
from lightning_plasticity.curvature.problem import NOT_FINITE, Batch, LossFunction, Progress, trainable_parameters

# The attribute `pyhessian.hessian` is the class, which shadows the module of that name.
_PyHessian: Any = importlib.import_module("pyhessian.hessian").hessian


class _TorchProxy:
    """A stand-in for ``torch`` inside PyHessian, with the precision and device of the parameters, and with ``eig``.

    Random numbers come from its own generator on the CPU. The global generators keep their state, and start vectors are
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
        """Allocate the tridiagonal matrix in float64, so that its eigenvalues are as precise as its entries."""
        # The MPS backend has no float64.
        return torch.zeros(*size, dtype=torch.float32 if self._like.device.type == "mps" else torch.float64)

    def eig(self, matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        """Decompose a symmetric matrix and return (real part, imaginary part) and vectors, as ``torch.eig`` did."""
        values, vectors = torch.linalg.eigh(matrix.cpu().double())
        return torch.stack([values, torch.zeros_like(values)], 1), vectors


class _ModelWithoutGradients:
    """A stand-in for the model in PyHessian's loops, which would clear the gradients of the real one."""

    def zero_grad(self) -> None:
        pass


class AdaptedHessian(_PyHessian):  # type: ignore[misc]
    """PyHessian's class for any batch and loss.

    Args:
        loss: The loss, with its graph.
        parameters: The parameters to differentiate with respect to.
        seed: Seed of all random vectors.
    """

    def __init__(self, loss: Tensor, parameters: list[nn.Parameter], seed: int) -> None:
        # PyHessian's constructor calls model(inputs) and criterion(outputs, targets), and leaves the gradients with
        # their graph in the parameters. This one sets every attribute that its methods use instead.
        self.model, self.full_dataset, self.device = _ModelWithoutGradients(), False, parameters[0].device
        self.params = parameters
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError("the loss does not depend on any trainable parameter of the model (was it detached?)")
        self.gradsH = [or_zeros(gradient, p) for gradient, p in zip(gradients, parameters, strict=True)]
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        self._torch = _TorchProxy(parameters[0], seed)
        self._done, self._total = 0, 0
        self._progress: Progress | None = None

    def report_to(self, progress: Progress | None, total: int) -> None:
        """Start reporting progress, from zero."""
        self._done, self._total, self._progress = 0, total, progress

    def density(self, iter: int, n_v: int) -> Any:
        """Run PyHessian's stochastic Lanczos quadrature: nodes and weights of each of ``n_v`` start vectors."""
        return self._run(_PyHessian.density, iter=iter, n_v=n_v)

    def eigenvalues(self, maxIter: int, tol: float, top_n: int) -> Any:
        """Run PyHessian's power iteration: the top eigenvalues and their eigenvectors."""
        return self._run(_PyHessian.eigenvalues, maxIter=maxIter, tol=tol, top_n=top_n)

    def trace(self, maxIter: int, tol: float) -> Any:
        """Run PyHessian's Hutchinson estimator: the list of its samples."""
        return self._run(_PyHessian.trace, maxIter=maxIter, tol=tol)

    def _run(self, method: FunctionType, **arguments: Any) -> Any:
        """Run the code of one of PyHessian's methods with other globals.

        Neither torch nor PyHessian's module is patched, so other threads and other users of PyHessian are not affected.
        """
        names = {**method.__globals__, "torch": self._torch, "hessian_vector_product": self._matvec}
        return FunctionType(method.__code__, names)(self, **arguments)

    def _matvec(self, gradients: list[Tensor], parameters: list[nn.Parameter], vector: list[Tensor]) -> list[Tensor]:
        """Multiply a vector by the Hessian and count the product."""
        products = dense_vjp(gradients, parameters, vector)
        if not all(bool(product.isfinite().all()) for product in products):
            raise ValueError(NOT_FINITE)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        # PyHessian writes into the products, but autograd may return a view of the vector, or one expanded number.
        return [product.clone(memory_format=torch.contiguous_format) for product in products]


@contextlib.contextmanager
def adapted_hessian(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], seed: int
) -> Iterator[AdaptedHessian]:
    """Compute the loss and yield PyHessian's class for it, to use within this context."""
    check_seed(seed)
    parameters = list(trainable_parameters(model).values())
    with twice_differentiable_loss(model, batch, loss_fn) as loss:
        yield AdaptedHessian(loss, parameters, seed)
