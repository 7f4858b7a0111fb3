"""Define the methods: no intervention, weight decay, every intervention at its defaults, and other measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    L2ER,
    UPGD,
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
class Method:
    """What is done against the loss of plasticity.

    Args:
        intervention: Returns a new intervention, or ``None`` for none.
        weight_decay: Coefficient of L2, as an argument of the optimizer.
        small: Whether it belongs to the small run.
        measured: Whether the callback measures and judges, or only runs the intervention.
        live: Whether the fit test trains a fresh network on the first fifth of the batches of each task.
        hessian: Whether the Hessian is measured, too.
    """

    intervention: Callable[[], Intervention] | None = None
    weight_decay: float = 0.0
    small: bool = False
    measured: bool = False
    live: bool = False
    hessian: bool = False

    def interventions(self) -> list[Intervention]:
        """Return the interventions of a new run."""
        return [] if self.intervention is None else [self.intervention()]


def settings(create: Callable[[float], Intervention], *values: float) -> tuple[Method, ...]:
    """Return a method for each value of a coefficient, the default among them."""
    return tuple(Method(partial(create, value)) for value in values)


CANDIDATES: dict[str, tuple[Method, ...]] = {
    "l2": tuple(Method(weight_decay=decay) for decay in (1e-4, 1e-3, 1e-2)),
    "shrink-perturb": settings(lambda s: ShrinkPerturb(s, when="task"), 0.4, 0.6, 0.8),
    "redo": settings(lambda threshold: ReDo(threshold, when=100), 0.0, 0.025, 0.1),
    "regrama": settings(lambda threshold: ReGraMa(threshold, when=100), 0.001, 0.01, 0.1),
    "reset-last": settings(lambda last: Reset(last=int(last), when="task"), 1, 2, 3),
    "dash": settings(lambda shrinkage: DASH(shrinkage=shrinkage, when="task"), 0.05, 0.1, 0.3),
    "continual-backprop": settings(ContinualBackprop, 1e-5, 1e-4, 1e-3),
    "self-normalized-reset": settings(SelfNormalizedReset, 0.005, 0.02, 0.08),
    "selective-weight-reinit": settings(lambda steps: SelectiveWeightReinit(every_n_steps=int(steps)), 32, 256, 2048),
    "upgd": settings(lambda noise: UPGD(noise=noise), 1e-3, 1e-2, 1e-1),
    "weight-clipping": settings(WeightClipping, 1.0, 2.0, 3.0),
    "hare-tortoise": settings(lambda steps: HareTortoise(0.99, int(steps)), 100, 400, 2000),
    "soft-shrink-perturb": settings(lambda rate: SoftShrinkPerturb(1 - rate, rate), 1e-6, 1e-5, 1e-4),
    "spectral": settings(SpectralRegularizer, 1e-4, 1e-3, 1e-2),
    "parseval": settings(Parseval, 1e-4, 1e-3, 1e-2),
    "l2-init": settings(L2Init, 1e-3, 1e-2, 1e-1),
    "wasserstein": settings(WassersteinInit, 1e-3, 1e-2, 1e-1),
    "effective-rank": settings(EffectiveRankRegularizer, 1e-4, 1e-3, 1e-2),
    "l2-er": settings(lambda decay: L2ER(weight_decay=decay), 1e-4, 1e-3, 1e-2),
}
"""Three settings of every intervention that has one: an equal budget."""

METHODS: dict[str, Method] = {
    "none": Method(small=True, measured=True),
    "live": Method(small=True, measured=True, live=True),
    "hessian": Method(measured=True, hessian=True),
    # The weight decay of L2ER.
    "l2": Method(weight_decay=1e-3, small=True, measured=True),
    "shrink-perturb": Method(lambda: ShrinkPerturb(when="task"), small=True, measured=True),
    "redo": Method(lambda: ReDo(when=100), small=True, measured=True),
    "shrink-perturb-on-collapse": Method(ShrinkPerturb, measured=True),
    "regrama": Method(lambda: ReGraMa(when=100)),
    "reset": Method(lambda: Reset(when="task")),
    "reset-last": Method(lambda: Reset(last=1, when="task")),
    "fire": Method(lambda: FIRE(when="task")),
    "dash": Method(lambda: DASH(when="task")),
    "continual-backprop": Method(ContinualBackprop),
    "self-normalized-reset": Method(SelfNormalizedReset),
    "selective-weight-reinit": Method(SelectiveWeightReinit),
    "upgd": Method(UPGD),
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
