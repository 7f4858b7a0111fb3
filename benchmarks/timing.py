"""Side by side: contenders alternate in one process, process CPU time, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


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
