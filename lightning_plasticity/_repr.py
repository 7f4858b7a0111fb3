"""Show an object as the constructor call that makes it."""

from __future__ import annotations

from collections.abc import Mapping


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
