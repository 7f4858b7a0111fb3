"""The spectrum of the Hessian from products alone, for models of any kind and size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.double_backward import second_derivatives, twice_differentiable_loss
from lightning_plasticity.curvature.matrix_free.lanczos import Reorthogonalization, check_lanczos, lanczos_spectrum
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator, HessianLinearOperator
from lightning_plasticity.curvature.matrix_free.micro_batches import sharded
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
    parameters: str | None = None,
    reorthogonalization: Reorthogonalization = "partial",
    deflate: bool = True,
    micro_batch_size: int | None = None,
    distributed: bool = True,
    backend: Literal["native", "pyhessian"] = "native",
    progress: Progress | None = None,
) -> Spectrum:
    r"""Estimate of the spectrum of the Hessian :math:`\nabla^2_\theta L`, by stochastic Lanczos quadrature.

    The Hessian is taken at the parameters that require gradients, with the model in evaluation mode. It costs
    ``num_probes * num_steps`` products, each about 1.4 to 2 gradients of the batch.

    Args:
        model: Any module. Nothing in it is changed.
        batch: Whatever ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each. The more, the smaller the eigenvalues that are resolved.
        seed: Seed of the start vectors.
        parameters: Only the parameters whose name matches this pattern (``*`` and ``?`` are wildcards): the block of
            the Hessian that belongs to them.
        reorthogonalization: How much is done to keep the Lanczos vectors orthogonal: ``"partial"`` (as right as
            ``"full"``, and cheaper), ``"full"``, or ``"none"`` (see
            :func:`~lightning_plasticity.curvature.matrix_free.lanczos.lanczos`).
        deflate: Whether what each start vector finds lowers the sampling error of the next, from three of them on and
            at no further products: much where few eigenvalues stand out, as in a collapsed network, little where the
            rank is large.
        micro_batch_size: Number of samples whose graph is held at a time. Each product then builds the graphs anew:
            about twice the time, for less memory. By default one graph of all samples is kept.
        distributed: Under a process group of several processes, whether each holds a part of the batch. The answer is
            that for all samples together, on every process; all of them have to ask. ``False``: this process's samples.
        backend: ``"native"``, or ``"pyhessian"`` for the algorithms of PyHessian, whose flaws
            :func:`~lightning_plasticity.curvature.pyhessian.pyhessian_spectrum` tells of. It takes neither
            ``parameters`` nor parts of a batch.
        progress: Called with the number of products done and the number of all of them.

    Returns:
        The estimate. Its ε-ranks carry a bracket and ``resolved``: ask them.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation. Some it has are wrong:
            :func:`~lightning_plasticity.curvature.double_backward.check_double_backward` tells.
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
    if backend not in ("native", "pyhessian"):
        raise ValueError(f"backend={backend!r} must be 'native' or 'pyhessian'")
    check_lanczos(num_probes, num_steps, seed, reorthogonalization)
    check_positive_ints(optional=True, micro_batch_size=micro_batch_size)
    selected = list(trainable_parameters(model, parameters).values())
    if backend == "pyhessian":
        _check_pyhessian_can(parameters, micro_batch_size, distributed=distributed)
        from lightning_plasticity.curvature.pyhessian import pyhessian_spectrum  # imports PyHessian

        return pyhessian_spectrum(
            model, batch, loss_fn, num_probes=num_probes, num_steps=num_steps, seed=seed, progress=progress
        )

    def build(part: Batch) -> CurvatureLinearOperator:
        with twice_differentiable_loss(model, part, loss_fn) as loss:
            return HessianLinearOperator(loss, selected)

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


def _check_pyhessian_can(parameters: str | None, micro_batch_size: int | None, *, distributed: bool) -> None:
    asked = [
        f"parameters={parameters!r}" if parameters is not None else "",
        f"micro_batch_size={micro_batch_size}" if micro_batch_size is not None else "",
        "distributed=True" if distributed and is_distributed() else "",
    ]
    if any(asked):
        raise ValueError(
            f"{', '.join(filter(None, asked))}: PyHessian knows only all parameters and the batch as a whole; use "
            "backend='native'"
        )
