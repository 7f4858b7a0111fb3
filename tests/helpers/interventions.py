"""The table of all interventions: how the tests build each one, and what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    L2ER,
    UPGD,
    ChurnRegularizer,
    ContinualBackprop,
    EffectiveRankRegularizer,
    HareTortoise,
    Intervention,
    L2Init,
    NormalizeAndProject,
    Parseval,
    ReDo,
    ReGraMa,
    Reset,
    SelectiveWeightReinit,
    SelfNormalizedReset,
    ShrinkPerturb,
    SoftShrinkPerturb,
    SpectralRegularizer,
    WassersteinInit,
    WeightClipping,
)


@dataclass(frozen=True)
class Row:
    """An intervention of the table.

    Args:
        kind: The class.
        arguments: Arguments with which it acts within a few steps on a small network.
        needs: The arguments and calls without which it raises: ``"forward"``, ``"loss"``, ``"start"``,
            ``"optimizers"``.
        on_units: It re-initialises single units.
        resumes_exactly: A run that is resumed from a checkpoint has the same end, bit for bit.
    """

    kind: type[Intervention]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    on_units: bool = False
    resumes_exactly: bool = True

    @property
    def name(self) -> str:
        return self.kind.__name__

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations of the constructor's parameters, by name."""
        return {name: str(p.annotation) for name, p in inspect.signature(self.kind).parameters.items()}

    def make(self, **arguments: Any) -> Any:
        return self.kind(**{**self.arguments, **arguments})


FORWARD, LOSS, START = frozenset({"forward"}), frozenset({"loss"}), frozenset({"start"})
OPTIMIZERS = frozenset({"optimizers"})

# In the order of docs/interventions.md.
INTERVENTIONS = (
    Row(ReDo, {"threshold": 0.5, "when": "task"}, FORWARD, on_units=True),
    Row(ReGraMa, {"threshold": 0.5, "when": 4}, LOSS, on_units=True),
    Row(Reset, {"last": 1, "when": 4}, FORWARD),
    Row(ShrinkPerturb, {"s": 0.1, "when": 3}),
    Row(FIRE, {"when": "task"}),
    Row(DASH, {"when": "task"}, LOSS),
    Row(ContinualBackprop, {"replacement_rate": 0.1, "maturity_threshold": 1}, FORWARD | START, on_units=True),
    Row(SelfNormalizedReset, {"rejection": 0.5, "cap": 40}, FORWARD | START, on_units=True),
    Row(
        SelectiveWeightReinit,
        {"factor": 0.2, "every_n_steps": 2, "pruning": "proportional", "seed": 5},
        START | OPTIMIZERS,
    ),
    Row(UPGD, {"decay": 0.9, "noise": 0.1, "seed": 5}, START | OPTIMIZERS),
    Row(WeightClipping, {"kappa": 0.3}),
    Row(NormalizeAndProject, needs=START),
    Row(HareTortoise, {"decay": 0.6, "every_n_steps": 3}, START),
    Row(SoftShrinkPerturb, {"shrink": 0.9, "noise": 0.3, "seed": 5}, START),
    Row(SpectralRegularizer),
    Row(Parseval),
    Row(L2Init, needs=START),
    Row(WassersteinInit, needs=START),
    # 12 samples are an epoch of the tests: a checkpoint does not hold pending minibatches.
    Row(EffectiveRankRegularizer, {"every_n_samples": 12}, FORWARD),
    Row(L2ER, {"every_n_samples": 12}, FORWARD),
    # A checkpoint does not hold its batches.
    Row(ChurnRegularizer, {"coefficient": 30.0}, FORWARD, resumes_exactly=False),
)


def select(kind: type[Intervention] = Intervention, *, on_units: bool | None = None) -> list[Row]:
    """Return the rows of a kind, and of those all or only those that act on units, or on weights."""
    return [row for row in INTERVENTIONS if issubclass(row.kind, kind) and on_units in (None, row.on_units)]


def for_each(rows: Iterable[Row]) -> pytest.MarkDecorator:
    """Parametrize a test by ``row``."""
    rows = list(rows)
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])
