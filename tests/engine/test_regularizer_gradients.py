"""Check the gradients of regularizers in training against the same term in ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import Regularizer
from tests.helpers.interventions_in_training import (
    NEVER,
    ByFusedAdam,
    ByLossBackward,
    BySGD,
    Regularized,
    cross_entropy,
)
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.usages import Quartic, half_precision


class BySparseGradients(BySGD):
    """A module with an embedding that has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = (4 * batch[0][:, 0].abs()).long().clamp(max=9)
        return super().training_step((self.embedding(tokens), batch[1]), batch_idx)


class Skipping(BySGD):
    """A module that takes a step on every other batch, as in Lightning's example of ``optimizer_step``."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class AccumulatingItself(Skipping):
    """A module that keeps the gradients of the skipped batches."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class WithNewOptimizers(BySGD):
    """A module that creates a new optimizer for each epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(BySGD, {}, id="plain"),
        pytest.param(BySGD, {"accumulate_grad_batches": 3}, id="accumulation with a short last window"),
        pytest.param(BySGD, "scaler", id="fp16"),
        pytest.param(ByFusedAdam, "scaler", id="fp16 and a fused optimizer"),
        pytest.param(BySparseGradients, {}, id="sparse gradients"),
        pytest.param(ByLossBackward, {}, id="loss.backward()"),
        pytest.param(Skipping, {}, id="gradients that are dropped"),
        pytest.param(AccumulatingItself, {}, id="gradients that are kept"),
        pytest.param(WithNewOptimizers, {}, id="new optimizers"),
    ],
)
def test_regularizer_counts_only_batches_with_a_loss(kind: type[Regularized], options: Any) -> None:
    ends = []
    for by_callback in (False, True):
        torch.manual_seed(0)
        module = kind()
        if not by_callback:
            module.term = Quartic(0.1)
        callback = SpectralCollapseCallback(
            collapse=NEVER, interventions=[Quartic(0.1)] if by_callback else [], loss_fn=cross_entropy
        )
        fitted = half_precision() if options == "scaler" else options
        trainer(callback, max_epochs=2, **fitted).fit(module, loader(batches=5))
        ends.append(weights(module))
    torch.manual_seed(0)
    plain = kind()
    trainer(max_epochs=2, **(half_precision() if options == "scaler" else options)).fit(plain, loader(batches=5))
    assert (ends[0] - ends[1]).abs().max() <= 1e-6
    assert (ends[0] - weights(plain)).abs().max() > 1e-3, "the term has an effect"


def test_penalty_is_logged_every_n_steps(tmp_path: Path) -> None:
    logger = MemoryLogger()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Quartic(0.1)])
    module = Classifier()
    first = Quartic(0.1).penalty(module).item()
    trainer(callback, logger=logger, log_every_n_steps=2).fit(module, loader(batches=6))
    penalties = logger.values("plasticity_training/Quartic/penalty")
    assert list(penalties) == [1, 3, 5]
    assert 0 < penalties[1] != first


class NotFinite(Regularizer):
    """A penalty that is not finite at the given calls."""

    def __init__(self, fails: Sequence[int]) -> None:
        super().__init__(1.0)
        self.calls, self.fails = -1, fails

    def penalty(self, model: nn.Module) -> Tensor:
        self.calls += 1
        return weights_term(model) * (float("nan") if self.calls in self.fails else 0.0)


def weights_term(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_regularizer_failure_raises_at_first_then_warns() -> None:
    module = Classifier()
    before = weights(module)
    with pytest.raises(ValueError, match="a gradient is not finite"):
        trainer(SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[NotFinite([0])])).fit(module, loader())
    assert torch.equal(weights(module), before)

    ends = []
    for fails in ([], [1]):
        torch.manual_seed(0)
        module = Classifier()
        fitted = trainer(SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[NotFinite(fails)]))
        if fails:
            with pytest.warns(PlasticityWarning, match="left out of this step, training goes on: a gradient is not"):
                fitted.fit(module, loader())
        else:
            fitted.fit(module, loader())
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_optimizers_of_frozen_parameters_are_not_regularized() -> None:
    class HalfFrozen(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            self.net[0].requires_grad_(False)
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    module = HalfFrozen()
    before = module.net[0].weight.clone(), module.net[2].weight.clone()
    callback = SpectralCollapseCallback(
        collapse=NEVER,
        interventions=[Quartic(1.0)],
        loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
    )
    trainer(callback).fit(module, loader())
    assert callback.history[0].errors == {}
    assert torch.equal(module.net[0].weight, before[0])
    assert not torch.equal(module.net[2].weight, before[1])


def test_regularizer_without_optimizer_does_nothing() -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> None:  # type: ignore[override]
            pass

    with (
        pytest.raises(MisconfigurationException, match=r"makes no optimizer to train .*: pass .*fit_test=None"),
        pytest.warns(UserWarning, match="configure_optimizers. returned .None."),
    ):
        trainer(SpectralCollapseCallback(interventions=[Quartic(1.0)])).fit(Still(), loader())
    callback = SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[Quartic(1.0)])
    with pytest.warns(UserWarning, match="configure_optimizers. returned .None."):
        trainer(callback).fit(Still(), loader())
    assert callback.history[0].errors == {}
