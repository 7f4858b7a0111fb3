"""Processes that train together decide together."""

from __future__ import annotations

import contextlib
import pickle
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_plasticity.isolation.batches import concat_batches

_together: ContextVar[bool] = ContextVar("together", default=False)


class PeerFailedError(RuntimeError):
    """What processes were doing together has failed in one of them; the cause is the error of this one, if it has any.

    Processes that have this error have it at the same point, with the same words.
    """


class CommunicationError(BaseException):
    """Whether the others have failed is not known, so that weights may differ from here on: nothing to be survived."""


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather_object(value: Any) -> list[Any]:
    """What each of the processes that train together has, in the order of their ranks."""
    if not is_distributed():
        return [value]
    packed = pickle.dumps(value)  # what cannot be sent is found out before the others wait for it
    sync_errors(at="an exchange")
    own = torch.distributed.get_rank()
    return [value if rank == own else pickle.loads(theirs) for rank, theirs in enumerate(_all_gather(packed))]


def all_gather_batch(batch: Any) -> Any:
    """One batch of the samples of all processes."""
    return concat_batches(all_gather_object(batch), like=batch)


def broadcast_object(value: Any) -> Any:
    """What the first of the processes that train together has."""
    if not is_distributed():
        return value
    is_first = torch.distributed.get_rank() == 0
    packed = [pickle.dumps(value) if is_first else b""]
    sync_errors(at="what the first has")
    with fatal_if_unreachable():
        torch.distributed.broadcast_object_list(packed, 0)
    return value if is_first else pickle.loads(packed[0])


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What is done inside is done by all processes that train together, or fails in all of them.

    An error in one is a :class:`PeerFailedError` in each. The others have it where they next :func:`sync_errors`: at a
    sum over processes, which the one that has failed will not come to; before changes of the model become final; or at
    the end. In a single process, errors are what they are.
    """
    if _together.get() or not is_distributed():
        yield
        return
    token = _together.set(True)
    try:
        yield
        sync_errors(at="the end")
    except PeerFailedError:
        raise
    except Exception as error:
        sync_errors(error)
        raise
    finally:
        _together.reset(token)


def sync_errors(error: Exception | None = None, at: str = "the next point of agreement") -> None:
    """Inside of :func:`all_or_none`: all processes have come to the next point of agreement, or one to its end.

    Args:
        error: What has ended it in this process.
        at: Which point this is.

    Raises:
        PeerFailedError: If it has ended in one of them, with the words of the first that it has; or if they have
            come to different points, as where a model takes another path in each, and would wait for each other.
        LostProcessesError: If this cannot be known.
    """
    if not _together.get():
        return
    point = zlib.crc32(at.encode())
    with fatal_if_unreachable():
        device = backend_device(torch.device("cpu"), torch.distributed.get_backend())
        most = torch.tensor([error is not None, point, -point], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        failed, last, first = most.tolist()
    if not failed and last == -first:
        return
    if not failed:
        raise PeerFailedError(f"the processes do not do the same, but come to {' and '.join(_all_gather(at))}")
    errors = _all_gather(None if error is None else format_error(error))
    rank, words = next((rank, words) for rank, words in enumerate(errors) if words is not None)
    raise PeerFailedError(f"in process {rank}: {words}" if rank else words) from error


def local_error(error: Exception) -> BaseException:
    """The error of this process, where it has one of its own; else what it has heard of the others'."""
    own = error.__cause__ if isinstance(error, PeerFailedError) else None
    return own or error


def raise_local_error(error: Exception) -> NoReturn:
    """Raises :func:`local_error`."""
    raise local_error(error)


def format_error(error: Exception | str) -> str:
    """An error in words: also one without a message, such as a MemoryError, and with the cause that another hides."""
    if isinstance(error, str | PeerFailedError):
        return str(error)
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    cause = error.__cause__
    return words if not isinstance(cause, Exception) or str(cause) in words else f"{words} ({format_error(cause)})"


def all_reduce_sum(value: Tensor, of: str = "") -> Tensor:
    """The sum of a tensor over the processes of ``torch.distributed``; the tensor itself if there is one only.

    Every process must ask at the same point. What is decided from it is then the same everywhere.

    Args:
        value: The tensor.
        of: What is summed up, such as the name of a layer: the same in every process.
    """
    if not is_distributed():
        return value
    total = value.to(backend_device(value.device, torch.distributed.get_backend()), copy=True)
    sync_errors(at=f"a sum of {of or 'tensors'} of shape {tuple(value.shape)}")
    with fatal_if_unreachable():
        torch.distributed.all_reduce(total)
    return total.to(value.device)


def backend_device(device: torch.device, backend: str) -> torch.device:
    """Where a tensor of this device must be to be sent: NCCL knows nothing but what is on the GPU of the process."""
    return torch.device("cuda") if backend == "nccl" and device.type != "cuda" else device


def _all_gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    with fatal_if_unreachable():
        torch.distributed.all_gather_object(values, value)
    values[torch.distributed.get_rank()] = value
    return values


@contextlib.contextmanager
def fatal_if_unreachable() -> Iterator[None]:
    """Inside of :func:`all_or_none`, an error in what processes exchange is none that they could agree on."""
    try:
        yield
    except Exception as error:
        if not _together.get():
            raise
        raise CommunicationError(f"processes that train together cannot reach each other: {error}") from error


def all_reduce_mean(value: Tensor, of: str = "") -> Tensor:
    """As :func:`all_reduce_sum`, the mean."""
    total = all_reduce_sum(value, of)
    return total if total is value else total / torch.distributed.get_world_size()
