"""Test that a task is measured on the samples that earlier ones could afford, without finding out again how many."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_plasticity import (
    GGNProbe,
    HessianProbe,
    PlasticityMonitor,
    PlasticityWarning,
    SpectralCollapseCallback,
    TaskDetector,
)
from lightning_plasticity import probes as probes_module
from lightning_plasticity.curvature import tangent_kernel
from lightning_plasticity.engine.monitoring import values_of
from tests.helpers.modules import NEVER, Classifier, trainer

MAX_STEPS = 30
"""Too few training steps for 64 of the sequences."""


class Tagger(Classifier):
    """Classifies each element of sequences; the cost of a probe is that of its matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())


class Contrastive(Classifier):
    """Attracts each sample to the one after it, and repels all others."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        return F.cross_entropy(z @ z.roll(1, 0).T, torch.arange(len(z)))


def sequences(*sizes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 40, 4, generator=generator), torch.randint(3, (n, 40), generator=generator)) for n in sizes]


def vectors(*sizes: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=generator), torch.zeros(n)) for n in sizes]


class Batches:
    """Batches whose position a checkpoint holds."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.taken = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        while self.taken < len(self.data):
            self.taken += 1
            yield self.data[self.taken - 1]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class SaveAfterFirst(Callback):
    """Saves a checkpoint after the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each attempt to measure appends its number of samples."""
    sizes: list[int] = []
    measure = probes_module.measure_within_budget

    def count(*args: Any, samples: int, **options: Any) -> Any:
        sizes.append(samples)
        return measure(*args, samples=samples, **options)

    monkeypatch.setattr(probes_module, "measure_within_budget", count)
    return sizes


def callback_for(every_n_steps: int, probe: Any = None) -> SpectralCollapseCallback:
    """Return a callback whose tasks have as many steps."""
    detector = TaskDetector(every_n_steps=every_n_steps)
    return SpectralCollapseCallback(probe or GGNProbe(max_steps=MAX_STEPS), collapse=NEVER, task_detector=detector)


def reports(callback: SpectralCollapseCallback) -> list[Any]:
    """Return what the reports hold, without tensors."""
    return [
        (r.step, r.metrics, r.remarks, r.errors, r.limited, r.coupled, r.outputs, r.collapsed) for r in callback.history
    ]


@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:task . was measured on . samples",
)
@pytest.mark.parametrize(
    ("module_class", "data", "every", "tried", "known"),
    [
        (Tagger, sequences(64, 64, 64), 1, 64, None),
        (Tagger, sequences(16, *[16] * 8), 4, 16, 8),
        (Contrastive, vectors(100, 100, 100), 1, 64, 100),
        (Contrastive, vectors(24, 24, 24), 1, 24, 24),
    ],
    ids=["costly", "costly, small batches", "coupled", "coupled, small batches"],
)
def test_later_tasks_start_from_what_is_known(
    module_class: type[Classifier],
    data: list[Any],
    every: int,
    tried: int,
    known: int | None,
    attempts: list[int],
    tmp_path: Path,
) -> None:
    """The initial weights and a resumed run, too."""
    path, whole, resumed = tmp_path / "a.ckpt", callback_for(every), callback_for(every)
    torch.manual_seed(0)
    trainer(whole, SaveAfterFirst(path)).fit(module_class(), Batches(data))
    samples = [report.metrics["probe_samples"] for report in whole.history]
    assert samples == [known or samples[0]] * 3
    assert [report.limited for report in whole.history] == [module_class is Tagger] * 3
    assert [report.coupled for report in whole.history] == [module_class is Contrastive] * 3
    # One attempt for the weights of each later task, and one for the initial weights.
    first, later = attempts[:-4], attempts[-4:]
    assert first == sorted(first, reverse=module_class is Tagger)
    assert (first[0], first[-1]) == (tried, samples[0])
    assert first.count(int(samples[0])) == 1
    assert later == samples[:1] * 4
    attempts.clear()
    trainer(resumed).fit(module_class(), Batches(data), ckpt_path=path)
    assert attempts == later
    assert reports(resumed) == reports(whole)


@pytest.mark.filterwarnings("ignore:task 0 was measured on 8 samples")
def test_costly_small_batch_is_measured_at_once_and_alone() -> None:
    """It was tried before any weight changed, and more samples would only cost more."""
    torch.manual_seed(0)
    module, (batch, *others) = Tagger(), sequences(16, 16, 16)
    samples = [tensor[:8] for tensor in batch]
    exact = tangent_kernel(module, samples, lambda m, b: m.training_step(b, 0), method="exact").learnable_fraction()
    callback, seen = SpectralCollapseCallback(GGNProbe(max_steps=MAX_STEPS)), []

    class Reader(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(dict(callback.history[0].metrics))

    trainer(callback, Reader()).fit(module, Batches([batch, *others]))
    assert seen[0] == seen[-1]
    assert seen[0]["learnable_fraction_lo"] <= exact <= seen[0]["learnable_fraction_hi"]
    assert seen[0]["learnable_fraction_hi"] - seen[0]["learnable_fraction_lo"] <= 0.03
    assert seen[0]["learnable_fraction_vs_initial"] == 1
    assert (
        callback.history[0].remarks[0]
        == "8 samples were taken instead of 64, for max_steps=30: more would take too long"
    )


def test_gathered_samples_remain_those_that_are_affordable(attempts: list[int]) -> None:
    """Also where their number is that of a task, and after a task that ended with fewer."""
    callback, module = SpectralCollapseCallback(GGNProbe(max_steps=MAX_STEPS), collapse=NEVER), Tagger()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "task . was measured on . samples", PlasticityWarning)
        for sizes in ((16, 16), (4, 4, 4), (6,), (4, 4, 4), (64,)):
            trainer(callback).fit(module, Batches(sequences(*sizes)))
    assert [report.metrics["probe_samples"] for report in callback.history] == [8, 8, 6, 8, 8]
    assert max(attempts[attempts.index(8) + 1 :]) == 8


def test_hessian_is_measured_on_all_samples_whatever_the_cost() -> None:
    probe = HessianProbe(samples=40, num_probes=1, num_steps=2, ggn=GGNProbe(max_steps=MAX_STEPS))
    callback = SpectralCollapseCallback(probe)
    trainer(callback).fit(Tagger(), Batches(sequences(24, 24)))
    assert callback.history[0].metrics["probe_samples"] == 40
    assert not callback.history[0].limited


def test_hidden_layers_are_measured_on_the_samples_of_the_probe() -> None:
    callback, module, states = SpectralCollapseCallback(GGNProbe(max_steps=MAX_STEPS), collapse=NEVER), Tagger(), []
    (batch,) = sequences(64)
    for _ in range(2):
        states.append({name: value.clone() for name, value in module.state_dict().items()})
        trainer(callback).fit(module, Batches([batch]))
    values = []
    for state, report in zip(states, callback.history, strict=True):
        copy, monitor = Tagger(), PlasticityMonitor()
        copy.load_state_dict(state)
        with torch.no_grad(), monitor.attach(copy):
            copy.net(batch[0][: int(report.metrics["probe_samples"])])
        values.append(values_of(monitor))
        assert {name: report.metrics[name] for name in values[-1]} == values[-1]
    now, initial = (by_name["effective_rank"] for by_name in reversed(values))
    assert callback.history[1].metrics["effective_rank_vs_initial"] == now / initial
    assert callback.history[0].metrics["probe_samples"] < 64


def test_verdict_of_the_fit_test_rests_on_all_samples() -> None:
    """There is no warning of few samples where only the spectra were measured on them."""
    callback = SpectralCollapseCallback(GGNProbe(max_steps=15))
    trainer(callback).fit(Tagger(), Batches(sequences(64)))
    (report,) = callback.history
    assert report.metrics["probe_samples"] < 16
    assert report.fit_curve
