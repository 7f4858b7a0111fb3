"""Check which optimizer steps count for step interventions and regularizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import L2Init, WeightClipping
from tests.helpers.interventions_in_training import (
    NEVER,
    ByFusedAdam,
    ByLossBackward,
    Counting,
    Regularized,
    cross_entropy,
    hooks,
)
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer
from tests.helpers.usages import Quartic, half_precision


def test_step_intervention_starts_once_and_acts_each_step(tmp_path: Path) -> None:
    intervention, module, logger = Counting(), Classifier(), MemoryLogger()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    trainer(callback, logger=logger).fit(module, loader(batches=4))
    assert (intervention.events, intervention.steps, hooks(module)) == (["start", "stop"], 4, 0)
    assert logger.values("plasticity_training/Counting/units") == {1: 1, 2: 2, 3: 3, 4: 4}
    trainer(callback, accumulate_grad_batches=3).fit(module, loader(batches=4))
    assert (intervention.events, intervention.steps, hooks(module)) == (["start", "stop"] * 2, 6, 0)


def test_steps_skipped_by_a_gradient_scaler_do_not_count() -> None:
    class Overflowing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 and not self.trainer.sanity_checking else loss

    intervention = Counting()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, **half_precision()).fit(Overflowing(), loader(batches=4))
    assert intervention.steps == 3


def test_steps_skipped_by_a_fused_optimizer_do_not_count() -> None:
    """Such an optimizer unscales gradients itself: its ``step`` is called, and does nothing."""

    class Overflowing(ByFusedAdam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Classifier.training_step(self, batch, 0) * (float("inf") if batch_idx == 1 else 1)

    intervention = Counting()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, **half_precision()).fit(Overflowing(), loader(batches=4))
    assert intervention.steps == 3


@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")
def test_steps_of_batches_without_loss_do_not_count() -> None:
    """Lightning steps the optimizer at the fourth batch, which has no loss."""
    intervention = Counting()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback).fit(Regularized(), loader(batches=6))
    assert intervention.steps == 5


class RawOptimizer(ByLossBackward):
    use_pl_optimizer = False


def test_raw_optimizer_steps_skip_regularizers_with_one_warning() -> None:
    intervention = Counting()
    callback = SpectralCollapseCallback(
        collapse=NEVER, interventions=[Quartic(0.1), intervention], loss_fn=cross_entropy
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=2).fit(RawOptimizer(), loader())
    messages = [str(warning.message) for warning in caught if warning.category is PlasticityWarning]
    expected = "SGD was stepped without Lightning, as with use_pl_optimizer=False: step what self.optimizers() returns"
    assert messages == [f"Quartic is left out of steps, training goes on: {expected}"]
    assert callback.history[0].errors == {"Quartic": expected}
    assert intervention.steps == 6


@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_batch_start"])
def test_steps_of_new_optimizers_count(when: str) -> None:
    class Renewing(Classifier):
        renewals = 0

    def renew(self: Renewing, *_: Any) -> None:
        self.renewals += 1
        self.trainer.strategy.setup_optimizers(self.trainer)

    setattr(Renewing, when, renew)
    intervention, module = Counting(), Renewing()
    fitted = trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention]), max_epochs=2)
    fitted.fit(module, loader(batches=3))
    assert intervention.steps == 6
    assert module.renewals > 1
    assert not fitted.optimizers[0]._optimizer_step_post_hooks


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer without calling the constructor of torch, as some libraries do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults = optimizer.state, optimizer.defaults

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_optimizers_without_hooks_allow_only_regularizers() -> None:
    class ByHand(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(data_loss(self, batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return Wrapper(torch.optim.SGD(self.parameters(), lr=0.1))

    def data_loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module.net(batch[0]), batch[1])

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[L2Init()], loss_fn=data_loss)
    trainer(callback).fit(ByHand(), loader())
    assert callback.history[0].errors == {}
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[WeightClipping()], loss_fn=data_loss)
    with pytest.raises(MisconfigurationException, match="when Wrapper takes a step"):
        trainer(callback).fit(ByHand(), loader())
