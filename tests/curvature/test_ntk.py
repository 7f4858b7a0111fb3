"""The tangent kernel by the way that is affordable, on all output positions or on a random subset."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.curvature import TooManyRowsError, tangent_kernel
from lightning_plasticity.curvature.cost import Budget, ForwardCounter, TooCostlyError
from lightning_plasticity.curvature.exact.gram import gram
from lightning_plasticity.curvature.ntk import KernelMeasurement, measure_within_budget
from lightning_plasticity.curvature.spectrum import Spectrum
from lightning_plasticity.functional import optimization_readiness

N = 6


WIDE = 20_000
"""Width at which passes cost more than all else."""


def tokens(shape: str, width: int = 8) -> tuple[nn.Module, Any, Any]:
    """Return a network with outputs at 5 positions, a batch, and a loss that receives them in a given shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 4)).double()
    x, y = torch.randn(N, 5, 3, dtype=torch.float64), torch.randint(4, (N, 5))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        if shape == "flattened":
            return F.cross_entropy(logits.view(-1, 4), batch[1].view(-1))
        if shape == "channels first":
            return F.cross_entropy(logits.transpose(1, 2), batch[1])
        if shape == "time first":
            return F.cross_entropy(model(batch[0].transpose(0, 1)).flatten(0, 1), batch[1].T.flatten())
        return -logits.log_softmax(-1).gather(2, batch[1][..., None]).mean()

    return model, (x, y), loss_fn


def dense_block(model: nn.Module, batch: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernel and the residual of some positions of every sample, from the full Jacobian."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (batch[0],))[:, positions].flatten()

    jacobian = torch.cat([j.flatten(1) for j in torch.func.jacrev(outputs)(parameters).values()], dim=1)
    logits = model(batch[0]).detach().requires_grad_()
    (residual,) = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), logits)
    return jacobian @ jacobian.T / N, residual[:, positions].flatten()


def fraction(kernel: Tensor, residual: Tensor, steps: int = 100) -> float:
    values, vectors = torch.linalg.eigh(kernel)
    shares = (vectors.T @ residual).square() / residual.square().sum()
    return (shares * -torch.expm1(-2 * steps * values.clamp(min=0) / values[-1])).sum().item()


@pytest.mark.parametrize("shape", ["tokens", "flattened", "time first"])
def test_all_ways_agree(shape: str) -> None:
    model, batch, loss_fn = tokens(shape)
    expected = fraction(*dense_block(model, batch, torch.arange(5)))
    exact = tangent_kernel(model, batch, loss_fn, method="exact", samples=N)
    by_products = tangent_kernel(model, batch, loss_fn, method="lanczos", samples=N, max_products=60)
    assert exact.learnable_fraction() == pytest.approx(expected, abs=1e-10)
    assert by_products.learnable_fraction().lo <= expected <= by_products.learnable_fraction().hi
    assert by_products.lambda_max == pytest.approx(float(exact.lambda_max), rel=1e-3)
    assert tangent_kernel(model, batch, loss_fn, max_rows=119).to_dict().keys() == by_products.to_dict().keys()
    with pytest.raises(TooManyRowsError, match="120 outputs"):
        tangent_kernel(model, batch, loss_fn, method="exact", max_rows=119)


def cross_entropy(outputs: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(outputs, torch.arange(len(x)) % 4)


def mse(outputs: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(outputs, torch.ones(len(x), 4).double())


@pytest.mark.parametrize("loss", [cross_entropy, mse])
@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_squared_residual_is_a_mean_over_samples(loss: Any, method: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(N, 3).double()
    outputs = model(x).detach()
    each = (outputs - 1) / 2 if loss is mse else outputs.softmax(1) - F.one_hot(torch.arange(N) % 4, 4)
    kernel = tangent_kernel(model, x, lambda model, x: loss(model(x), x), method=method)
    assert kernel.squared_residual == pytest.approx(each.square().sum(1).mean().item(), rel=1e-10)


@pytest.mark.parametrize("shape", ["tokens", "channels first", "by hand"])
def test_readiness_is_that_of_the_gradients_of_samples(shape: str) -> None:
    model, (x, y), loss_fn = tokens(shape)
    parameters = list(model.parameters())

    def gradient(batch: Any) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss_fn(model, batch), parameters)])

    each = torch.stack([gradient((x[i : i + 1], y[i : i + 1])) for i in range(N)])
    loss = loss_fn(model, (x, y)).item()
    expected = optimization_readiness(loss, each).item()
    budget = Budget(math.inf, 1.0)
    measured = measure_within_budget(
        model, (x, y), loss_fn, samples=N, max_rows=2048, positions=None, budget=budget, parts={"last": ["2.*"]}
    )
    assert measured.readiness == pytest.approx(expected, rel=1e-9)
    assert math.isnan(within(1e-3, fewest_products=True).readiness)


def test_readiness_is_unknown_where_positions_hide_samples() -> None:
    """Which of the outputs ``(positions × samples, channels)`` belong to a sample cannot be seen."""
    measured = within(math.inf)
    assert measured.products == 0
    assert math.isnan(measured.readiness)


def test_squared_residual_is_that_of_all_positions() -> None:
    model, batch, loss_fn = tokens("tokens")
    some, whole = (
        tangent_kernel(model, batch, loss_fn, method="lanczos", samples=N, positions=count) for count in (N, 5 * N)
    )
    assert some.squared_residual == whole.squared_residual
    _, residual = dense_block(model, batch, torch.arange(5))
    assert whole.squared_residual == pytest.approx(N * residual.square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("shape", ["tokens", "flattened"])
@pytest.mark.parametrize("seed", [0, 1])
def test_positions_are_a_block_of_the_kernel_that_is_equal_for_all_samples(shape: str, seed: int) -> None:
    model, batch, loss_fn = tokens(shape)
    kernel = tangent_kernel(model, batch, loss_fn, method="lanczos", samples=N, positions=2 * N + 1, seed=seed)
    measured = kernel.learnable_fraction()
    drawn = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:2].sort().values
    assert measured.lo <= fraction(*dense_block(model, batch, drawn)) <= measured.hi
    # No other two positions give this number.
    others = [torch.tensor([i, j]) for i in range(5) for j in range(i) if {i, j} != set(drawn.tolist())]
    assert not any(measured.lo <= fraction(*dense_block(model, batch, other)) <= measured.hi for other in others)


def test_operations_are_counted() -> None:
    with ForwardCounter() as counter:
        F.conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)) @ torch.ones(6, 2)
    # Two operations for each multiplication.
    assert counter.flops == 2 * (2 * 5 * 6 * 6 * 27 + 2 * 5 * 6 * 6 * 2)


def test_operations_of_recurrent_layers_are_counted() -> None:
    lstm = nn.LSTM(3, 5, batch_first=True)
    with ForwardCounter() as counter:
        lstm(torch.ones(2, 7, 3))
    assert counter.flops == 2 * 14 * (4 * 5 * 3 + 4 * 5 * 5)


def within(steps: float, *, samples_per_step: float = 1.0, width: int = 8, **options: Any) -> KernelMeasurement:
    model, batch, loss_fn = tokens("flattened", width)
    return measure_within_budget(
        model,
        batch,
        loss_fn,
        samples=N,
        max_rows=options.pop("max_rows", 2048),
        positions=None,
        budget=Budget(steps, samples_per_step),
        **options,
    )


def test_budget_chooses_the_way() -> None:
    model, batch, loss_fn = tokens("flattened")
    exact = within(1000)
    assert exact.products == 0
    assert isinstance(exact.spectrum, Spectrum)
    torch.testing.assert_close(exact.spectrum.eigenvalues, gram(model, batch, loss_fn).spectrum().eigenvalues)
    by_products = within(1000, max_rows=100)
    assert 12 <= by_products.products <= 60
    assert by_products.spectrum is None
    assert by_products.no_gauss_newton is not None
    assert "max_rows=100" in by_products.no_gauss_newton
    fewest = within(1, max_rows=100, fewest_products=True)
    assert fewest.products <= 12
    with pytest.raises(TooCostlyError, match="training steps, more than 10"):
        within(10, max_rows=100, width=WIDE)


def test_fewer_samples_are_no_way_out_of_fixed_costs() -> None:
    small = within(1, max_rows=100)
    assert small.products == 9
    assert small.over_budget


def test_larger_training_steps_allow_more() -> None:
    """The budget is in training steps: if these have more samples, the measurement may take longer."""
    with pytest.raises(TooCostlyError) as small:
        within(10, max_rows=100, width=WIDE, samples_per_step=1.0)
    with pytest.raises(TooCostlyError) as large:
        within(10, max_rows=100, width=WIDE, samples_per_step=1.5)
    assert small.value.affordable < large.value.affordable < 1
