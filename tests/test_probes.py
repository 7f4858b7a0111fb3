"""The probes of the callback: what they measure, what they refuse, and what becomes of estimates."""

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import (
    Collapse,
    GGNProbe,
    HessianProbe,
    PlasticityWarning,
    PyHessianProbe,
    SpectralCollapseCallback,
)
from lightning_plasticity.curvature import UnsupportedModelError, ggn_spectrum, hessian_spectrum
from lightning_plasticity.diagnostics import DIAGNOSTICS, EPSILON, diagnostics_of
from lightning_plasticity.interventions import ShrinkPerturb
from tests.helpers.modules import Classifier, LoggingByItself, loader, trainer, weights

FEW = {"num_probes": 2, "num_steps": 8}
ALL = {"num_probes": 4, "num_steps": 67}
"""As many steps as the classifier has parameters: the spectrum is complete, and every rank is resolved."""

HESSIAN_ALONE: dict[str, Any] = {"probe": HessianProbe(ggn=None, **FEW), "collapse": Collapse("hessian_effective_rank")}


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


class Recorder(Classifier):
    """Keeps the first batch of each fit, and the weights that met it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.first = [tensor.clone() for tensor in batch]
            self.then = {name: value.clone() for name, value in self.state_dict().items()}


@pytest.mark.parametrize(("kind", "backend"), [(HessianProbe, "native"), (PyHessianProbe, "pyhessian")])
def test_report_is_the_spectrum_of_the_hessian_on_the_first_samples(kind: type[HessianProbe], backend: Any) -> None:
    callback, module = SpectralCollapseCallback(kind(samples=5, seed=3, ggn=GGNProbe(samples=4), **FEW)), Recorder()
    for seed in range(2):
        trainer(callback).fit(module, loader(size=6, seed=seed))
    twin = Classifier()
    twin.load_state_dict(module.then)
    five, four = ([tensor[:n] for tensor in module.first] for n in (5, 4))
    report = callback.history[1]
    expected = hessian_spectrum(twin, five, cross_entropy, seed=3, backend=backend, **FEW)
    assert report.matrix == "hessian"
    assert torch.equal(report.spectrum.eigenvalues, expected.eigenvalues)
    assert torch.equal(report.spectrum.weights, expected.weights)
    assert report.metrics["hessian_trace"] == expected.trace
    assert report.metrics["hessian_trace_standard_error"] == expected.trace.standard_error
    assert report.metrics["learnable_fraction"] == ggn_spectrum(twin, four, cross_entropy).learnable_fraction()
    assert report.metrics["probe_loss"] == pytest.approx(cross_entropy(twin, five).item())


def test_the_complete_spectrum_agrees_with_the_dense_hessian() -> None:
    callback, module = SpectralCollapseCallback(HessianProbe(num_probes=16, num_steps=67)), Recorder().double()
    data = TensorDataset(torch.randn(6, 4).double(), torch.arange(6) % 3)
    trainer(callback).fit(module, DataLoader(data, batch_size=6))
    twin = Classifier().double()
    twin.load_state_dict(module.then)
    loss = cross_entropy(twin, module.first)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()), create_graph=True)])
    rows = [torch.autograd.grad(entry, list(twin.parameters()), retain_graph=True) for entry in gradient]
    dense = torch.linalg.eigvalsh(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    metrics = callback.history[0].metrics
    assert metrics["hessian_lambda_max"] == pytest.approx(dense.max().item())
    assert metrics["hessian_lambda_min"] == pytest.approx(dense.min().item())
    assert dense.min() < -1e-3, "there is negative curvature to see"
    for name, exact in (
        ("hessian_trace", dense.sum().item()),
        ("hessian_epsilon_rank", (dense.abs() > EPSILON).sum().item()),
        ("hessian_negative_mass", (dense.clamp(max=0).sum() / -dense.abs().sum()).item()),
    ):
        assert abs(metrics[name] - exact) < 4 * metrics[f"{name}_standard_error"], name
    assert metrics["hessian_epsilon_rank_resolved"] == 1


def test_metrics_are_those_of_both_matrices_with_their_uncertainty_as_plain_floats() -> None:
    callback = SpectralCollapseCallback(HessianProbe(**ALL), monitor=False)
    trainer(callback).fit(Classifier(), loader())
    metrics = callback.history[0].metrics
    assert all(type(value) is float for value in metrics.values())
    uncertainty = {f"{d.name}_{what}" for d in DIAGNOSTICS.values() for what in d.uncertainty}
    assert {"hessian_trace_standard_error", "hessian_epsilon_rank_resolved"} <= uncertainty
    names = [d.name for d in diagnostics_of(["ggn", "hessian"])]
    assert metrics.keys() == {*names, *(f"{name}_vs_initial" for name in names), *uncertainty, "probe_loss"}


def test_one_start_vector_has_no_standard_errors() -> None:
    callback = SpectralCollapseCallback(HessianProbe(num_probes=1, num_steps=8))
    trainer(callback).fit(Classifier(), loader())
    assert not [name for name in callback.history[0].metrics if name.endswith("standard_error")]


def test_start_vectors_are_the_same_at_every_task() -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback, module = SpectralCollapseCallback(HessianProbe(**FEW)), Still()
    data = DataLoader(TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0])), batch_size=4)
    for _ in range(2):
        trainer(callback).fit(module, data)
        torch.rand(7)
    first, second = callback.history
    assert torch.equal(first.spectrum.eigenvalues, second.spectrum.eigenvalues)
    assert first.metrics == second.metrics


@pytest.mark.parametrize("probe", [GGNProbe(), HessianProbe(ggn=None, **FEW)], ids=["ggn", "hessian"])
def test_collapse_must_watch_what_the_probe_measures(probe: Any) -> None:
    metric = "hessian_trace" if isinstance(probe, GGNProbe) else "learnable_fraction"
    other = "ggn_trace" if isinstance(probe, GGNProbe) else "hessian_epsilon_rank"
    below: dict[str, Any] = {"below": 1.0, "relative_to": None} if metric == "hessian_trace" else {}
    module = Classifier()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=rf"metric='{metric}'\) watches what .* one of .*{other}"):
        trainer(SpectralCollapseCallback(probe, collapse=Collapse(metric, **below))).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_an_unresolved_rank_raises_no_alarm_and_says_so() -> None:
    callback = SpectralCollapseCallback(HessianProbe(**FEW), collapse=Collapse("hessian_epsilon_rank", below=1.0))
    module = Classifier()
    with pytest.warns(PlasticityWarning, match=r"task 0: ε-rank of the Hessian is not resolved \(it is .*raise num_"):
        trainer(callback).fit(module, loader())
    assert not callback.history[0].collapsed
    assert callback.history[0].metrics["hessian_epsilon_rank_resolved"] == 0
    assert "hessian_epsilon_rank_vs_initial" not in callback.history[0].metrics
    # Below its resolution quadrature sees full rank: compared with that, a resolved rank would look like a collapse.
    callback.history[0].metrics["hessian_epsilon_rank"] = 67.0
    callback.probe = HessianProbe(**ALL)
    trainer(callback).fit(module, loader())
    assert callback.history[1].metrics["hessian_epsilon_rank"] < 67
    assert not callback.history[1].collapsed


def test_a_resolved_rank_raises_the_alarm() -> None:
    callback = SpectralCollapseCallback(HessianProbe(**ALL), collapse=Collapse("hessian_epsilon_rank"))
    module = Classifier()
    trainer(callback).fit(module, loader())
    with torch.no_grad():
        module.net[0].bias.fill_(-100)
    with pytest.warns(PlasticityWarning, match="task 1: ε-rank of the Hessian .* losing its plasticity"):
        trainer(callback).fit(module, loader())
    assert callback.history[1].collapsed


class Forgetful(torch.autograd.Function):
    """x³, whose backward forgets that its slope depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.slope


class Cubed(Classifier):
    """Has wrong second derivatives when told so."""

    wrong = True
    checks = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).checks += batch[0].dtype == torch.float64
        hidden = self.net[0](batch[0])
        return F.cross_entropy(self.net[2](Forgetful.apply(hidden) if self.wrong else hidden**3), batch[1])


@pytest.mark.parametrize("kind", [HessianProbe, PyHessianProbe])
def test_wrong_second_derivatives_are_an_error_before_any_weight_has_changed(kind: type[HessianProbe]) -> None:
    module = Cubed()
    before = weights(module)
    message = rf"{kind.__name__} needs second derivatives.*custom autograd.Function Forgetful.*Or use GGNProbe\(\)"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(SpectralCollapseCallback(kind(**FEW))).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_second_derivatives_are_checked_once_a_fit_and_wrong_ones_in_a_later_fit_are_reported() -> None:
    class Tasks(Cubed):
        wrong = False
        checks = 0
        task_id = 0

        def on_train_epoch_end(self) -> None:
            self.task_id += 1

    probe = HessianProbe(**FEW)
    callback, module = SpectralCollapseCallback(probe, collapse=Collapse(below=1e-9), monitor=False), Tasks()
    trainer(callback, max_epochs=1).fit(module, loader())
    once = Tasks.checks
    assert once > 0
    trainer(callback, max_epochs=3).fit(module, loader())
    assert Tasks.checks == 2 * once
    assert len(callback.history) == 4
    module.wrong = True
    with pytest.warns(PlasticityWarning, match=r"task 4: plasticity could not be measured, .*Forgetful"):
        trainer(callback).fit(module, loader())
    assert callback.history[-1].spectrum is None


def test_weight_norm_is_composed_and_right() -> None:
    def normed(dtype: torch.dtype) -> Recorder:
        module = Recorder()
        module.net[0] = weight_norm(module.net[0])
        return module.to(dtype)

    callback, module = SpectralCollapseCallback(HessianProbe(**FEW)), normed(torch.float32)
    trainer(callback).fit(module, loader())
    twin = normed(torch.float32)
    twin.load_state_dict(module.then)
    expected = hessian_spectrum(twin, module.first, cross_entropy, **FEW)
    assert torch.equal(callback.history[0].spectrum.eigenvalues, expected.eigenvalues)


def test_reentrant_checkpoints_are_refused() -> None:
    class Checkpointed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(self.net, x, use_reentrant=True), batch[1])

    with pytest.raises(MisconfigurationException, match="pass use_reentrant=False") as refused:
        trainer(SpectralCollapseCallback(**HESSIAN_ALONE)).fit(Checkpointed(), loader())
    assert "GGNProbe" not in str(refused.value), "which refuses them too"
    with pytest.raises(UnsupportedModelError, match="pass use_reentrant=False"):
        trainer(SpectralCollapseCallback(GGNProbe())).fit(Checkpointed(), loader())


def test_a_loss_that_cannot_be_computed_in_float64_is_measured_with_a_warning() -> None:
    class Single(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

    callback = SpectralCollapseCallback(HessianProbe(**FEW))
    with pytest.warns(PlasticityWarning, match="second derivatives could not be checked, so the Hessian's numbers are"):
        trainer(callback).fit(Single(), loader())
    assert callback.history[0].spectrum is not None


@pytest.mark.parametrize("kind", [HessianProbe, PyHessianProbe])
def test_a_hessian_that_is_not_finite_is_an_error(kind: type[HessianProbe]) -> None:
    class Rooted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (0 * self.net[0].bias).norm()

    callback = SpectralCollapseCallback(kind(ggn=None, **FEW), collapse=Collapse("hessian_effective_rank"))
    with pytest.raises(ValueError, match="the curvature of the loss on the probe batch is NaN or infinite"):
        trainer(callback).fit(Rooted(), loader())


def test_a_loss_of_another_model_is_refused() -> None:
    other = Classifier()
    callback = SpectralCollapseCallback(**HESSIAN_ALONE, loss_fn=lambda module, batch: cross_entropy(other, batch))
    with (
        pytest.raises(ValueError, match="is not of the model that the loss function was given: let"),
        pytest.warns(PlasticityWarning, match="could not be checked"),
    ):
        trainer(callback).fit(Classifier(), loader())


class OfGraphs(Classifier):
    """Adds up neighbours, which are named by their numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, (sources, targets), y = batch
        return super().training_step((torch.zeros_like(x).index_add(0, targets, x[sources]), y), batch_idx)


class Recurrent(OfGraphs):
    """Has a hidden state for each place in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 4), torch.zeros(SIZE, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state = self.cell(batch[0], self.state.to(batch[0]))
        self.state = state.detach()
        return F.cross_entropy(self.net(state), batch[2])


SIZE = 100


@pytest.mark.parametrize("kind", [OfGraphs, Recurrent])
@pytest.mark.parametrize(
    ("probe", "whole", "advice"),
    [
        (GGNProbe(), GGNProbe(samples=SIZE), "the first 64 alone: write GGNProbe(samples=100)"),
        (
            GGNProbe(samples=SIZE, max_rows=60),
            GGNProbe(samples=SIZE, max_rows=300),
            "the first 20 alone: write GGNProbe(samples=100, max_rows=300)",
        ),
        (
            HessianProbe(64, ggn=None, **FEW),
            HessianProbe(SIZE, ggn=None, **FEW),
            "the first 64 alone: write HessianProbe(samples=100)",
        ),
    ],
    ids=["ggn", "rows", "hessian"],
)
def test_a_step_that_needs_whole_batches_is_told_what_to_write(
    kind: type[Classifier], probe: Any, whole: Any, advice: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    graph = (torch.randn(SIZE, 4, generator=generator), torch.arange(2 * SIZE).reshape(2, -1) % SIZE)
    data = DataLoader([(*graph, torch.arange(SIZE) % 3)], batch_size=None)
    collapse = Collapse("hessian_effective_rank") if isinstance(probe, HessianProbe) else Collapse()
    with pytest.raises(MisconfigurationException, match=f"on all 100 samples .*{re.escape(advice)}$") as caught:
        trainer(SpectralCollapseCallback(probe, collapse=collapse)).fit(kind(), data)
    assert ("out of bounds" if kind is OfGraphs else "doesn't match hidden0 batch size") in str(caught.value.__cause__)
    callback = SpectralCollapseCallback(whole, collapse=collapse)
    trainer(callback).fit(kind(), data)
    assert callback.history[0].errors == {}


def test_losses_without_a_known_curvature_need_the_hessian_alone() -> None:
    class Sine(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).sin().mean()

    with pytest.raises(MisconfigurationException, match=r"too, which failed: .*write HessianProbe\(ggn=None\) and let"):
        trainer(SpectralCollapseCallback(HessianProbe(**FEW))).fit(Sine(), loader())
    callback = SpectralCollapseCallback(**HESSIAN_ALONE)
    trainer(callback).fit(Sine(), loader())
    assert callback.history[0].metrics["hessian_negative_mass"] > 0
    assert "learnable_fraction" not in callback.history[0].metrics


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None], ids=["out of memory", "nan"])
def test_a_later_probe_that_fails_is_reported_and_training_goes_on(error: Exception | None) -> None:
    class Fragile(Classifier):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.broken and not self.training:  # as the probe's copy is
                if error is not None:
                    raise error
                return loss * torch.nan
            return loss

    callback, module = SpectralCollapseCallback(HessianProbe(**FEW)), Fragile()
    trainer(callback).fit(module, loader())
    module.broken = True
    before = weights(module)
    with pytest.warns(PlasticityWarning, match=r"task 1: plasticity could not be measured, .*(out of|nan)"):
        trainer(callback).fit(module, loader())
    assert callback.history[1].spectrum is None
    assert not torch.equal(weights(module), before)


def test_what_cannot_be_copied_is_shared_with_a_loss_fn_and_large_data_are_never_copied() -> None:
    class Data(TensorDataset):
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

    module = Classifier()
    module.net.guard, module.data = threading.Lock(), Data(torch.zeros(1))
    callback = SpectralCollapseCallback(HessianProbe(**FEW), loss_fn=cross_entropy)
    trainer(callback).fit(module, loader())
    assert callback.history[0].spectrum is not None


def test_loggers_of_the_users_own_are_silent_in_check_and_probe(tmp_path: Path) -> None:
    module = LoggingByItself(CSVLogger(tmp_path))
    trainer(SpectralCollapseCallback(HessianProbe(**FEW))).fit(module, loader())
    assert len(module.own.experiment.metrics) == 3


def test_works_in_half_precision() -> None:
    full, half = (SpectralCollapseCallback(HessianProbe(**ALL)) for _ in range(2))
    for callback, precision in ((full, "32-true"), (half, "bf16-true")):
        torch.manual_seed(0)
        module = Classifier()
        with torch.no_grad():  # weights that both precisions can hold
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        data = DataLoader(TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0])), batch_size=4)
        trainer(callback, precision=precision).fit(module, data)
    for name in ("hessian_trace", "hessian_lambda_min"):
        assert half.history[0].metrics[name] == pytest.approx(full.history[0].metrics[name], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_history_with_hessians_survives_a_checkpoint(tmp_path: Path) -> None:
    callback, module = SpectralCollapseCallback(HessianProbe(**FEW), interventions=[ShrinkPerturb()]), Classifier()
    saver = ModelCheckpoint(tmp_path)
    trainer(callback, saver, enable_checkpointing=True).fit(module, loader())
    path = saver.best_model_path
    state = torch.load(path, weights_only=True)["callbacks"]["SpectralCollapseCallback"]["history"][0]
    assert state["matrix"] == "hessian"
    resumed, again = SpectralCollapseCallback(HessianProbe(**FEW)), Classifier()
    trainer(resumed, saver, max_epochs=2, enable_checkpointing=True).fit(again, loader(), ckpt_path=path)
    (ours,), (theirs,) = resumed.history, callback.history
    assert ours.matrix == theirs.matrix
    assert ours.metrics == theirs.metrics
    assert ours.spectrum.epsilon_rank(EPSILON).lo == theirs.spectrum.epsilon_rank(EPSILON).lo
    assert ours.spectrum.trace.standard_error == theirs.spectrum.trace.standard_error > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: HessianProbe(samples=0),
            ValueError,
            r"^HessianProbe\(samples=0\) must be a whole number, 1 or",
        ),
        (lambda: HessianProbe(num_probes=True), ValueError, r"HessianProbe\(num_probes=True\)"),
        (lambda: HessianProbe(num_steps=2.5), ValueError, r"HessianProbe\(num_steps=2.5\)"),  # type: ignore[arg-type]
        (lambda: HessianProbe(seed=-1), ValueError, r"HessianProbe\(seed=-1\) must be a whole number, 0 or larger"),
        (lambda: HessianProbe(seed=2**70), ValueError, rf"seed={2**70} must be a whole number"),
        (lambda: HessianProbe(ggn=64), ValueError, r"HessianProbe\(ggn=64\) must be a GGNProbe or None"),  # type: ignore[arg-type]
        (lambda: PyHessianProbe(num_steps=0), ValueError, r"^PyHessianProbe\(num_steps=0\)"),
        (
            lambda: SpectralCollapseCallback(probe=HessianProbe),
            TypeError,
            "an instance of Probe, such as",
        ),  # type: ignore[arg-type]
        (lambda: SpectralCollapseCallback(Collapse()), TypeError, r"probe=Collapse\(.* must be an instance of Probe"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [HessianProbe, PyHessianProbe])
def test_a_lightning_cli_configuration_builds_the_probe(
    kind: type[HessianProbe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    ggn = {"class_path": "lightning_plasticity.GGNProbe", "init_args": {"samples": 16}}
    config = {
        "class_path": "lightning_plasticity.SpectralCollapseCallback",
        "init_args": {
            "probe": {
                "class_path": f"lightning_plasticity.{kind.__name__}",
                "init_args": {"num_steps": 32, "ggn": ggn},
            }
        },
    }

    def built(args: Any) -> Any:
        cli = LightningCLI(Classifier, args=args, run=False, save_config_callback=None, seed_everything_default=False)
        (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config))
        return next(c.probe for c in cli.trainer.callbacks if isinstance(c, SpectralCollapseCallback))

    expected = kind(num_steps=32, ggn=GGNProbe(samples=16))
    assert built({"trainer": {"callbacks": [config]}}) == expected
    assert built(["--config", str(tmp_path / "saved.yaml")]) == expected
