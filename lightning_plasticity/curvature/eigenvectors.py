"""Compute the eigenvectors of a curvature matrix that belong to the eigenvalues of largest absolute value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_choice, check_number, check_positive_ints, check_seed
from lightning_plasticity.curvature.double_backward import second_derivative_mode, twice_differentiable_loss
from lightning_plasticity.curvature.exact.loss_derivatives import LossDerivatives
from lightning_plasticity.curvature.exact.recording import Recording
from lightning_plasticity.curvature.matrix_free.eigenpairs import RestartedLanczos
from lightning_plasticity.curvature.matrix_free.linear_operators import (
    CurvatureLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from lightning_plasticity.curvature.matrix_free.micro_batches import operator_of_batch
from lightning_plasticity.curvature.problem import Batch, LossFunction, Progress, trainable_parameters
from lightning_plasticity.isolation.batches import batch_size


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    r"""Eigenpairs of a curvature matrix, by absolute value, descending.

    Args:
        values: Eigenvalues :math:`\lambda_i`, shape ``(k,)``, float64.
        vectors: Eigenvectors :math:`v_i` of length 1: for each one a tensor for each parameter, of its shape, by name.
        residuals: :math:`\lVert A v_i - \lambda_i v_i \rVert`, shape ``(k,)``, float64: an eigenvalue is within this
            distance of :math:`\lambda_i`.
        converged: Whether the residuals are within the tolerance and a search for larger eigenvalues found none.
        num_products: Number of matrix-vector products that were done.
    """

    values: Tensor
    vectors: tuple[dict[str, Tensor], ...]
    residuals: Tensor
    converged: bool
    num_products: int


def top_eigenvectors(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFunction[Batch],
    k: int,
    *,
    matrix: Literal["hessian", "ggn"] = "hessian",
    parameters: str | Collection[str] | None = None,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
    micro_batch_size: int | None = None,
    distributed: bool = True,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""Compute the ``k`` eigenvalues of largest absolute value of a curvature matrix, with their eigenvectors.

    The model is in evaluation mode. Lanczos with restarts takes memory for ``2 k + 20`` vectors of all parameters, and
    products that cost about two gradients of the batch each. It finds multiple eigenvalues, too.

    Args:
        model: Any module. It is not changed.
        batch: The batch for ``loss_fn``, of any type.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss over the samples, a scalar with a graph.
        k: Number of eigenpairs.
        matrix: ``"hessian"`` or ``"ggn"`` (Gauss-Newton).
        parameters: A name or pattern of parameters (``*`` and ``?`` are wildcards), or several, to select the block of
            the matrix that belongs to them. By default all parameters that require gradients.
        tolerance: Largest residual of a pair, relative to the largest absolute eigenvalue.
        max_products: Number of products after which to stop, whether the pairs have converged or not. ``k`` more give
            the residuals.
        seed: Seed of the start vectors.
        micro_batch_size: Number of samples with a graph at a time; ``None`` for all.
        distributed: Whether each process of a process group holds a part of the batch.
        progress: Called after each product with the number of products done and the largest number.

    Returns:
        The eigenpairs. If ``converged`` is false, ``residuals`` says how far each one is.

    Raises:
        DoubleBackwardError: If torch has no second derivative of an operation.
        NoGaussNewtonMatrixError: If ``matrix="ggn"`` and the loss has no convex Hessian with respect to the outputs.
        ValueError: If ``k`` exceeds the number of parameters or of products, the loss is not a finite scalar that
            depends on the parameters, the model has half precision, or an argument is invalid.

    Example:
        >>> import torch.nn.functional as F
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> pairs = top_eigenvectors(model, (x, y), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), 2)
        >>> [round(value, 6) for value in pairs.values.tolist()]  # of (2/n) xᵀx
        [4.0, 1.0]
        >>> pairs.vectors[0]["weight"].abs().round(decimals=4)
        tensor([[0., 1.]])
    """
    check_choice(("hessian", "ggn"), matrix=matrix)
    check_positive_ints(k=k, max_products=max_products)
    check_positive_ints(optional=True, micro_batch_size=micro_batch_size)
    check_number("(0, 1)", tolerance=tolerance)
    check_seed(seed)
    selected = trainable_parameters(model, parameters)
    num_parameters = sum(parameter.numel() for parameter in selected.values())
    if k > num_parameters:
        raise ValueError(f"k={k} is more than the {num_parameters} parameters: there are as many eigenvectors")
    if k > max_products:
        raise ValueError(f"max_products={max_products} must be at least k={k}, one product for each eigenvector")
    weights = list(selected.values())

    def build(part: Batch) -> CurvatureLinearOperator:
        if matrix == "hessian":
            with twice_differentiable_loss(model, part, loss_fn) as loss:
                return HessianLinearOperator(loss, weights)
        recording = Recording(model, {})
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        with twice_differentiable_loss(model, part, loss_fn, recording) as loss:
            hessian = LossDerivatives(loss, recording, names, batch_size(part)).hessian
            return GGNLinearOperator(loss, hessian, weights)

    with second_derivative_mode(model):
        operator = operator_of_batch(
            build, model, batch, loss_fn, weights, micro_batch_size=micro_batch_size, distributed=distributed
        )
        return _eigenpairs(operator, list(selected), k, tolerance, max_products, seed, progress)


def _eigenpairs(
    operator: CurvatureLinearOperator,
    names: list[str],
    k: int,
    tolerance: float,
    max_products: int,
    seed: int,
    progress: Progress | None,
) -> Eigenpairs:
    process, done = RestartedLanczos(operator, k, tolerance, seed), 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, max_products + k)

    while not process.finished and done < max_products:
        process.advance()
        report()
    values, vectors = process.pairs()
    residuals = []
    for value, vector in zip(values.tolist(), vectors, strict=True):
        residuals.append((operator(vector) - value * vector).norm().double().cpu())
        report()
    residual = torch.stack(residuals)
    return Eigenpairs(
        values,
        tuple(dict(zip(names, operator.split(vector), strict=True)) for vector in vectors),
        residual,
        process.finished and bool((residual <= tolerance * values[0].abs()).all()),
        done,
    )
