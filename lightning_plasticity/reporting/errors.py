"""What could not be done, and why: said in a warning, and kept for the report of the task."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_plasticity.collapse import PlasticityWarning
from lightning_plasticity.distributed.agreement import all_gather_object, format_error


class ErrorLog:
    """Failures that training survives: each is warned of, and the first of each culprit is kept."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def record(self, who: str, what: str, error: Exception | str) -> None:
        """Warns of a failure.

        Args:
            who: Who failed, as in :attr:`~lightning_plasticity.reports.TaskReport.errors`.
            what: What follows from it.
            error: Why.
        """
        rank_zero_warn(f"{what}, training goes on: {str(error) or format_error(error)}", category=PlasticityWarning)
        self._first.setdefault(who, format_error(error))

    def flush_into(self, errors: dict[str, str]) -> None:
        """Adds the first error of each to those that are known of it, if none is; begins anew."""
        for who, error in self._first.items():
            errors.setdefault(who, error)
        self._first.clear()


def gather_errors(errors: dict[str, str]) -> dict[str, str]:
    """The errors of all processes that train together, the same in each of them. To be asked for at the same point.

    Warns:
        PlasticityWarning: Of those that the first process, the one that is heard, has not had itself.
    """
    first, *others = all_gather_object(errors)
    everywhere: dict[str, str] = dict(first)
    for rank, theirs in enumerate(others, start=1):
        for who in theirs.keys() - everywhere.keys():
            everywhere[who] = f"on rank {rank}: {theirs[who]}"
            rank_zero_warn(f"{who} failed {everywhere[who]}", category=PlasticityWarning)
    return everywhere
