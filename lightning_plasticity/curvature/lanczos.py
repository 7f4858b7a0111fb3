r"""The Lanczos process: the spectrum of a matrix that is only known by its products with vectors.

From a start vector :math:`v`, :math:`k` products give an orthonormal basis :math:`Q` of the Krylov space and a
tridiagonal :math:`T = Q^\top A Q`, whose eigenvalues (Ritz values) and squared first components are the Gauss
quadrature of the spectral measure of :math:`v`. Averaged over random start vectors it is an estimate of the whole
spectrum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_plasticity.curvature.estimates import Quadrature
from lightning_plasticity.curvature.products import CurvatureProduct
from lightning_plasticity.curvature.spectrum import Spectrum

Progress = Callable[[int, int], None]
"""Called with the number of products done and the number of all of them."""

_BREAKDOWN = 50
"""In units of the rounding error of a product: below it, what is left of a new direction is rounding error alone."""


def lanczos_spectrum(
    product: CurvatureProduct, *, num_probes: int, num_steps: int, seed: int, progress: Progress | None = None
) -> Spectrum:
    """The spectrum of a curvature matrix by stochastic Lanczos quadrature.

    Args:
        product: The matrix.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each; no more than the matrix has rows are taken.
        seed: Seed of the start vectors. They are drawn on the CPU: the same on every device.
        progress: Told of every product.

    Raises:
        ValueError: If a number is not positive.

    References:
        Ubaru, Chen and Saad 2017; Ghorbani et al. 2019, arXiv 1901.10159.
    """
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or larger")
    generator = torch.Generator().manual_seed(seed)
    steps = min(num_steps, product.dimension)
    quadratures = []
    for probe in range(num_probes):
        start = torch.randn(product.dimension, generator=generator, dtype=torch.float64)
        done = probe * steps

        def report(step: int, done: int = done) -> None:
            if progress is not None:
                progress(done + step, num_probes * steps)

        quadratures.append(lanczos(product, start.to(product.device, product.dtype), steps, report))
    return Spectrum.from_quadratures(quadratures, product.dimension, semidefinite=product.semidefinite)


def lanczos(
    product: CurvatureProduct, start: Tensor, steps: int, report: Callable[[int], None] | None = None
) -> Quadrature:
    """One Lanczos run, with full re-orthogonalisation.

    Classical Gram-Schmidt twice, as two matrix products each: as good as modified Gram-Schmidt, and fast. The run ends
    when the Krylov space is exhausted, which is judged relative to the matrix: the scale of the loss does not matter.

    Args:
        product: The matrix.
        start: The start vector, shape ``(P,)``; its length does not matter.
        steps: Number of products, at most :math:`P`.
        report: Told of every product.
    """
    basis = torch.empty(steps, len(start), dtype=start.dtype, device=start.device)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    size = 0.0  # the largest entry of T so far: the scale of the matrix
    vector = start / start.norm()
    complete = False
    for step in range(steps):
        basis[step] = vector
        image = product(vector)
        rounding = torch.finfo(start.dtype).eps * image.norm().item()
        done = basis[: step + 1]
        coefficients = done @ image
        image = image - done.T @ coefficients
        correction = done @ image
        image = image - done.T @ correction
        diagonal.append((coefficients[step] + correction[step]).item())
        off_diagonal.append(image.norm().item())
        size = max(size, abs(diagonal[-1]))
        if report is not None:
            report(step + 1)
        if off_diagonal[-1] <= _BREAKDOWN * max(rounding, torch.finfo(start.dtype).eps * size):
            complete = True
            break
        size = max(size, off_diagonal[-1])
        vector = image / off_diagonal[-1]
    return _quadrature(diagonal, off_diagonal, complete=complete or len(diagonal) == len(start))


def _quadrature(diagonal: list[float], off_diagonal: list[float], *, complete: bool) -> Quadrature:
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    between = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    tridiagonal += torch.diag(between, 1) + torch.diag(between, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[0].square()
    return Quadrature(nodes, weights / weights.sum(), off_diagonal[-1] * vectors[-1].abs(), complete)
