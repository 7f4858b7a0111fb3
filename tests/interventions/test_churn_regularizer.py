"""Check ChurnRegularizer against its formula with copies of earlier weights, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import SpectralCollapseCallback, TaskDetector
from lightning_plasticity.activations import loss_arguments
from lightning_plasticity.interventions import ChurnRegularizer
from tests.helpers.interventions_in_training import NEVER
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_two_processes
from tests.helpers.usages import StatefulClassifier, convolutional


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 4, generator=generator).double(), torch.randn(6, 3, generator=generator).double())
        for _ in range(count)
    ]


@pytest.mark.parametrize("is_loss", [False, True])
def test_term_and_gradient_equal_the_formula(is_loss: bool) -> None:
    """Whether ``forward`` returns the outputs, or computes a loss of them and of targets."""
    model, regularizer = network(), ChurnRegularizer(0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    before: list[nn.Sequential] = []
    for number, (x, y) in enumerate(data := batches(6)):
        penalty = regularizer.penalty(model)
        if number < 2:
            assert penalty.item() == 0
        else:
            reference = data[number - 2][0]
            expected = 0.7 * F.mse_loss(model(reference), before[number - 1](reference).detach())
            assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
            parameters = list(model.parameters())
            gradients = [torch.autograd.grad(term, parameters, retain_graph=True) for term in (penalty, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)
        before.append(copy.deepcopy(model))
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + penalty).backward()
        optimizer.step()

        def forward(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Any:
            return F.mse_loss(model(x), y) if is_loss else {"outputs": model(x)}

        regularizer.after_step(model, forward=forward)


def ready(model: nn.Module, regularizer: ChurnRegularizer, forward: Any) -> ChurnRegularizer:
    """Bring a regularizer to where it has a term, and move the model."""
    for _ in range(2):
        regularizer.after_step(model, forward=forward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.ones_like(parameter))
    return regularizer


def test_only_some_entries_of_large_outputs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_arguments, "_MAX_ENTRIES", 9)
    model = network()
    old, ((x, _),) = copy.deepcopy(model), batches(1)
    penalty = ready(model, ChurnRegularizer(), lambda model: model(x)).penalty(model)
    expected = (model(x) - old(x)).flatten()[::3].square().mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)


def test_masked_outputs_have_not_moved() -> None:
    model, mask = network(), torch.tensor([0.0, -torch.inf, 0.0]).double()
    ((x, _),) = batches(1)
    penalty = ready(model, ChurnRegularizer(), lambda model: model(x) + mask).penalty(model)
    assert penalty.isfinite()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(penalty, list(model.parameters())))


def test_frozen_and_excluded_parameters_get_no_gradient() -> None:
    model = network()
    ((x, _),) = batches(1)
    model[0].bias.requires_grad_(False)
    regularizer = ready(model, ChurnRegularizer(exclude=["2.weight"]), lambda model: model(x))
    regularizer.penalty(model).backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight", "2.bias"]


# Side effects


class Noisy(nn.Module):
    """Draws random numbers of all kinds, normalises by its batch, drops units, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return self.net(x + noise)


def test_weights_alone_make_churn_and_no_trace_is_left() -> None:
    model, x = Noisy(), torch.randn(6, 4)
    regularizer = ChurnRegularizer()
    regularizer.start(model, forward=lambda model: model(x))
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(2):
        regularizer.after_step(model, forward=lambda model: model(x))
    assert regularizer.penalty(model).item() == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    assert model.calls == 0
    assert all(part.training for part in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_copy_is_run_with_the_weights_of_the_model() -> None:
    model, regularizer = network(), ChurnRegularizer(0.7)
    old, ((x, _),) = copy.deepcopy(model), batches(1)
    runs: list[nn.Module] = []

    def forward(run: nn.Module) -> Any:
        runs.append(run)
        return run(x)

    regularizer.start(model, forward=forward, make_copy=lambda: copy.deepcopy(model))
    ready(model, regularizer, forward)
    expected = 0.7 * F.mse_loss(model(x), old(x).detach())
    penalty, parameters = regularizer.penalty(model), list(model.parameters())
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(term, parameters) for term in (penalty, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-15)
    assert len(set(map(id, runs))) == 1
    assert runs[0] is not model


# In the callback


class BySGD(Classifier):
    """A module that is trained by SGD, and records its batches and the weights before each step."""

    recomputes = False

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])
        self.states.append(copy.deepcopy(self.state_dict()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = checkpoint(self.net, batch[0], use_reentrant=False) if self.recomputes else self.net(batch[0])
        return F.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class ByFormula(BySGD):
    """The same with the term in its ``training_step``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        # The callback runs copies of the module, too, of which the first batches have no churn.
        if batch_idx < 2:
            return loss
        reference, old = self.batches[-3], copy.deepcopy(self.net)
        old.load_state_dict({name.removeprefix("net."): value for name, value in self.states[-2].items()})
        return loss + 3 * F.mse_loss(self.net(reference), old(reference).detach())


class Recomputing(BySGD):
    """The same with activations that are recomputed in the backward pass."""

    recomputes = True


@pytest.mark.parametrize("kind", [BySGD, Recomputing])
def test_callback_equals_the_term_in_training_step(kind: type[BySGD]) -> None:
    ends = []
    for module_kind, interventions in ((kind, [ChurnRegularizer(3)]), (ByFormula, []), (BySGD, [])):
        torch.manual_seed(0)
        module = module_kind()
        callback = SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        trainer(callback).fit(module, loader(batches=6))
        assert not callback.history[0].errors
        ends.append(weights(module))
    assert (ends[0] - ends[1]).abs().max() <= 1e-6
    assert (ends[1] - ends[2]).abs().max() > 1e-3, "the term has an effect"


def test_zero_coefficient_leaves_no_trace_in_training() -> None:
    ends, rows = [], []
    for interventions in ([ChurnRegularizer(0)], []):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        module, logger = StatefulClassifier(convolutional()), MemoryLogger()
        callback = SpectralCollapseCallback(collapse=NEVER, interventions=interventions)
        data = TensorDataset(torch.randn(48, 1, 6, 6), torch.randint(3, (48,)))
        trainer(callback, logger=logger, max_epochs=2).fit(module, DataLoader(data, batch_size=8, shuffle=True))
        ends.append((module.state_dict(), module.noise, module.steps_seen, [loss.item() for loss in module.outputs]))
        rows.append([row for row in logger.rows if not any(key.startswith("plasticity") for key in row)])
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert ends[0][1:] == ends[1][1:]
    assert rows[0] == rows[1]


def test_tasks_start_without_a_term() -> None:
    logger = MemoryLogger()
    detector = TaskDetector(every_n_epochs=1)
    callback = SpectralCollapseCallback(
        collapse=NEVER, interventions=[ChurnRegularizer()], task_detector=detector, monitor=False
    )
    trainer(callback, logger=logger, max_epochs=2).fit(Classifier(), loader(batches=4))
    penalties = list(logger.values("plasticity_training/ChurnRegularizer/penalty").values())
    assert [penalty > 0 for penalty in penalties] == [False, False, True, True] * 2


def gradients_on_a_rank(rank: int) -> Any:
    """Return the term and its gradients on each of two ranks, which have batches of their own."""
    model = network()
    old, ((x, _),) = copy.deepcopy(model), batches(1, seed=rank)
    penalty = ready(model, ChurnRegularizer(), lambda model: model(x)).penalty(model)
    expected = F.mse_loss(model(x), old(x).detach())
    return [
        [term.detach(), *torch.autograd.grad(term, list(model.parameters()), retain_graph=True)]
        for term in (penalty, expected)
    ]


def test_ranks_average_their_terms_and_gradients() -> None:
    (first, first_expected), (second, second_expected) = in_two_processes(gradients_on_a_rank)
    assert not torch.equal(first_expected[0], second_expected[0])
    for one, other, *expected in zip(first, second, first_expected, second_expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, sum(expected) / 2, rtol=1e-11, atol=1e-15)


# Errors


def test_forward_without_outputs_raises_at_the_start() -> None:
    model = network()
    with pytest.raises(ValueError, match="ChurnRegularizer: Sequential has no outputs that depend on its weights"):
        ChurnRegularizer().start(model, forward=lambda model: model(torch.ones(2, 4).double()).argmax())


def test_outputs_that_change_their_shape_are_named() -> None:
    model, sizes = network(), iter((4, 4, 5))
    regularizer = ready(model, ChurnRegularizer(), lambda model: model(torch.ones(next(sizes), 4).double()))
    with pytest.raises(ValueError, match="Sequential has other outputs on a batch than a step ago"):
        regularizer.penalty(model)
