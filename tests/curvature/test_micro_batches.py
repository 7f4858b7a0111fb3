"""Test spectra of a batch in micro-batches and over several processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.curvature import Spectrum, ggn_spectrum, hessian_spectrum
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.matrix_free.micro_batches import MicroBatched
from tests.helpers.processes import in_two_processes

OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 30}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def batch(samples: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(3, (samples,), generator=generator), "scale": torch.tensor(1.5)}


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return batch["scale"] * F.cross_entropy(model(batch["x"]), batch["y"])


def spectra(batch: dict[str, Tensor], **options: Any) -> dict[str, Spectrum]:
    return {
        "hessian": hessian_spectrum(model(), batch, loss_fn, **OPTIONS, **options),
        "ggn": ggn_spectrum(model(), batch, loss_fn, method="lanczos", **OPTIONS, **options),
    }


def assert_equal(actual: Spectrum, expected: Spectrum) -> None:
    torch.testing.assert_close(actual.eigenvalues, expected.eigenvalues, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_micro_batches_give_the_spectrum_of_the_batch(size: int) -> None:
    whole, pieces = spectra(batch()), spectra(batch(), micro_batch_size=size)
    for name, expected in whole.items():
        assert_equal(pieces[name], expected)


def test_products_hold_one_micro_batch_graph_at_a_time() -> None:
    held: list[int] = []
    alive = 0

    class Counted(CurvatureLinearOperator):
        def __init__(self, part: dict[str, Tensor]) -> None:
            nonlocal alive
            super().__init__(parameters, loss_fn(network, part).item())
            alive += 1
            held.append(alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

        def __call__(self, vector: Tensor) -> Tensor:
            return vector

    network = model().eval()
    parameters = list(network.parameters())
    product = MicroBatched(network, batch(), loss_fn, parameters, 2, Counted)
    held.clear()
    vector = torch.randn(product.dimension, dtype=torch.float64)
    # The weights of the micro-batches sum to one.
    torch.testing.assert_close(product(vector), vector)
    assert len(held) == 4
    # The next graph is built before the last one is freed.
    assert max(held) <= 2


def test_loss_that_is_not_a_sample_mean_is_refused() -> None:
    part = batch()
    part["y"][0] = -100
    with pytest.raises(ValueError, match=r"micro_batch_size=2: the loss of the samples .* is no mean over samples"):
        hessian_spectrum(model(), part, loss_fn, micro_batch_size=2)


@pytest.mark.parametrize("kind", ["class weights", "batch statistics"])
def test_loss_is_checked_away_from_the_weights_too(kind: str) -> None:
    """Where every sample has the same loss, any weighted mean is right."""
    network: Any = model()
    nn.init.zeros_(network[4].weight)
    nn.init.zeros_(network[4].bias)
    weight = torch.tensor([1.0, 5.0, 20.0]).double() if kind == "class weights" else None
    if kind == "batch statistics":
        network[1] = nn.BatchNorm1d(6, track_running_stats=False).double()

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], weight=weight)

    with pytest.raises(ValueError, match=r"micro_batch_size=3: .* no mean over samples"):
        hessian_spectrum(network, batch(6), loss_fn, micro_batch_size=3)
    assert not any(parameter.any() for parameter in network[4].parameters()), "the weights are restored after the check"


def test_unsplittable_batches_and_invalid_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size=2: the batch holds no tensor"):
        hessian_spectrum(model(), "text", lambda model, _: loss_fn(model, batch()), micro_batch_size=2)
    with pytest.raises(ValueError, match=r"a tensor of shape \(7, 3\); it must return the mean loss"):
        hessian_spectrum(model(), batch(), lambda model, batch: model(batch["x"]), micro_batch_size=2)


def test_micro_batches_leave_the_model_unchanged() -> None:
    network = model()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    hessian_spectrum(network, batch(), loss_fn, micro_batch_size=2, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_pyhessian_refuses_micro_batches() -> None:
    """With a single process, distributed=True is allowed."""
    with pytest.raises(ValueError, match=r"micro_batch_size=2: PyHessian supports only"):
        hessian_spectrum(model(), batch(), loss_fn, backend="pyhessian", micro_batch_size=2)
    with pytest.raises(ValueError, match=r"micro_batch_size=0 must be a whole number"):
        hessian_spectrum(model(), batch(), loss_fn, micro_batch_size=0)


def spectra_of_rank(rank: int) -> tuple[dict[str, Any], list[str]]:
    """Return the spectra and the errors of one of two processes: rank 0 has five samples, rank 1 has two."""
    whole = batch()
    bounds = slice(0, 5) if rank == 0 else slice(5, 7)
    own = {**whole, "x": whole["x"][bounds], "y": whole["y"][bounds]}
    # The global generators differ between processes, the start vectors must not.
    torch.manual_seed(rank)
    results = {**spectra(own), **{f"{name} in pieces": s for name, s in spectra(own, micro_batch_size=2).items()}}
    results["gram"] = ggn_spectrum(model(), own, loss_fn)
    results["sketch"] = ggn_spectrum(model(), own, loss_fn, sketch=2)
    results["alone"] = ggn_spectrum(model(), own, loss_fn, distributed=False)
    refused = []
    weight = torch.tensor([1.0, 5.0, 20.0]).double()
    for attempt in (
        lambda: hessian_spectrum(model(), own, loss_fn, backend="pyhessian"),
        lambda: hessian_spectrum(model(), own, lambda m, b: F.cross_entropy(m(b["x"]), b["y"], weight=weight)),
        # The loss is infinite on rank 1 only.
        lambda: hessian_spectrum(model(), {**own, "scale": own["scale"] / (1 - rank)}, loss_fn),
    ):
        try:
            attempt()
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    return {name: s.to_dict() for name, s in results.items()}, refused


def test_two_processes_give_the_spectrum_of_all_samples() -> None:
    ranks = in_two_processes(spectra_of_rank)
    whole = batch()
    expected = spectra(whole)
    exact = ggn_spectrum(model(), whole, loss_fn)
    sketch = ggn_spectrum(model(), whole, loss_fn, sketch=2)
    for states, refused in ranks:
        results = {name: Spectrum.from_dict(state) for name, state in states.items()}
        for name, spectrum in expected.items():
            assert_equal(results[name], spectrum)
            assert_equal(results[f"{name} in pieces"], spectrum)
        torch.testing.assert_close(results["gram"].eigenvalues, exact.eigenvalues, rtol=1e-12, atol=1e-14)
        assert results["gram"].learnable_fraction() == pytest.approx(exact.learnable_fraction(), rel=1e-10)
        torch.testing.assert_close(results["sketch"].eigenvalues, sketch.eigenvalues, rtol=1e-12, atol=1e-14)
        assert "distributed=True: PyHessian supports only" in refused[0]
        assert "distributed=True: the loss of the samples together" in refused[1]
        assert len(refused) == 3, "an error on one process is raised on all, so none waits"
    first, second = ({name: Spectrum.from_dict(s) for name, s in states.items()} for states, _ in ranks)
    for name in expected:
        assert torch.equal(first[name].eigenvalues, second[name].eigenvalues), "every process has the same answer"
    shares = 5 / 7 * first["alone"].trace + 2 / 7 * second["alone"].trace
    assert shares == pytest.approx(exact.trace, rel=1e-12)
    assert not math.isclose(first["alone"].trace, second["alone"].trace)
