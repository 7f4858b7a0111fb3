"""Define the warning and the error that users see, and format constructor calls."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch

_log = logging.getLogger("lightning_plasticity")


class PlasticityWarning(UserWarning):
    """The network is losing its ability to learn, or could not be measured."""


class MisconfigurationError(Exception):
    """The arguments do not fit the model, its loss or its batch.

    :class:`~lightning_plasticity.SpectralCollapseCallback` raises it as Lightning's ``MisconfigurationException``.
    """


class SkippedBatchError(MisconfigurationError):
    """There is no loss to measure, because ``training_step`` returned ``None``, by which Lightning skips a batch."""


def rank_zero_warn(message: str, *, stacklevel: int = 3) -> None:
    """Issue a :class:`PlasticityWarning` on the first rank of a distributed run, shown without a path in front.

    Args:
        message: The text of the warning.
        stacklevel: The frame that the warning is attributed to; by default the caller of the calling function.
    """
    if is_rank_zero():
        with _without_path():
            warnings.warn(message, PlasticityWarning, stacklevel=stacklevel)


@contextlib.contextmanager
def _without_path() -> Iterator[None]:
    """Show warnings as ``<category>: <message>``: the line of this package that issues one says nothing."""
    original = warnings.formatwarning

    def format_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
        return f"{category.__name__}: {message}\n"

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = original


def rank_zero_info(message: str) -> None:
    """Log a message of the logger ``lightning_plasticity`` at level INFO on the first rank of a distributed run."""
    if is_rank_zero():
        _log.info(message)


def constructor_call(instance: object, arguments: Mapping[str, object]) -> str:
    """Return ``Class(name=value, ...)`` with the arguments that are not ``None``.

    Args:
        instance: An instance of the class.
        arguments: The arguments by name. A mapping, such as a ``state_dict``, is shown by its size.

    Example:
        >>> constructor_call(object(), {"threshold": 0.1, "initial": {"weight": 0.0, "bias": 0.0}, "when": None})
        'object(threshold=0.1, initial=<2 tensors>)'
    """
    shown = {
        name: f"<{len(value)} tensors>" if isinstance(value, Mapping) else repr(value)
        for name, value in arguments.items()
        if value is not None
    }
    return f"{type(instance).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def listed(names: Iterable[str]) -> str:
    """Return the first names of a list, and how many others there are.

    Example:
        >>> print(listed("abcde"))
        'a', 'b' and 3 others
    """
    names = list(map(repr, names))
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} others"


def is_rank_zero() -> bool:
    """Return whether this process is the first rank, or the only process."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
