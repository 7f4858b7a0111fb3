"""States of the monitor: accumulation, bounded memory, saving and precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity import functional as P
from lightning_plasticity.functional.ranks import leading_count, singular_values_of_moments
from tests.helpers.monitored import X, mlp
from tests.metrics.test_functional import numpy_cloned, numpy_effective_rank


def activations(samples: int, units: int, rank: int) -> Tensor:
    return torch.randn(samples, rank) @ torch.randn(rank, units)


def test_layers_may_appear_later_and_vanish() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)])

        def forward(self, x: Tensor) -> Tensor:
            for part in list(self.parts)[:-1]:
                x = F.relu(part(x))
            return self.parts[-1](x)

    model = Changing()
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    model.parts.insert(1, nn.Linear(8, 8))
    with monitor:
        model(X)
        # The network changes while the monitor is attached.
        model.parts.insert(1, nn.Linear(8, 8))
        model(X)
    assert {name: layer.samples for name, layer in monitor.layers.items()} == {
        "parts.0": 3 * len(X),
        "parts.1": 2 * len(X),
        "relu": len(X),
    }
    monitor.reset()
    assert monitor.layers == {}
    del model.parts[1:3]
    with monitor:
        model(X)
    assert list(monitor.layers) == ["parts.0"]
    assert not any("parts.1" in name for name in monitor.compute())


def test_width_may_change_only_after_a_reset() -> None:
    monitor = PlasticityMonitor(max_samples=16)
    monitor.update({"a": torch.ones(9, 4)})
    with pytest.raises(ValueError, match=r"layer 'a' had 4 units and has 20 now: reset\(\) the monitor"):
        monitor.update({"a": torch.ones(9, 20)})
    # Wider than max_samples, and narrower again.
    for width in (20, 5):
        monitor.reset()
        monitor.update({"a": torch.randn(9, width)})
        assert monitor.layers["a"].units == width
        assert monitor.compute()["effective_rank/a"] > 1


def test_batches_add_up_and_modes_stay() -> None:
    model = mlp(8).eval()
    model[0].train()
    monitor = PlasticityMonitor(model)
    with monitor:
        for part in X.split(5):
            model(part)
    assert [module.training for module in model] == [True, False, False]
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(
        numpy_effective_rank(torch.relu(model[0](X)).detach().double().numpy()), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision(dtype: torch.dtype) -> None:
    model, inputs = mlp(8).to(dtype), X.to(dtype)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(inputs)
    h = torch.relu(model[0](inputs)).detach().double().numpy()
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(numpy_effective_rank(h), rel=1e-6)


def test_autocast_does_not_reach_the_statistics() -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with monitor, torch.autocast("cpu", torch.bfloat16):
        model(X)
        h = torch.relu(model[0](X))
    assert h.dtype == torch.bfloat16
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(
        numpy_effective_rank(h.double().detach().numpy()), rel=1e-6
    )


def test_nan_is_reported_for_the_layer_and_over_all() -> None:
    model = mlp(8, 6)
    monitor = PlasticityMonitor(model)
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with monitor:
        model(X)
    values = monitor.compute()
    for measure in monitor.measures:
        assert values[f"{measure}/0"].isfinite()
        assert values[f"{measure}/2"].isnan()
        assert values[measure].isnan()


def test_dead_network_is_dormant_and_not_nan() -> None:
    model = mlp(8)
    nn.init.constant_(model[0].bias, -100.0)
    monitor = PlasticityMonitor(model)
    with monitor:
        model(X)
    values = {name: value.item() for name, value in monitor.compute().items() if "/" not in name}
    assert values == {
        "dormant_fraction": 1,
        "dead_fraction": 1,
        "cloned_fraction": 0,
        "effective_rank": 0,
        "stable_rank": 0,
        "srank": 0,
        "feature_norm": 0,
    }


def test_no_layers_give_nan() -> None:
    monitor = PlasticityMonitor(nn.Linear(4, 2))
    with monitor:
        monitor._network[0](X)
    with pytest.warns(UserWarning, match="was called before"):
        values = monitor.compute()
    assert list(values) == monitor.measures
    assert all(value.isnan() for value in values.values())


def test_wide_layers_are_exact_up_to_max_samples() -> None:
    h = activations(60, 100, 40)
    monitor = PlasticityMonitor(max_samples=64, measures=["effective_rank", "dead_fraction"])
    monitor.update({"wide": h[:25]})
    monitor.update({"wide": h[25:]})
    assert monitor.layers["wide"].ranked_samples == 60
    assert not monitor.layers["wide"].ranks_are_estimates
    assert monitor.compute()["effective_rank/wide"].item() == pytest.approx(
        numpy_effective_rank(h.double().numpy()), rel=1e-6
    )


def test_ranks_beyond_max_samples_are_estimates() -> None:
    monitor = PlasticityMonitor(max_samples=64, measures=["effective_rank", "dead_fraction"])
    h = torch.randn(1000, 100)
    h[:, 0] = 0
    # This sample is beyond max_samples, which bounds only the samples of the ranks.
    h[999, 0] = 1
    for part in h.split(100):
        monitor.update({"wide": part, "narrow": part[:, :10]})
    layer = monitor.layers["wide"]
    assert (layer.samples, layer.ranked_samples, layer.ranks_are_estimates) == (1000, 64, True)
    assert not monitor.layers["narrow"].ranks_are_estimates
    with pytest.warns(UserWarning, match="the ranks of wide are estimates, from 64 samples of at most 4096 units"):
        values = monitor.compute()
    assert values["dead_fraction/wide"] == 0
    stored = sum(row.numel() for row in getattr(monitor, "wide|rows"))
    assert stored == 64 * 100
    kept = torch.cat(getattr(monitor, "wide|rows")).numpy()
    among_them = (kept[:, None] == h[None].double().numpy()).all(2)
    assert among_them.any(1).all(), "they are samples as they were"
    assert among_them.any(0).sum() == 64, "none of them twice"
    assert values["effective_rank/wide"].item() == pytest.approx(numpy_effective_rank(kept), rel=1e-6)


def test_clones_of_wide_layers_are_found_in_some_samples() -> None:
    h = torch.randn(300, 100)
    h[:, 10:40] = 2 * h[:, 50:80] + 0.1 * torch.randn(300, 30)
    monitor = PlasticityMonitor(max_samples=64, measures=["cloned_fraction"])
    for part in h.split(100):
        monitor.update({"wide": part, "narrow": part[:, :60]})
    values = monitor.compute()
    assert values["cloned_fraction/wide"].item() == numpy_cloned(h.double().numpy()) == 0.3
    assert values["cloned_fraction/narrow"].item() == numpy_cloned(h[:, :60].double().numpy()) == 10 / 60
    assert values["cloned_fraction"].item() == pytest.approx(40 / 160)


def test_layers_beyond_max_units_have_no_cloned_fraction() -> None:
    monitor = PlasticityMonitor(max_samples=16, max_units=64, measures=["cloned_fraction"])
    monitor.update({"wide": torch.randn(32, 100), "narrow": torch.ones(32, 10)})
    assert {name: value.item() for name, value in monitor.compute().items()} == {
        "cloned_fraction": 0,
        "cloned_fraction/narrow": 0,
    }


@pytest.mark.parametrize("rank", [3, 30])
def test_random_sums_of_units_keep_the_ranks(rank: int) -> None:
    h = activations(64, 20_000, rank)
    monitor = PlasticityMonitor(max_units=4096, measures=["effective_rank"])
    monitor.update({"wide": h})
    assert monitor.layers["wide"].ranks_are_estimates
    assert getattr(monitor, "wide|rows")[0].shape == (64, 4096)
    with pytest.warns(UserWarning, match="are estimates"):
        value = monitor.compute()["effective_rank/wide"].item()
    assert value == pytest.approx(numpy_effective_rank(h.double().numpy()), rel=0.02)


def test_kept_samples_are_not_all_the_same_token() -> None:
    x = torch.randn(512, 8, 600).relu()
    # Every sequence begins with the same token.
    x[:, 0] = x[0, 0]
    monitor = PlasticityMonitor(max_samples=512)
    monitor.update({"a": x})
    with pytest.warns(UserWarning, match="are estimates"):
        ranks = monitor.compute()
    rows = x.flatten(0, 1).double()[torch.randperm(4096)[:512]]
    values = torch.linalg.svdvals(rows)
    share = values / values.sum()
    expected = torch.exp(-torch.xlogy(share, share).sum()).item()
    assert ranks["effective_rank"].item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("max_samples", [512, 16])
def test_rounding_adds_no_rank(max_samples: int) -> None:
    basis = torch.randn(3, 100, dtype=torch.float64)
    monitor = PlasticityMonitor(max_samples=max_samples)
    total = []
    for _ in range(20):
        h = torch.randn(300, 3, dtype=torch.float64) @ basis
        monitor.update({"a": h})
        total.append(h)
    moments = monitor._moments("a")
    assert (torch.linalg.eigvalsh(moments).abs() > 0).sum() > 3, "there is rounding"
    sigma = singular_values_of_moments(moments)
    assert (sigma > 0).sum() == leading_count(sigma, 0.0) == 3
    assert P.srank(torch.cat(total), 0.0) == 3
    if max_samples == 512:
        exact = np.linalg.svd(torch.cat(total).numpy(), compute_uv=False)[:3]
        share = exact / exact.sum()
        expected = np.exp(-(share * np.log(share)).sum())
        assert monitor.compute()["effective_rank"].item() == pytest.approx(expected, rel=1e-9)


def test_states_load_into_a_new_monitor() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(8, 20)
            self.monitor = PlasticityMonitor(self.net, max_samples=16)
            # Layers that are measured later are saved too.
            self.monitor.persistent(True)

    old, new = Owner(), Owner()
    with old.monitor:
        old.net(X)
    saved = old.state_dict()
    # Loading replaces these states.
    with new.monitor:
        new.net[:-1](X)
        nn.Sequential(nn.Tanh(), nn.Linear(4, 1))(X)
    for _ in range(2):
        assert new.load_state_dict(saved) == ([], [])
        assert new.monitor.layers == old.monitor.layers
        with pytest.warns(UserWarning, match="are estimates"):
            assert new.monitor.compute() == old.monitor.compute()
        # The loaded states accumulate further.
        with new.monitor:
            new.net(X)
        assert new.monitor.layers["0"].samples == 2 * len(X)
    other = PlasticityMonitor(measures=["dormant_fraction"])
    mine = {name.removeprefix("monitor."): state for name, state in saved.items() if name.startswith("monitor")}
    # A monitor with other measures has other states.
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(mine)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\|norm_sum"):
        PlasticityMonitor(max_samples=16).load_state_dict({k: v for k, v in mine.items() if "norm_sum" not in k})


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.set_dtype(torch.float16),
        lambda m: nn.ModuleList([m]).half(),
    ],
)
def test_sums_stay_in_double_precision_after_conversion(
    convert: Callable[[PlasticityMonitor], nn.Module],
) -> None:
    model = mlp(8)
    with PlasticityMonitor(model) as monitor:
        model(X)
    before = monitor.compute()
    convert(monitor)
    monitor._computed = None
    assert monitor.compute() == before
    with monitor:
        model(X)
    assert all(getattr(monitor, state).dtype == torch.float64 for state in monitor._defaults)
    assert monitor.compute()["effective_rank/0"].item() == pytest.approx(before["effective_rank/0"].item(), rel=1e-9)


def test_memory_is_bounded_while_losses_add_up() -> None:
    model = mlp(8, last=nn.Sigmoid())
    total = torch.zeros(())
    with PlasticityMonitor(model) as monitor:
        for _ in range(5):
            total = total + model(X).mean().detach()
        assert monitor._tracker is not None
        assert not monitor._tracker._origins
    assert list(monitor.layers) == ["0"]


def test_memory_is_bounded_while_the_dimension_is_unknown() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(30, 2))
    monitor = PlasticityMonitor(model).attach()
    for _ in range(5):
        model(torch.randn(4, 5, 6))
        assert monitor._tracker is not None
        assert len(monitor._tracker._undecided) == 1
        assert not monitor._tracker._origins
    with pytest.warns(UserWarning, match="no layer before or behind 0 determines"):
        monitor.detach()
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, 5 * 20)
