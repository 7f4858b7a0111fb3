"""What one default probe costs, and how exact it is. Run: python -m benchmarks.probe.

Times are process CPU time with one thread, contenders alternated, medians; the unit is a training step of the same
network with batch 256.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import alternate
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.curvature.exact.gram import gram
from tests.helpers.cases import CASES, dense


def cost() -> None:
    """One probe, and its parts, in training steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    probe = x[:64], y[:64]

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model, (x, y)).backward()
        optimizer.step()

    medians = alternate(
        {
            "training step, batch 256": step,
            "Gram matrices, 64 samples": lambda: gram(model, probe, loss_fn),
            "the same with eigenvalues": lambda: ggn_spectrum(model, probe, loss_fn),
            "the callback's probe (network and initial weights)": lambda: [
                ggn_spectrum(model, probe, loss_fn).learnable_fraction() for _ in range(2)
            ],
        },
        rounds=15,
    )
    unit = medians["training step, batch 256"]
    print("MLP 784-256-256-10")
    for name, seconds in medians.items():
        print(f"  {name:<52}{1e3 * seconds:8.1f} ms {seconds / unit:7.1f} steps")


def accuracy() -> None:
    """Largest relative error of the Gram spectrum over the table of small models."""
    for dtype in (torch.float64, torch.float32):
        errors = {}
        for case in CASES:
            spectrum, expected = ggn_spectrum(*case.build(dtype), case.loss_fn), dense(case).eigenvalues
            count = min(len(spectrum.eigenvalues), len(expected))
            errors[case.name] = ((spectrum.eigenvalues[:count] - expected[:count]).abs().max() / expected[0]).item()
        worst = max(errors, key=errors.__getitem__)
        print(f"{dtype}: largest error of an eigenvalue over λmax, {len(errors)} models: {errors[worst]:.1e} ({worst})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cost()
    accuracy()
