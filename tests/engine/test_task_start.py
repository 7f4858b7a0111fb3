"""The start of a task on a plain torch module: measurements, copies, initial weights and repairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.task_start import TaskStart
from lightning_plasticity.interventions import Intervention, ShrinkPerturb
from lightning_plasticity.messages import PlasticityWarning
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import GGNProbe, HessianProbe, Probe
from lightning_plasticity.reports import TaskReport
from lightning_plasticity.training import sandbox
from tests.helpers.modules import Classifier, loader, trainer


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def loss_fn(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def task_start(probe: Probe | None = None, interventions: tuple[Intervention, ...] = ()) -> TaskStart:
    errors = ErrorLog()
    runner = InterventionRunner(interventions, errors)
    return TaskStart(
        probe or GGNProbe(), Collapse(), PlasticityMonitor(), monitor_is_required=True, runner=runner, errors=errors
    )


class CountingContext(ProbeContext):
    """Counts the copies that are made of the model."""

    copies = 0

    def copy(self) -> nn.Module:
        type(self).copies += 1
        return super().copy()


def test_plain_module_is_measured_as_by_ggn_spectrum() -> None:
    model, report = mlp(), TaskReport(0, None, 0)
    task_start().prepare(ProbeContext(model, batch(), loss_fn), [], report)
    spectrum = ggn_spectrum(model, batch(), loss_fn)
    assert report.spectrum is not None
    torch.testing.assert_close(report.spectrum.eigenvalues, spectrum.eigenvalues)
    assert report.metrics["probe_loss"] == pytest.approx(loss_fn(model, batch()).item())


@pytest.mark.parametrize("probe", [GGNProbe(), HessianProbe(num_probes=2, num_steps=3)])
def test_initial_weights_are_measured_on_the_same_batch(probe: Probe) -> None:
    model, start = mlp(), task_start(probe)
    first = TaskReport(0, None, 0)
    start.prepare(ProbeContext(model, batch(), loss_fn), [], first)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    second = TaskReport(1, None, 10)
    with pytest.warns(PlasticityWarning, match="losing its plasticity"):
        start.prepare(ProbeContext(model, batch(), loss_fn), [first], second)
    assert second.metrics["dead_fraction"] == 1.0
    ratio = second.metrics["learnable_fraction"] / first.metrics["learnable_fraction"]
    assert second.metrics["learnable_fraction_vs_initial"] == pytest.approx(ratio)
    assert second.metrics["feature_norm_vs_initial"] == 0.0


def test_model_is_copied_once_a_task() -> None:
    model, start = mlp(), task_start()
    history: list[TaskReport] = []
    for task in range(3):
        CountingContext.copies = 0
        report = TaskReport(task, None, task)
        start.prepare(CountingContext(model, batch(task), loss_fn), history, report)
        history.append(report)
        assert CountingContext.copies == 1
        with torch.no_grad():
            model[0].weight.mul_(1.1)


def test_module_is_copied_once_a_task_in_a_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_plasticity import SpectralCollapseCallback

    copies = []
    copy_module = sandbox.copy_module
    monkeypatch.setattr(sandbox, "copy_module", lambda *a, **k: copies.append(1) or copy_module(*a, **k))
    module, callback = Classifier(), SpectralCollapseCallback(interventions=[ShrinkPerturb(when="task")])
    counts = []
    for _ in range(3):
        copies.clear()
        trainer(callback).fit(module, loader())
        counts.append(len(copies))
    # The first task tries the repair on a copy, the later ones run it.
    assert counts == [2, 2, 2]


def test_a_loss_that_changes_the_model_is_measured_on_unchanged_weights() -> None:
    def averaging_loss(model: Any, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        with torch.no_grad():
            model[0].bias.sub_(100.0)
        return loss

    model, report = mlp(), TaskReport(0, None, 0)
    expected = TaskReport(0, None, 0)
    task_start().prepare(ProbeContext(model, batch(), averaging_loss), [], report)
    task_start().prepare(ProbeContext(model, batch(), loss_fn), [], expected)
    assert report.metrics["dead_fraction"] == expected.metrics["dead_fraction"]


def test_model_is_left_as_it_was() -> None:
    model = mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task_start(interventions=(ShrinkPerturb(),)).prepare(
        ProbeContext(model, batch(), loss_fn), [], TaskReport(0, None, 0)
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_model_keeps_its_dtype() -> None:
    model, report = mlp().to(torch.bfloat16), TaskReport(0, None, 0)
    x, y = batch()
    task_start().prepare(ProbeContext(model, (x.to(torch.bfloat16), y), loss_fn), [], report)
    assert report.metrics["learnable_fraction"] > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
