"""Test all metrics against the contract that torchmetrics tests its own metrics against."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_plasticity.diagnostics import DIAGNOSTICS
from lightning_plasticity.metrics import (
    ClonedFraction,
    DeadFraction,
    DormantFraction,
    EffectiveRank,
    FeatureNorm,
    GradientDormantFraction,
    OptimizationReadiness,
    PlasticityMonitor,
    SRank,
    StableRank,
    WeightMagnitude,
)
from tests.helpers.numpy_diagnostics import (
    Array,
    features,
    numpy_cloned,
    numpy_dead,
    numpy_dormant,
    numpy_effective_rank,
    numpy_feature_norm,
    numpy_srank,
    numpy_stable_rank,
    to_matrix,
)
from tests.helpers.processes import WORLD, in_two_processes

matplotlib.use("Agg")

BATCHES = 4


@dataclass(frozen=True)
class Contract:
    """A metric, its input batches and its reference value from NumPy."""

    make: Callable[..., Metric]
    batch: Callable[[int], tuple[Any, ...]]
    reference: Callable[[list[tuple[Any, ...]]], Any]
    corrupt: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda batch: (
        *batch[:-1],
        torch.full_like(batch[-1], math.nan),
    )


def join_batches(batches: list[tuple[Any, ...]]) -> Array:
    return np.concatenate([to_matrix(batch[-1].double().numpy(), 1) for batch in batches])


def feature_contract(make: Callable[..., Metric], reference: Callable[[Array], Any]) -> Contract:
    return Contract(
        make,
        # Batches of different sizes, so that a mean over batches differs from the mean over samples.
        lambda number: (features((9 + 5 * number, 7, 2, 3), 1, seed=number),),
        lambda batches: reference(join_batches(batches)),
    )


def gradient_reference(batches: list[tuple[Any, ...]]) -> float:
    units = np.mean([np.abs(g.double().numpy()).mean((1, 2)) for (g,) in batches], axis=0)
    return float(np.mean(units / units.mean() <= 0.01))


def weight_reference(batches: list[tuple[Any, ...]]) -> float:
    return float(np.abs(np.concatenate([w.double().numpy().ravel() for (w,) in batches])).mean())


def readiness_reference(batches: list[tuple[Any, ...]]) -> float:
    g = np.stack([gradient.double().numpy().ravel() for _, gradient in batches])
    loss = np.mean([loss for loss, _ in batches])
    return float((g.mean(0) ** 2).sum() ** 2 / (loss * (g**2).sum(1).mean()))


def monitor_reference(batches: list[tuple[Any, ...]]) -> dict[str, Any]:
    references = {
        "dormant_fraction": numpy_dormant,
        "dead_fraction": numpy_dead,
        "cloned_fraction": numpy_cloned,
        "effective_rank": numpy_effective_rank,
        "stable_rank": numpy_stable_rank,
        "srank": numpy_srank,
        "feature_norm": numpy_feature_norm,
    }
    f = {
        layer: np.concatenate([to_matrix(batch[layer].double().numpy(), 1) for (batch,) in batches])
        for layer in ("a", "b")
    }
    values: dict[str, Any] = {}
    for name, reference in references.items():
        a, b = reference(f["a"]), reference(f["b"])
        values[name] = (7 * a + 14 * b) / 21 if DIAGNOSTICS[name].is_fraction else (a + b) / 2
        values |= {f"{name}/a": a, f"{name}/b": b}
    return values


def monitor_batch(number: int) -> tuple[Any, ...]:
    a, b, c = (features((9 + 5 * number, 7, 2, 3), 1, seed=number + offset) for offset in (0, 10, 20))
    return ({"a": a, "b": torch.cat([b, c], 1)},)


CONTRACTS = {
    "DormantFraction": feature_contract(DormantFraction, numpy_dormant),
    "DormantFraction-0_2": feature_contract(lambda **k: DormantFraction(0.2, **k), lambda f: numpy_dormant(f, 0.2)),
    "DeadFraction": feature_contract(DeadFraction, numpy_dead),
    "ClonedFraction": feature_contract(ClonedFraction, numpy_cloned),
    "EffectiveRank": feature_contract(EffectiveRank, numpy_effective_rank),
    "StableRank": feature_contract(StableRank, numpy_stable_rank),
    "SRank": feature_contract(SRank, numpy_srank),
    "FeatureNorm": feature_contract(FeatureNorm, numpy_feature_norm),
    "GradientDormantFraction": Contract(
        GradientDormantFraction,
        lambda number: (
            torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(number))
            * torch.tensor([1.0, 0, 2, 1e-3, 1, 5]).reshape(6, 1, 1),
        ),
        gradient_reference,
    ),
    "WeightMagnitude": Contract(
        WeightMagnitude,
        lambda number: (torch.randn(3 + number, 4, generator=torch.Generator().manual_seed(number)),),
        weight_reference,
    ),
    "OptimizationReadiness": Contract(
        OptimizationReadiness,
        lambda number: (1.0 + number, 0.5 + torch.randn(3, 4, generator=torch.Generator().manual_seed(number))),
        readiness_reference,
    ),
    "PlasticityMonitor": Contract(
        PlasticityMonitor,
        monitor_batch,
        monitor_reference,
        lambda batch: ({name: torch.full_like(h, math.nan) for name, h in batch[0].items()},),
    ),
}

every_metric = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
every_scalar = pytest.mark.parametrize(
    "contract", [c for name, c in CONTRACTS.items() if name != "PlasticityMonitor"], ids=list(CONTRACTS)[:-1]
)


def assert_value(value: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert set(value) == set(expected)
        for name in expected:
            assert_value(value[name], expected[name])
    else:
        assert isinstance(value, Tensor)
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(float(expected), rel=1e-6, nan_ok=True)


def cast_batch(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype)
    if isinstance(batch, dict):
        return {name: cast_batch(value, dtype) for name, value in batch.items()}
    return tuple(cast_batch(value, dtype) for value in batch) if isinstance(batch, tuple) else batch


def make_batches(contract: Contract, count: int = BATCHES) -> list[tuple[Any, ...]]:
    return [contract.batch(number) for number in range(count)]


@every_metric
def test_updates_accumulate_to_reference(contract: Contract) -> None:
    metric, batches = contract.make(), make_batches(contract)
    for batch in batches:
        metric.update(*batch)
    assert_value(metric.compute(), contract.reference(batches))


@every_metric
def test_forward_returns_value_of_batch(contract: Contract) -> None:
    metric, batches = contract.make(), make_batches(contract)
    for batch in batches:
        assert_value(metric(*batch), contract.reference([batch]))
    assert_value(metric.compute(), contract.reference(batches))
    assert metric.update_count == len(batches)


@every_metric
def test_reset(contract: Contract) -> None:
    metric, batches = contract.make(), make_batches(contract)
    metric.update(*batches[0])
    metric.compute()
    metric.reset()
    metric.update(*batches[1])
    assert_value(metric.compute(), contract.reference(batches[1:2]))


@every_metric
@pytest.mark.parametrize("copy", [lambda m: pickle.loads(pickle.dumps(m)), deepcopy, lambda m: m.clone()])
def test_copies_are_independent(contract: Contract, copy: Callable[[Metric], Metric]) -> None:
    metric, batches = contract.make(), make_batches(contract)
    metric.update(*batches[0])
    other = copy(metric)
    assert type(other) is type(metric)
    other.update(*batches[1])
    assert_value(other.compute(), contract.reference(batches[:2]))
    assert_value(metric.compute(), contract.reference(batches[:1]))


@every_metric
def test_flags_constant_and_state_not_persistent(contract: Contract) -> None:
    metric = contract.make()
    for flag in ("is_differentiable", "higher_is_better", "full_state_update", "plot_lower_bound", "plot_upper_bound"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, flag, True)
    metric.update(*contract.batch(0))
    assert metric.state_dict() == {}
    assert isinstance(hash(metric), int)
    assert metric.is_differentiable is False


@every_scalar
def test_full_state_update_is_not_needed(contract: Contract) -> None:
    assert contract.make().full_state_update is False
    lean, full = contract.make(), contract.make()
    full.__class__ = type("Full", (type(full),), {"full_state_update": True})
    for batch in make_batches(contract):
        assert lean(*batch).item() == full(*batch).item()
    assert lean.compute().item() == full.compute().item()


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="torchmetrics before 1.5 cannot merge states")
@every_scalar
def test_merge_state(contract: Contract) -> None:
    first, second, batches = contract.make(), contract.make(), make_batches(contract)
    first.update(*batches[0])
    second.update(*batches[1])
    first.merge_state(second)
    assert_value(first.compute(), contract.reference(batches[:2]))
    empty = contract.make()
    empty.merge_state(second)
    empty.update(*batches[2])
    assert_value(empty.compute(), contract.reference(batches[1:3]))


@every_scalar
def test_load_persistent_state(contract: Contract) -> None:
    metric, batches = contract.make(), make_batches(contract)
    metric.persistent(True)
    metric.update(*batches[0])
    other = contract.make()
    other.load_state_dict(metric.state_dict())
    other.update(*batches[1])
    assert_value(other.compute(), contract.reference(batches[:2]))


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(contract: Contract, dtype: torch.dtype) -> None:
    metric = contract.make()
    metric.set_dtype(dtype)
    batches = [cast_batch(batch, dtype) for batch in make_batches(contract)]
    for batch in batches:
        metric.update(*batch)
    assert_value(metric.compute(), contract.reference(batches))


@every_metric
def test_results_and_states_are_detached(contract: Contract) -> None:
    metric = contract.make()

    def require_grad(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: require_grad(h) for name, h in value.items()}
        return value.clone().requires_grad_() if isinstance(value, Tensor) else value

    value = metric(*(require_grad(value) for value in contract.batch(0)))
    results = value.values() if isinstance(value, dict) else [value]
    assert not any(result.requires_grad for result in results)
    assert not any(
        state.requires_grad for name in metric._defaults if isinstance(state := getattr(metric, name), Tensor)
    )


@every_metric
def test_nan_input_makes_result_nan_until_reset(contract: Contract) -> None:
    metric, batches = contract.make(), make_batches(contract)
    metric.update(*batches[0])
    metric.update(*contract.corrupt(batches[1]))
    metric.update(*batches[2])
    value = metric.compute()
    assert all(result.isnan() for result in (value.values() if isinstance(value, dict) else [value]))
    metric.reset()
    metric.update(*batches[0])
    assert_value(metric.compute(), contract.reference(batches[:1]))


@every_scalar
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_one_infinite_entry_makes_result_nan(contract: Contract, bad: float) -> None:
    metric = contract.make()
    *rest, values = contract.batch(0)
    values = values.clone()
    values.view(-1)[3] = bad
    metric.update(*rest, values)
    assert metric.compute().isnan()


@every_scalar
def test_compute_without_data_is_nan(contract: Contract) -> None:
    metric = contract.make()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan()


@pytest.mark.parametrize(
    "name", ["DormantFraction", "DeadFraction", "ClonedFraction", "EffectiveRank", "SRank", "FeatureNorm"]
)
def test_batch_without_samples_adds_nothing(name: str) -> None:
    contract = CONTRACTS[name]
    metric, batch = contract.make(), contract.batch(0)
    metric.update(torch.zeros(0, 3))
    assert metric.compute().isnan()
    metric.update(*batch)
    metric.update(torch.zeros(0, 7, 2, 3))
    assert_value(metric.compute(), contract.reference([batch]))


def test_zero_layer_is_dormant_with_rank_zero() -> None:
    zeros = torch.zeros(9, 4)
    for make, expected in ((DormantFraction, 1), (DeadFraction, 1), (GradientDormantFraction, 1), (FeatureNorm, 0)):
        assert make()(zeros).item() == expected
    for make in (EffectiveRank, StableRank, SRank):
        assert make()(zeros).item() == 0
    assert OptimizationReadiness()(0.0, torch.ones(3)).item() == 0


def test_fewer_samples_than_units_warns() -> None:
    metric = EffectiveRank()
    with pytest.warns(UserWarning, match="fewer samples than the 50 units that there are"):
        value = metric(torch.randn(10, 50))
    assert value <= 10
    assert metric.samples == 10


def test_change_of_unit_count_raises() -> None:
    for make in (DormantFraction, EffectiveRank):
        metric = make()
        metric.update(torch.ones(9, 4))
        with pytest.raises(ValueError, match=r"has accumulated 4 units and now gets 5: reset\(\) it first"):
            metric.update(torch.ones(9, 5))
        metric.reset()
        metric.update(torch.ones(9, 5))


def test_module_as_weights_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    loss = model(torch.randn(8, 3)).square().mean()
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert OptimizationReadiness()(loss, model) == OptimizationReadiness()(loss.item(), flat)
    entries = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    assert WeightMagnitude()(model).item() == pytest.approx(entries.abs().mean().item(), rel=1e-12)


def test_invalid_arguments_raise_in_constructor() -> None:
    with pytest.raises(ValueError, match=r"threshold=-1 must be in \[0, 1\]"):
        DormantFraction(-1)
    with pytest.raises(ValueError, match=r"delta=1.5 must be in \[0, 1\)"):
        SRank(1.5)
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `tau`"):
        DormantFraction(tau=0.1)


def test_collection_shares_states() -> None:
    names = ["DormantFraction", "DormantFraction-0_2", "DeadFraction", "EffectiveRank", "StableRank", "SRank"]
    contracts = {name: CONTRACTS[name] for name in [*names, "FeatureNorm"]}
    collection = MetricCollection({name: contract.make() for name, contract in contracts.items()}, prefix="plasticity/")
    batches = make_batches(contracts["FeatureNorm"])
    for batch in batches:
        collection.update(*batch)
    assert_value(
        collection.compute(),
        {f"plasticity/{name}": contract.reference(batches) for name, contract in contracts.items()},
    )
    groups = sorted(sorted(group) for group in collection.compute_groups.values())
    assert groups == [sorted(names[:3]), sorted(names[3:]), ["FeatureNorm"]]


@every_metric
def test_plot_one_or_several_values(contract: Contract) -> None:
    metric = contract.make()
    values = [metric(*batch) for batch in make_batches(contract)]
    for drawn in (None, values[0], values):
        figure, axes = metric.plot() if drawn is None else metric.plot(drawn)
        assert figure is not None
        assert axes.has_data()
        plt.close(figure)


def test_ranks_are_exact_at_condition_1e6() -> None:
    left = torch.linalg.qr(torch.randn(300, 100, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0]
    f = (left * torch.logspace(0, -6, 100, dtype=torch.float64)) @ right
    effective, stable, leading = EffectiveRank(), StableRank(), SRank()
    for metric in (effective, stable, leading):
        for part in f.split(70):
            metric.update(part)
    assert effective.compute().item() == pytest.approx(numpy_effective_rank(f.numpy()), rel=1e-6)
    assert stable.compute().item() == pytest.approx(numpy_stable_rank(f.numpy()), rel=1e-6)
    assert leading.compute().item() == numpy_srank(f.numpy())


# Two processes


def compute_on_rank(rank: int) -> dict[str, Any]:
    """Return the values of every metric in one of two processes, each with half of the batches."""
    results: dict[str, Any] = {}
    for name, contract in CONTRACTS.items():
        batches = make_batches(contract)
        metric = contract.make()
        for batch in batches[rank::WORLD]:
            metric.update(*batch)
        results[name] = metric.compute()
        # The states are unsynchronised between the two calls of compute().
        results[f"{name} again"] = metric.compute()
        metric.update(*batches[rank])
        results[f"{name}, further"] = metric.compute()
        on_step = contract.make(dist_sync_on_step=True)
        results[f"{name}, forward"] = on_step(*batches[rank])
        partial = contract.make()
        if rank == 1:
            partial.update(*batches[0])
        else:
            # Avoid the warning of torchmetrics in the process that has no batch.
            partial._update_count = 1
        results[f"{name}, one without data"] = partial.compute()
    unequal = DormantFraction()
    unequal.update(torch.ones(3, 4 + rank))
    try:
        unequal.compute()
        results["unequal"] = "no error"
    except ValueError as error:
        results["unequal"] = str(error)
    results |= different_layers(rank)
    return results


def different_layers(rank: int) -> dict[str, Any]:
    """Return the values for layers in one process only, in another order, and wider than the cap."""
    wide = torch.randn(20, 30, generator=torch.Generator().manual_seed(rank))
    monitor = PlasticityMonitor(max_samples=16, measures=["effective_rank", "dead_fraction"])
    if rank == 0:
        monitor.update({"b": torch.eye(5), "a": torch.eye(4)})
        monitor.update({"wide": wide[:8]})
    else:
        monitor.update({"a": torch.eye(4), "c": torch.eye(3)})
    return {"layers": monitor.compute()}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Any]]:
    return in_two_processes(compute_on_rank)


@pytest.mark.slow
@every_metric
def test_two_processes_match_one(
    contract: Contract, two_processes: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    name, batches = request.node.callspec.id, make_batches(contract)
    for results in two_processes:
        assert_value(results[name], contract.reference(batches))
        assert_value(results[f"{name} again"], contract.reference(batches))
        assert_value(results[f"{name}, further"], contract.reference([*batches, *batches[:2]]))
        assert_value(results[f"{name}, forward"], contract.reference(batches[:2]))
        assert_value(results[f"{name}, one without data"], contract.reference(batches[:1]))


@pytest.mark.slow
def test_processes_with_different_layers_do_not_deadlock(two_processes: list[dict[str, Any]]) -> None:
    wide = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))[:8].double().numpy()
    ranks = {"a": 4, "b": 5, "c": 3, "wide": numpy_effective_rank(wide)}
    for results in two_processes:
        layers = results["layers"]
        assert {name.partition("/")[2] for name in layers} == {"", *ranks}
        for layer, rank in ranks.items():
            assert layers[f"effective_rank/{layer}"].item() == pytest.approx(rank, rel=1e-6)
        assert layers["effective_rank"].item() == pytest.approx(np.mean(list(ranks.values())), rel=1e-6)


@pytest.mark.slow
def test_different_unit_counts_raise_in_all_processes(two_processes: list[dict[str, Any]]) -> None:
    for results in two_processes:
        assert results["unequal"] == (
            "the processes give DormantFraction different numbers of units: magnitude_sum has the shapes [(4,), (5,)]"
        )
