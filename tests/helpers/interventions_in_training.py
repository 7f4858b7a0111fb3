"""Modules and interventions for tests that run interventions in a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_plasticity import Collapse
from lightning_plasticity.interventions import Regularizer, RepairReport, StepIntervention
from lightning_plasticity.interventions.base import InterventionContext
from tests.helpers.modules import Classifier

NEVER = Collapse(above=1e9)
"""A rule that detects no collapse."""


class Regularized(Classifier):
    """A module that adds a penalty in ``training_step``, and has no loss for its fourth batch."""

    term: Regularizer | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            return None
        loss = super().training_step(batch, batch_idx)
        return loss if self.term is None else loss + self.term.penalty(self)


class BySGD(Regularized):
    """A module that is trained by SGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ByFusedAdam(Regularized):
    """A module that is trained by a fused optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, fused=True)


class ByLossBackward(BySGD):
    """A module that calls ``loss.backward()``, which Lightning does not notice."""

    use_pl_optimizer = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers(use_pl_optimizer=self.use_pl_optimizer)
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        optimizer.step()


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss of the data without the penalty."""
    return F.cross_entropy(module.net(batch[0]), batch[1])


class Counting(StepIntervention):
    """A step intervention that records its calls, and fails at the given steps."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.events: list[str] = []
        self.steps, self.fails = 0, fails
        self.handle: Any = None

    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.stop()
        self.events.append("start")
        self.handle = model.register_forward_pre_hook(lambda *_: None)

    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        self.steps += 1
        if self.steps in self.fails:
            raise ValueError("no luck")
        return RepairReport(self.name, {"net.0": torch.arange(self.steps)})

    def stop(self) -> None:
        if self.handle is not None:
            self.events.append("stop")
            self.handle.remove()
            self.handle = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def hooks(module: nn.Module) -> int:
    """Count the forward hooks of a module and its submodules."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
