"""Measure the cost of interventions, and the first steps of new weights. Run: python -m benchmarks.interventions.

Times are process CPU time with one thread, contenders alternated, medians.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import mlp, resnet18
from benchmarks.timing import alternate
from lightning_plasticity import interventions
from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    ContinualBackprop,
    Intervention,
    InterventionContext,
    ReDo,
    ReGraMa,
    Regularizer,
    StepIntervention,
    describe_units,
)
from lightning_plasticity.interventions.units.unit_reset import plan_reset
from lightning_plasticity.interventions.weights.optimizer_state import reset_state
from lightning_plasticity.interventions.weights.updates import apply_update

LR = 1e-3
SHOWN_STEPS = (1, 2, 3, 5, 10, 30, 100)


def cases(small_rounds: int, large_rounds: int) -> dict[str, tuple[nn.Module, Tensor, int]]:
    """Return the networks to measure on, each with a batch of inputs and a number of rounds."""
    return {
        "MLP 64-128-128-10, batch 128": (mlp(64, 128, 128, 10), torch.randn(128, 64), 10 * small_rounds),
        "MLP 784-1000-1000-1000-10, batch 128": (mlp(784, 1000, 1000, 1000, 10), torch.randn(128, 784), small_rounds),
        "ResNet-18 for 32x32 images, batch 64": (resnet18(), torch.randn(64, 3, 32, 32), large_rounds),
    }


def stream(name: str) -> Callable[[bool], tuple[Tensor, Tensor]]:
    """Return a function that draws batches of 64, from before or after the reset of units."""
    generator = torch.Generator().manual_seed(1)
    if name == "new random labels":
        xs, ys = torch.randn(2, 1024, 64, generator=generator), torch.randint(10, (2, 1024), generator=generator)

        def memorise(after: bool) -> tuple[Tensor, Tensor]:
            rows = torch.randint(1024, (64,), generator=generator)
            return xs[int(after), rows], ys[int(after), rows]

        return memorise
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def noisy(after: bool) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 64, generator=generator)
        labels, noise = teacher(x).argmax(1), torch.randint(10, (64,), generator=generator)
        return x, torch.where(torch.rand(64, generator=generator) < 0.2, noise, labels)

    return noisy


def step_sizes(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], task: str, policy: str
) -> dict[str, list[tuple[float, float]]]:
    """Measure the mean step of reset and of kept weights, in learning rates, over 100 steps after 1000."""
    torch.manual_seed(0)
    model = mlp(64, 128, 128, 10)
    optimizer, batches = make(list(model.parameters())), stream(task)

    def step(after: bool) -> None:
        x, y = batches(after)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(1000):
        step(after=False)
    units = describe_units(model, lambda model: model(torch.randn(8, 64)))
    update = plan_reset(model, units, {"2": torch.arange(16)}, torch.Generator().manual_seed(0))
    apply_update("benchmark", update, [])
    positions = {p: part.positions for p, part in update.parts.items() if isinstance(p, nn.Parameter)}
    reset_state(optimizer, positions)
    masks = {}
    for parameter in (model[2].weight, model[4].weight):
        flat = torch.zeros(parameter.numel(), dtype=torch.bool)
        masks[parameter] = flat.index_fill_(0, positions[parameter], True).view_as(parameter)
    for parameter, mask in masks.items():
        state = optimizer.state[parameter]
        for key in ("exp_avg_sq", "square_avg"):
            if key in state and policy == "mean of the kept second moments":
                state[key][mask] = state[key][~mask].mean()
        if policy == "step count zero" and "step" in state:
            state["step"].zero_()
    sizes: dict[str, list[tuple[float, float]]] = {"incoming": [], "outgoing": []}
    for _ in range(100):
        before = {parameter: parameter.detach().clone() for parameter in masks}
        step(after=True)
        for name, (parameter, mask) in zip(sizes, masks.items(), strict=True):
            moved = (parameter.detach() - before[parameter]).abs() / LR
            sizes[name].append((moved[mask].mean().item(), moved[~mask].mean().item()))
    return sizes


def first_steps() -> None:
    """Compare policies for Adam's second moment of re-initialised entries."""
    print("Mean step of reset weights, as a multiple of that of kept weights of the same tensor, after n steps;")
    print("last column: the largest mean step of reset and of kept weights, in learning rates")
    print(f"{'':<86}" + "".join(f"{n:>7}" for n in SHOWN_STEPS))
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "Adam": lambda p: torch.optim.Adam(p, lr=LR),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR),
    }
    for task in ("noisy stream", "new random labels"):
        for name, make in makers.items():
            policies = ["zero, as here", "mean of the kept second moments"]
            for policy in [*policies, "step count zero"] if name == "Adam" else policies:
                for kind, sizes in step_sizes(make, task, policy).items():
                    ratios = "".join(f"{sizes[n - 1][0] / sizes[n - 1][1]:7.2f}" for n in SHOWN_STEPS)
                    largest = " and ".join(f"{max(column):.2f}" for column in zip(*sizes, strict=True))
                    print(f"  {task:<20}{name:<10}{policy:<34}{kind:<20}{ratios}   {largest}")


def cost() -> None:
    """Print the cost of one repair, in training steps."""
    torch.manual_seed(0)
    for name, (model, x, rounds) in cases(5, 1).items():
        print(name)
        cost_of_repairs(model, x, rounds)


def cost_of_repairs(model: nn.Module, x: Tensor, rounds: int) -> None:
    """Print the cost of repairs of one network."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    y = torch.randint(10, (len(x),))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    two = x[:2]
    medians = alternate(
        {
            "training step": step,
            "describe_units, 2 samples": lambda: describe_units(model, lambda model: model(two)),
            "describe_units, the batch": lambda: describe_units(model, lambda model: model(x)),
            "ReDo": lambda: ReDo(0.1).repair(model, optimizers=[optimizer], forward=lambda model: model(x)),
            "ReGraMa": lambda: ReGraMa(0.1).repair(model, optimizers=[optimizer], loss=loss),
            "FIRE, not applied": lambda: FIRE().plan(model, InterventionContext()),
            "DASH, not applied": lambda: DASH().plan(model, InterventionContext(losses=[loss])),
        },
        rounds=rounds,
        warmup=rounds // 5,
    )
    for name, seconds in medians.items():
        print(f"  {name:<30}{1e3 * seconds:9.0f} ms {seconds / medians['training step']:8.1f} steps")


STEP_BARS = {
    "MLP 64-128-128-10, batch 128": {
        "ContinualBackprop": 1.25,
        "SelfNormalizedReset": 1.3,
        "SpectralRegularizer": 1.3,
        "L2Init": 1.15,
    },
    "MLP 784-1000-1000-1000-10, batch 128": {
        "ContinualBackprop": 1.15,
        "SpectralRegularizer": 1.25,
        "WeightClipping": 1.05,
        "L2Init": 1.12,
    },
}
"""The largest accepted cost of a training step with the intervention, in plain steps."""


def running_costs() -> None:
    """Print the cost that interventions add to every training step."""
    torch.manual_seed(0)
    for name, (model, x, rounds) in cases(60, 7).items():
        print(f"{name}; ratio to a plain training step beside it (median, mean)")
        for intervention in interventions_in_training():
            median, mean = cost_of_step(model, x, intervention, rounds)
            bar = STEP_BARS.get(name, {}).get(intervention.name)
            print(f"  {intervention.name:<28}{median:7.3f}{mean:8.3f}" + (f"   bar ≤ {bar}" if bar else ""), flush=True)


def interventions_in_training() -> list[Intervention]:
    """Build every public intervention that acts in each training step."""
    # The default of 100 steps would delay replacements beyond the measurement.
    arguments = {ContinualBackprop: {"maturity_threshold": 20}}
    public = [value for name in interventions.__all__ if inspect.isclass(value := getattr(interventions, name))]
    kinds = [kind for kind in public if issubclass(kind, StepIntervention | Regularizer)]
    return [kind(**arguments.get(kind, {})) for kind in kinds if not inspect.isabstract(kind)]


def cost_of_step(model: nn.Module, x: Tensor, intervention: Intervention, rounds: int) -> tuple[float, float]:
    """Measure the median and the mean training step with an intervention, as ratios to those of a plain one, Adam."""
    y = torch.randint(10, (len(x),))
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def step_with(*, treated: bool) -> Callable[[], None]:
        trained = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-4)
        if treated:
            intervention.start(trained, forward=lambda model: model(x[:2]), optimizers=[optimizer])

        def step() -> None:
            start = time.process_time()
            optimizer.zero_grad()
            loss = F.cross_entropy(trained(x), y)
            loss.backward()
            if treated and isinstance(intervention, Regularizer):
                intervention.add_gradients(trained)
            optimizer.step()
            if treated and isinstance(intervention, StepIntervention):
                intervention.after_step(trained, [optimizer], forward=lambda model: model(x))
            seconds[treated].append(time.process_time() - start)

        return step

    warmup = 25 if rounds > 25 else 2
    alternate({"plain": step_with(treated=False), "treated": step_with(treated=True)}, rounds=rounds, warmup=warmup)
    intervention.stop()
    treated, plain = seconds[True][warmup:], seconds[False][warmup:]
    return statistics.median(treated) / statistics.median(plain), statistics.mean(treated) / statistics.mean(plain)


if __name__ == "__main__":
    torch.set_num_threads(1)
    first_steps()
    cost()
    running_costs()
