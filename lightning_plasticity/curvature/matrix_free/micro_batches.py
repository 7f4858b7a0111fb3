"""Build the linear operator of a batch in micro-batches or over the samples of several processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.problem import LossFunction, check_loss, full_precision, normal
from lightning_plasticity.distributed.agreement import is_distributed
from lightning_plasticity.isolation.batches import batch_size, concat_batches, micro_batches, to_device
from lightning_plasticity.isolation.state import probe_mode

_DISTANCE = 0.1
"""Distance from the weights, relative to their size, of the second point where the loss is checked to be a mean."""


class MicroBatched(CurvatureLinearOperator):
    """The mean of an operator over the micro-batches of a batch, with the graph of one micro-batch at a time.

    Every product builds every graph anew: about twice the time, for a fraction of the memory.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: Computes the mean loss.
        parameters: The parameters of the rows and columns.
        size: Number of samples in a micro-batch.
        build: Builds the operator of a micro-batch.

    Raises:
        ValueError: If the batch cannot be split, or its loss is not the mean of the losses of its micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFunction[Any],
        parameters: Sequence[nn.Parameter],
        size: int,
        build: Callable[[Any], CurvatureLinearOperator],
    ) -> None:
        if batch_size(batch) is None:
            raise ValueError(f"micro_batch_size={size}: the batch holds no tensor that could be taken apart")
        pieces = list(micro_batches(batch, size))
        sizes = [batch_size(piece) or 0 for piece in pieces]
        super().__init__(parameters, _check_mean(model, loss_fn, batch, pieces, sizes, f"micro_batch_size={size}"))
        self._pieces = pieces
        self._weights = [piece_size / sum(sizes) for piece_size in sizes]
        self._build = build
        self.semidefinite = build(pieces[0]).semidefinite

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for weight, piece in zip(self._weights, self._pieces, strict=True):
            result.add_(self._build(piece)(vector), alpha=weight)
        return result


class AveragedOverRanks(CurvatureLinearOperator):
    """The mean of an operator over the samples of all processes, each of which has the operator of its own samples.

    Args:
        operator: The operator of the samples of this process.
        num_samples: Number of samples of this process.
    """

    def __init__(self, operator: CurvatureLinearOperator, num_samples: int) -> None:
        sums = torch.tensor([num_samples, num_samples * operator.loss], dtype=torch.float64, device=operator.device)
        dist.all_reduce(sums)
        super().__init__(operator.parameters, (sums[1] / sums[0]).item())
        self.semidefinite = operator.semidefinite
        self._operator = operator
        self._weight = num_samples / sums[0].item()

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        result = self._operator(vector) * self._weight
        dist.all_reduce(result)
        return result


def operator_of_batch(
    build: Callable[[Any], CurvatureLinearOperator],
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction[Any],
    parameters: Sequence[nn.Parameter],
    *,
    micro_batch_size: int | None,
    distributed: bool,
) -> CurvatureLinearOperator:
    """Build the operator of a batch, in micro-batches and averaged over processes as requested.

    Args:
        build: Builds the operator of a batch.
        model: The model.
        batch: The batch of this process.
        loss_fn: Computes the mean loss.
        parameters: The parameters of the rows and columns.
        micro_batch_size: Number of samples with a graph at a time; ``None`` for all.
        distributed: Whether each process of a process group holds a part of the batch.

    Raises:
        ValueError: If the batch cannot be split, or the loss is not a mean over samples.
        RuntimeError: If the operator could be built on this process, but not on all of them.
    """

    def local_operator() -> CurvatureLinearOperator:
        if micro_batch_size is None:
            return build(batch)
        return MicroBatched(model, batch, loss_fn, parameters, micro_batch_size, build)

    if not distributed or not is_distributed():
        return local_operator()
    num_samples = batch_size(batch)
    if num_samples is None:
        raise ValueError("the batch holds no tensor to count the samples of this process by: pass distributed=False")
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (num_samples, batch))
    next_num_samples, next_batch = gathered[(dist.get_rank() + 1) % len(gathered)]
    next_batch = to_device(next_batch, batch)

    def checked_operator() -> CurvatureLinearOperator:
        # Each process checks its samples together with those of the next one. If every such pair is a mean, the loss of
        # all samples is a mean too.
        both = concat_batches([batch, next_batch])
        _check_mean(model, loss_fn, both, [batch, next_batch], [num_samples, next_num_samples], "distributed=True")
        return local_operator()

    return AveragedOverRanks(_build_on_all_ranks(checked_operator), num_samples)


def _build_on_all_ranks(build: Callable[[], CurvatureLinearOperator]) -> CurvatureLinearOperator:
    """Build the operator of this process, or raise on all processes if one of them fails.

    Otherwise the others would wait for it in the next collective operation, without end.
    """
    operator, local_error = None, None
    try:
        operator = build()
    except Exception as error:
        local_error = error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if local_error is None else str(local_error))
    if local_error is not None:
        raise local_error
    failed = {rank: message for rank, message in enumerate(messages) if message is not None}
    if failed or operator is None:
        raise RuntimeError(f"the curvature could not be measured on every process: {failed}")
    return operator


def _check_mean(
    model: nn.Module,
    loss_fn: LossFunction[Any],
    batch: Any,
    pieces: Sequence[Any],
    sizes: Sequence[int],
    option: str,
) -> float:
    """Check that the loss of a batch is the mean over the samples of its pieces, and return it.

    The check runs at the weights and at a second point. A network that gives every sample the same loss, such as one
    with a zero output layer, satisfies any weighted mean.

    Args:
        model: The model.
        loss_fn: Computes the mean loss.
        batch: The batch.
        pieces: The batch in pieces.
        sizes: Number of samples in each piece.
        option: The option that splits the batch, for the error message.

    Raises:
        ValueError: If it is not the mean.
    """
    losses = [[_loss_near(model, loss_fn, part, distance) for part in (batch, *pieces)] for distance in (0, _DISTANCE)]
    for whole, *parts in losses:
        mean = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        scale = sum(size * abs(part) for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        eps = torch.finfo(next(model.parameters()).dtype).eps
        if not abs(mean - whole) <= eps**0.5 * scale:
            raise ValueError(
                f"{option}: the loss of the samples together is {whole:.6g}, that of their parts {mean:.6g} on "
                "average, so it is no mean over samples (ignored targets, class weights, a sum, terms that couple "
                "samples?): pass a loss_fn that is, or the samples as one batch"
            )
    return losses[0][0]


def _loss_near(model: nn.Module, loss_fn: LossFunction[Any], batch: Any, distance: float) -> float:
    """Compute the loss at a distance from the weights, relative to their size, along a fixed random direction."""

    class LossModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return loss_fn(self.model, batch)

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = normal(parameter.shape, parameter, generator)
        size = parameter.detach().square().mean().sqrt() if parameter.numel() else parameter.detach().sum()
        weights[f"model.{name}"] = parameter.detach() + distance * torch.where(size > 0, size, 1) * noise
    with probe_mode(model), full_precision(), torch.no_grad():
        loss = functional_call(LossModule(), weights, (batch,))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        check_loss(loss)
    return float(loss.item())
