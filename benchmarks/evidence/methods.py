"""Define the methods: no intervention, weight decay, every intervention at its defaults, and the live fit test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    L2ER,
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
    SelfNormalizedReset,
    ShrinkPerturb,
    SoftShrinkPerturb,
    SpectralRegularizer,
    WassersteinInit,
    WeightClipping,
)


@dataclass(frozen=True)
class Method:
    """What is done against the loss of plasticity.

    Args:
        intervention: Returns a new intervention, or ``None`` for none.
        weight_decay: Coefficient of L2, as an argument of the optimizer.
        small: Whether it belongs to the small run.
        live: Whether the fit test trains a fresh network on the first fifth of the batches of each task.
    """

    intervention: Callable[[], Intervention] | None = None
    weight_decay: float = 0.0
    small: bool = False
    live: bool = False

    def interventions(self) -> list[Intervention]:
        """Return the interventions of a new run."""
        return [] if self.intervention is None else [self.intervention()]


METHODS: dict[str, Method] = {
    "none": Method(small=True),
    "live": Method(small=True, live=True),
    # The weight decay of L2ER.
    "l2": Method(weight_decay=1e-3, small=True),
    "shrink-perturb": Method(lambda: ShrinkPerturb(when="task"), small=True),
    "redo": Method(lambda: ReDo(when=100), small=True),
    "shrink-perturb-on-collapse": Method(ShrinkPerturb),
    "regrama": Method(lambda: ReGraMa(when=100)),
    "reset": Method(lambda: Reset(when="task")),
    "reset-last": Method(lambda: Reset(last=1, when="task")),
    "fire": Method(lambda: FIRE(when="task")),
    "dash": Method(lambda: DASH(when="task")),
    "continual-backprop": Method(ContinualBackprop),
    "self-normalized-reset": Method(SelfNormalizedReset),
    "weight-clipping": Method(WeightClipping),
    "normalize-and-project": Method(NormalizeAndProject),
    "hare-tortoise": Method(HareTortoise),
    "soft-shrink-perturb": Method(SoftShrinkPerturb),
    "spectral": Method(SpectralRegularizer),
    "parseval": Method(Parseval),
    "l2-init": Method(L2Init),
    "wasserstein": Method(WassersteinInit),
    "effective-rank": Method(EffectiveRankRegularizer),
    "l2-er": Method(L2ER),
}
"""All methods by name."""
