"""Batches in pieces: micro-batches, and the shards of several processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.curvature import Spectrum, ggn_spectrum, hessian_spectrum
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.matrix_free.micro_batches import MicroBatched
from lightning_plasticity.isolation.batches import batch_size, concat_batches, micro_batches, slice_batch
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
def test_micro_batches_give_the_spectrum_of_the_whole_batch(size: int) -> None:
    whole, pieces = spectra(batch()), spectra(batch(), micro_batch_size=size)
    for name, expected in whole.items():
        assert_equal(pieces[name], expected)


def test_a_product_holds_the_graph_of_one_micro_batch_at_a_time() -> None:
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
    torch.testing.assert_close(product(vector), vector)  # the shares add up to one
    assert len(held) == 4
    assert max(held) <= 2  # the next one is built before the last one is let go


def test_losses_that_are_no_mean_over_samples_are_refused() -> None:
    part = batch()
    part["y"][0] = -100
    with pytest.raises(ValueError, match=r"micro_batch_size=2: the loss of the samples .* is no mean over samples"):
        hessian_spectrum(model(), part, loss_fn, micro_batch_size=2)


@pytest.mark.parametrize("kind", ["class weights", "batch statistics"])
def test_such_losses_are_seen_where_every_sample_has_the_same_loss_too(kind: str) -> None:
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
    assert not any(parameter.any() for parameter in network[4].parameters()), "looked at elsewhere, left where it was"


def test_batches_without_tensors_and_losses_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size=2: the batch holds no tensor"):
        hessian_spectrum(model(), "text", lambda model, _: loss_fn(model, batch()), micro_batch_size=2)
    with pytest.raises(ValueError, match=r"a tensor of shape \(7, 3\); it must return the mean loss"):
        hessian_spectrum(model(), batch(), lambda model, batch: model(batch["x"]), micro_batch_size=2)


def test_micro_batches_leave_no_trace_on_the_model() -> None:
    network = model()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    hessian_spectrum(network, batch(), loss_fn, micro_batch_size=2, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_batches_come_apart_and_together() -> None:
    whole = batch()
    pieces = list(micro_batches(whole, 3))
    assert [batch_size(piece) for piece in pieces] == [3, 3, 1]
    for name, tensor in concat_batches(pieces).items():
        assert torch.equal(tensor, whole[name])
    with pytest.raises(ValueError, match=r"batches that hold \[3, 1\] tensors cannot be joined"):
        concat_batches([whole, {"x": whole["x"]}])


def test_a_single_process_is_not_distributed_and_pyhessian_knows_no_pieces() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_size=2: PyHessian knows only"):
        hessian_spectrum(model(), batch(), loss_fn, backend="pyhessian", micro_batch_size=2)
    with pytest.raises(ValueError, match=r"micro_batch_size=0 must be a whole number"):
        hessian_spectrum(model(), batch(), loss_fn, micro_batch_size=0)


def one_of_two(rank: int) -> tuple[dict[str, Any], list[str]]:
    """Rank 0 has five samples, rank 1 two."""
    whole = batch()
    bounds = slice(0, 5) if rank == 0 else slice(5, 7)
    own = {**whole, "x": whole["x"][bounds], "y": whole["y"][bounds]}
    torch.manual_seed(rank)  # the global generators differ, the start vectors must not
    found = {**spectra(own), **{f"{name} in pieces": s for name, s in spectra(own, micro_batch_size=2).items()}}
    found["gram"] = ggn_spectrum(model(), own, loss_fn)
    found["sketch"] = ggn_spectrum(model(), own, loss_fn, sketch=2)
    found["alone"] = ggn_spectrum(model(), own, loss_fn, distributed=False)
    refused = []
    weight = torch.tensor([1.0, 5.0, 20.0]).double()
    for attempt in (
        lambda: hessian_spectrum(model(), own, loss_fn, backend="pyhessian"),
        lambda: hessian_spectrum(model(), own, lambda m, b: F.cross_entropy(m(b["x"]), b["y"], weight=weight)),
        lambda: hessian_spectrum(model(), {**own, "scale": own["scale"] / (1 - rank)}, loss_fn),  # infinite on one
    ):
        try:
            attempt()
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    return {name: s.to_dict() for name, s in found.items()}, refused


def test_two_processes_give_the_spectrum_of_all_samples() -> None:
    results = in_two_processes(one_of_two)
    whole = batch()
    expected = spectra(whole)
    exact = ggn_spectrum(model(), whole, loss_fn)
    sketch = ggn_spectrum(model(), whole, loss_fn, sketch=2)
    for states, refused in results:
        found = {name: Spectrum.from_dict(state) for name, state in states.items()}
        for name, spectrum in expected.items():
            assert_equal(found[name], spectrum)
            assert_equal(found[f"{name} in pieces"], spectrum)
        torch.testing.assert_close(found["gram"].eigenvalues, exact.eigenvalues, rtol=1e-12, atol=1e-14)
        assert found["gram"].learnable_fraction() == pytest.approx(exact.learnable_fraction(), rel=1e-10)
        torch.testing.assert_close(found["sketch"].eigenvalues, sketch.eigenvalues, rtol=1e-12, atol=1e-14)
        assert "distributed=True: PyHessian knows only" in refused[0]
        assert "distributed=True: the loss of the samples together" in refused[1]
        assert len(refused) == 3, "all processes fail where one does: none waits for the others"
    first, second = ({name: Spectrum.from_dict(s) for name, s in states.items()} for states, _ in results)
    for name in expected:
        assert torch.equal(first[name].eigenvalues, second[name].eigenvalues), "every process has the same answer"
    shares = 5 / 7 * first["alone"].trace + 2 / 7 * second["alone"].trace
    assert shares == pytest.approx(exact.trace, rel=1e-12)
    assert not math.isclose(first["alone"].trace, second["alone"].trace)


def sequences(n: int) -> list[Tensor]:
    return [torch.full((20 + i,), float(i)) for i in range(n)]


SAMPLES: dict[str, Callable[[int], Any]] = {
    "of one length": lambda n: ([torch.full((40,), float(i)) for i in range(n)], torch.arange(n)),
    "of different lengths": lambda n: {"x": tuple(sequences(n)), "y": torch.arange(n)},
    "several of each": lambda n: [torch.ones(()), [{"x": x, "at": x[:5]} for x in sequences(n)], torch.arange(n)],
    "two lists": lambda n: (sequences(n), [torch.tensor(i) for i in range(n)], torch.arange(n)),
    "two views": lambda n: [[torch.arange(n), torch.zeros(n, 40)], torch.arange(n)],
    "two loaders": lambda n: [[torch.arange(n), torch.arange(n)], [torch.arange(n), torch.arange(n)]],
    "inputs and labels": lambda n: [torch.zeros(n, 4), torch.arange(n)],
}
"""Batches of so many samples."""


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("n", [1, 3, 4, 8, 11])
def test_the_first_samples_of_a_batch_are_the_smaller_batch_and_pieces_join_again(name: str, n: int) -> None:
    make = SAMPLES[name]
    whole = make(n)
    assert batch_size(whole) == n
    for samples in range(1, n + 1):
        assert_same(slice_batch(whole, samples), make(samples))
        assert_same(concat_batches(list(micro_batches(whole, samples))), whole)


def test_two_views_beside_two_numbers_are_not_two_samples() -> None:
    views = [torch.zeros(8, 3), torch.zeros(8, 3)]
    assert batch_size([views, torch.zeros(8), torch.ones(2)]) == 8


def test_two_features_of_the_edges_of_a_graph_are_not_two_samples() -> None:
    nodes, edges = torch.zeros(100, 3), torch.zeros(2, 300)
    assert batch_size((nodes, edges, [torch.zeros(300), torch.zeros(300)], torch.zeros(100))) == 100


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_of_sparse_tensors_the_first_samples_are_those_of_the_dense_ones(layout: torch.layout) -> None:
    x, y = torch.eye(7).roll(1, 0), torch.arange(7)
    for samples in (5, 7, 9):
        some, labels = slice_batch((x.to_sparse(layout=layout), y), samples)
        assert (some.layout, len(labels)) == (layout, min(samples, 7))
        assert torch.equal(some.to_dense(), x[:samples])


def test_a_tuple_of_different_things_is_no_list_of_samples() -> None:
    labels = torch.arange(3)
    mixed = (torch.zeros(3, 2), (labels, labels.flip(0), torch.tensor(0.3)))
    assert batch_size(mixed) == 3
    assert [part.tolist() for part in slice_batch(mixed, 2)[1][:2]] == [[0, 1], [2, 1]]
    assert batch_size({"labelled": (torch.zeros(16, 3), torch.zeros(16)), "others": torch.zeros(2, 3)}) == 16
