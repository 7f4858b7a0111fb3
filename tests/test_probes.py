"""Test the probes of the Hessian: the spectra they report, the models they refuse, and the errors of estimates."""

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from lightning_plasticity.diagnostics import EPSILON, diagnostics_of
from lightning_plasticity.interventions import ShrinkPerturb
from tests.helpers.modules import (
    NEVER,
    WITHOUT_FIT_TEST,
    Classifier,
    DirectLogging,
    FirstBatchRecorder,
    cross_entropy,
    loader,
    trainer,
    weights,
)

FEW = {"num_probes": 2, "num_steps": 8}
ALL = {"num_probes": 4, "num_steps": 67}
"""One Lanczos step for each parameter of the classifier, so that the spectrum is complete and all ranks resolved."""

HESSIAN_ONLY: dict[str, Any] = {"probe": HessianProbe(ggn=None, **FEW), "collapse": Collapse("hessian_effective_rank")}


@pytest.mark.parametrize(("probe_class", "backend"), [(HessianProbe, "native"), (PyHessianProbe, "pyhessian")])
def test_report_holds_hessian_spectrum_on_first_samples(probe_class: type[HessianProbe], backend: Any) -> None:
    callback, module = (
        SpectralCollapseCallback(probe_class(samples=20, seed=3, ggn=GGNProbe(samples=18), **FEW)),
        FirstBatchRecorder(),
    )
    for seed in range(2):
        trainer(callback).fit(module, loader(size=21, seed=seed))
    copy = Classifier()
    copy.load_state_dict(module.first_state)
    twenty, eighteen = ([tensor[:n] for tensor in module.first_batch] for n in (20, 18))
    report = callback.history[1]
    expected = hessian_spectrum(copy, twenty, cross_entropy, seed=3, backend=backend, **FEW)
    assert report.matrix == "hessian"
    assert torch.equal(report.spectrum.eigenvalues, expected.eigenvalues)
    assert torch.equal(report.spectrum.weights, expected.weights)
    assert report.metrics["hessian_trace"] == expected.trace
    assert report.metrics["hessian_trace_standard_error"] == expected.trace.standard_error
    assert report.metrics["learnable_fraction"] == ggn_spectrum(copy, eighteen, cross_entropy).learnable_fraction()
    assert report.metrics["probe_loss"] == pytest.approx(cross_entropy(copy, twenty).item())


def test_complete_spectrum_equals_dense_hessian() -> None:
    callback, module = (
        SpectralCollapseCallback(HessianProbe(samples=16, num_probes=16, num_steps=67)),
        FirstBatchRecorder().double(),
    )
    data = TensorDataset(torch.randn(16, 4).double(), torch.arange(16) % 3)
    trainer(callback).fit(module, DataLoader(data, batch_size=16))
    copy = Classifier().double()
    copy.load_state_dict(module.first_state)
    loss = cross_entropy(copy, module.first_batch)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(copy.parameters()), create_graph=True)])
    rows = [torch.autograd.grad(entry, list(copy.parameters()), retain_graph=True) for entry in gradient]
    dense = torch.linalg.eigvalsh(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
    metrics = callback.history[0].metrics
    assert metrics["hessian_lambda_max"] == pytest.approx(dense.max().item())
    assert metrics["hessian_lambda_min"] == pytest.approx(dense.min().item())
    assert dense.min() < -1e-3, "the Hessian has negative eigenvalues"
    for name, exact in (
        ("hessian_trace", dense.sum().item()),
        ("hessian_epsilon_rank", (dense.abs() > EPSILON).sum().item()),
        ("hessian_negative_mass", (dense.clamp(max=0).sum() / -dense.abs().sum()).item()),
    ):
        assert abs(metrics[name] - exact) < 4 * metrics[f"{name}_standard_error"], name
    assert metrics["hessian_epsilon_rank_resolved"] == 1


def test_metrics_cover_both_matrices_and_uncertainties() -> None:
    callback = SpectralCollapseCallback(HessianProbe(samples=64, **ALL), **WITHOUT_FIT_TEST, monitor=False)
    trainer(callback).fit(Classifier(lr=20.0), loader())
    metrics = callback.history[0].metrics
    assert all(type(value) is float for value in metrics.values())
    # That of the exact learnable fraction is zero.
    uncertainty = {f"{d.name}_{suffix}" for d in diagnostics_of(["hessian"]) for suffix in d.uncertainty}
    assert {"hessian_trace_standard_error", "hessian_epsilon_rank_resolved"} <= uncertainty
    names = [d.name for d in diagnostics_of(["kernel", "gradients", "ggn", "hessian"])]
    assert metrics.keys() == {
        *names,
        *(f"{name}_vs_initial" for name in names),
        *uncertainty,
        "probe_loss",
        "probe_samples",
    }


def test_one_start_vector_has_no_standard_errors() -> None:
    callback = SpectralCollapseCallback(HessianProbe(num_probes=1, num_steps=8), **WITHOUT_FIT_TEST)
    trainer(callback).fit(Classifier(), loader())
    assert not [name for name in callback.history[0].metrics if name.endswith("standard_error")]


def test_start_vectors_are_equal_at_every_task() -> None:
    class ZeroLearningRate(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback, module = SpectralCollapseCallback(HessianProbe(samples=16, **FEW)), ZeroLearningRate()
    data = DataLoader(TensorDataset(torch.eye(4).repeat(4, 1), torch.arange(16) % 3), batch_size=16)
    for _ in range(2):
        trainer(callback).fit(module, data)
        torch.rand(7)
    first, second = callback.history
    assert torch.equal(first.spectrum.eigenvalues, second.spectrum.eigenvalues)
    assert first.metrics == second.metrics


@pytest.mark.parametrize("probe", [GGNProbe(), HessianProbe(ggn=None, **FEW)], ids=["ggn", "hessian"])
def test_collapse_metric_must_be_measured_by_the_probe(probe: Any) -> None:
    metric = "hessian_trace" if isinstance(probe, GGNProbe) else "learnable_fraction"
    other = "ggn_trace" if isinstance(probe, GGNProbe) else "hessian_epsilon_rank"
    below: dict[str, Any] = {"below": 1.0, "relative_to": None} if metric == "hessian_trace" else {}
    module = Classifier()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=rf"metric='{metric}'\) watches what .* one of .*{other}"):
        trainer(SpectralCollapseCallback(probe, collapse=Collapse(metric, **below))).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_unresolved_rank_warns_without_collapse() -> None:
    callback = SpectralCollapseCallback(HessianProbe(**FEW), collapse=Collapse("hessian_epsilon_rank", below=1.0))
    module = Classifier()
    with pytest.warns(PlasticityWarning, match=r"task 0: ε-rank of the Hessian is not resolved \(it is .*raise num_"):
        trainer(callback).fit(module, loader())
    assert not callback.history[0].collapsed
    assert callback.history[0].metrics["hessian_epsilon_rank_resolved"] == 0
    assert "hessian_epsilon_rank_vs_initial" not in callback.history[0].metrics
    # An unresolved rank can be as high as the full rank, beside which any resolved rank would look like a collapse.
    callback.history[0].metrics["hessian_epsilon_rank"] = 67.0
    callback.probe = HessianProbe(**ALL)
    trainer(callback).fit(module, loader())
    assert callback.history[1].metrics["hessian_epsilon_rank"] < 67
    assert not callback.history[1].collapsed


def test_resolved_rank_below_threshold_is_a_collapse() -> None:
    callback = SpectralCollapseCallback(HessianProbe(**ALL), collapse=Collapse("hessian_epsilon_rank"))
    module = Classifier()
    trainer(callback).fit(module, loader())
    with torch.no_grad():
        module.net[0].bias.fill_(-100)
    with pytest.warns(PlasticityWarning, match="task 1: ε-rank of the Hessian .* losing its plasticity"):
        trainer(callback).fit(module, loader())
    assert callback.history[1].collapsed


class WrongCube(torch.autograd.Function):
    """Compute x³, with a backward pass that treats the slope 3x² as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.slope


class Cubed(Classifier):
    """Has wrong second derivatives while ``wrong`` is set; counts evaluations in float64 in ``checks``."""

    wrong = True
    checks = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).checks += batch[0].dtype == torch.float64
        hidden = self.net[0](batch[0])
        return F.cross_entropy(self.net[2](WrongCube.apply(hidden) if self.wrong else hidden**3), batch[1])


@pytest.mark.parametrize("probe_class", [HessianProbe, PyHessianProbe])
def test_wrong_second_derivatives_are_refused(probe_class: type[HessianProbe]) -> None:
    module = Cubed()
    before = weights(module)
    message = (
        rf"{probe_class.__name__} needs second derivatives.*custom autograd.Function WrongCube.*Or use GGNProbe\(\)"
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer(SpectralCollapseCallback(probe_class(**FEW))).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_second_derivatives_are_checked_once_per_fit() -> None:
    """Wrong second derivatives in a later fit are reported, and not raised."""

    class Tasks(Cubed):
        wrong = False
        checks = 0
        task_id = 0

        def on_train_epoch_end(self) -> None:
            self.task_id += 1

    probe = HessianProbe(**FEW)
    callback, module = SpectralCollapseCallback(probe, collapse=NEVER, monitor=False), Tasks()
    trainer(callback, max_epochs=1).fit(module, loader())
    once = Tasks.checks
    assert once > 0
    trainer(callback, max_epochs=3).fit(module, loader())
    assert Tasks.checks == 2 * once
    assert len(callback.history) == 4
    module.wrong = True
    with pytest.warns(PlasticityWarning, match=r"task 4: plasticity could not be measured, .*WrongCube"):
        trainer(callback).fit(module, loader())
    assert callback.history[-1].spectrum is None


def test_weight_norm_is_supported() -> None:
    def make_module() -> FirstBatchRecorder:
        module = FirstBatchRecorder()
        module.net[0] = weight_norm(module.net[0])
        return module

    callback, module = SpectralCollapseCallback(HessianProbe(samples=64, **FEW)), make_module()
    trainer(callback).fit(module, loader())
    copy = make_module()
    copy.load_state_dict(module.first_state)
    expected = hessian_spectrum(copy, module.first_batch, cross_entropy, **FEW)
    assert torch.equal(callback.history[0].spectrum.eigenvalues, expected.eigenvalues)


def test_reentrant_checkpointing_is_refused() -> None:
    class Checkpointed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(self.net, x, use_reentrant=True), batch[1])

    with pytest.raises(MisconfigurationException, match="pass use_reentrant=False") as refused:
        trainer(SpectralCollapseCallback(**HESSIAN_ONLY)).fit(Checkpointed(), loader())
    assert "GGNProbe" not in str(refused.value), "GGNProbe refuses them too"
    with pytest.raises(UnsupportedModelError, match="pass use_reentrant=False"):
        trainer(SpectralCollapseCallback(**WITHOUT_FIT_TEST)).fit(Checkpointed(), loader())


def test_loss_without_float64_support_only_warns() -> None:
    class Single(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

    callback = SpectralCollapseCallback(HessianProbe(**FEW))
    with pytest.warns(
        PlasticityWarning, match="second derivatives could not be checked, so the Hessian's numbers may be wrong"
    ):
        trainer(callback).fit(Single(), loader())
    assert callback.history[0].spectrum is not None


@pytest.mark.parametrize("probe_class", [HessianProbe, PyHessianProbe])
def test_nonfinite_hessian_is_an_error(probe_class: type[HessianProbe]) -> None:
    class Rooted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (0 * self.net[0].bias).norm()

    callback = SpectralCollapseCallback(probe_class(ggn=None, **FEW), collapse=Collapse("hessian_effective_rank"))
    with pytest.raises(ValueError, match="the curvature of the loss on the probe batch is NaN or infinite"):
        trainer(callback).fit(Rooted(), loader())


def test_loss_of_another_model_is_refused() -> None:
    other = Classifier()
    callback = SpectralCollapseCallback(**HESSIAN_ONLY, loss_fn=lambda module, batch: cross_entropy(other, batch))
    with (
        pytest.raises(ValueError, match="is not of the model that the loss function was given: let"),
        pytest.warns(PlasticityWarning, match="could not be checked"),
    ):
        trainer(callback).fit(Classifier(), loader())


class GraphConvolution(Classifier):
    """Sums the features of neighbours, which are given by their indices in the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, (sources, targets), y = batch
        return super().training_step((torch.zeros_like(x).index_add(0, targets, x[sources]), y), batch_idx)


class Recurrent(GraphConvolution):
    """Carries a hidden state for each position in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.RNNCell(4, 4), torch.zeros(SIZE, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        state = self.cell(batch[0], self.state.to(batch[0]))
        self.state = state.detach()
        return F.cross_entropy(self.net(state), batch[2])


SIZE = 100


def whole_graph() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    graph = (torch.randn(SIZE, 4, generator=generator), torch.arange(2 * SIZE).reshape(2, -1) % SIZE)
    return DataLoader([(*graph, torch.arange(SIZE) % 3)], batch_size=None)


@pytest.mark.parametrize("module_class", [GraphConvolution, Recurrent])
def test_step_that_needs_full_batches_is_refused_with_advice(module_class: type[Classifier]) -> None:
    collapse = Collapse("hessian_effective_rank")
    with pytest.raises(
        MisconfigurationException, match=r"on all 100 samples .*the first 64 alone: write HessianProbe\(samples=100\)$"
    ) as caught:
        trainer(SpectralCollapseCallback(HessianProbe(64, ggn=None, **FEW), collapse=collapse)).fit(
            module_class(), whole_graph()
        )
    assert ("out of bounds" if module_class is GraphConvolution else "doesn't match hidden0 batch size") in str(
        caught.value.__cause__
    )
    callback = SpectralCollapseCallback(HessianProbe(SIZE, ggn=None, **FEW), collapse=collapse)
    trainer(callback).fit(module_class(), whole_graph())
    assert callback.history[0].errors == {}


@pytest.mark.parametrize("module_class", [GraphConvolution, Recurrent])
def test_kernel_of_step_that_needs_full_batches_is_measured_on_them(module_class: type[Classifier]) -> None:
    results = []
    for probe in (GGNProbe(), GGNProbe(samples=SIZE)):
        torch.manual_seed(0)
        callback = SpectralCollapseCallback(probe, monitor=False)
        trainer(callback).fit(module_class(), whole_graph())
        results.append(callback.history[0])
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics["probe_samples"] == SIZE
    assert results[0].remarks[0] == (
        "all 100 samples were taken, because the loss of a sample cannot be computed without the others"
    )


def test_loss_that_is_not_convex_has_a_kernel_and_a_hessian() -> None:
    class Sine(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).sin().mean()

    callback = SpectralCollapseCallback(HessianProbe(**FEW))
    trainer(callback).fit(Sine(), loader())
    (report,) = callback.history
    assert report.metrics["hessian_negative_mass"] > 0
    assert "learnable_fraction" in report.metrics
    assert "epsilon_rank" not in report.metrics
    assert "not convex in the network's outputs" in report.remarks[0]
    with pytest.raises(
        MisconfigurationException, match=r"'epsilon_rank'\) watches what could not be measured .*not convex"
    ):
        trainer(SpectralCollapseCallback(collapse=Collapse("epsilon_rank"))).fit(Sine(), loader())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None], ids=["out of memory", "nan"])
def test_later_probe_failure_only_warns(error: Exception | None) -> None:
    class Fragile(Classifier):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            # The copy that the probe evaluates is in evaluation mode.
            if self.broken and not self.training:
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


def test_uncopyable_objects_and_datasets_are_shared() -> None:
    """With ``loss_fn`` a lock is shared with the probe's copy; datasets are always shared."""

    class Data(TensorDataset):
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

    module = Classifier()
    module.net.guard, module.data = threading.Lock(), Data(torch.zeros(1))
    callback = SpectralCollapseCallback(HessianProbe(**FEW), loss_fn=cross_entropy)
    trainer(callback).fit(module, loader())
    assert callback.history[0].spectrum is not None


def test_direct_loggers_are_silent_in_check_and_probe(tmp_path: Path) -> None:
    module = DirectLogging(CSVLogger(tmp_path))
    trainer(SpectralCollapseCallback(HessianProbe(**FEW))).fit(module, loader())
    assert len(module.direct_logger.experiment.metrics) == 3


def test_half_precision_matches_full_precision() -> None:
    full, half = (SpectralCollapseCallback(HessianProbe(samples=16, **ALL)) for _ in range(2))
    for callback, precision in ((full, "32-true"), (half, "bf16-true")):
        torch.manual_seed(0)
        module = Classifier()
        # Both precisions can represent these weights.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        data = DataLoader(TensorDataset(torch.eye(4).repeat(4, 1), torch.arange(16) % 3), batch_size=16)
        trainer(callback, precision=precision).fit(module, data)
    for name in ("hessian_trace", "hessian_lambda_min"):
        assert half.history[0].metrics[name] == pytest.approx(full.history[0].metrics[name], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_checkpoint_restores_hessian_spectra(tmp_path: Path) -> None:
    callback, module = (
        SpectralCollapseCallback(HessianProbe(samples=64, **FEW), interventions=[ShrinkPerturb()]),
        Classifier(),
    )
    checkpointing = ModelCheckpoint(tmp_path)
    trainer(callback, checkpointing, enable_checkpointing=True).fit(module, loader())
    path = checkpointing.best_model_path
    state = torch.load(path, weights_only=True)["callbacks"]["SpectralCollapseCallback"]["history"][0]
    assert state["matrix"] == "hessian"
    resumed, resumed_module = SpectralCollapseCallback(HessianProbe(**FEW)), Classifier()
    trainer(resumed, checkpointing, max_epochs=2, enable_checkpointing=True).fit(
        resumed_module, loader(), ckpt_path=path
    )
    (restored,), (original,) = resumed.history, callback.history
    assert restored.matrix == original.matrix
    assert restored.metrics == original.metrics
    assert restored.spectrum.epsilon_rank(EPSILON).lo == original.spectrum.epsilon_rank(EPSILON).lo
    assert restored.spectrum.trace.standard_error == original.spectrum.trace.standard_error > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: HessianProbe(samples=0),
            ValueError,
            r"^HessianProbe\(samples=0\) must be a whole number, at",
        ),
        (lambda: HessianProbe(num_probes=True), ValueError, r"HessianProbe\(num_probes=True\)"),
        (lambda: HessianProbe(num_steps=2.5), ValueError, r"HessianProbe\(num_steps=2.5\)"),  # type: ignore[arg-type]
        (
            lambda: HessianProbe(seed=-1),
            ValueError,
            r"HessianProbe\(seed=-1\) must be a whole number, from 0 to 2\*\*64 - 1",
        ),
        (lambda: HessianProbe(seed=2**70), ValueError, rf"seed={2**70}\) must be a whole number"),
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


@pytest.mark.parametrize("probe_class", [HessianProbe, PyHessianProbe])
def test_lightning_cli_builds_the_probe(
    probe_class: type[HessianProbe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    ggn = {"class_path": "lightning_plasticity.GGNProbe", "init_args": {"samples": 16}}
    config = {
        "class_path": "lightning_plasticity.SpectralCollapseCallback",
        "init_args": {
            "probe": {
                "class_path": f"lightning_plasticity.{probe_class.__name__}",
                "init_args": {"num_steps": 32, "ggn": ggn},
            }
        },
    }

    def build(args: Any) -> Any:
        cli = LightningCLI(Classifier, args=args, run=False, save_config_callback=None, seed_everything_default=False)
        (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config))
        return next(c.probe for c in cli.trainer.callbacks if isinstance(c, SpectralCollapseCallback))

    expected = probe_class(num_steps=32, ggn=GGNProbe(samples=16))
    assert build({"trainer": {"callbacks": [config]}}) == expected
    assert build(["--config", str(tmp_path / "saved.yaml")]) == expected
