"""Translate the roles of reStructuredText in docstrings to Markdown, for mkdocstrings."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    r"""Return a docstring with formulas as ``\(...\)`` and ``\[...\]``, and references as code.

    Example:
        >>> to_markdown(r":math:`\theta` of :class:`~package.module.Class`")
        '\\(\\theta\\) of `Class`'
    """
    text = re.sub(r"^( *)\.\. math::((?:.*)(?:\n(?:\1 +.*|(?= *\n\1 )))*)", _display, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    text = re.sub(r":\w+:`(?:~[\w.]*\.|\.?)([^`]*)`", r"`\1`", text)
    # Examples between paragraphs; those of a section are indented.
    text = re.sub(r"^>>> .*(?:\n.+)*", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE)
    # The parser of Google's style knows the plural only.
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _display(match: re.Match[str]) -> str:
    formula = " ".join(match[2].split())
    return textwrap.indent(f"\\[ {formula} \\]", match[1])


class Roles(griffe.Extension):
    """Translate every docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Translate the docstring of an object, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
