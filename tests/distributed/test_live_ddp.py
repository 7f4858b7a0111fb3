"""Test the live fit test on two ranks with DDP: a copy of each rank, one fresh network, one verdict."""

import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, FitTest, SpectralCollapseCallback
from lightning_plasticity.distributed.data_parallel import average_gradients
from lightning_plasticity.engine.shadow_run import ShadowRun
from lightning_plasticity.interventions import Intervention, ReDo
from tests.helpers.modules import NEVER, Classifier, trainer, weights
from tests.helpers.processes import in_two_processes
from tests.helpers.usages import Quartic

BATCHES = 12


class Logging(Classifier):
    """Logs its accuracy, keeps its batches, and clips as the Trainer says."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.log("train_acc", (logits.argmax(1) == batch[1]).float().mean())
        return F.cross_entropy(logits, batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Restarting(Logging):
    """Normalizes by a mean of past batches; begins each fit anew, since it trains in the second one only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(4))
        self.losses: list[float] = []

    def on_train_start(self) -> None:
        self.moments.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.moments = 0.5 * self.moments + 0.5 * batch[0].mean(0)
        return super().training_step([batch[0] - self.moments, batch[1]], batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item() * self.trainer.accumulate_grad_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1 if hasattr(self, "trains") else 0.0, momentum=0.9)

    def on_train_end(self) -> None:
        self.trains = True


class Failing(Callback):
    """Lets the comparison fail on the second rank, at the third batch of the second fit."""

    def __init__(self, rank: int) -> None:
        self.rank, self.batches = rank, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1
        if self.rank == 1 and self.batches == BATCHES + 3:
            ShadowRun._loss_of_network = _fail  # type: ignore[method-assign]


def _fail(*_: Any) -> Any:
    raise MemoryError


def fit(
    rank: int,
    *others: Callback,
    interventions: tuple[Intervention, ...] = (),
    rule: Collapse = NEVER,
    with_callback: bool = True,
    module: type[Logging] = Logging,
    accumulated: int = 1,
) -> dict[str, Any]:
    """Train two tasks on one of two ranks, each on batches of its own."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29513", WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    net = module()
    start = weights(net)
    callback = SpectralCollapseCallback(
        fit_test=FitTest(live=True, steps=10, metric="train_acc"), collapse=rule, interventions=interventions
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            size = 16 * BATCHES
            data = TensorDataset(torch.randn(size, 4, generator=generator), torch.randint(3, (size,)))
            trainer(
                *others,
                *[callback] * with_callback,
                strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
                devices=2,
                gradient_clip_val=0.5,
                accumulate_grad_batches=accumulated,
            ).fit(net, DataLoader(data, batch_size=8))
    return {
        "start": start,
        "weights": weights(net),
        "noise": torch.rand(3),
        "history": [report.to_dict() for report in callback.history],
        "batches": net.batches,
        "losses": getattr(net, "losses", []),
    }


def averaged(rank: int) -> list[list[float] | None]:
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        parameters[1].grad = torch.ones(2)
    average_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def everything(rank: int) -> dict[str, dict[str, Any]]:
    result = {
        "without": fit(rank, interventions=(), with_callback=False),
        "with": fit(rank),
        "regularized": fit(rank, interventions=(Quartic(0.1),)),
        "repaired": fit(rank, interventions=(ReDo(),), rule=Collapse(above=1e-9)),
    }
    for accumulated in (1, 2):
        result[f"restarting {accumulated}"] = fit(rank, module=Restarting, accumulated=accumulated)
    result["with"]["gradients"] = averaged(rank)
    original = ShadowRun._loss_of_network
    try:
        result["failing"] = fit(rank, Failing(rank))
    finally:
        ShadowRun._loss_of_network = original  # type: ignore[method-assign]
    return result


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    one, other = in_two_processes(everything)
    return {name: [one[name], other[name]] for name in one}


def test_ranks_end_with_the_same_weights_and_reports(runs: dict[str, list[dict[str, Any]]]) -> None:
    for one, other in runs.values():
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])


def test_training_is_bit_identical_on_both_ranks(runs: dict[str, list[dict[str, Any]]]) -> None:
    for expected, actual in zip(runs["without"], runs["with"], strict=True):
        assert torch.equal(actual["weights"], expected["weights"])
        assert torch.equal(actual["noise"], expected["noise"])


@pytest.mark.parametrize(("run", "coefficient"), [("with", 0.0), ("regularized", 0.1)])
def test_fresh_network_learns_from_batches_of_both_ranks(
    runs: dict[str, list[dict[str, Any]]], run: str, coefficient: float
) -> None:
    """It equals a plain loop on the joint batches, whose mean gradient is that of both ranks."""
    net = Logging()
    torch.nn.utils.vector_to_parameters(runs[run][0]["start"].clone(), net.parameters())
    optimizer, losses, accuracies = net.configure_optimizers(), [], []
    for pair in zip(*(rank["batches"][BATCHES : BATCHES + 10] for rank in runs[run]), strict=True):
        x, y = (torch.cat([batch[part] for batch in pair]) for part in (0, 1))
        logits = net.net(x)
        loss = F.cross_entropy(logits, y)
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == y).float().mean().item())
        optimizer.zero_grad()
        (loss + Quartic(coefficient).penalty(net) if coefficient else loss).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    report = runs[run][0]["history"][1]
    assert report["fresh_fit_curve"] == pytest.approx(losses, rel=1e-5)
    assert report["metrics"]["handicap"] > 0
    assert report["metrics"]["live_metric_gap"] != 0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_fresh_network_trains_as_ddp_does(runs: dict[str, list[dict[str, Any]]], accumulated: int) -> None:
    """The network begins the second fit as a fresh one, so that both have the mean training losses of the ranks."""
    one, other = runs[f"restarting {accumulated}"]
    losses = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)][BATCHES : BATCHES + 10]
    report = one["history"][1]
    assert report["fit_curve"] == pytest.approx(losses, rel=1e-6)
    assert report["fresh_fit_curve"] == pytest.approx(losses, rel=1e-6)


def test_repairs_at_the_verdict_are_the_same(runs: dict[str, list[dict[str, Any]]]) -> None:
    reports = runs["repaired"][0]["history"]
    assert [report["collapsed"] for report in reports] == [True, True]
    assert [repair["step"] for repair in reports[1]["repairs"]] == [BATCHES + 9]
    assert {"handicap", "fit_loss"} <= reports[1]["before"].keys() & reports[1]["after"].keys()


def test_error_on_one_rank_ends_the_comparison_on_both(runs: dict[str, list[dict[str, Any]]]) -> None:
    for run in runs["failing"]:
        report = run["history"][1]
        assert report["errors"] == {"fit_test": "on rank 1: MemoryError"}
        assert "handicap" not in report["metrics"]
        assert "learnable_fraction" in report["metrics"]
    assert torch.equal(runs["failing"][0]["weights"], runs["without"][0]["weights"])


def test_missing_gradient_counts_as_zero(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert [run["gradients"] for run in runs["with"]] == [[[1.5, 3.0], [0.5, 0.5], None]] * 2
