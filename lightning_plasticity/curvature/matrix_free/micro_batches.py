"""A batch in pieces: micro-batches one after the other, and the shards that several processes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.problem import LossFunction, check_loss, full_precision, normal
from lightning_plasticity.distributed.agreement import is_distributed
from lightning_plasticity.isolation.batches import batch_size, concat_batches, micro_batches, to_device
from lightning_plasticity.isolation.state import probe_mode

_DISTANCE = 0.1
"""How far from the weights, relative to their size, the loss is looked at a second time."""


class MicroBatched(CurvatureLinearOperator):
    """A mean over the samples of a batch, of which only one piece has a graph at a time.

    Every product builds every graph anew: about twice the time, for a fraction of the memory.

    Args:
        model: The model.
        batch: The batch.
        loss_fn: The mean loss.
        parameters: The parameters that the rows and columns belong to.
        size: Number of samples in a piece.
        build: Makes the matrix of a piece.

    Raises:
        ValueError: If the batch cannot be taken apart, or its loss is not the mean of the pieces' losses.
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
        check_positive_ints(micro_batch_size=size)
        if batch_size(batch) is None:
            raise ValueError(f"micro_batch_size={size}: the batch holds no tensor that could be taken apart")
        pieces = list(micro_batches(batch, size))
        sizes = [batch_size(piece) or 0 for piece in pieces]
        super().__init__(parameters, _check_mean(model, loss_fn, batch, pieces, sizes, f"micro_batch_size={size}"))
        self._pieces = pieces
        self._shares = [own / sum(sizes) for own in sizes]
        self._build = build
        self.semidefinite = build(pieces[0]).semidefinite

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for share, piece in zip(self._shares, self._pieces, strict=True):
            result.add_(self._build(piece)(vector), alpha=share)
        return result


class AveragedOverRanks(CurvatureLinearOperator):
    """The mean over the samples of all processes, each of which has the matrix of its own samples.

    Args:
        product: The matrix of this process's samples.
        samples: Their number.
    """

    def __init__(self, product: CurvatureLinearOperator, samples: int) -> None:
        counts = torch.tensor([samples, samples * product.loss], dtype=torch.float64, device=product.device)
        dist.all_reduce(counts)
        super().__init__(product.parameters, (counts[1] / counts[0]).item())
        self.semidefinite = product.semidefinite
        self._product = product
        self._share = samples / counts[0].item()

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        result = self._product(vector) * self._share
        dist.all_reduce(result)
        return result


def sharded(
    build: Callable[[Any], CurvatureLinearOperator],
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction[Any],
    parameters: Sequence[nn.Parameter],
    *,
    micro_batch_size: int | None,
    distributed: bool,
) -> CurvatureLinearOperator:
    """The matrix of a batch, in micro-batches and over processes as asked for.

    Args:
        build: Makes the matrix of a batch.
        model: The model.
        batch: The batch of this process.
        loss_fn: The mean loss.
        parameters: The parameters that the rows and columns belong to.
        micro_batch_size: Number of samples whose graph is held at a time; ``None``: all.
        distributed: Whether the processes of a process group each hold a part of the batch.
    """

    def own() -> CurvatureLinearOperator:
        if micro_batch_size is None:
            return build(batch)
        return MicroBatched(model, batch, loss_fn, parameters, micro_batch_size, build)

    if not distributed or not is_distributed():
        return own()
    samples = batch_size(batch)
    if samples is None:
        raise ValueError("the batch holds no tensor to count the samples of this process by: pass distributed=False")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (samples, batch))
    next_samples, next_batch = everyone[(dist.get_rank() + 1) % len(everyone)]
    next_batch = to_device(next_batch, batch)

    def checked() -> CurvatureLinearOperator:
        # Each process with the next one: if two are a mean, all of them are.
        both = concat_batches([batch, next_batch])
        _check_mean(model, loss_fn, both, [batch, next_batch], [samples, next_samples], "distributed=True")
        return own()

    return AveragedOverRanks(_all_or_none(checked), samples)


def _all_or_none(work: Callable[[], CurvatureLinearOperator]) -> CurvatureLinearOperator:
    """The work of this process, unless it fails on any: the others would wait for ever."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    failed = {rank: message for rank, message in enumerate(everyone) if message is not None}
    if failed or result is None:
        raise RuntimeError(f"the curvature could not be measured on every process: {failed}")
    return result


def _check_mean(
    model: nn.Module,
    loss_fn: LossFunction[Any],
    batch: Any,
    pieces: Sequence[Any],
    sizes: Sequence[int],
    what: str,
) -> float:
    """The loss of a batch, checked to be the mean over the samples of its pieces.

    At other weights too: where a network gives every sample the same loss, any mean is right.
    """
    values = [
        [_loss_near(model, loss_fn, part, distance) for part in (batch, *pieces)] for distance in (0.0, _DISTANCE)
    ]
    for whole, *parts in values:
        mean = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        scale = sum(size * abs(part) for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        eps = torch.finfo(next(model.parameters()).dtype).eps
        if not abs(mean - whole) <= eps**0.5 * scale:
            raise ValueError(
                f"{what}: the loss of the samples together is {whole:.6g}, that of their parts {mean:.6g} on average, "
                "so it is no mean over samples (ignored targets, class weights, a sum, terms that couple samples?): "
                "pass a loss_fn that is, or the samples as one batch"
            )
    return values[0][0]


def _loss_near(model: nn.Module, loss_fn: LossFunction[Any], batch: Any, distance: float) -> float:
    """The loss some way away from the weights, relative to their size: the same way every time."""

    class Lossy(nn.Module):
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
        loss = functional_call(Lossy(), weights, (batch,))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        check_loss(loss)
    return float(loss.item())
