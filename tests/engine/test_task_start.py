"""Check the start of a task on a plain torch module: measurements, copies, initial weights and repairs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.task_start import TaskStart
from lightning_plasticity.interventions import Intervention, ShrinkPerturb
from lightning_plasticity.messages import PlasticityWarning
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import GGNProbe, HessianProbe, Probe
from lightning_plasticity.reports import TaskReport
from lightning_plasticity.training import sandbox
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, loader, trainer


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


PROBES = [GGNProbe(samples=16), HessianProbe(samples=16, num_probes=2, num_steps=3)]


def task_start(probe: Probe | None = None, interventions: tuple[Intervention, ...] = ()) -> TaskStart:
    errors = ErrorLog()
    runner = InterventionRunner(interventions, errors)
    return TaskStart(
        probe or GGNProbe(samples=16),
        Collapse("learnable_fraction"),
        None,
        PlasticityMonitor(),
        monitor_is_required=True,
        runner=runner,
        errors=errors,
    )


class CountingContext(ProbeContext):
    """A context that counts the copies of the model."""

    copies = 0

    def _copy_model(self, copied: list[Any]) -> nn.Module:
        type(self).copies += 1
        return super()._copy_model(copied)


def test_plain_module_is_measured_as_by_ggn_spectrum() -> None:
    model, report = mlp(), TaskReport(0, None, 0)
    task_start().measure_and_start(ProbeContext(model, batch(), loss_fn), [], report)
    spectrum = ggn_spectrum(model, batch(), loss_fn)
    assert report.spectrum is not None
    torch.testing.assert_close(report.spectrum.eigenvalues, spectrum.eigenvalues)
    assert report.metrics["probe_loss"] == pytest.approx(loss_fn(model, batch()).item())


@pytest.mark.parametrize("probe", PROBES)
def test_initial_weights_are_measured_on_the_same_batch(probe: Probe) -> None:
    model, start = mlp(), task_start(probe)
    first = TaskReport(0, None, 0)
    start.measure_and_start(ProbeContext(model, batch(), loss_fn), [], first)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    second = TaskReport(1, None, 10)
    with pytest.warns(PlasticityWarning, match="losing its plasticity"):
        start.measure_and_start(ProbeContext(model, batch(), loss_fn), [first], second)
    assert second.metrics["dead_fraction"] == 1.0
    ratio = second.metrics["learnable_fraction"] / first.metrics["learnable_fraction"]
    assert second.metrics["learnable_fraction_vs_initial"] == pytest.approx(ratio)
    assert second.metrics["feature_norm_vs_initial"] == 0.0


def test_model_is_copied_once_a_task() -> None:
    """The probe and the monitor measure the weights, and from the second task on the initial weights too."""
    model, start = mlp(), task_start()
    history: list[TaskReport] = []
    for task in range(3):
        CountingContext.copies = 0
        report = TaskReport(task, None, task)
        start.measure_and_start(CountingContext(model, batch(task), loss_fn), history, report)
        history.append(report)
        assert CountingContext.copies == 1
        with torch.no_grad():
            model[0].weight.mul_(1.1)


def test_module_is_copied_once_for_each_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_plasticity import SpectralCollapseCallback

    copies = []
    copy_module = sandbox.copy_module
    monkeypatch.setattr(sandbox, "copy_module", lambda *a, **k: copies.append(1) or copy_module(*a, **k))
    counts = []
    for interventions in ([], [ShrinkPerturb(when="task")]):
        module, callback = Classifier(), SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=interventions)
        for _ in range(2):
            copies.clear()
            trainer(callback).fit(module, loader())
            counts.append(len(copies))
    # The first task tries the repair on a copy, the later ones run it and measure the repaired module.
    assert counts == [1, 1, 2, 3]


class Stateful(nn.Sequential):
    """Scales its outputs by a number that every call changes, out of reach of parameters and buffers."""

    def __init__(self, state: Any, advance: Callable[[Any], float]) -> None:
        super().__init__(*mlp())
        self.state = state
        self.advance = advance

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.advance(self.state)


def teacher_norm(teachers: list[nn.Linear]) -> float:
    """Move a teacher that is no submodule, as an average of the weights does."""
    with torch.no_grad():
        return float(teachers[0].weight.add_(1.0).norm())


STATES: dict[str, Callable[[], tuple[Any, Callable[[Any], float]]]] = {
    "tensor": lambda: (torch.ones(()), lambda tensor: float(tensor.add_(1))),
    "array": lambda: (np.ones(1), lambda array: float(np.add(array, 1, out=array)[0])),
    "set": lambda: ({0}, lambda numbers: numbers.add(len(numbers)) or len(numbers)),
    "object": lambda: (
        SimpleNamespace(calls=0),
        lambda counter: vars(counter).update(calls=counter.calls + 1) or counter.calls,
    ),
    "hidden teacher": lambda: ([nn.Linear(2, 2)], teacher_norm),
    "torch generator": lambda: (torch.Generator().manual_seed(0), lambda g: 1 + float(torch.rand((), generator=g))),
    "numpy generator": lambda: (np.random.default_rng(0), lambda g: 1 + float(g.random())),
    "random": lambda: (random.Random(0), lambda g: 1 + g.random()),
}


@pytest.mark.parametrize(
    "probe", [GGNProbe(samples=16), HessianProbe(samples=16, num_probes=2, num_steps=3)], ids=["ggn", "hessian"]
)
@pytest.mark.parametrize("state", STATES)
def test_all_measurements_start_from_the_same_state(state: str, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are still the initial ones differ in no number from those."""
    monkeypatch.setattr(HessianProbe, "check", lambda *_: None)
    model, start = Stateful(*STATES[state]()), task_start(probe)
    first, second = TaskReport(0, None, 0), TaskReport(1, None, 1)
    start.measure_and_start(ProbeContext(model, batch(), loss_fn), [], first)
    start.measure_and_start(ProbeContext(model, batch(), loss_fn), [first], second)
    assert not second.errors
    ratios = [value for name, value in second.metrics.items() if name.endswith("_vs_initial")]
    assert ratios
    assert all(ratio in (1.0, 0.0) or math.isnan(ratio) for ratio in ratios)
    assert first.metrics["ggn_trace"] == second.metrics["ggn_trace"]


@pytest.mark.filterwarnings("ignore:task 0 was measured on")
def test_fewer_samples_are_measured_on_unchanged_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the samples cost too much, fewer are taken: the loss that was computed before left no trace."""
    monkeypatch.setattr("lightning_plasticity.probes._FEWEST_EXACT_SAMPLES", 8)
    model = nn.Sequential(mlp(), nn.Linear(3, 3).requires_grad_(False))

    def averaging_loss(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            model[1].weight.mul_(0.5)
        return loss_fn(model, batch)

    limited, whole = TaskReport(0, None, 0), TaskReport(0, None, 0)
    task_start(GGNProbe(samples=16, max_steps=0.7)).measure_and_start(
        ProbeContext(model, batch(), averaging_loss), [], limited
    )
    taken = int(limited.metrics["probe_samples"])
    assert 8 <= taken < 16
    task_start(GGNProbe(samples=taken)).measure_and_start(ProbeContext(model, batch(), averaging_loss), [], whole)
    assert limited.metrics["probe_loss"] == whole.metrics["probe_loss"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_initial_weights_are_measured_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    """The precision may change between two fits."""
    model, start, (x, y) = mlp(), task_start(), batch()
    first, second = TaskReport(0, None, 0), TaskReport(1, None, 1)
    start.measure_and_start(ProbeContext(model, (x, y), loss_fn), [], first)
    start.measure_and_start(ProbeContext(model.to(dtype), (x.to(dtype), y), loss_fn), [first], second)
    assert not second.errors
    assert second.metrics["ggn_trace_vs_initial"] == 1.0


def test_half_precision_module_is_monitored_in_its_own_dtype() -> None:
    from lightning_plasticity import SpectralCollapseCallback

    class Casting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0].to(self.dtype)), batch[1])

    callback = SpectralCollapseCallback(monitor=PlasticityMonitor())
    trainer(callback, precision="bf16-true").fit(Casting(), loader())
    assert "dead_fraction" in callback.history[0].metrics


def test_monitor_runs_on_weights_unchanged_by_the_loss() -> None:
    def averaging_loss(model: Any, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        with torch.no_grad():
            model[0].bias.sub_(100.0)
        return loss

    model, report = mlp(), TaskReport(0, None, 0)
    expected = TaskReport(0, None, 0)
    task_start().measure_and_start(ProbeContext(model, batch(), averaging_loss), [], report)
    task_start().measure_and_start(ProbeContext(model, batch(), loss_fn), [], expected)
    assert report.metrics["dead_fraction"] == expected.metrics["dead_fraction"]


def test_model_is_left_as_it_was() -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task_start(interventions=(ShrinkPerturb(),)).measure_and_start(
        ProbeContext(model, batch(), loss_fn), [], TaskReport(0, None, 0)
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_model_keeps_its_dtype() -> None:
    model, report = mlp().to(torch.bfloat16), TaskReport(0, None, 0)
    x, y = batch()
    task_start().measure_and_start(ProbeContext(model, (x.to(torch.bfloat16), y), loss_fn), [], report)
    assert report.metrics["learnable_fraction"] > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_grown_head_keeps_its_first_initial_rows() -> None:
    """The trained rows that are copied into a larger head are not initial weights."""
    model = nn.Sequential(nn.Linear(3, 2))
    initial = InitialWeights()
    initial.store(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.add_(5.0)
    head = nn.Linear(3, 4)
    with torch.no_grad():
        head.weight[:2] = model[0].weight
    model[0] = head
    initial.store(model)
    assert torch.equal(initial.values["0.weight"][:2], first["0.weight"])
    assert torch.equal(initial.values["0.weight"][2:], head.weight[2:].detach())
    assert torch.equal(initial.values["0.bias"], torch.cat([first["0.bias"], head.bias[2:].detach()]))
