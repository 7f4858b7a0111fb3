"""What arguments have to be."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any, TypeGuard


def as_float(value: Any) -> float:
    """The value, if it is a number; else NaN, which is in no range."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_str_list(value: Any, *, at_least: int = 1) -> bool:
    """Whether these are names, that many or more."""
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and len(value) >= at_least
        and all(isinstance(name, str) for name in value)
    )


def check_positive_ints(**counts: int | None) -> None:
    """What every number of something has to be; ``None`` stands for no limit.

    Raises:
        ValueError: If one is not a positive whole number.
    """
    for name, count in counts.items():
        if count is not None and (not is_int(count) or count < 1):
            raise ValueError(f"{name}={count!r} must be a whole number, 1 or larger")


def check_seed(seed: int) -> None:
    """What the seed of torch's random numbers has to be.

    Raises:
        ValueError: If it is something else.
    """
    if not is_int(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed!r} must be a whole number, from -2**63 to 2**64 - 1")
