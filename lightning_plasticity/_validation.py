"""Validate arguments: raise errors that give the argument, its value and the values that are allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any, TypeGuard


def as_float(value: Any) -> float:
    """Return a real number as a float, and NaN, which lies in no interval, for any other value."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether the value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_str_list(value: Any, *, at_least: int = 1) -> bool:
    """Return whether the value is a collection of at least so many strings, and not a string itself."""
    return (
        isinstance(value, Collection)
        and not isinstance(value, str)
        and len(value) >= at_least
        and all(isinstance(name, str) for name in value)
    )


def check_positive_ints(owner: str | None = None, /, *, optional: bool = False, **values: int | None) -> None:
    """Check that every value is an integer of at least 1.

    Args:
        owner: The class whose constructor takes the arguments; ``None`` for a function.
        optional: Accept ``None`` too.
        values: The values by the names of the arguments.

    Raises:
        ValueError: If a value is anything else.

    Example:
        >>> check_positive_ints("ReDo", every_n_steps=0)
        Traceback (most recent call last):
        ValueError: ReDo(every_n_steps=0) must be a whole number, at least 1
    """
    for name, value in values.items():
        if not (value is None and optional) and (not is_int(value) or value < 1):
            raise ValueError(f"{_format_argument(owner, name, value)} must be a whole number, at least 1")


def check_number(interval: str, owner: str | None = None, meaning: str = "", /, **values: float) -> None:
    """Check that every value is a real number in an interval.

    Args:
        interval: The interval in mathematical notation: ``"[0, 1)"``, or ``"[0, inf)"`` for finite numbers from 0 on.
        owner: The class whose constructor takes the arguments; ``None`` for a function.
        meaning: Description of the number, which ends the message.
        values: The values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, is NaN, or lies outside the interval.

    Example:
        >>> check_number("[0, 1)", "HareTortoise", decay=1)
        Traceback (most recent call last):
        ValueError: HareTortoise(decay=1) must be in [0, 1)
        >>> check_number("[0, inf)", None, "a number of steps", delay=-1)
        Traceback (most recent call last):
        ValueError: delay=-1 must be a finite number, at least 0: a number of steps
    """
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    for name, value in values.items():
        number = as_float(value)
        above = low <= number if interval[0] == "[" else low < number
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            allowed = _format_interval(interval) + (f": {meaning}" if meaning else "")
            raise ValueError(f"{_format_argument(owner, name, value)} must be {allowed}")


def check_choice(choices: Sequence[object], owner: str | None = None, /, **values: object) -> None:
    """Check that every value is one of the choices. The number 0 is not ``False``.

    Args:
        choices: The values that are allowed.
        owner: The class whose constructor takes the arguments; ``None`` for a function.
        values: The values by the names of the arguments.

    Raises:
        ValueError: If a value is none of the choices.

    Example:
        >>> check_choice(("auto", "gram", "lanczos"), method="exact")
        Traceback (most recent call last):
        ValueError: method='exact' must be 'auto', 'gram' or 'lanczos'
        >>> check_choice((True, False), "SpectralRegularizer", exact=0)
        Traceback (most recent call last):
        ValueError: SpectralRegularizer(exact=0) must be True or False
    """
    for name, value in values.items():
        if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
            *others, last = map(repr, choices)
            allowed = f"{', '.join(others)} or {last}" if others else last
            raise ValueError(f"{_format_argument(owner, name, value)} must be {allowed}")


def check_seed(seed: int, owner: str | None = None, *, minimum: int = -(2**63)) -> None:
    """Check that ``torch.Generator.manual_seed`` accepts the seed.

    Args:
        seed: The seed.
        owner: The class whose constructor takes it; ``None`` for a function.
        minimum: The smallest seed to accept; torch accepts any from -2**63 on.

    Raises:
        ValueError: If the seed is no integer or out of range.
    """
    if not is_int(seed) or not minimum <= seed < 2**64:
        low = "-2**63" if minimum == -(2**63) else minimum
        raise ValueError(f"{_format_argument(owner, 'seed', seed)} must be a whole number, from {low} to 2**64 - 1")


def _format_argument(owner: str | None, name: str, value: object) -> str:
    return f"{name}={value!r}" if owner is None else f"{owner}({name}={value!r})"


def _format_interval(interval: str) -> str:
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    bound = "" if low == "-inf" else f"at least {low}" if interval[0] == "[" else f"greater than {low}"
    return ", ".join(filter(None, ["a finite number" if interval[-1] == ")" else "", bound]))
