"""Check the monitor in the callback: at the start of tasks on a copy, and on training batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_plasticity import Collapse, GGNProbe, PlasticityMonitor, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.engine.error_log import ErrorLog
from lightning_plasticity.engine.monitoring import StepMonitor
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.metrics.monitor import MEASURES
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer


def hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


class BatchKeeping(Classifier):
    """A module that keeps its last training batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch = batch


@pytest.mark.parametrize("max_samples", [7, 8])
def test_report_names_ranks_that_are_estimates(max_samples: int) -> None:
    callback = SpectralCollapseCallback(monitor=PlasticityMonitor(max_samples=max_samples))
    trainer(callback).fit(Classifier(), loader())
    (report,) = callback.history
    named = [remark for remark in report.remarks if "are estimates" in remark]
    assert len(named) == (max_samples == 7)
    assert all(remark.startswith("the ranks of net.0 are estimates, from 7 samples") for remark in named)


QUIET = Collapse(above=1e9)
"""A rule that detects no collapse."""


def test_features_are_measured_in_eval_mode_on_probe_samples() -> None:
    torch.manual_seed(0)
    module = BatchKeeping()
    module.net.insert(2, nn.Dropout(0.5))
    start = copy.deepcopy(module.net).eval()
    callback = SpectralCollapseCallback(probe=GGNProbe(samples=20))
    trainer(callback, max_steps=1).fit(module, loader(batches=1, size=24))
    x = module.batch[0][:20]
    features = start[1](start[0](x)).detach().double()
    values = torch.linalg.svdvals(features)
    share = values / values.sum()
    metrics = callback.history[0].metrics
    assert metrics["effective_rank"] == pytest.approx(torch.exp(-torch.xlogy(share, share).sum()).item(), rel=1e-6)
    assert metrics["stable_rank"] == pytest.approx((values.square().sum() / values[0].square()).item(), rel=1e-6)
    assert metrics["feature_norm"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-6)
    magnitudes = features.abs().mean(0)
    assert metrics["dormant_fraction"] == (magnitudes <= 0.025 * magnitudes.mean()).double().mean().item()
    assert metrics["effective_rank/net.0"] == metrics["effective_rank"], "there is one hidden layer"
    assert metrics["effective_rank_vs_initial"] == pytest.approx(1.0), "these are the initial weights"
    assert hooks(module) == 0


def test_features_are_compared_with_those_of_the_initial_weights() -> None:
    module, callback = BatchKeeping(), SpectralCollapseCallback(collapse=QUIET)
    start = copy.deepcopy(module.net)
    trainer(callback).fit(module, loader())
    with torch.no_grad():
        # Half of the units.
        module.net[0].weight[:4] = 0
        module.net[0].bias[:4] = 0
    before = copy.deepcopy(module.net)
    trainer(callback, max_steps=1).fit(module, loader())
    norms = [net[:2](module.batch[0]).norm(dim=1).mean().item() for net in (before, start)]
    metrics = callback.history[1].metrics
    assert metrics["dead_fraction"] >= 0.5
    assert metrics["feature_norm_vs_initial"] == pytest.approx(norms[0] / norms[1], rel=1e-6)


def test_without_a_monitor_nothing_is_measured() -> None:
    callback = SpectralCollapseCallback(monitor=False)
    trainer(callback).fit(Classifier(), loader())
    assert not any(name.startswith(MEASURES) for name in callback.history[0].metrics)


def test_given_monitor_selects_measures_and_stays_unchanged() -> None:
    monitor = PlasticityMonitor(measures=["srank"])
    callback = SpectralCollapseCallback(monitor=monitor, monitor_every_n_steps=1)
    trainer(callback).fit(Classifier(), loader())
    names = [name for name in callback.history[0].metrics if name.startswith(MEASURES)]
    assert sorted(names) == ["srank", "srank/net.0", "srank_vs_initial"]
    assert not monitor.layers


@pytest.mark.parametrize("every", [1, 2, 3])
def test_training_batches_are_measured_every_n_steps(every: int) -> None:
    seen: list[Tensor] = []

    class Recorded(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.net[:2](batch[0])
            # Skip the copies of the probe, which have no such logger.
            if isinstance(self.trainer.logger, MemoryLogger):
                seen.append(hidden.detach())
            return F.cross_entropy(self.net[2](hidden), batch[1])

    logger, callback = MemoryLogger(), SpectralCollapseCallback(collapse=QUIET, monitor_every_n_steps=every)
    module = Recorded()
    for fit in range(2):
        trainer(callback, logger=logger).fit(module, loader(seed=fit))
    norms = logger.values("plasticity_training/feature_norm")
    assert list(norms) == [step for step in range(6) if step % every == 0]
    for step, norm in norms.items():
        assert norm == pytest.approx(seen[step].norm(dim=1).mean().item(), rel=1e-6)
    assert len(seen) == 6, "there is no extra forward pass"
    assert hooks(module) == 0


def test_first_batch_of_an_accumulated_step_is_measured() -> None:
    logger, callback = MemoryLogger(), SpectralCollapseCallback(monitor_every_n_steps=1)
    trainer(callback, logger=logger, accumulate_grad_batches=2).fit(Classifier(), loader(batches=5))
    assert list(logger.values("plasticity_training/srank")) == [0, 1, 2]


def test_tensorboard_has_one_group_for_training(tmp_path: Path) -> None:
    callback = SpectralCollapseCallback(monitor_every_n_steps=1)
    trainer(callback, logger=TensorBoardLogger(tmp_path, version=0)).fit(Classifier(), loader())
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0")).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("plasticity_training/")}
    assert tags == {f"plasticity_training/{m}{layer}" for m in MEASURES for layer in ("", "/net.0")}
    assert [event.step for event in events.Scalars("plasticity_training/dormant_fraction/net.0")] == [0, 1, 2]


def test_exception_in_a_measured_step_leaves_no_hook() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1 and hooks(self):
                raise RuntimeError("the user's own")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer(SpectralCollapseCallback(monitor_every_n_steps=1)).fit(module, loader())
    assert hooks(module) == 0
    assert torch._C._len_torch_function_stack() == 0


def test_skipped_steps_leave_no_hook() -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    module = Skipping()
    trainer(SpectralCollapseCallback(monitor_every_n_steps=1)).fit(module, loader())
    assert hooks(module) == 0
    assert torch._C._len_torch_function_stack() == 0


def test_feature_rank_can_raise_the_alarm() -> None:
    module = Classifier()
    callback = SpectralCollapseCallback(collapse=Collapse("effective_rank", below=0.8))
    trainer(callback).fit(module, loader())
    with torch.no_grad():
        module.net[0].weight[1:] = module.net[0].weight[0]
        module.net[0].bias[1:] = module.net[0].bias[0]
    with pytest.warns(PlasticityWarning, match=r"task 1: effective rank of the features 1, .* of its best"):
        trainer(callback).fit(module, loader())
    assert callback.history[1].collapsed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": "yes"}, TypeError, "monitor='yes' must be True, False or a PlasticityMonitor"),
        ({"monitor_every_n_steps": 0}, ValueError, "monitor_every_n_steps=0 must be a whole number, at least 1"),
        ({"monitor": False, "monitor_every_n_steps": 5}, ValueError, "with monitor=False: there is no monitor"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpectralCollapseCallback(**arguments)


def test_unmeasured_metric_raises_before_training() -> None:
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    callback = SpectralCollapseCallback(collapse=Collapse("srank"), monitor=PlasticityMonitor(measures=["stable_rank"]))
    with pytest.raises(MisconfigurationException, match=r"'srank'\) watches what neither GGNProbe.* nor the monitor"):
        trainer(callback).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match=r"'dormant_fraction'\) needs a threshold: write above="):
        Collapse("dormant_fraction")


def test_only_default_monitor_failure_just_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the default monitor is a warning; one of a requested measurement ends the run."""

    def failing(*_: Any) -> None:
        raise RuntimeError("no access")

    monkeypatch.setattr(PlasticityMonitor, "attach", failing)
    callback = SpectralCollapseCallback()
    with pytest.warns(PlasticityWarning, match=r"could not be monitored.*no access; monitor=False stops"):
        trainer(callback).fit(Classifier(), loader())
    assert "learnable_fraction" in callback.history[0].metrics
    for arguments in ({"monitor": PlasticityMonitor()}, {"collapse": Collapse("effective_rank")}):
        with pytest.raises(RuntimeError, match="no access"):
            trainer(SpectralCollapseCallback(**arguments)).fit(Classifier(), loader())  # type: ignore[arg-type]
    with (
        pytest.warns(PlasticityWarning),
        pytest.raises(MisconfigurationException, match=r"monitor_every_n_steps: no access"),
    ):
        trainer(SpectralCollapseCallback(monitor_every_n_steps=1)).fit(Classifier(), loader())


def test_network_without_hidden_layers_has_no_features() -> None:
    class Linear(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3))

    callback = SpectralCollapseCallback(monitor_every_n_steps=1)
    trainer(callback).fit(Linear(), loader())
    assert not any(name.startswith(MEASURES) for name in callback.history[0].metrics)
    with pytest.raises(MisconfigurationException, match="watches hidden layers, and the monitor has seen none"):
        trainer(SpectralCollapseCallback(collapse=Collapse("srank"))).fit(Linear(), loader())


def test_batches_of_several_steps_are_measured_when_due() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(1 if batch_idx == 0 else 2):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

    logger = MemoryLogger()
    callback = SpectralCollapseCallback(
        monitor_every_n_steps=2, loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1])
    )
    # Batches begin at steps 0, 1, 3, 5, 7 and 9.
    trainer(callback, logger=logger).fit(Manual(), loader(batches=6))
    assert list(logger.values("plasticity_training/srank")) == [0, 3, 5, 7, 9]


def test_error_during_a_forward_pass_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Classifier(), SpectralCollapseCallback(monitor_every_n_steps=1)
    original = PlasticityMonitor.observe

    def failing(self: PlasticityMonitor, *arguments: Any) -> Any:
        if self.suppress_errors:
            raise ValueError("no such layer")
        return original(self, *arguments)

    monkeypatch.setattr(PlasticityMonitor, "observe", failing)
    with pytest.warns(PlasticityWarning, match="some activations could not be monitored, .*: no such layer"):
        trainer(callback).fit(module, loader())
    assert hooks(module) == 0


def test_epoch_that_ends_early_leaves_no_hook() -> None:
    class Stopping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self) -> None:
            self.left = hooks(self)

    module = Stopping()
    trainer(SpectralCollapseCallback(monitor_every_n_steps=1)).fit(module, loader())
    assert module.left == 0


def test_monitor_failing_after_a_success_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    attach, compute = PlasticityMonitor.attach, PlasticityMonitor.compute
    calls = {"attach": 0, "compute": 0}

    def failing_attach(self: PlasticityMonitor, module: nn.Module) -> PlasticityMonitor:
        calls["attach"] += self.suppress_errors
        if calls["attach"] == 2:
            raise RuntimeError("compiled meanwhile")
        return attach(self, module)

    def failing_compute(self: PlasticityMonitor) -> dict[str, Tensor]:
        calls["compute"] += self.suppress_errors
        if calls["compute"] == 2:
            raise ArithmeticError("no convergence")
        return compute(self)

    monkeypatch.setattr(PlasticityMonitor, "attach", failing_attach)
    monkeypatch.setattr(PlasticityMonitor, "compute", failing_compute)
    module, logger = Classifier(), MemoryLogger()
    with (
        pytest.warns(PlasticityWarning, match="could not be monitored, training goes on: compiled meanwhile"),
        pytest.warns(PlasticityWarning, match="could not be monitored, training goes on: no convergence"),
    ):
        trainer(SpectralCollapseCallback(monitor_every_n_steps=1), logger=logger).fit(module, loader(batches=5))
    assert list(logger.values("plasticity_training/srank")) == [0, 3, 4]
    assert hooks(module) == 0


def test_layer_names_without_a_match_raise_at_once() -> None:
    module = Classifier()
    # In the whole module this layer is "net.1".
    monitor = PlasticityMonitor(module.net, layers=["1"])
    with pytest.raises(ValueError, match=r"layers=\['1'\] can match nothing in Classifier, .*\['net'\]"):
        trainer(SpectralCollapseCallback(monitor=monitor)).fit(module, loader())
    step_monitor = StepMonitor(monitor, 1, ErrorLog())
    with pytest.raises(MisconfigurationError, match=r"monitor_every_n_steps: layers=\['1'\] can match nothing"):
        step_monitor.begin(module, 0)
    assert hooks(module) == 0
