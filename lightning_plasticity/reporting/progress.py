"""A long probe says in the Trainer's progress bar how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from lightning.pytorch import Trainer

from lightning_plasticity._compat import training_description
from lightning_plasticity.curvature.problem import Progress

_INTERVAL = 0.25
"""Seconds between two updates, and before the first: faster ones cannot be read, and short probes need none."""


@contextlib.contextmanager
def shown_progress(trainer: Trainer, what: str) -> Iterator[Progress]:
    """Shows progress in the description of the training bar, and puts it back afterwards, also after an exception.

    Args:
        trainer: The Trainer. If it has no progress bar, or one of another kind than Lightning's, nothing is shown.
        what: What is under way.

    Yields:
        A function to be called with the number of steps done and the number of all steps.
    """
    description = None
    with _forgiven():
        description = training_description(trainer)
    last, shown = time.monotonic(), False

    def show(done: int, total: int) -> None:
        nonlocal last, shown
        if description is not None and time.monotonic() - last >= _INTERVAL:
            with _forgiven():
                description.show(f"{what} {done}/{total}")
            last, shown = time.monotonic(), True

    try:
        yield show
    finally:
        if description is not None and shown:
            with _forgiven():
                description.restore()


def _forgiven() -> contextlib.suppress:
    """Any error: a bar is decoration, and some of Lightning's kind are other bars inside, or none."""
    return contextlib.suppress(Exception)
