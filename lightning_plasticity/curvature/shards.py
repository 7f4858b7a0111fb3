"""A batch in pieces: micro-batches one after the other, and the shards that several processes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.curvature.batches import batch_size, concatenated, micro_batches
from lightning_plasticity.curvature.problem import LossFunction, check_counts
from lightning_plasticity.curvature.products import CurvatureProduct
from lightning_plasticity.isolation import probing


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(batch: Any) -> Any:
    """The samples of all processes, in the order of their ranks."""
    batches: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(batches, batch)
    batches[dist.get_rank()] = batch
    return concatenated(batches, like=batch)


class MicroBatched(CurvatureProduct):
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
        ValueError: If the loss of the batch is not the mean of the pieces' losses.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFunction[Any],
        parameters: Sequence[nn.Parameter],
        size: int,
        build: Callable[[Any], CurvatureProduct],
    ) -> None:
        check_counts(micro_batch_size=size)
        with probing(model), torch.no_grad():
            self.loss = loss_fn(model, batch).item()
        super().__init__(parameters, self.loss)
        self._pieces = list(micro_batches(batch, size))
        sizes = [batch_size(piece) or 0 for piece in self._pieces]
        self._shares = [own / sum(sizes) for own in sizes]
        self._build = build
        losses = []
        for piece in self._pieces:
            product = build(piece)
            self.semidefinite = product.semidefinite
            losses.append(product.loss)
        mean = sum(share * loss for share, loss in zip(self._shares, losses, strict=True))
        scale = sum(share * abs(loss) for share, loss in zip(self._shares, losses, strict=True))
        if not abs(mean - self.loss) <= torch.finfo(self.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"micro_batch_size={size}: the loss of the whole batch is {self.loss:.6g}, that of its micro-batches "
                f"{mean:.6g} on average, so it is no mean over samples (ignored targets, class weights, terms that "
                "couple samples?): pass a loss_fn that is, or no micro_batch_size"
            )

    @override
    def __call__(self, vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector)
        for share, piece in zip(self._shares, self._pieces, strict=True):
            result.add_(self._build(piece)(vector), alpha=share)
        return result


class AveragedOverRanks(CurvatureProduct):
    """The mean over the samples of all processes, each of which has the matrix of its own samples.

    Args:
        product: The matrix of this process's samples.
        samples: Their number.
    """

    def __init__(self, product: CurvatureProduct, samples: int) -> None:
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
    build: Callable[[Any], CurvatureProduct],
    model: nn.Module,
    batch: Any,
    loss_fn: LossFunction[Any],
    parameters: Sequence[nn.Parameter],
    *,
    micro_batch_size: int | None,
    distributed: bool,
) -> CurvatureProduct:
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
    if micro_batch_size is None:
        product = build(batch)
    else:
        product = MicroBatched(model, batch, loss_fn, parameters, micro_batch_size, build)
    if not distributed or not is_distributed():
        return product
    samples = batch_size(batch)
    if samples is None:
        raise ValueError("the batch holds no tensor to count the samples of this process by: pass distributed=False")
    return AveragedOverRanks(product, samples)
