"""Select parameters of a model by name patterns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_plasticity._validation import is_str_list
from lightning_plasticity.isolation.weights import all_names

Patterns = Sequence[str] | None
"""Names of modules or parameters, with ``*``, ``?`` and ``[...]`` as wildcards; a module stands for all in it."""


def check_patterns(owner: str, **patterns: Patterns) -> None:
    """Check that arguments are lists of names.

    Args:
        owner: The class whose constructor takes the arguments.
        patterns: The values by the names of the arguments.

    Raises:
        ValueError: If one is anything else, such as a string.
    """
    for argument, value in patterns.items():
        if value is not None and not is_str_list(value, at_least=0):
            raise ValueError(f"{owner}({argument}={value!r}) must be a list of names, such as ['head'], or None")


def selected_tensors(owner: str, model: nn.Module, include: Patterns, exclude: Patterns) -> set[Tensor]:
    """Return the parameters and buffers that some pattern of ``include`` and none of ``exclude`` matches.

    A pattern matches a tensor if it matches its name, or the name of a module that it is in; of a tied one any name.

    Args:
        owner: The class whose constructor takes the patterns, for the message.
        model: The model.
        include: Patterns; ``None`` includes all.
        exclude: Patterns; ``None`` excludes none.

    Raises:
        ValueError: If a pattern matches nothing.

    Example:
        >>> model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
        >>> [tuple(tensor.shape) for tensor in selected_tensors("Reset", model, ["head"], ["*.bias"])]
        [(2, 2)]
    """
    names = all_names(model)
    included = set(names) if include is None else _matching(owner, "include", include, model, names)
    return included - _matching(owner, "exclude", exclude or (), model, names)


def find_module(owner: str, argument: str, name: str, model: nn.Module) -> nn.Module:
    """Return the module of a name.

    Args:
        owner: The class whose constructor takes the name, for the message.
        argument: The argument, for the message.
        name: The name.
        model: The model.

    Raises:
        ValueError: If there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(f"{owner}({argument}=...): {_no_match(name, 'module', model, modules)}")
    return modules[name]


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name, or the name of a module that it is in.

    Example:
        >>> matches("head.0.weight", "head"), matches("head.0.weight", "*.weight"), matches("head.0.weight", "0")
        (True, True, False)
    """
    return any(fnmatchcase(prefix, pattern) for prefix in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _matching(
    owner: str, argument: str, patterns: Sequence[str], model: nn.Module, names: dict[Tensor, list[str]]
) -> set[Tensor]:
    known = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    known |= {name for tensor_names in names.values() for name in tensor_names}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{owner}({argument}=...): {_no_match(pattern, 'module or parameter', model, known)}")
    return {
        tensor
        for tensor, tensor_names in names.items()
        if any(matches(name, pattern) for name in tensor_names for pattern in patterns)
    }


def _no_match(name: str, kind: str, model: nn.Module, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0)
    return f"{name!r} matches no {kind} of {type(model).__name__}; the nearest names are {nearest}"
