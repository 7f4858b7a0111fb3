"""Restore the Python attributes of modules and other objects."""

from __future__ import annotations

import contextlib
import operator
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn


class Snapshot:
    """The contents of a dict and of all dicts, lists and deques inside of it.

    Args:
        attributes: The dict, such as ``vars(object)``.
        excluded: Identities of collections that :meth:`restore` leaves as they are.

    Example:
        >>> settings = {"rates": [0.1]}
        >>> snapshot = Snapshot(settings)
        >>> settings["rates"].append(0.2)
        >>> snapshot.restore()
        >>> settings
        {'rates': [0.1]}
    """

    def __init__(self, attributes: dict[str, Any], excluded: Collection[int] = ()) -> None:
        self._contents: list[tuple[Any, Any]] = []
        pending: list[Any] = [attributes]
        seen = set(excluded)
        while pending:
            value = pending.pop()
            if isinstance(value, dict | list | deque) and id(value) not in seen:
                seen.add(id(value))
                # Subclasses may override copy().
                self._contents.append((value, dict(value) if isinstance(value, dict) else list(value)))
                pending += value.values() if isinstance(value, dict) else value

    def restore(self) -> None:
        """Put the contents back into the same collections."""
        for value, content in self._contents:
            # Some subclasses of dict cannot be changed, such as configurations that a library freezes.
            if _is_unchanged(value, content):
                continue
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)


def _is_unchanged(value: Any, content: Any) -> bool:
    if len(value) != len(content) or not all(map(operator.is_, value, content)):
        return False
    return not isinstance(content, dict) or all(map(operator.is_, value.values(), content.values()))


@contextlib.contextmanager
def preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of a model and of its submodules on exit.

    A hidden state that a training step carries on to the next batch, for example, stays that of the current batch.

    Args:
        model: The model. The values of its tensors are not restored.
    """
    snapshots = [Snapshot(vars(module)) for module in model.modules()]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
