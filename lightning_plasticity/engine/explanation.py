"""Explain an alarm: what else has changed in the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.reports import TaskReport

_EXPLAINING = ("fit_loss", "learnable_fraction", "epsilon_rank", "ntk_effective_rank", "dormant_fraction")
"""Diagnostics that explain why a network learns worse than its initial weights."""

_SHARE = 0.8
"""Share of the initial weights' value below which a diagnostic has fallen."""


def explain(values: Mapping[str, float], references: Mapping[str, float], history: Sequence[TaskReport]) -> str:
    """Return what is worse than in the initial weights, and since when there have been alarms.

    Args:
        values: The diagnostics of the network.
        references: Those of its initial weights.
        history: The reports of all earlier tasks.

    Example:
        >>> now, initial = (
        ...     {"learnable_fraction": 0.1, "epsilon_rank": 64.0},
        ...     {"learnable_fraction": 0.5, "epsilon_rank": 70.0},
        ... )
        >>> explain(now, initial, [])
        'learnable fraction 0.1 instead of 0.5'
    """
    known = [name for name in _EXPLAINING if name in values and name in references]
    phrases = [
        f"{DIAGNOSTICS[name].title} {values[name]:.3g} instead of {references[name]:.3g}"
        for name in known
        if _is_worse(name, values[name], references[name])
    ]
    alarms = 0
    for report in reversed(history):
        if not report.collapsed:
            break
        alarms += 1
    if alarms:
        phrases.append(f"alarms since task {history[-alarms].task}")
    return "; ".join(phrases)


def _is_worse(name: str, value: float, reference: float) -> bool:
    if DIAGNOSTICS[name].higher_is_better:
        return value < _SHARE * reference
    return value > reference + (1 - _SHARE) * abs(reference)
