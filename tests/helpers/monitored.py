"""Networks and helpers of the tests of PlasticityMonitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """A function between a hidden layer and the output layer."""

    def __init__(self, activation: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, width)
        self.out = nn.LazyLinear(3)
        self.activation = activation
        self.out(activation(self.hidden(torch.zeros(1, 4))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.hidden(x)))


class Block(nn.Module):
    """A residual block of two layers with functional activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.outer(F.relu(self.inner(x))))


class Step(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


def chained(*steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a sequence of modules and functions."""
    chain = nn.Sequential()
    for step in steps:
        chain.append(step if isinstance(step, nn.Module) else Step(step))
    return chain


def mlp(*widths: int, last: nn.Module | None = None) -> nn.Sequential:
    """Return an MLP with 4 inputs, these hidden widths and 3 outputs."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((4, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3), *([last] if last else []))


def measured_layers(model: nn.Module, *inputs: Any, **options: Any) -> list[str]:
    """Return the names of the layers that a monitor measures in one forward pass."""
    monitor = PlasticityMonitor(model, **options)
    with monitor:
        model(*inputs)
    return list(monitor.layers)


def count_hooks(model: nn.Module) -> int:
    """Return the number of hooks of all modules, the global ones included."""
    of_modules = [
        value for m in model.modules() for key, value in vars(m).items() if "hooks" in key and isinstance(value, dict)
    ]
    global_hooks = [value for key, value in vars(torch.nn.modules.module).items() if key.startswith("_global_")]
    return sum(len(value) for value in [*of_modules, *global_hooks] if isinstance(value, dict))


def count_modes() -> int:
    """Return the number of active torch function modes."""
    return torch._C._len_torch_function_stack()
