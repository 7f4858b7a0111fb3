"""Measure the cost of one default probe, and the accuracy of its spectrum. Run: python -m benchmarks.probe.

Times are process CPU time with one thread, contenders alternated, medians; the unit is a training step of the same
network with batch 256.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from benchmarks.models import SequenceClassifier, mlp
from benchmarks.timing import alternate
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.curvature.exact.gram import gram

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def cost() -> None:
    """Print the cost of one probe and of its parts, in training steps."""
    torch.manual_seed(0)
    model = mlp(784, 256, 256, 10)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    probe = x[:64], y[:64]

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


SMALL_MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: mlp(24, 8, 8, 3),
    "convolutions and batch norm": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 4, 6)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(32, 3)),
    ),
    "Transformer layer": SequenceClassifier,
}


def accuracy() -> None:
    """Print the largest relative error of the Gram spectrum over some small models."""
    for dtype in (torch.float64, torch.float32):
        errors = {}
        for name, build in SMALL_MODELS.items():
            torch.manual_seed(0)
            model, x, y = build().double().eval(), torch.randn(12, 24).double(), torch.randint(3, (12,))
            expected = dense_ggn_eigenvalues(model, x)
            eigenvalues = ggn_spectrum(copy.deepcopy(model).to(dtype), (x.to(dtype), y), loss_fn).eigenvalues
            count = min(len(eigenvalues), len(expected))
            errors[name] = ((eigenvalues[:count] - expected[:count]).abs().max() / expected[0]).item()
        worst = max(errors, key=errors.__getitem__)
        print(f"{dtype}: largest error of an eigenvalue over λmax, {len(errors)} models: {errors[worst]:.1e} ({worst})")


def dense_ggn_eigenvalues(model: nn.Module, x: Tensor) -> Tensor:
    """Compute all eigenvalues of the Gauss-Newton matrix of the mean cross entropy, ``(P,)``, largest first."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,))

    jacobian = torch.cat([part.flatten(2) for part in jacrev(logits)(parameters).values()], 2)
    p = logits(parameters).softmax(1)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    return torch.linalg.eigvalsh(torch.einsum("nap,nab,nbq->pq", jacobian, hessian, jacobian)).flip(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cost()
    accuracy()
