"""Compute the spectrum of the Gauss-Newton matrix, or estimate it where the exact matrix is too costly."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

from torch import nn

from lightning_plasticity._validation import check_choice
from lightning_plasticity.curvature.double_backward import twice_differentiable_loss
from lightning_plasticity.curvature.exact.gram import TooManyRowsError, gram
from lightning_plasticity.curvature.exact.jacobian import TooManyPassesError
from lightning_plasticity.curvature.exact.jacobian_rows import JacobianTooLargeError
from lightning_plasticity.curvature.exact.loss_derivatives import LossDerivatives
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.matrix_free.lanczos import Reorthogonalization
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator, GGNLinearOperator
from lightning_plasticity.curvature.matrix_free.stochastic_lanczos import LanczosOptions, estimate_spectrum
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress, trainable_parameters
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.distributed.agreement import all_gather_batch, is_distributed
from lightning_plasticity.isolation.batches import batch_size

_AUTO_MAX_ROWS = 4096
"""Rows up to which the exact matrix is cheaper: its eigenvalues take as long as a few hundred products."""

_PASSES_PER_PRODUCT = 2.5
"""Cost of one product with the Gauss-Newton matrix, in backward passes from the outputs."""

_log = logging.getLogger("lightning_plasticity")


def ggn_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    method: Literal["auto", "gram", "lanczos"] = "auto",
    parameters: str | Collection[str] | None = None,
    samples: int | None = None,
    max_rows: int | None = None,
    sketch: int | None = None,
    num_probes: int = 8,
    num_steps: int = 64,
    seed: int = 0,
    reorthogonalization: Reorthogonalization = "partial",
    deflate: bool = True,
    micro_batch_size: int | None = None,
    distributed: bool = True,
    progress: Progress | None = None,
) -> Spectrum:
    r"""Compute or estimate the spectrum of the Gauss-Newton matrix :math:`J^\top \frac{\partial^2 L}{\partial f^2} J`.

    The model is in evaluation mode (no dropout, BatchNorm with its running statistics). Any model is supported; layers
    in ``LAYER_RULES`` are fast. The Jacobian with respect to any other parameter costs a backward pass for each output
    number, which is logged. Closed forms are checked against autograd before they are used.

    The outputs :math:`f` are the results of the last operations that use parameters, found in the autograd graph. Any
    loss that is convex and twice differentiable in them can be used; for others see :func:`tangent_kernel`. Terms of
    the weights alone are left out. :func:`custom_loss` names the outputs where the graph gives others than meant.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        method: ``"gram"``: exact, with the tangent kernel, from a matrix with a row for each output number of the
            batch. ``"lanczos"``: an estimate by ``num_probes * num_steps`` products, each about two gradients.
            ``"auto"``: exact, unless that is more work, too large, or needs more samples at a time than
            ``micro_batch_size``, which is logged.
        parameters: A name or pattern of parameters (``*`` and ``?`` are wildcards), or several, to select the block of
            the matrix that belongs to them. By default all parameters that require gradients.
        samples: Number of samples :math:`n` that the loss averages over, for the tangent kernel; the Gauss-Newton
            matrix does not depend on it. By default the first dimension of the outputs.
        max_rows: Maximum number of rows of the exact matrix (samples times outputs of each). By default the number up
            to which the exact matrix is cheaper.
        sketch: Number of random combinations of each sample's outputs to take instead of all outputs. The matrix then
            has ``samples * sketch`` rows. It is an unbiased estimate of the Gauss-Newton matrix, as is its trace, which
            has a standard error. Its other eigenvalues are not: the largest may be many times too large.
        num_probes: Number of start vectors. For this argument and all below see
            :func:`~lightning_plasticity.curvature.hessian_spectrum`.
        num_steps: Number of Lanczos steps.
        seed: Seed of the start vectors and of the sketch.
        reorthogonalization: How to keep the Lanczos vectors orthogonal.
        deflate: Whether the Ritz vectors of each run reduce the sampling error of the next.
        micro_batch_size: Number of samples with a graph at a time. Only an estimate can work in micro-batches.
        distributed: Whether each process of a process group holds a part of the batch. For ``"gram"`` the parts are
            gathered on every process.
        progress: Called after each product with the number of products done and the total.

    Returns:
        The spectrum. If it is exact, ``kernel`` has the tangent kernel of the same batch.

    Raises:
        DoubleBackwardError: If products are wrong because a custom autograd.Function hides derivatives.
        UnsupportedModelError: If the loss is not convex in the outputs, linear, or not twice differentiable; with
            ``method="gram"`` also if a Jacobian exceeds the memory limit.
        TooManyRowsError: If ``max_rows`` is exceeded, with ``method="gram"``.
        ValueError: If the loss is not a finite scalar that depends on the parameters, the model has half precision, a
            number is not positive or the pattern matches nothing.

    References:
        Schraudolph 2002; arXiv 2509.22335 (loss-weighted Gram matrix).

    Example:
        >>> import torch, torch.nn.functional as F
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> spectrum = ggn_spectrum(model, (x, y), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        >>> [round(value, 6) for value in spectrum.eigenvalues.tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
    """
    _check_method(method, sketch, micro_batch_size)
    options = LanczosOptions(
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        reorthogonalization=reorthogonalization,
        deflate=deflate,
        micro_batch_size=micro_batch_size,
        distributed=distributed,
        progress=progress,
    )

    def exact_spectrum(max_rows: int | None, max_passes: float = math.inf) -> Spectrum:
        full_batch: Any = all_gather_batch(batch) if distributed and is_distributed() else batch
        matrix = gram(
            model,
            full_batch,
            loss_fn,
            parameters=parameters,
            samples=samples,
            max_rows=max_rows,
            max_passes=max_passes,
            sketch=sketch,
            seed=seed,
        )
        return matrix.spectrum()

    if method == "gram":
        return exact_spectrum(max_rows)
    if method == "auto":
        spectrum = _exact_unless_too_costly(exact_spectrum, max_rows, options)
        if spectrum is not None:
            return spectrum
    return _estimated_spectrum(model, batch, loss_fn, parameters, options)


def _check_method(method: str, sketch: int | None, micro_batch_size: int | None) -> None:
    check_choice(("auto", "gram", "lanczos"), method=method)
    if method == "lanczos" and sketch is not None:
        raise ValueError(f"sketch={sketch} is a way to make the exact matrix smaller; method='lanczos' has none")
    if micro_batch_size is not None and (method == "gram" or sketch is not None):
        raise ValueError(f"micro_batch_size={micro_batch_size} is for 'lanczos'; the exact matrix needs all samples")


def _exact_unless_too_costly(
    exact_spectrum: Callable[[int | None, float], Spectrum], max_rows: int | None, options: LanczosOptions
) -> Spectrum | None:
    """Compute the exact spectrum, or log the reason for an estimate and return ``None``.

    Args:
        exact_spectrum: Computes the spectrum, limited to a number of rows and of backward passes.
        max_rows: See :func:`ggn_spectrum`.
        options: The options of the estimate, whose cost is the limit.
    """
    if options.micro_batch_size is not None:
        reason = f"micro_batch_size={options.micro_batch_size}, and the exact matrix needs all samples at once"
    else:
        try:
            return exact_spectrum(
                _AUTO_MAX_ROWS if max_rows is None else max_rows, _PASSES_PER_PRODUCT * options.num_products
            )
        except (TooManyRowsError, TooManyPassesError, JacobianTooLargeError) as error:
            reason = str(error)
    _log.info("estimating the Gauss-Newton spectrum by %d products: %s", options.num_products, reason)
    return None


def _estimated_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    parameters: str | Collection[str] | None,
    options: LanczosOptions,
) -> Spectrum:
    """Estimate the spectrum by products with the Gauss-Newton matrix."""
    selected = list(trainable_parameters(model, parameters).values())
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def build(part: Batch) -> CurvatureLinearOperator:
        recording = Recording(model, {})
        with twice_differentiable_loss(model, part, loss_fn, recording) as loss:
            hessian = LossDerivatives(loss, recording, names, batch_size(part)).hessian
            return GGNLinearOperator(loss, hessian, selected)

    return estimate_spectrum(build, model, batch, loss_fn, selected, options)
