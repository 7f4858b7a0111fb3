"""The spectra of the Hessian and of the Gauss-Newton matrix from products alone, for models of any kind and size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from lightning_plasticity.curvature.double_backward import (
    composed_weight_norm,
    double_backward_ready,
    explained_errors,
)
from lightning_plasticity.curvature.gram import Batch, LossFunction, check_loss, trainable_parameters
from lightning_plasticity.curvature.lanczos import Progress, Reorthogonalization, lanczos_spectrum
from lightning_plasticity.curvature.outputs import outputs_of
from lightning_plasticity.curvature.products import GaussNewtonProduct, HessianProduct
from lightning_plasticity.curvature.recording import Recording
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.isolation import probing


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
            ``"full"``, and cheaper), ``"full"``, or ``"none"`` (see :func:`~lightning_plasticity.curvature.lanczos`).
        deflate: Whether what each start vector finds lowers the sampling error of the next, from three of them on and
            at no further products: much where few eigenvalues stand out, as in a collapsed network, little where the
            rank is large.
        backend: ``"native"``, or ``"pyhessian"`` for the algorithms of PyHessian, whose flaws
            :func:`~lightning_plasticity.curvature.pyhessian.pyhessian_spectrum` tells of; it takes no ``parameters``.
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
    if backend == "pyhessian":
        if parameters is not None:
            raise ValueError(f"parameters={parameters!r}: PyHessian knows only all parameters; use backend='native'")
        from lightning_plasticity.curvature.pyhessian import pyhessian_spectrum  # imports PyHessian

        return pyhessian_spectrum(
            model, batch, loss_fn, num_probes=num_probes, num_steps=num_steps, seed=seed, progress=progress
        )
    with _graph(model, batch, loss_fn) as loss:
        product = HessianProduct(loss, _selected(model, parameters))
    return lanczos_spectrum(
        product,
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        reorthogonalization=reorthogonalization,
        deflate=deflate,
        progress=progress,
    )


def ggn_spectrum_by_lanczos(
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
    progress: Progress | None = None,
) -> Spectrum:
    """Estimate of the spectrum of the Gauss-Newton matrix, for batches too large for the exact Gram matrix.

    Arguments are those of :func:`hessian_spectrum`; losses those of
    :func:`~lightning_plasticity.curvature.ggn_spectrum`, which is exact and knows the tangent kernel.

    Raises:
        UnsupportedModelError: If the curvature of the loss by the network's outputs is not known.
        ValueError: As :func:`hessian_spectrum`.
    """
    selected = _selected(model, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    recording = Recording({})
    with _graph(model, batch, loss_fn, recording) as loss:
        product = GaussNewtonProduct(outputs_of(loss, recording.loss_calls, names), selected)
    return lanczos_spectrum(
        product,
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        reorthogonalization=reorthogonalization,
        deflate=deflate,
        progress=progress,
    )


@contextlib.contextmanager
def _graph(
    model: nn.Module, batch: Batch, loss_fn: LossFunction[Batch], recording: Recording | None = None
) -> Iterator[Tensor]:
    """The loss, with a graph that can be differentiated twice as long as it is kept."""
    with probing(model), explained_errors():
        with double_backward_ready(model), composed_weight_norm(), recording or contextlib.nullcontext():
            loss = loss_fn(model, batch)
        check_loss(loss)
        yield loss


def _selected(model: nn.Module, pattern: str | None) -> list[nn.Parameter]:
    parameters = trainable_parameters(model)
    if pattern is None:
        return list(parameters.values())
    matching = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
    if not matching:
        raise ValueError(f"parameters={pattern!r} matches none of the trainable parameters {list(parameters)}")
    return matching
