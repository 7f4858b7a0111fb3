"""Running a function in another process, or in two that talk by gloo."""

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
    """Of torch 2.6, ``fully_shard`` needs a GPU: it records events on streams, which those of the CPU do not know."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of torch {torch.__version__} does not run on a CPU")


def in_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """What ``function(rank)``, a function of a module, returns in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(function, folder), nprocs=WORLD, join=True)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(WORLD)]


def _work(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    # Before torch 2.8 a process group waits for its threads with the interpreter lock in hand, which they may need to
    # end (pytorch #154976). Its backend does so without the lock: whose last reference is this one. With it, later
    # releases abort every tenth process at its end.
    old = Version(torch.__version__) < Version("2.8")
    _backend = dist.group.WORLD._get_backend(torch.device("cpu")) if old else None
    try:
        torch.save(function(rank), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()


def fork_server() -> ForkServerContext:
    """Makes processes that have imported everything already, which takes the time of a test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.killed_run"])
    return context


def in_another_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, with one thread."""
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()  # the other process has its own: if it dies, nothing can come any more
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))
