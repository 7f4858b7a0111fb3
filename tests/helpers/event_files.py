"""Read the event files that a TensorBoardLogger has written."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(directory: Path) -> EventAccumulator:
    """Read all events of the first run in the directory that a logger was given."""
    guidance = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    return EventAccumulator(str(directory / "lightning_logs" / "version_0"), size_guidance=guidance).Reload()


def sort_by_step(events: list[Any]) -> list[Any]:
    """Sort events by step: event files are read in the order of their names, not of the fits that wrote them."""
    return sorted(events, key=lambda event: event.step)
