"""Exchange values between ranks, and raise an error on all ranks when one of them fails."""

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

_inside_all_or_none: ContextVar[bool] = ContextVar("inside_all_or_none", default=False)


class PeerFailedError(RuntimeError):
    """Failure of the block of :func:`all_or_none` on at least one rank.

    All ranks raise it at the same point and with the same message. Its cause is the local error, if this rank failed.
    """


class CommunicationError(BaseException):
    """Failure of a collective inside :func:`all_or_none`.

    Not recoverable: it is unknown whether another rank failed, so weights may have diverged. It is not an
    ``Exception``, so that handlers that let training go on do not catch it.
    """


def is_distributed() -> bool:
    """Return whether there is a process group of more than one rank."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Run the block on all ranks, or raise on all ranks.

    An error on one rank is a :class:`PeerFailedError` on each. The other ranks raise it at their next
    :func:`sync_errors`: at a collective, which the failed rank does not reach; before changes of the model become
    final; or at the end of the block. Without a process group, errors pass unchanged. An inner block joins the
    outermost one.
    """
    if _inside_all_or_none.get() or not is_distributed():
        yield
        return
    token = _inside_all_or_none.set(True)
    try:
        yield
        sync_errors(point="the end")
    except PeerFailedError:
        raise
    except Exception as error:
        sync_errors(error)
        raise
    finally:
        _inside_all_or_none.reset(token)


def sync_errors(error: Exception | None = None, point: str = "the next synchronisation point") -> None:
    """Wait for all ranks inside :func:`all_or_none`, and raise if one has failed. Do nothing outside of it.

    Args:
        error: The error that ended the block on this rank.
        point: Name of the synchronisation point.

    Raises:
        PeerFailedError: If the block has failed on a rank, with the message of the lowest such rank; or if ranks are
            at different points, as when a model takes another path on each, and would wait for each other forever.
        CommunicationError: If ranks cannot reach each other.
    """
    if not _inside_all_or_none.get():
        return
    checksum = zlib.crc32(point.encode())
    with fatal_if_unreachable():
        device = backend_device(torch.device("cpu"), torch.distributed.get_backend())
        # The maximum over ranks shows in one reduction whether any failed and whether all checksums are equal.
        status = torch.tensor([error is not None, checksum, -checksum], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX)
        any_failed, largest, negated_smallest = status.tolist()
    if any_failed:
        messages = _all_gather(None if error is None else format_error(error))
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise PeerFailedError(f"on rank {rank}: {message}" if rank else message) from error
    if largest != -negated_smallest:
        raise PeerFailedError(f"ranks reached different synchronisation points: {' and '.join(_all_gather(point))}")


@contextlib.contextmanager
def fatal_if_unreachable() -> Iterator[None]:
    """Raise a :class:`CommunicationError` for an error in a collective inside :func:`all_or_none`.

    Ranks cannot agree on such an error, since they would need a collective to do so.
    """
    try:
        yield
    except Exception as error:
        if not _inside_all_or_none.get():
            raise
        raise CommunicationError(f"ranks cannot reach each other: {error}") from error


def local_error(error: Exception) -> BaseException:
    """Return the error that this rank raised itself, or ``error`` if only other ranks failed."""
    cause = error.__cause__ if isinstance(error, PeerFailedError) else None
    return cause or error


def raise_local_error(error: Exception) -> NoReturn:
    """Raise :func:`local_error`."""
    raise local_error(error)


def format_error(error: Exception | str) -> str:
    """Return the type and message of an error, and its cause unless the message holds it.

    An error without a message, such as a ``MemoryError``, is represented by its type.
    """
    if isinstance(error, str | PeerFailedError):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    cause = error.__cause__
    return text if not isinstance(cause, Exception) or str(cause) in text else f"{text} ({format_error(cause)})"


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order."""
    if not is_distributed():
        return [value]
    # Pickle first: on an error, this rank must not leave the others waiting for its value.
    pickled = pickle.dumps(value)
    sync_errors(point="a gather of objects")
    local_rank = torch.distributed.get_rank()
    return [value if rank == local_rank else pickle.loads(data) for rank, data in enumerate(_all_gather(pickled))]


def all_gather_batch(batch: Any) -> Any:
    """Return one batch with the samples of all ranks."""
    return concat_batches(all_gather_object(batch), like=batch)


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0."""
    if not is_distributed():
        return value
    is_source = torch.distributed.get_rank() == 0
    pickled = [pickle.dumps(value) if is_source else b""]
    sync_errors(point="a broadcast of an object")
    with fatal_if_unreachable():
        torch.distributed.broadcast_object_list(pickled, 0)
    return value if is_source else pickle.loads(pickled[0])


def all_reduce_sum(value: Tensor, name: str = "") -> Tensor:
    """Return the sum of a tensor over ranks, or the tensor itself without a process group.

    All ranks must call it at the same point. A decision that depends on the result is the same on all of them.

    Args:
        value: The tensor.
        name: Name of the summands, such as that of a layer, for errors; the same on all ranks.
    """
    if not is_distributed():
        return value
    total = value.to(backend_device(value.device, torch.distributed.get_backend()), copy=True)
    sync_errors(point=f"a sum of {name or 'tensors'} of shape {tuple(value.shape)}")
    with fatal_if_unreachable():
        torch.distributed.all_reduce(total)
    return total.to(value.device)


def all_reduce_mean(value: Tensor, name: str = "") -> Tensor:
    """Return the mean of a tensor over ranks, or the tensor itself without a process group.

    The arguments are those of :func:`all_reduce_sum`.
    """
    total = all_reduce_sum(value, name)
    return total if total is value else total / torch.distributed.get_world_size()


def backend_device(device: torch.device, backend: str) -> torch.device:
    """Return the device that the backend sends a tensor of this device from: NCCL only sends from GPUs."""
    return torch.device("cuda") if backend == "nccl" and device.type != "cuda" else device


def _all_gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * torch.distributed.get_world_size()
    with fatal_if_unreachable():
        torch.distributed.all_gather_object(values, value)
    values[torch.distributed.get_rank()] = value
    return values
