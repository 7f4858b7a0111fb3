"""What could not be done, and why: said in a warning, and kept for the report of the task."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_plasticity.collapse import PlasticityWarning


class Failures:
    """Failures that training survives: each is warned of, and the first of each culprit is kept."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def add(self, who: str, what: str, error: Exception | str) -> None:
        """Warns of a failure.

        Args:
            who: Who failed, as in :attr:`~lightning_plasticity.reports.TaskReport.errors`.
            what: What follows from it.
            error: Why.
        """
        rank_zero_warn(f"{what}, training goes on: {str(error) or described(error)}", category=PlasticityWarning)
        self._first.setdefault(who, described(error))

    def move_to(self, errors: dict[str, str]) -> None:
        """Adds the first error of each to those that are known of it, if none is; begins anew."""
        for who, error in self._first.items():
            errors.setdefault(who, error)
        self._first.clear()


def described(error: Exception | str) -> str:
    """An error in words: also one without a message, such as a MemoryError, and with the cause that another hides."""
    if isinstance(error, str):
        return error
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    cause = error.__cause__
    return words if not isinstance(cause, Exception) or str(cause) in words else f"{words} ({described(cause)})"
