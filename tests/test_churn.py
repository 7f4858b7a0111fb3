"""Compare the churn of the fit test with dense computations, and check that it leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from lightning_plasticity import Collapse, FitTest, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity import churn as module_of_churn
from lightning_plasticity.activations import loss_arguments
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.isolation.state import repeatable_rng
from tests.helpers.modules import Classifier, loader, trainer

Loss = Callable[[Any, Any], Tensor]


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.ReLU(), nn.Linear(8, 3)).double()


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def reversed_mse(model: Any, batch: Any) -> Tensor:
    """The error with its arguments exchanged: the target, which does not move, comes first."""
    return F.mse_loss(target=model(batch[0]), input=F.one_hot(batch[1], 3).double())


def handwritten(model: Any, batch: Any) -> Tensor:
    return (torch.logsumexp(model(batch[0]), 1) - model(batch[0])[:, 0]).mean()


def data(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


def churn(model: nn.Module, loss_fn: Loss, lr: float = 0.1) -> float:
    context = ProbeContext(model, data(), loss_fn, [torch.optim.SGD(model.parameters(), lr)])
    return FitTest(steps=2).fit(context, 64).churn


def moved(model: nn.Module, loss_fn: Loss, function: Callable[[dict[str, Tensor], Any], Tensor]) -> list[np.ndarray]:
    """Return how far a step of gradient descent on the first 16 samples moves a function on these and the next 16."""
    x, y = data()
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return loss_fn(lambda x: functional_call(model, parameters, x), (x[:16], y[:16]))

    gradient = grad(loss)(before)
    after = {name: before[name] - 0.1 * gradient[name] for name in before}
    batches = [(x[:16], y[:16]), (x[16:32], y[16:32])]
    return [(function(after, batch) - function(before, batch)).numpy() for batch in batches]


@pytest.mark.parametrize("loss_fn", [cross_entropy, reversed_mse])
def test_churn_equals_dense_step(loss_fn: Loss) -> None:
    model = mlp()
    batch, others = moved(model, loss_fn, lambda parameters, batch: functional_call(model, parameters, batch[0]))
    expected = np.sqrt((others**2).sum(1).mean() / (batch**2).sum(1).mean())
    assert churn(model, loss_fn) == pytest.approx(expected, rel=1e-9)


def test_churn_of_a_handwritten_loss_is_that_of_the_loss() -> None:
    model = mlp()

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        return handwritten(lambda x: functional_call(model, parameters, x), batch)

    batch, others = moved(model, handwritten, loss)
    assert churn(model, handwritten) == pytest.approx(abs(others / batch), rel=1e-9)


def test_churn_follows_from_the_tangent_kernel() -> None:
    """Of a short step the movements are the blocks of the kernel times the residual of the batch."""
    model = mlp()
    x, y = data()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    jacobian = jacrev(lambda parameters: functional_call(model, parameters, x[:32]))(parameters)
    rows = torch.cat([each.reshape(96, -1) for each in jacobian.values()], 1)
    residual = functional_call(model, parameters, x[:16]).softmax(1) - F.one_hot(y[:16], 3)
    movement = rows @ rows[:48].T @ residual.flatten()
    expected = (movement[48:].norm() / movement[:48].norm()).item()
    assert churn(model, cross_entropy, lr=1e-5) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=["dropout", "BatchNorm"])
def test_outputs_are_repeatable_in_training_mode(layer: nn.Module) -> None:
    """Without a step nothing moves, whatever dropout draws and running statistics count."""
    model = mlp(layer)
    assert np.isnan(churn(model, cross_entropy, lr=0.0))
    assert churn(model, cross_entropy) > 0


def test_other_samples_do_not_move_if_nothing_is_shared() -> None:
    """Each half of the samples has its own inputs and its own weights."""
    x = torch.block_diag(torch.ones(16, 1), torch.ones(16, 1))
    model = nn.Linear(2, 1, bias=False)
    batch = (x, torch.ones(32, 1))
    context = ProbeContext(
        model, batch, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), [torch.optim.SGD(model.parameters())]
    )
    assert FitTest(steps=1).fit(context, 32).churn == 0


def test_only_some_entries_of_large_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    monkeypatch.setattr(loss_arguments, "_MAX_ENTRIES", 24)
    x, y = data()
    context = ProbeContext(model, (x[:16], y[:16]), cross_entropy)
    (outputs,) = module_of_churn.outputs_on(context, model, [context.batch])
    assert outputs.tensors[0].tolist() == model(x[:16]).flatten()[::3].tolist()


def test_number_of_outputs_that_changes_is_no_error() -> None:
    """Where the step changes which outputs the loss receives, the loss takes their place."""
    calls = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        calls.append(len(calls))
        kept = slice(8 + len(calls))
        return F.cross_entropy(model(batch[0])[kept], batch[1][kept])

    assert churn(mlp(), loss_fn) > 0


def test_loss_of_a_whole_batch_has_no_churn() -> None:
    model = mlp()
    context = ProbeContext(model, data(), cross_entropy, [torch.optim.SGD(model.parameters(), 0.1)])
    assert np.isnan(FitTest(steps=1).fit(replace(context, whole_batch=True), 64).churn)


def test_divergence_has_no_churn() -> None:
    assert np.isnan(churn(mlp(), cross_entropy, lr=1e300))


def test_random_numbers_are_repeated_and_restored() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    drawn = []
    for _ in range(2):
        with repeatable_rng():
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002


def test_churn_is_logged_and_watched() -> None:
    callback = SpectralCollapseCallback(
        collapse=Collapse("churn", above=0.01),
        fit_test=FitTest(steps=2),
        monitor=False,
        task_detector=TaskDetector(every_n_steps=2),
    )
    with pytest.warns(PlasticityWarning, match=r"churn .*, above 0.01"):
        trainer(callback).fit(Classifier(), loader(batches=4))
    first, second = (report.metrics for report in callback.history)
    assert first["churn_vs_initial"] == 1 != second["churn_vs_initial"]
    assert callback.history[1].collapsed
