r"""Estimate the spectrum of a curvature matrix by stochastic Lanczos quadrature.

The Gauss quadratures of random start vectors average to an estimate of the whole spectrum. The Ritz vectors of each run
reduce the variance of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_choice, check_positive_ints, check_seed
from lightning_plasticity.curvature.double_backward import second_derivative_mode
from lightning_plasticity.curvature.estimates import Quadrature
from lightning_plasticity.curvature.matrix_free.lanczos import Reorthogonalization, run_lanczos
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.matrix_free.micro_batches import operator_of_batch
from lightning_plasticity.curvature.problem import LossFunction, Progress, normal
from lightning_plasticity.curvature.spectrum import Spectrum


@dataclass(frozen=True)
class LanczosOptions:
    """The options of an estimate, validated.

    Args:
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Number of Lanczos steps for each start vector, reduced to the number of rows of the matrix.
        seed: Seed of the start vectors. They are drawn on the CPU: the same on every device.
        reorthogonalization: See :func:`~lightning_plasticity.curvature.matrix_free.lanczos.lanczos`.
        deflate: Whether each run reduces the variance of the next. The Ritz values stay the same. It has no effect with
            fewer than three start vectors, nor without reorthogonalization, which leaves no orthogonal basis.
        micro_batch_size: Number of samples with a graph at a time; ``None`` for all.
        distributed: Whether each process of a process group holds a part of the batch.
        progress: Called after every product.

    Raises:
        ValueError: If a number is not a positive integer, the seed is out of range or ``reorthogonalization`` is
            unknown.
    """

    num_probes: int
    num_steps: int
    seed: int
    reorthogonalization: Reorthogonalization = "partial"
    deflate: bool = True
    micro_batch_size: int | None = None
    distributed: bool = True
    progress: Progress | None = None

    def __post_init__(self) -> None:
        check_positive_ints(num_probes=self.num_probes, num_steps=self.num_steps)
        check_seed(self.seed)
        check_choice(get_args(Reorthogonalization), reorthogonalization=self.reorthogonalization)
        check_positive_ints(optional=True, micro_batch_size=self.micro_batch_size)

    @property
    def num_products(self) -> int:
        """Largest number of matrix-vector products."""
        return self.num_probes * self.num_steps


def estimate_spectrum(
    build: Callable[[Any], CurvatureLinearOperator],
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction[Any],
    parameters: Sequence[nn.Parameter],
    options: LanczosOptions,
) -> Spectrum:
    """Estimate the spectrum of the curvature of a loss on a batch.

    Args:
        build: Builds the operator of a batch.
        model: The model.
        batch: The batch of this process.
        loss_fn: Computes the mean loss.
        parameters: The parameters of the rows and columns.
        options: The options.
    """
    with second_derivative_mode(model):
        operator = operator_of_batch(
            build,
            model,
            batch,
            loss_fn,
            parameters,
            micro_batch_size=options.micro_batch_size,
            distributed=options.distributed,
        )
        return lanczos_spectrum(operator, options)


def lanczos_spectrum(operator: CurvatureLinearOperator, options: LanczosOptions) -> Spectrum:
    r"""Estimate the spectrum of a linear operator by stochastic Lanczos quadrature.

    Plain quadrature estimates :math:`\operatorname{tr} f(A)` by :math:`P \, v_i^\top f(A) v_i` with unit vectors
    :math:`v_i`. Deflation takes most of it from the previous run, with basis :math:`Q` and tridiagonal :math:`T`:

    .. math::
        \operatorname{tr} f(A) \approx \operatorname{tr} f(T) + P \, v_i^\top (f(A) - Q f(T) Q^\top) v_i ,

    so that only the part outside :math:`Q` has sampling error. As :math:`Q` is independent of :math:`v_i`, the mean is
    unbiased, however far the Ritz vectors are from eigenvectors. The runs form a ring: the last run deflates the first.
    From three runs on, each of any two estimates uses a start vector that the other does not: they are uncorrelated,
    and the standard error of their mean is valid.

    Deflation takes no further products, one pass over the basis for each run, and no memory: the runs are sequential,
    and the peak is below :math:`(m + 6) P` numbers for :math:`m` steps, beside the memory of a product.

    Args:
        operator: The matrix.
        options: The options; the operator itself determines the batch.

    Raises:
        ValueError: If a product is not finite.

    References:
        Ubaru, Chen and Saad 2017; Ghorbani et al. 2019, arXiv 1901.10159. Deflation: Gambhir, Stathopoulos and Orginos
        2017, arXiv 1603.05988; Meyer et al. 2021 (Hutch++), arXiv 2010.09649; Chen and Hallman 2023 (deflation by the
        Krylov space), arXiv 2205.01736; Epperly, Tropp and Webber 2024 (every vector serves both ends), arXiv
        2301.07825.
    """
    num_probes, progress = options.num_probes, options.progress
    steps = min(options.num_steps, operator.dimension)
    deflate = options.deflate and num_probes > 2 and options.reorthogonalization != "none"
    generator = torch.Generator()

    def draw(probe: int) -> Tensor:
        # After the last start vector the first one is drawn again, to close the ring.
        if probe % num_probes == 0:
            generator.manual_seed(options.seed)
        return normal((operator.dimension,), operator.parameters[0], generator)

    quadratures: list[Quadrature] = []
    overlaps: list[Tensor] = []
    start = draw(0)
    for probe in range(num_probes):

        def report(step: int, done: int = probe * steps) -> None:
            if progress is not None:
                progress(done + step, num_probes * steps)

        run = run_lanczos(operator, start, steps, report, options.reorthogonalization)
        quadratures.append(run.quadrature)
        start = draw(probe + 1)
        if deflate:
            overlaps.append(run.overlaps(start))
        # Free the basis before the next run allocates its own.
        del run
    if deflate:
        quadratures = [
            quadrature.deflated(quadratures[index - 1], overlaps[index - 1], operator.dimension)
            for index, quadrature in enumerate(quadratures)
        ]
    return Spectrum.from_quadratures(quadratures, operator.dimension, semidefinite=operator.semidefinite)
