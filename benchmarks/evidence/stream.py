"""Define what a stream is: a network, an optimizer, and tasks, each a list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

Batch: TypeAlias = tuple[Tensor, ...]
# A sized iterable of batches.
Task: TypeAlias = Any


@dataclass(frozen=True)
class Stream:
    """A stream of tasks, and what learns it.

    Args:
        network: Returns a new network.
        learning_rate: The learning rate of Adam.
        draw: ``draw(seed)`` yields the tasks.
        small: Number of tasks in the small run.
        full: Number of tasks in the full run.
        regression: Whether the loss is the mean squared error instead of the cross-entropy.
        head: What happens to the last layer at the start of every task: nothing, new random weights, or zeros.
        outputs: ``outputs(task)`` is the number of outputs that the last layer has grown to by a task, if it grows.
    """

    network: Callable[[], nn.Module]
    learning_rate: float
    draw: Callable[[int], Iterator[Task]]
    small: int
    full: int
    regression: bool = False
    head: Literal["kept", "new", "zero"] = "kept"
    outputs: Callable[[int], int] | None = None

    @property
    def live_metric(self) -> str | None:
        """Name of the logged number by which a network can be compared with a fresh one on the same batches."""
        return None if self.regression else "accuracy"

    def optimizer(self, parameters: Iterable[nn.Parameter], weight_decay: float = 0.0) -> Optimizer:
        """Return Adam with this stream's learning rate; the weight decay is a part of the gradient."""
        return Adam(parameters, self.learning_rate, weight_decay=weight_decay)

    def batches(self, task: Task, network: nn.Module) -> Task:
        """Return the batches of a task for a network."""
        return task

    def evaluate(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy on a batch; the accuracy of a regression is NaN.

        Outputs are ``(n, C)``, or ``(n, T, C)`` of sequences.
        """
        x, y = batch
        outputs = network(x)
        if self.regression:
            return F.mse_loss(outputs, y), torch.tensor(torch.nan)
        accuracy = (outputs.detach().argmax(-1) == y).float().mean()
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten()), accuracy


def seeded(seed: int) -> torch.Generator:
    """Return the source of all randomness of the tasks of one run."""
    return torch.Generator().manual_seed(seed)
