"""Run a function in another process, or on two ranks with gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version

WORLD = 2


def skip_without_fsdp_on_the_cpu() -> None:
    """Skip the test on torch 2.6, whose ``fully_shard`` records events on streams, which CPU streams lack."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of torch {torch.__version__} does not run on a CPU")


def in_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """Return ``function(rank)`` of each of two ranks; the function must be picklable."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run_rank, args=(function, folder), nprocs=WORLD, join=True)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(WORLD)]


def _run_rank(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    # Before torch 2.8, the destructor of a process group waits for its threads and holds the interpreter lock, which
    # they may need to end (pytorch #154976). The backend's own destructor releases the lock first, so the backend must
    # go last. Later releases abort one process in ten at its end with this reference, so they go without.
    is_old = Version(torch.__version__) < Version("2.8")
    _backend = dist.group.WORLD._get_backend(torch.device("cpu")) if is_old else None
    try:
        torch.save(function(rank), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()


def fork_server() -> ForkServerContext:
    """Return a context whose processes start with all imports done, since these take longer than a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed_run"])
    return context


def in_another_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a picklable function in a new process, with one thread."""
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    # The process has its own end of the pipe. With this one closed, recv() raises if the process dies.
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))
