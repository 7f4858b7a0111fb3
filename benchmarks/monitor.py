"""Measure the cost of PlasticityMonitor on training batches. Run: python -m benchmarks.monitor.

Times are medians of process CPU time with one thread, measured in turns. The unit is a training step (forward,
backward, Adam) of the same network after the monitor was detached. A monitored step attaches, trains, detaches,
computes every value and resets.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.curvature import Batch, conv
from benchmarks.timing import alternate
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.metrics.monitor import MEASURES

EVERY = 50
"""Number of steps between two monitored ones, for the bar on all measures."""

MEASURED: dict[str, tuple[str, ...]] = {
    "dormant_fraction": ("dormant_fraction",),
    "dormant and dead fraction": ("dormant_fraction", "dead_fraction"),
    "feature_norm": ("feature_norm",),
    "effective_rank": ("effective_rank",),
    "all three ranks": ("effective_rank", "stable_rank", "srank"),
    "everything": MEASURES,
}


def mlp() -> tuple[nn.Module, Batch]:
    """Return an MLP 784-1000-1000-1000-10 and a batch of 128 samples."""
    widths = (784, 1000, 1000, 1000)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1000, 10)), (torch.randn(128, 784), torch.randint(10, (128,)))


def train_step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return a function that trains the model for one step."""
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def monitored(step: Callable[[], None], model: nn.Module, measures: tuple[str, ...]) -> Callable[[], None]:
    """Return a step during which a monitor measures the model."""
    monitor = PlasticityMonitor(model, measures=measures)

    def monitored_step() -> None:
        with monitor:
            step()
        monitor.compute()
        monitor.reset()

    return monitored_step


def count_hooks(model: nn.Module) -> int:
    """Return the number of hooks in the network."""
    return sum(
        len(getattr(module, registry))
        for module in model.modules()
        for registry in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def cost(name: str, model: nn.Module, batch: Batch, rounds: int) -> None:
    """Print the table of one network. Every line is measured in turns with plain steps, against drift."""
    step = train_step(model.train(), batch)

    def added(contender: Callable[[], None]) -> float:
        medians = alternate({"plain": step, "monitored": contender}, rounds=rounds, warmup=2)
        return 100 * (medians["monitored"] / medians["plain"] - 1)

    print(f"{name}: added to a training step by one with a monitor")
    for title, measures in MEASURED.items():
        percent = added(monitored(step, model, measures))
        bar = "   bar ≤ 10 %" if title == "dormant_fraction" else ""
        print(f"  {title + ', every step':<44}{percent:>8.1f} %{bar}", flush=True)
    print(f"  {f'everything, every {EVERY} steps':<44}{percent / EVERY:>8.2f} %   bar ≤ 2 %")
    print(f"  {'detached':<44}{added(step):>8.1f} %   noise; {count_hooks(model)} hooks left, bar 0", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cost("MLP 784-1000-1000-1000-10, batch 128", *mlp(), options.rounds)
    cost("conv net, batch 128", *conv(128), options.rounds)
