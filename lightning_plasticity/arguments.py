"""What arguments have to be."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any


def number(value: Any) -> float:
    """The value, if it is a number; else NaN, which is in no range."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def are_names(value: Any) -> bool:
    """Whether these are names, at least one."""
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
    )


def check_counts(**counts: int | None) -> None:
    """What every number of something has to be; ``None`` stands for no limit.

    Raises:
        ValueError: If one is not a positive whole number.
    """
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise ValueError(f"{name}={count!r} must be a whole number, 1 or larger")
