"""Measure contenders by process CPU time, alternating in one process."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each contender; every round runs all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, contender in contenders.items():
            start = time.process_time()
            contender()
            if number >= warmup:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def take_turns(contenders: Mapping[str, Callable[[Callable[[], None]], object]]) -> dict[str, float]:
    """Return the seconds of each contender, where all alternate many times during their runs.

    Whatever slows the machine down for a while then slows all of them.

    Args:
        contenders: Functions that run in threads, one at a time. Each receives a function, and hands over to the next
            contender by calling it.
    """
    turn = {name: threading.Semaphore(0) for name in contenders}
    waiting = deque(contenders)
    seconds = dict.fromkeys(contenders, 0.0)
    started = 0.0

    def begin_next() -> None:
        nonlocal started
        if waiting:
            started = time.process_time()
            turn[waiting.popleft()].release()

    def hand_over(name: str) -> None:
        seconds[name] += time.process_time() - started
        waiting.append(name)
        begin_next()
        turn[name].acquire()

    def run(name: str) -> None:
        turn[name].acquire()
        # The number of threads is a setting of each thread.
        torch.set_num_threads(1)
        try:
            contenders[name](lambda: hand_over(name))
        finally:
            seconds[name] += time.process_time() - started
            begin_next()

    with ThreadPoolExecutor(len(contenders)) as threads:
        runs = [threads.submit(run, name) for name in contenders]
        begin_next()
    for done in runs:
        done.result()
    return seconds
