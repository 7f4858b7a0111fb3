"""What interventions cost, and how large the first steps of new weights are. Run: python -m benchmarks.interventions.

Times are process CPU time with one thread, contenders alternated, medians.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import alternate
from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    HareTortoise,
    NormalizeAndProject,
    ReDo,
    ReGraMa,
    RunningRemedy,
    SoftShrinkPerturb,
    WeightClipping,
    describe_units,
)
from lightning_plasticity.interventions.base import Request
from lightning_plasticity.interventions.changes import apply
from lightning_plasticity.interventions.optimizer_state import clear
from lightning_plasticity.interventions.recycling import recycling
from tests.unit_models import ResNet

LR = 1e-3
SHOWN = (1, 2, 3, 5, 10, 30, 100)


def stream(name: str) -> Callable[[bool], tuple[Tensor, Tensor]]:
    """Batches of 64, before and after the recycling."""
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
    """Mean step of recycled and of kept weights, in learning rates, over 100 steps after 1000."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, batches = make(list(model.parameters())), stream(task)

    def step(after: bool) -> None:
        x, y = batches(after)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(1000):
        step(after=False)
    units = describe_units(model, lambda model: model(torch.randn(8, 64)))
    changes = recycling(model, units, {"2": torch.arange(16)}, torch.Generator().manual_seed(0))
    apply("benchmark", changes, [])
    masks = {parameter: changes.renewed[parameter] for parameter in (model[2].weight, model[4].weight)}
    clear(
        optimizer,
        {parameter: mask for parameter, mask in changes.renewed.items() if isinstance(parameter, nn.Parameter)},
    )
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
    """The choice of what Adam's second moment becomes at new entries."""
    print("Mean step of recycled weights, as a multiple of that of kept weights of the same tensor, after n steps;")
    print("last column: the largest mean step of recycled and of kept weights, in learning rates")
    print(f"{'':<86}" + "".join(f"{n:>7}" for n in SHOWN))
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "Adam": lambda p: torch.optim.Adam(p, lr=LR),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR),
    }
    for task in ("noisy stream", "new random labels"):
        for name, make in makers.items():
            policies = ["zero, as here", "mean of the kept second moments"]
            for policy in [*policies, "step count zero"] if name == "Adam" else policies:
                for kind, sizes in step_sizes(make, task, policy).items():
                    ratios = "".join(f"{sizes[n - 1][0] / sizes[n - 1][1]:7.2f}" for n in SHOWN)
                    largest = " and ".join(f"{max(column):.2f}" for column in zip(*sizes, strict=True))
                    print(f"  {task:<20}{name:<10}{policy:<34}{kind:<20}{ratios}   {largest}")


def cost() -> None:
    """One repair, in training steps."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        *(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU()),
        *(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)),
    )
    cases = {
        "MLP 784-1000-1000-1000-10, batch 128": (mlp, torch.randn(128, 784), 5),
        "ResNet-18 for 32x32 images, batch 64": (ResNet(64, classes=10), torch.randn(64, 3, 32, 32), 1),
    }
    for name, (model, x, rounds) in cases.items():
        print(name)
        _cost(model, x, rounds)


def _cost(model: nn.Module, x: Tensor, rounds: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    y = torch.randint(10, (len(x),))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    few = x[:2]
    medians = alternate(
        {
            "training step": step,
            "describe_units, 2 samples": lambda: describe_units(model, lambda model: model(few)),
            "describe_units, the batch": lambda: describe_units(model, lambda model: model(x)),
            "ReDo": lambda: ReDo(0.1).repair(model, optimizers=[optimizer], forward=lambda model: model(x)),
            "ReGraMa": lambda: ReGraMa(0.1).repair(model, optimizers=[optimizer], loss=loss),
        },
        rounds=rounds,
        warmup=rounds // 5,
    )
    for name, seconds in medians.items():
        print(f"  {name:<30}{1e3 * seconds:9.0f} ms {seconds / medians['training step']:8.1f} steps")


def cost_of_weight_remedies() -> None:
    """A training step with each remedy that acts on all weights, and one repair of that kind, in plain steps."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        *(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU()),
        *(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)),
    )
    cases = {
        "MLP 784-1000-1000-1000-10, batch 128": (mlp, torch.randn(128, 784), 60),
        "ResNet-18 for 32x32 images, batch 64": (ResNet(64, classes=10), torch.randn(64, 3, 32, 32), 5),
    }
    for name, (model, x, rounds) in cases.items():
        print(name)
        _cost_of_weight_remedies(model, x, rounds)


def _cost_of_weight_remedies(model: nn.Module, x: Tensor, rounds: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    y = torch.randint(10, (len(x),))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    def step_with(remedy: RunningRemedy) -> Callable[[], None]:
        remedy.start(model)

        def both() -> None:
            step()
            remedy.after_step(model, [optimizer])

        return both

    seconds = alternate(
        {
            "training step": step,
            "with WeightClipping": step_with(WeightClipping()),
            "with NormalizeAndProject": step_with(NormalizeAndProject()),
            "with HareTortoise": step_with(HareTortoise()),
            "with SoftShrinkPerturb": step_with(SoftShrinkPerturb()),
            "FIRE": lambda: FIRE().changes(model, Request()),
            "DASH, one mini-batch": lambda: DASH().changes(model, Request(losses=[loss])),
        },
        rounds=rounds,
        warmup=max(1, rounds // 10),
    )
    for name, median in seconds.items():
        print(f"  {name:<34}{1e3 * median:9.1f} ms {median / seconds['training step']:8.3f} steps")


if __name__ == "__main__":
    torch.set_num_threads(1)
    first_steps()
    cost()
    cost_of_weight_remedies()
