"""Check decoupled regularizers against AdamO, written out in numpy, and the callback against the same plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import SpectralCollapseCallback
from lightning_plasticity.interventions import Parseval, Regularizer
from lightning_plasticity.interventions.decoupled_steps import DecoupledSteps
from tests.helpers.interventions_in_training import NEVER, ByFusedAdam, cross_entropy
from tests.helpers.modules import Classifier, loader, trainer, weights
from tests.helpers.usages import Quartic, half_precision

RATES = (0.05, 0.02)


def network() -> nn.Sequential:
    """Build a float64 network with a tall, a wide and an excluded matrix."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def isometry_gradient(weight: np.ndarray) -> np.ndarray:
    """Return the gradient of ‖Wᵀ W − I‖² if W has as many rows as columns or more, else of ‖W Wᵀ − I‖²."""
    rows, columns = weight.shape
    if rows >= columns:
        return 4 * weight @ (weight.T @ weight - np.eye(columns))
    return 4 * (weight @ weight.T - np.eye(rows)) @ weight


def test_plain_loop_equals_adamo_in_numpy() -> None:
    model, strength = network(), 0.3
    names = [name for name, _ in model.named_parameters()]
    rates = {name: RATES[0] if name < "2" else RATES[1] for name in names}
    groups = [{"params": [model.get_parameter(name)], "lr": rates[name]} for name in names]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
    regularizer = Parseval(strength, decoupled=True)
    theta = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    first, second = ({name: np.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    for step in range(1, 6):
        x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        regularizer.descend(model, [optimizer])
        task = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        optimizer.step()
        for name, gradient in task.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            mean, variance = first[name] / (1 - 0.9**step), second[name] / (1 - 0.99**step)
            isometry = isometry_gradient(theta[name]) if name in ("0.weight", "2.weight") else 0.0
            adam = mean / (np.sqrt(variance) + 1e-8)
            theta[name] = theta[name] - rates[name] * adam - rates[name] * strength * isometry
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), theta[name], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[parameter]["exp_avg_sq"].numpy(), second[name], rtol=1e-10)


def test_descend_leaves_other_parameters_and_gradients() -> None:
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    Parseval(0.3, decoupled=True).descend(model, [torch.optim.SGD([model[0].weight, model[4].weight], lr=0.1)])
    changed = [not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)]
    assert changed == [True, False, False, False, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


# In the callback


class WithSchedule(Classifier):
    """A module with a learning rate that changes at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: Classifier, regularizer: Regularizer | None, **options: Any) -> list[tuple[Tensor, ...]]:
    """Fit a module and return its batches."""
    batches: list[tuple[Tensor, ...]] = []
    module.on_train_batch_start = lambda batch, _: batches.append(tuple(batch))  # type: ignore[method-assign]
    interventions = [] if regularizer is None else [regularizer]
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=interventions, loss_fn=cross_entropy)
    trainer(callback, **options).fit(module, loader(batches=4))
    return batches


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}],
    ids=["plain", "accumulation", "clipping"],
)
def test_callback_equals_the_plain_loop(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, copied = WithSchedule(), WithSchedule()
    copied.load_state_dict(module.state_dict())
    regularizer = Parseval(0.2, decoupled=True)
    batches = fit(module, regularizer, **options)
    configured = copied.configure_optimizers()
    optimizer, window = configured["optimizer"], options.get("accumulate_grad_batches", 1)
    for number, batch in enumerate(batches, start=1):
        (cross_entropy(copied, batch) / window).backward()
        if number % window:
            continue
        nn.utils.clip_grad_norm_(copied.parameters(), options.get("gradient_clip_val", torch.inf))
        regularizer.descend(copied, [optimizer])
        optimizer.step()
        optimizer.zero_grad()
        configured["lr_scheduler"]["scheduler"].step()
    assert len(batches) == 4
    torch.testing.assert_close(weights(module), weights(copied), rtol=1e-5, atol=1e-7)


class TwoOptimizers(Classifier):
    """A module that steps one of its two optimizers at each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        self.zero_grad()
        self.manual_backward(cross_entropy(self, batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=lr) for index, lr in ((0, 0.1), (2, 0.03))]


def test_each_optimizer_descends_at_its_own_steps() -> None:
    torch.manual_seed(0)
    module, copied = TwoOptimizers(), TwoOptimizers()
    copied.load_state_dict(module.state_dict())
    batches = fit(module, Quartic(0.5, decoupled=True))
    optimizers = copied.configure_optimizers()
    for number, batch in enumerate(batches):
        copied.zero_grad()
        cross_entropy(copied, batch).backward()
        Quartic(0.5).descend(copied, [optimizers[number % 2]])
        optimizers[number % 2].step()
    torch.testing.assert_close(weights(module), weights(copied), rtol=1e-5, atol=1e-7)


class Overflowing(ByFusedAdam):
    """A module whose gradients overflow in all batches but the first."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss * torch.inf if batch_idx else loss


class OverflowingSGD(Overflowing):
    """The same with an optimizer that is not called if the gradients overflow."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [Overflowing, OverflowingSGD])
def test_skipped_steps_change_nothing(kind: type[Classifier]) -> None:
    ends = []
    for limit in (1, 4):
        torch.manual_seed(0)
        module = kind()
        fit(module, Parseval(0.2, decoupled=True), limit_train_batches=limit, **half_precision())
        ends.append(weights(module))
    torch.manual_seed(0)
    assert not torch.equal(ends[0], weights(kind()))
    assert torch.equal(*ends)


def test_decoupled_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    def fitted(epochs: int, path: Path | None = None) -> Tensor:
        torch.manual_seed(0)
        module = Classifier()
        callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Parseval(0.2, decoupled=True)])
        run = trainer(callback, max_epochs=epochs)
        run.fit(module, torch.utils.data.DataLoader(loader().dataset, batch_size=64), ckpt_path=path)
        run.save_checkpoint(tmp_path / "last.ckpt")
        assert not run.optimizers[0]._optimizer_step_post_hooks
        return weights(module)

    whole = fitted(4)
    fitted(2)
    assert torch.equal(fitted(4, tmp_path / "last.ckpt"), whole)


# One step


def scheduled(steps: DecoupledSteps, optimizer: torch.optim.Optimizer, gradients: Sequence[float]) -> None:
    parameters = optimizer.param_groups[0]["params"]
    steps.schedule(optimizer, parameters, [torch.full_like(p, g) for p, g in zip(parameters, gradients, strict=True)])


def test_closure_that_runs_twice_descends_once() -> None:
    parameter, steps = nn.Parameter(torch.ones(2)), DecoupledSteps()
    optimizer = torch.optim.LBFGS([parameter], lr=0.5, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := 0 * parameter.sum() + 1).backward()
        scheduled(steps, optimizer, [2.0])
        return loss

    optimizer.step(closure)
    assert parameter.tolist() == [0.0, 0.0]
    optimizer.step(lambda: 0 * parameter.sum())
    assert parameter.tolist() == [0.0, 0.0], "a gradient is used once"


def test_bad_decoupled_is_named() -> None:
    with pytest.raises(ValueError, match=r"Parseval\(decoupled='yes'\) must be True or False"):
        Parseval(decoupled="yes")  # type: ignore[arg-type]
