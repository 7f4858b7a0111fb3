"""Estimate the spectrum of the Hessian from matrix-vector products."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import nn

from lightning_plasticity._validation import check_choice
from lightning_plasticity.curvature.double_backward import twice_differentiable_loss
from lightning_plasticity.curvature.matrix_free.lanczos import Reorthogonalization
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator, HessianLinearOperator
from lightning_plasticity.curvature.matrix_free.stochastic_lanczos import LanczosOptions, estimate_spectrum
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress, trainable_parameters
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.distributed.agreement import is_distributed


def hessian_spectrum(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    seed: int = 0,
    parameters: str | Collection[str] | None = None,
    reorthogonalization: Reorthogonalization = "partial",
    deflate: bool = True,
    micro_batch_size: int | None = None,
    distributed: bool = True,
    backend: Literal["native", "pyhessian"] = "native",
    progress: Progress | None = None,
) -> Spectrum:
    r"""Estimate the spectrum of the Hessian :math:`\nabla^2_\theta L` by stochastic Lanczos quadrature.

    :math:`\theta` are the parameters that require gradients. The model is in evaluation mode. The estimate costs
    ``num_probes * num_steps`` products, each about 1.4 to 2 gradients of the batch.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Number of Lanczos steps for each start vector. More steps resolve smaller eigenvalues.
        seed: Seed of the start vectors.
        parameters: A name or pattern of parameters (``*`` and ``?`` are wildcards), or several, to select the block of
            the Hessian that belongs to them.
        reorthogonalization: How to keep the Lanczos vectors orthogonal: ``"partial"`` (as accurate as ``"full"``, and
            cheaper), ``"full"``, or ``"none"`` (see
            :func:`~lightning_plasticity.curvature.matrix_free.lanczos.lanczos`).
        deflate: Whether the Ritz vectors of each run reduce the sampling error of the next, from three start vectors on
            and without further products. The gain is large if few eigenvalues stand out, as in a collapsed network, and
            small if the rank is large.
        micro_batch_size: Number of samples with a graph at a time. Each product then builds the graphs anew: about
            twice the time, for less memory. By default one graph of all samples is kept.
        distributed: Whether each process of a process group holds a part of the batch. Every process must then call
            this function, and gets the spectrum for all samples. With ``False`` it is that of its own samples.
        backend: ``"native"``, or ``"pyhessian"`` for the algorithms of PyHessian, whose limits
            :func:`~lightning_plasticity.curvature.pyhessian.pyhessian_spectrum` describes. It supports neither
            ``parameters`` nor parts of a batch.
        progress: Called after each product with the number of products done and the total.

    Returns:
        The estimate. Its ε-ranks have a bracket and the property ``resolved``.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation. For operations with a wrong one see
            :func:`~lightning_plasticity.curvature.double_backward.check_double_backward`.
        ValueError: If the loss is not a finite scalar that depends on the parameters, the model has half precision, a
            number is not positive or the pattern matches nothing.

    References:
        Ghorbani et al. 2019, arXiv 1901.10159.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> model = nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
        >>> spectrum = hessian_spectrum(model, (x, y), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))
        >>> [round(value, 6) for value in spectrum.top(2).tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
    """
    check_choice(("native", "pyhessian"), backend=backend)
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
    selected = list(trainable_parameters(model, parameters).values())
    if backend == "pyhessian":
        _check_pyhessian_supports(parameters, micro_batch_size, distributed=distributed)
        # PyHessian is imported only if it is used.
        from lightning_plasticity.curvature.pyhessian import pyhessian_spectrum

        return pyhessian_spectrum(
            model, batch, loss_fn, num_probes=num_probes, num_steps=num_steps, seed=seed, progress=progress
        )

    def build(part: Batch) -> CurvatureLinearOperator:
        with twice_differentiable_loss(model, part, loss_fn) as loss:
            return HessianLinearOperator(loss, selected)

    return estimate_spectrum(build, model, batch, loss_fn, selected, options)


def _check_pyhessian_supports(
    parameters: str | Collection[str] | None, micro_batch_size: int | None, *, distributed: bool
) -> None:
    unsupported = [
        f"parameters={parameters!r}" if parameters is not None else "",
        f"micro_batch_size={micro_batch_size}" if micro_batch_size is not None else "",
        "distributed=True" if distributed and is_distributed() else "",
    ]
    if any(unsupported):
        raise ValueError(
            f"{', '.join(filter(None, unsupported))}: PyHessian supports only all parameters and the batch as a whole; "
            "use backend='native'"
        )
