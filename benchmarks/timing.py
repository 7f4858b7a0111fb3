"""Side by side: contenders alternate in one process, in process CPU time."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each contender, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, contender in contenders.items():
            start = time.process_time()
            contender()
            if number >= warmup:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def take_turns(contenders: Mapping[str, Callable[[Callable[[], None]], object]]) -> dict[str, float]:
    """Seconds of each contender, where they alternate many times on the way: what slows the machine slows them all.

    Args:
        contenders: Each runs in a thread of its own, one at a time, and lets the next one go on by calling what it is
            given.
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
        torch.set_num_threads(1)  # of every thread by itself
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
