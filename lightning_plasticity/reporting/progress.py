"""Show the progress of a long probe in the progress bar of the Trainer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from lightning.pytorch import Trainer

from lightning_plasticity._compat import training_description
from lightning_plasticity.curvature.problem import Progress

_INTERVAL = 0.25
"""Seconds before the first update and between updates. Faster ones cannot be read; short probes need none."""


@contextlib.contextmanager
def shown_progress(trainer: Trainer, activity: str) -> Iterator[Progress]:
    """Show progress in the description of the training progress bar, and restore the description on exit.

    Args:
        trainer: The Trainer. Without a progress bar, or with one that is not Lightning's, nothing is shown.
        activity: Name of the activity, such as ``"probing curvature"``.

    Yields:
        A function to call with the number of completed steps and the total number of steps.
    """
    description = None
    with _ignore_errors():
        description = training_description(trainer)
    last_update, shown = time.monotonic(), False

    def show(done: int, total: int) -> None:
        nonlocal last_update, shown
        if description is not None and time.monotonic() - last_update >= _INTERVAL:
            with _ignore_errors():
                description.show(f"{activity} {done}/{total}")
            last_update, shown = time.monotonic(), True

    try:
        yield show
    finally:
        if description is not None and shown:
            with _ignore_errors():
                description.restore()


def _ignore_errors() -> contextlib.suppress:
    """Ignore all errors: the progress bar is optional, and subclasses of Lightning's bars may lack its parts."""
    return contextlib.suppress(Exception)
