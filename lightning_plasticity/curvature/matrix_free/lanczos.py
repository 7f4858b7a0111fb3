r"""The Lanczos process: the spectrum of a matrix that is only known by its products with vectors.

From a start vector :math:`v`, :math:`k` products give an orthonormal basis :math:`Q` of the Krylov space and a
tridiagonal :math:`T = Q^\top A Q`, whose eigenvalues (Ritz values) and squared first components are the Gauss
quadrature of the spectral measure of :math:`v`. Averaged over random start vectors it is an estimate of the whole
spectrum, whose variance each run's Ritz vectors lower for the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_plasticity._validation import check_positive_ints, check_seed
from lightning_plasticity.curvature.estimates import Quadrature
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.problem import NOT_FINITE, Progress, normal
from lightning_plasticity.curvature.spectrum import Spectrum

Reorthogonalization: TypeAlias = Literal["full", "partial", "none"]

_BREAKDOWN = 50
"""In units of the rounding error of a product: below it, what is left of a new direction is rounding error alone."""


def check_lanczos(num_probes: int, num_steps: int, seed: int, reorthogonalization: Reorthogonalization) -> None:
    """What the arguments of :func:`lanczos_spectrum` have to be; for who computes something before it.

    Raises:
        ValueError: If a number is not positive and whole, or another one is not known.
    """
    check_positive_ints(num_probes=num_probes, num_steps=num_steps)
    check_seed(seed)
    if reorthogonalization not in get_args(Reorthogonalization):
        raise ValueError(f"reorthogonalization={reorthogonalization!r} must be 'full', 'partial' or 'none'")


def lanczos_spectrum(
    product: CurvatureLinearOperator,
    *,
    num_probes: int,
    num_steps: int,
    seed: int,
    reorthogonalization: Reorthogonalization = "partial",
    deflate: bool = True,
    progress: Progress | None = None,
) -> Spectrum:
    r"""The spectrum of a curvature matrix by stochastic Lanczos quadrature.

    Plain quadrature estimates :math:`\operatorname{tr} f(A)` by :math:`P \, v_i^\top f(A) v_i` with unit vectors
    :math:`v_i`. Deflated, the run before, with basis :math:`Q` and tridiagonal :math:`T`, knows most of it:

    .. math::
        \operatorname{tr} f(A) \approx \operatorname{tr} f(T) + P \, v_i^\top (f(A) - Q f(T) Q^\top) v_i ,

    so that only what :math:`Q` misses has sampling error. As :math:`Q` is independent of :math:`v_i`, the mean is as
    right as without, however far the Ritz vectors are from eigenvectors. The runs form a ring: the first is told of the
    last. From three runs on, each estimate has a start vector that the other has not seen: they are uncorrelated, and
    the standard error of their mean is honest.

    It takes no further products, one pass over the basis for each run, and no memory to speak of: runs come one after
    the other, and the peak is less than :math:`(m + 6) P` numbers for :math:`m` steps, beside what the product needs.

    Args:
        product: The matrix.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each; no more than the matrix has rows are taken.
        seed: Seed of the start vectors. They are drawn on the CPU: the same on every device.
        reorthogonalization: See :func:`lanczos`.
        deflate: Whether each run lowers the variance of the next. The Ritz values are the same. It has no effect with
            fewer than three start vectors, nor without reorthogonalization, which leaves no orthogonal basis.
        progress: Told of every product.

    Raises:
        ValueError: If an argument is none that :func:`check_lanczos` lets pass, or a product is not finite.

    References:
        Ubaru, Chen and Saad 2017; Ghorbani et al. 2019, arXiv 1901.10159. Deflation: Gambhir, Stathopoulos and Orginos
        2017, arXiv 1603.05988; Meyer et al. 2021 (Hutch++), arXiv 2010.09649; Chen and Hallman 2023 (the Krylov space
        as what to deflate), arXiv 2205.01736; Epperly, Tropp and Webber 2024 (every vector serves both ends), arXiv
        2301.07825.
    """
    check_lanczos(num_probes, num_steps, seed, reorthogonalization)
    steps = min(num_steps, product.dimension)
    deflate = deflate and num_probes > 2 and reorthogonalization != "none"
    generator = torch.Generator()

    def draw(probe: int) -> Tensor:
        if probe % num_probes == 0:
            generator.manual_seed(seed)
        return normal((product.dimension,), product.parameters[0], generator)

    quadratures: list[Quadrature] = []
    shares: list[Tensor] = []
    start = draw(0)
    for probe in range(num_probes):

        def report(step: int, done: int = probe * steps) -> None:
            if progress is not None:
                progress(done + step, num_probes * steps)

        run = _run(product, start, steps, report, reorthogonalization)
        quadratures.append(run.quadrature)
        start = draw(probe + 1)
        if deflate:
            shares.append(run.shares(start))
        del run  # its basis, before there is another
    if deflate:
        quadratures = [
            quadrature.deflated(quadratures[number - 1], shares[number - 1], product.dimension)
            for number, quadrature in enumerate(quadratures)
        ]
    return Spectrum.from_quadratures(quadratures, product.dimension, semidefinite=product.semidefinite)


def lanczos(
    product: CurvatureLinearOperator,
    start: Tensor,
    steps: int,
    report: Callable[[int], None] | None = None,
    *,
    reorthogonalization: Reorthogonalization = "partial",
) -> Quadrature:
    """One Lanczos run.

    The run ends when the Krylov space is exhausted, which is judged relative to the matrix: the scale of the loss does
    not matter.

    Args:
        product: The matrix.
        start: The start vector, shape ``(P,)``; its length does not matter.
        steps: Number of products, at most :math:`P`.
        report: Told of every product.
        reorthogonalization: ``"full"``: every new direction is made orthogonal to all earlier ones, by two
            matrix-vector products with the basis. ``"partial"``: only when a recurrence that follows the loss of
            orthogonality says that it has grown to the root of the rounding error, up to which the tridiagonal matrix
            stays right to rounding error. ``"none"``: never, which needs only two vectors of the basis; eigenvalues
            then appear in several copies, whose weights add up to the right one.

    References:
        Simon 1984, "The Lanczos algorithm with partial reorthogonalization".
    """
    return _run(product, start, steps, report, reorthogonalization).quadrature


@dataclass(frozen=True, eq=False)
class _Run:
    """What a Lanczos run leaves.

    Args:
        quadrature: The quadrature.
        basis: The Lanczos vectors, shape ``(k, P)``.
        vectors: The eigenvectors of the tridiagonal matrix, in its columns, shape ``(k, k)``, float64.
    """

    quadrature: Quadrature
    basis: Tensor
    vectors: Tensor

    def shares(self, vector: Tensor) -> Tensor:
        """How much of a vector's square lies along each Ritz vector, shape ``(k,)``, float64."""
        along = (self.basis @ (vector / vector.norm())).cpu().double()
        return torch.mv(self.vectors.T, along).square()


def _run(
    product: CurvatureLinearOperator,
    start: Tensor,
    steps: int,
    report: Callable[[int], None] | None,
    reorthogonalization: Reorthogonalization,
) -> _Run:
    eps = torch.finfo(start.dtype).eps
    rows = min(steps, 2) if reorthogonalization == "none" else steps
    basis = torch.empty(rows, len(start), dtype=start.dtype, device=start.device)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    watch = _Orthogonality(eps * math.sqrt(len(start)))
    torch.div(start, start.norm(), out=basis[0])
    complete, scale = False, 1.0
    for step in range(steps):
        vector = basis[step % rows]
        image = product(vector).detach()
        if not step:
            scale = _scale_of(image)
        if scale != 1:
            image = image / scale
        size = image.norm().item()
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
        if step:
            image = image.add(basis[(step - 1) % rows], alpha=-off_diagonal[-1])
        diagonal.append(torch.dot(vector, image).item())
        image = image.add(vector, alpha=-diagonal[-1])
        if reorthogonalization == "full" or (
            reorthogonalization == "partial" and watch.needs_care(diagonal, [*off_diagonal, image.norm().item()])
        ):
            image = _orthogonal(image, basis[: step + 1])
        off_diagonal.append(image.norm().item())
        if report is not None:
            report(step + 1)
        if off_diagonal[-1] <= _BREAKDOWN * eps * max(size, *map(abs, diagonal), *off_diagonal[:-1]):
            complete = True
            break
        if step + 1 < steps:
            torch.div(image, off_diagonal[-1], out=basis[(step + 1) % rows])
    nodes, weights, residuals, vectors = _ritz(diagonal, off_diagonal)
    residuals = residuals + _BREAKDOWN * eps * nodes.abs().max()  # a bound cannot be sharper than the products
    complete = complete or len(diagonal) == len(start)
    return _Run(Quadrature(scale * nodes, weights, scale * residuals, complete), basis[: len(diagonal)], vectors)


def _scale_of(image: Tensor) -> float:
    """A power of two to divide products by, so that squares of their entries neither vanish nor overflow."""
    largest = image.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(NOT_FINITE)
    return 1.0 if largest == 0 or 1e-9 < largest < 1e9 else 2.0 ** math.floor(math.log2(largest))


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector orthogonal to the rows of a basis; taken twice where the first pass removes most of it."""
    before = vector.norm()
    vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
    if vector.norm() < 0.5 * before:
        vector = torch.addmv(vector, basis.T, basis @ vector, alpha=-1)
    return vector


class _Orthogonality:
    r"""Follows how orthogonal the Lanczos vectors are without looking at them.

    :math:`\omega_{jk} = q_j \cdot q_k` obeys the same three-term recurrence as the vectors, driven by rounding errors.

    Args:
        noise: Size of one rounding error.
    """

    def __init__(self, noise: float) -> None:
        self._noise = noise
        self._before = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._now = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._again = False

    def needs_care(self, diagonal: list[float], off_diagonal: list[float]) -> bool:
        """Whether the vector about to be added must be made orthogonal to all before it. To be asked once a step.

        Args:
            diagonal: The diagonal of T so far, ``step + 1`` numbers.
            off_diagonal: What is beside it, the norm of the new vector last, ``step + 1`` numbers.
        """
        count = len(diagonal)
        alpha, beta = (
            torch.tensor(diagonal, dtype=torch.float64, device="cpu"),
            torch.tensor(off_diagonal, dtype=torch.float64, device="cpu"),
        )
        # Relative to the matrix, not to its neighbours in T: a short new vector is mostly rounding error.
        rounding = self._noise * torch.maximum(alpha.abs().max(), beta.max())
        following = (rounding / beta[-1]).expand(count).clone()
        if count > 1 and beta[-1] > 0:
            now, before = self._now, self._before  # of the newest vector, and of the one before it
            padded = torch.cat([now, torch.ones(1, dtype=torch.float64, device="cpu")])
            grown = beta[: count - 1] * padded[1:] + (alpha[: count - 1] - alpha[-1]) * now
            grown[1:] += beta[: count - 2] * now[:-1]
            grown[: len(before)] -= beta[-2] * before
            if len(before) < len(grown):
                grown[-1] -= beta[-2]
            following[:-1] = (grown + torch.copysign(rounding.expand_as(grown), grown)) / beta[-1]
        care = self._again or bool(following.abs().max() > math.sqrt(self._noise))
        # The vector before it is as far from orthogonal: two in a row are mended.
        self._again = care and not self._again
        if care:
            following.fill_(self._noise)
        self._before, self._now = self._now, following
        return care


def _ritz(diagonal: list[float], off_diagonal: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, their weights in the start vector, residuals, and eigenvectors."""
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    between = torch.tensor(off_diagonal[:-1], dtype=torch.float64, device="cpu")
    tridiagonal += torch.diag(between, 1) + torch.diag(between, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[0].square()
    return nodes, weights / weights.sum(), off_diagonal[-1] * vectors[-1].abs(), vectors
