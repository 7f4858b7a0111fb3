"""Tests of training on two ranks with DDP: both report, decide and repair the same."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, GGNProbe, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.distributed.agreement import backend_device
from lightning_plasticity.interventions import (
    ChurnRegularizer,
    ContinualBackprop,
    Intervention,
    Parseval,
    ReDo,
    Regularizer,
    ShrinkPerturb,
)
from tests.helpers.modules import Classifier, trainer, weights
from tests.helpers.processes import in_two_processes

STEPS = 6


class Decay(Regularizer):
    def penalty(self, model: nn.Module) -> Tensor:
        return self.coefficient * torch.stack([p.pow(4).sum() for p in model.parameters()]).sum()


class RecordingBatches(Classifier):
    """A classifier that keeps the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


class Decayed(RecordingBatches):
    """Adds the penalty of ``Decay`` to its own loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + Decay(0.1).penalty(self)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    size = 8 * STEPS
    x, y = torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)
    # The last sample is of another task.
    return TensorDataset(x, y, torch.arange(size) // (size - 1))


def fit(
    rank: int,
    *interventions: Intervention,
    module: type[RecordingBatches] = RecordingBatches,
    collapse: Collapse = Collapse(above=1e9),  # noqa: B008  (immutable)
    detector: Callable[[], TaskDetector] = TaskDetector,
    samples: int = 8,
    with_callback: bool = True,
) -> dict[str, Any]:
    """Run two fits on one of two ranks; each rank trains on every other sample."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    net = module()
    with torch.no_grad():
        # Every third unit is dead.
        net.net[0].bias[::3] = -100
    callback = SpectralCollapseCallback(
        GGNProbe(samples=samples),
        collapse=collapse,
        interventions=interventions,
        task_detector=detector(),
        monitor_every_n_steps=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            trainer(
                *[callback] * with_callback,
                strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
                devices=2,
            ).fit(net, DataLoader(data(), batch_size=4))
    return {
        "weights": weights(net),
        "noise": torch.rand(3),
        "history": [report.to_dict() for report in callback.history],
        "batches": net.batches,
    }


def without_callback(rank: int) -> dict[str, Any]:
    return fit(rank, with_callback=False)


def with_callback(rank: int) -> dict[str, Any]:
    return fit(rank)


def regularized(rank: int) -> dict[str, Any]:
    return fit(rank, Decay(0.1))


def regularized_in_loss(rank: int) -> dict[str, Any]:
    return fit(rank, module=Decayed, with_callback=False)


def penalised(rank: int) -> dict[str, Any]:
    return fit(rank, ChurnRegularizer(), Parseval(0.1, decoupled=True), ContinualBackprop(0.1, 1, utility="gradient"))


def repaired(rank: int) -> dict[str, Any]:
    always = Collapse(above=1e-9)
    return fit(rank, ReDo(), ShrinkPerturb(0.1, when=2), collapse=always)


def labelled(rank: int) -> dict[str, Any]:
    return fit(rank, detector=lambda: TaskDetector(batch_label=2))


def gathered(rank: int) -> dict[str, Any]:
    return fit(rank, samples=20)


def everything(rank: int) -> dict[str, dict[str, Any]]:
    jobs = (without_callback, with_callback, regularized, regularized_in_loss, penalised, repaired, labelled, gathered)
    return {job.__name__: job(rank) for job in jobs}


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    one, other = in_two_processes(everything)
    return {name: [one[name], other[name]] for name in one}


def test_ranks_end_with_the_same_weights_and_reports(runs: dict[str, list[dict[str, Any]]]) -> None:
    for one, other in runs.values():
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])


def test_callback_leaves_training_bit_identical(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert len(runs["with_callback"][0]["history"]) == 2
    for expected, actual in zip(runs["without_callback"], runs["with_callback"], strict=True):
        assert torch.equal(actual["weights"], expected["weights"])
        assert torch.equal(actual["noise"], expected["noise"])


def test_probe_uses_samples_of_both_ranks(runs: dict[str, list[dict[str, Any]]]) -> None:
    torch.manual_seed(0)
    net = Classifier()
    with torch.no_grad():
        net.net[0].bias[::3] = -100
    x, y = (torch.cat([run["batches"][0][part] for run in runs["with_callback"]]) for part in (0, 1))
    expected = ggn_spectrum(net, (x, y), lambda net, batch: F.cross_entropy(net.net(batch[0]), batch[1]))
    report = runs["with_callback"][0]["history"][0]
    assert report["metrics"]["epsilon_rank"] == expected.epsilon_rank(1e-2)
    assert report["metrics"]["ggn_trace"] == pytest.approx(float(expected.trace), rel=1e-6)
    dead = (net.net[0](x) <= 0).all(0)
    assert report["metrics"]["dead_fraction"] == dead.double().mean() >= 3 / 8


def test_samples_of_both_ranks_are_gathered(runs: dict[str, list[dict[str, Any]]]) -> None:
    """The batches of the ranks have 8 samples together, so that the third one gives the last 4: two of each rank."""
    torch.manual_seed(0)
    net = Classifier()
    with torch.no_grad():
        net.net[0].bias[::3] = -100
    shares = [(step, run, 2 if step == 2 else 4) for step in range(3) for run in runs["gathered"]]
    x, y = (torch.cat([run["batches"][step][part][:size] for step, run, size in shares]) for part in (0, 1))
    expected = ggn_spectrum(net, (x, y), lambda net, batch: F.cross_entropy(net.net(batch[0]), batch[1]))
    report = runs["gathered"][0]["history"][0]
    assert report["metrics"]["probe_samples"] == len(x) == 20
    assert report["metrics"]["ggn_trace"] == pytest.approx(float(expected.trace), rel=1e-6)
    assert torch.equal(runs["gathered"][0]["weights"], runs["without_callback"][0]["weights"])


def test_regularizer_equals_its_term_in_training_step(runs: dict[str, list[dict[str, Any]]]) -> None:
    by_callback, in_loss = runs["regularized"][0]["weights"], runs["regularized_in_loss"][0]["weights"]
    assert (by_callback - in_loss).abs().max() <= 1e-6
    assert (by_callback - runs["without_callback"][0]["weights"]).abs().max() > 1e-3


def test_terms_of_the_batches_of_a_rank_act_on_both(runs: dict[str, list[dict[str, Any]]]) -> None:
    for run, plain in zip(runs["penalised"], runs["with_callback"], strict=True):
        assert not any(report["errors"] for report in run["history"])
        assert not torch.equal(run["weights"], plain["weights"])


def test_repairs_are_the_same_on_both_ranks(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, second = runs["repaired"][0]["history"]
    assert {0, 3, 6} <= set(first["repairs"][0]["units"]["net.0"].tolist())
    assert [repair["step"] for repair in first["repairs"]] == [0, 2, 4, 6]
    assert [repair["step"] for repair in second["repairs"]] == [6, 8, 10, 12]


def test_label_on_one_rank_starts_a_task_on_both(runs: dict[str, list[dict[str, Any]]]) -> None:
    steps = [[step for step, batch in enumerate(run["batches"]) if 1 in batch[2]] for run in runs["labelled"]]
    assert sorted(map(len, steps)) == [0, 2], "one rank has it, in both fits"
    tasks = [(report["task_id"], report["step"]) for report in runs["labelled"][0]["history"]]
    assert tasks == [(0, 0), (1, min(steps[0] + steps[1]))]


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [("cpu", "nccl", "cuda"), ("cuda:1", "nccl", "cuda:1"), ("cpu", "gloo", "cpu"), ("cuda:1", "gloo", "cuda:1")],
)
def test_nccl_sends_cpu_tensors_from_the_gpu(device: str, backend: str, expected: str) -> None:
    assert backend_device(torch.device(device), backend) == torch.device(expected)
