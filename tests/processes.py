"""Running a function in two processes that talk by gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def in_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """What ``function(rank)``, a function of a module, returns in each of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, args=(function, folder), nprocs=WORLD, join=True)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(WORLD)]


def _work(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        torch.save(function(rank), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()
