"""Define losses, modules and interventions that fail on purpose."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_plasticity.interventions import Regularizer
from tests.helpers.modules import Classifier, cross_entropy


class FailingLoss:
    """The cross-entropy, or ``error`` while ``fails`` is set."""

    def __init__(self, error: Exception, fails: bool = False) -> None:
        self.error, self.fails = error, fails

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        if self.fails:
            raise self.error
        return cross_entropy(module, batch)


class NaNLossClassifier(Classifier):
    """Has a loss of NaN at the third batch of every epoch, which turns all its weights to NaN."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if batch_idx == 2 else loss


class ZeroPenalty(Regularizer):
    """A regularizer with coefficient 0."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def penalty(self, model: nn.Module) -> Tensor:
        return self.coefficient * torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


class NoUnits(Classifier):
    """Has a single layer, and so neither hidden units nor hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3))
