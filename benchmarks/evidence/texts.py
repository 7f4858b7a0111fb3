"""Predict the next character of texts that every Python has; their kind changes from task to task."""

from __future__ import annotations

import argparse
import html.entities
import inspect
import locale
import pydoc_data.topics
import typing
import unicodedata
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.evidence.stream import Task, seeded

# The printable characters of ASCII, and the line feed.
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
LENGTH, BATCH_SIZE, BATCHES = 32, 16, 150
WIDTH, HEADS = 32, 2


@cache
def texts() -> tuple[Tensor, ...]:
    """Return texts of four kinds: documentation, names of characters, source code, and tables.

    They are those of the running Python, so they differ a little between its releases.

    Returns:
        The numbers of the characters of each text; characters that are not among ``CHARACTERS`` are left out.
    """
    documentation = pydoc_data.topics.topics.values()
    names = (unicodedata.name(chr(code), "") for code in range(0x20, 0x3000))
    source = (inspect.getsource(module) for module in (argparse, inspect, typing))
    tables = (
        f"{name}\t{value}" for table in (html.entities.html5, locale.locale_alias) for name, value in table.items()
    )
    return tuple(numbers("\n".join(lines)) for lines in (documentation, names, source, tables))


def numbers(text: str) -> Tensor:
    """Return the numbers of the characters of a text.

    Example:
        >>> numbers("a b!")
        tensor([66,  1, 67,  2])
    """
    of_character = {character: number for number, character in enumerate(CHARACTERS)}
    return torch.tensor([of_character[character] for character in text if character in of_character])


def changing_texts(seed: int) -> Iterator[Task]:
    """Yield excerpts of one text, then of the next one, in turn; the target is the next character at every place."""
    g = seeded(seed)
    while True:
        for text in texts():
            task = []
            for _ in range(BATCHES):
                start = torch.randint(len(text) - LENGTH, (BATCH_SIZE, 1), generator=g)
                excerpt = text[start + torch.arange(LENGTH + 1)]
                task.append((excerpt[:, :-1], excerpt[:, 1:]))
            yield task


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    @override
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A block on normalized inputs, whose outputs are added to them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.block = block

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """The sum of embeddings of a character and of its place."""

    def __init__(self) -> None:
        super().__init__()
        self.character = nn.Embedding(len(CHARACTERS), WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.character(x) + self.place  # type: ignore[no-any-return]


def transformer() -> nn.Sequential:
    """Return a causal Transformer of two layers: ``(n, T)`` numbers of characters to ``(n, T, C)`` logits."""

    def feed_forward() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    blocks = [Residual(block()) for _ in range(2) for block in (Attention, feed_forward)]
    return nn.Sequential(Embedding(), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS)))
