"""Warn about errors that do not end training, and collect them for the report of the task."""

from __future__ import annotations

from lightning_plasticity.distributed.agreement import all_gather_object, format_error
from lightning_plasticity.messages import rank_zero_warn


class ErrorLog:
    """Errors that do not end training. An error is a warning; the first one of each source is kept.

    Args:
        name: The name of the callback, a prefix of its warnings.
    """

    def __init__(self, name: str | None = None) -> None:
        self._prefix = "" if name is None else f"{name}: "
        self._errors: dict[str, str] = {}

    def warn(self, message: str) -> None:
        """Issue a :class:`~lightning_plasticity.PlasticityWarning` on rank 0."""
        rank_zero_warn(f"{self._prefix}{message}", stacklevel=4)

    def record(self, source: str, consequence: str, error: Exception | str) -> None:
        """Warn about an error, and keep it if it is the first one of its source.

        Args:
            source: The part that failed: a key of :attr:`~lightning_plasticity.reports.TaskReport.errors`.
            consequence: The effect of the error on the run; the warning begins with it.
            error: The error.

        Warns:
            PlasticityWarning: Always.
        """
        self.warn(f"{consequence}, training goes on: {str(error) or format_error(error)}")
        self.keep(source, format_error(error))

    def keep(self, source: str, error: str) -> None:
        """Keep an error without a warning, if it is the first one of its source.

        Args:
            source: The part that failed.
            error: The error in words.
        """
        self._errors.setdefault(source, error)

    def flush_into(self, errors: dict[str, str]) -> None:
        """Move the errors into a dictionary, in which earlier errors of the same source stay."""
        for source, error in self._errors.items():
            errors.setdefault(source, error)
        self._errors.clear()


def gather_errors(errors: dict[str, str]) -> dict[str, str]:
    """Return the errors of all ranks, on every rank. All ranks must call it at the same point.

    Args:
        errors: The errors of this rank by their sources.

    Returns:
        For each source, the error of the lowest rank that has one, with the rank in front unless it is 0.

    Warns:
        PlasticityWarning: On rank 0, for each error that rank 0 did not have itself.
    """
    rank_zero_errors, *others = all_gather_object(errors)
    gathered: dict[str, str] = dict(rank_zero_errors)
    for rank, rank_errors in enumerate(others, start=1):
        for source in rank_errors.keys() - gathered.keys():
            gathered[source] = f"on rank {rank}: {rank_errors[source]}"
            rank_zero_warn(f"{source} failed {gathered[source]}")
    return gathered
