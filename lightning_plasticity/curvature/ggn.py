"""The spectrum of the Gauss-Newton matrix: exact where the batch is small enough, estimated where not."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.double_backward import second_derivatives, twice_differentiable_loss
from lightning_plasticity.curvature.exact.gram import TooManyRowsError, gram
from lightning_plasticity.curvature.exact.jacobian import TooManyPassesError
from lightning_plasticity.curvature.exact.jacobian_rows import JacobianTooLargeError
from lightning_plasticity.curvature.exact.outputs import outputs_of
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.matrix_free.lanczos import Reorthogonalization, check_lanczos, lanczos_spectrum
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator, GGNLinearOperator
from lightning_plasticity.curvature.matrix_free.micro_batches import sharded
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress, trainable_parameters
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.distributed.agreement import all_gather_batch, is_distributed

_AUTO_MAX_ROWS = 4096
"""Rows up to which the exact matrix is the cheaper way: its eigenvalues take as long as some hundred products."""

_PASSES_PER_PRODUCT = 2.5
"""Backward passes from the outputs that take as long as one product with the Gauss-Newton matrix."""

_log = logging.getLogger("lightning_plasticity")


def ggn_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    method: Literal["auto", "gram", "lanczos"] = "auto",
    parameters: str | None = None,
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
    r"""Spectrum of the generalized Gauss-Newton matrix :math:`J^\top \frac{\partial^2 L}{\partial f^2} J`.

    The matrix is taken with the model in evaluation mode (no dropout, BatchNorm with its running statistics). Any model
    will do; fast are the layers in ``LAYER_RULES``. The Jacobian by any other parameter costs a backward pass for each
    output number, which is logged. Losses are made of those in ``LOSS_RULES``: cross-entropy and its relatives, squared
    error, Huber's loss, and :func:`custom_loss` for any other. Closed forms are checked against autograd before they
    are used.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        method: ``"gram"``: exact, with the tangent kernel, from a matrix with a row for each output number of the
            batch. ``"lanczos"``: an estimate by ``num_probes * num_steps`` products, each about two gradients.
            ``"auto"``: exact, unless that is more work, too large, or needs more samples at a time than
            ``micro_batch_size``, which is logged.
        parameters: Only the parameters whose name matches this pattern (``*`` and ``?`` are wildcards): the block of
            the matrix that belongs to them. By default all that require gradients.
        samples: Number of samples that the loss is a mean over: the :math:`n` of the tangent kernel, of no consequence
            for the Gauss-Newton matrix. By default the first dimension of what the first loss function was given.
        max_rows: Most rows of the exact matrix (samples times outputs a sample). By default as many as are worth it.
        sketch: Take this many random combinations of each sample's outputs instead of all outputs. The matrix then has
            ``samples * sketch`` rows, and is an unbiased estimate of the Gauss-Newton matrix, as is its trace, which
            has a standard error. Eigenvalues spread more than the true ones. For vocabularies and dense prediction.
        num_probes: See :func:`~lightning_plasticity.curvature.hessian_spectrum`, as for all that follow.
        num_steps: Lanczos steps.
        seed: Seed of the start vectors and of the sketch.
        reorthogonalization: What is done to keep the Lanczos vectors orthogonal.
        deflate: Whether what each start vector finds lowers the sampling error of the next.
        micro_batch_size: Number of samples whose graph is held at a time, which only an estimate can do with.
        distributed: Whether the processes of a process group each hold a part of the batch. For ``"gram"`` the parts
            are brought together on every process.
        progress: Called with the number of products done and of all of them.

    Returns:
        The spectrum. If it is exact, the tangent kernel of the same batch is in ``kernel``.

    Raises:
        DoubleBackwardError: If products are wrong: a custom autograd.Function hides derivatives from them.
        UnsupportedModelError: If the curvature of a loss term is not known; with ``method="gram"`` also if a Jacobian
            is too large to be held.
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
    check_lanczos(num_probes, num_steps, seed, reorthogonalization)
    check_positive_ints(optional=True, micro_batch_size=micro_batch_size)
    auto, reason = method == "auto", None
    if auto and micro_batch_size is not None:
        reason = f"micro_batch_size={micro_batch_size}, and the exact matrix needs all samples at once"
    elif method != "lanczos":
        whole: Any = all_gather_batch(batch) if distributed and is_distributed() else batch
        try:
            return gram(
                model,
                whole,
                loss_fn,
                parameters=parameters,
                samples=samples,
                max_rows=_AUTO_MAX_ROWS if auto and max_rows is None else max_rows,
                max_passes=_PASSES_PER_PRODUCT * num_probes * num_steps if auto else float("inf"),
                sketch=sketch,
                seed=seed,
            ).spectrum()
        except (TooManyRowsError, TooManyPassesError, JacobianTooLargeError) as error:
            if not auto:
                raise
            reason = str(error)
    if reason is not None:
        _log.info("estimating the Gauss-Newton spectrum by %d products: %s", num_probes * num_steps, reason)
    selected = list(trainable_parameters(model, parameters).values())
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def build(part: Batch) -> CurvatureLinearOperator:
        recording = Recording({})
        with twice_differentiable_loss(model, part, loss_fn, recording) as loss:
            return GGNLinearOperator(loss, outputs_of(loss, recording.loss_calls, names), selected)

    with second_derivatives(model):
        return lanczos_spectrum(
            sharded(build, model, batch, loss_fn, selected, micro_batch_size=micro_batch_size, distributed=distributed),
            num_probes=num_probes,
            num_steps=num_steps,
            seed=seed,
            reorthogonalization=reorthogonalization,
            deflate=deflate,
            progress=progress,
        )


def _check_method(method: str, sketch: int | None, micro_batch_size: int | None) -> None:
    if method not in ("auto", "gram", "lanczos"):
        raise ValueError(f"method={method!r} must be 'auto', 'gram' or 'lanczos'")
    if method == "lanczos" and sketch is not None:
        raise ValueError(f"sketch={sketch} is a way to make the exact matrix smaller; method='lanczos' has none")
    if micro_batch_size is not None and (method == "gram" or sketch is not None):
        raise ValueError(f"micro_batch_size={micro_batch_size} is for 'lanczos'; the exact matrix needs all samples")
