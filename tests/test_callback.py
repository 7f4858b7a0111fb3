"""Test the callback on real Trainers: reports, collapse warnings, repairs, checkpoints and arguments."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_plasticity import Collapse, GGNProbe, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.diagnostics import diagnostics_of
from lightning_plasticity.functional import optimization_readiness
from lightning_plasticity.interventions import Reset, ShrinkPerturb
from tests.helpers.modules import (
    NEVER,
    Classifier,
    FirstBatchRecorder,
    cross_entropy,
    loader,
    tasks_seen,
    trainer,
    weights,
)


def deactivate_hidden_units(module: LightningModule) -> None:
    """Set the biases so low that no hidden ReLU is ever active."""
    with torch.no_grad():
        module.net[0].bias.fill_(-100)


def test_report_holds_ggn_spectrum_on_first_batch_of_task() -> None:
    callback, module = SpectralCollapseCallback(), FirstBatchRecorder()
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(callback).fit(module, loader())
    trainer(callback).fit(module, loader(seed=1))
    copy = Classifier()
    copy.load_state_dict(module.first_state)
    expected = ggn_spectrum(copy, module.first_batch, cross_entropy)
    report = callback.history[1]
    assert torch.equal(report.spectrum.eigenvalues, expected.eigenvalues)
    assert report.metrics["learnable_fraction"] == expected.learnable_fraction()
    assert report.metrics["probe_loss"] == pytest.approx(cross_entropy(copy, module.first_batch).item())
    gradients = []
    for x, y in zip(*module.first_batch, strict=True):
        loss = cross_entropy(copy, (x[None], y[None]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(copy.parameters()))]))
    readiness = optimization_readiness(report.metrics["probe_loss"], gradients).item()
    assert report.metrics["optimization_readiness"] == pytest.approx(readiness, rel=1e-4)
    assert "optimization_readiness_vs_initial" in report.metrics
    copy.load_state_dict(initial)
    at_initial = ggn_spectrum(copy, module.first_batch, cross_entropy)
    for diagnostic in (diagnostic for diagnostic in diagnostics_of(["ggn"]) if not diagnostic.needs_plan):
        ratio = report.metrics[f"{diagnostic.name}_vs_initial"]
        assert ratio == pytest.approx(diagnostic.compute(expected) / diagnostic.compute(at_initial))
        assert callback.history[0].metrics[f"{diagnostic.name}_vs_initial"] == 1


@pytest.mark.parametrize("lr", [0.5, 20.0])
def test_fast_directions_follow_from_rate_and_steps_of_the_run(lr: float) -> None:
    """The threshold of the eigenvalues is ln 10 / (ηK), with K the steps of the fit."""
    callback, module = SpectralCollapseCallback(), FirstBatchRecorder(lr)
    trainer(callback, max_epochs=3).fit(module, loader())
    (report,) = callback.history
    assert report.expected_steps == 3 * len(loader())
    threshold = math.log(10) / (lr * report.expected_steps)
    copy = Classifier()
    copy.load_state_dict(module.first_state)
    spectrum = ggn_spectrum(copy, module.first_batch, cross_entropy)
    assert report.metrics["fast_rank"] == (spectrum.eigenvalues > threshold).sum().item() > 0
    fast = spectrum.kernel.residual_shares[spectrum.kernel.eigenvalues > threshold].sum().item()
    assert report.metrics["fast_residual_share"] == pytest.approx(fast, abs=1e-9)
    assert 0 < fast < 1
    assert callback.history[0].metrics["fast_rank_vs_initial"] == 1


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_tasks_of_unknown_length_have_no_fast_rank(lr: float) -> None:
    callback = SpectralCollapseCallback(collapse=Collapse("learnable_fraction", below=1e-9))

    class Endless(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            self.trainer.should_stop = True

    trainer(callback, max_epochs=-1).fit(Endless(lr), loader())
    (report,) = callback.history
    assert report.expected_steps is None
    assert not report.metrics.keys() & {"fast_rank", "fast_residual_share"}
    left_out = ["numbers of the fast directions are left out: the length of the task is not known"]
    assert report.remarks == (left_out if lr else [])


def test_samples_limit_the_probe_batch() -> None:
    for probe, samples in ((GGNProbe(), 64), (GGNProbe(samples=20), 20)):
        callback, module = SpectralCollapseCallback(probe), FirstBatchRecorder()
        trainer(callback).fit(module, loader())
        copy = Classifier()
        copy.load_state_dict(module.first_state)
        expected = ggn_spectrum(copy, [tensor[:samples] for tensor in module.first_batch], cross_entropy)
        assert torch.equal(callback.history[0].spectrum.eigenvalues, expected.eigenvalues)


def test_initial_weights_are_probed_from_the_second_task_on() -> None:
    class Counting(GGNProbe):
        def measure(self, *arguments: Any) -> Any:
            probed.append(self)
            return super().measure(*arguments)

    probed: list[GGNProbe] = []
    callback, module, counts = SpectralCollapseCallback(Counting(), collapse=NEVER), Classifier(), []
    for _ in range(3):
        trainer(callback).fit(module, loader())
        counts.append(len(probed))
    assert counts == [1, 3, 5]


def test_growing_head_is_probed_at_its_new_size() -> None:
    """The initial weights of a new head are those that it has at its first probe."""
    callback, module = SpectralCollapseCallback(), Classifier()
    trainer(callback).fit(module, loader())
    module.net[2] = nn.Linear(8, 5)
    trainer(callback).fit(module, loader())
    assert callback.history[1].spectrum.num_parameters == 4 * 8 + 8 + 8 * 5 + 5


@pytest.mark.full_fit_test
def test_collapse_warns_once_and_is_repaired() -> None:
    torch.manual_seed(0)
    callback = SpectralCollapseCallback(interventions=[ShrinkPerturb(), Reset(layers=["net.2"])])
    module = Classifier()
    trainer(callback, max_epochs=3).fit(module, loader())
    deactivate_hidden_units(module)
    before = weights(module)
    with pytest.warns(
        PlasticityWarning, match=r"task 1: handicap .*, above 1.25: a fresh network would learn"
    ) as caught:
        trainer(callback, max_epochs=3).fit(module, loader())
    assert sum(issubclass(warning.category, PlasticityWarning) for warning in caught) == 1
    report = callback.history[1]
    assert report.collapsed
    assert [(repair.name, repair.num_parameters_changed) for repair in report.repairs] == [
        ("ShrinkPerturb", len(before)),
        ("Reset", 27),
    ]
    assert module.net[0].bias.max() > -25, "the dead units can become active again"
    assert not callback.history[0].collapsed


@pytest.mark.full_fit_test
def test_repair_on_collapse_equals_manual_repair() -> None:
    class ManuallyRepaired(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and self.trainer.current_epoch == 0 and self.repair_now:
                ShrinkPerturb(initial=initial).repair(
                    self, optimizers=self.trainer.optimizers, generator=torch.Generator().manual_seed(1000)
                )

    trained_weights = []
    for manual in (False, True):
        torch.manual_seed(0)
        module = ManuallyRepaired()
        initial = {name: value.clone() for name, value in module.state_dict().items()}
        callbacks = [] if manual else [SpectralCollapseCallback(interventions=[ShrinkPerturb()])]
        module.repair_now = False
        trainer(*callbacks).fit(module, loader())
        deactivate_hidden_units(module)
        module.repair_now = manual
        if manual:
            trainer(*callbacks).fit(module, loader())
        else:
            with pytest.warns(PlasticityWarning):
                trainer(*callbacks).fit(module, loader())
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)


@pytest.mark.full_fit_test
def test_collapse_without_interventions_changes_no_weights() -> None:
    trained_weights = []
    for callbacks in ([], [SpectralCollapseCallback()]):
        torch.manual_seed(0)
        module = Classifier()
        trainer(*callbacks).fit(module, loader())
        deactivate_hidden_units(module)
        if callbacks:
            with pytest.warns(PlasticityWarning):
                trainer(*callbacks).fit(module, loader())
        else:
            trainer().fit(module, loader())
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)


@pytest.mark.full_fit_test
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_checkpoint_restores_history_and_initial_weights(tmp_path: Path) -> None:
    callback, module = SpectralCollapseCallback(interventions=[ShrinkPerturb()]), Classifier()
    trainer(callback).fit(module, loader())
    deactivate_hidden_units(module)
    checkpointing = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(PlasticityWarning):
        trainer(callback, checkpointing, enable_checkpointing=True, max_epochs=2).fit(module, loader())
    path = next(tmp_path.glob("*step=2.ckpt"))
    resumed, resumed_module = SpectralCollapseCallback(interventions=[ShrinkPerturb()]), Classifier()
    state = torch.load(path, weights_only=True)
    assert state["callbacks"]["SpectralCollapseCallback"]["version"] == 1
    second_trainer = trainer(resumed, checkpointing, max_epochs=2, enable_checkpointing=True)
    second_trainer.fit(resumed_module, loader(), ckpt_path=path)
    assert [report.to_dict().keys() for report in resumed.history] == [
        report.to_dict().keys() for report in callback.history
    ]
    for restored, original in zip(resumed.history, callback.history, strict=True):
        assert (restored.task, restored.step, restored.metrics, restored.collapsed) == (
            original.task,
            original.step,
            original.metrics,
            original.collapsed,
        )
        assert torch.equal(restored.spectrum.kernel.residual_shares, original.spectrum.kernel.residual_shares)
        assert [repair.to_dict() for repair in restored.repairs] == [repair.to_dict() for repair in original.repairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlasticityWarning)
        trainer(callback).fit(module, loader())
        trainer(resumed).fit(resumed_module, loader())
    assert callback.history[-1].step == 3 + 6
    assert resumed.history[-1].step == 3 + second_trainer.global_step


def test_evaluating_a_checkpoint_keeps_the_history(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    callback, module = SpectralCollapseCallback(collapse=NEVER), Tested()
    pl_trainer = trainer(callback)
    pl_trainer.fit(module, loader())
    pl_trainer.save_checkpoint(tmp_path / "first.ckpt")
    pl_trainer.fit_loop.max_epochs += 1
    pl_trainer.fit(module, loader())
    pl_trainer.test(module, DataLoader(loader().dataset), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    pl_trainer.fit_loop.max_epochs += 1
    pl_trainer.fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3), (2, None, 6)]


def test_manually_loaded_state_survives_evaluation(tmp_path: Path) -> None:
    """A checkpoint saved without the callback does not reset a state that is loaded by hand after evaluating it."""

    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    foreign, module, first = trainer(), Tested(), SpectralCollapseCallback()
    foreign.fit(module, loader())
    foreign.save_checkpoint(tmp_path / "foreign.ckpt")
    trainer(first).fit(module, loader())
    callback = SpectralCollapseCallback()
    data = DataLoader(loader().dataset, batch_size=4)
    trainer(callback).test(module, data, ckpt_path=tmp_path / "foreign.ckpt", verbose=False)
    callback.load_state_dict(first.state_dict())
    assert tasks_seen(callback) == tasks_seen(first) == [(0, None, 0)]


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="in version 99, and this release reads version 1"):
        SpectralCollapseCallback().load_state_dict({"version": 99})


def test_probe_works_without_logger() -> None:
    callback = SpectralCollapseCallback()
    trainer(callback, logger=False).fit(Classifier(), loader())
    assert callback.history[0].metrics["learnable_fraction"] > 0


def test_unmatched_layer_names_are_an_error_at_the_first_probe() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no module; there are"):
        trainer(SpectralCollapseCallback(interventions=[Reset(layers=["encoder.*"])])).fit(Classifier(), loader())


def test_interventions_may_be_a_generator() -> None:
    callback = SpectralCollapseCallback(interventions=(intervention for intervention in [ShrinkPerturb(when=1)]))  # type: ignore[arg-type]
    trainer(callback).fit(Classifier(), loader())
    assert len(callback.interventions) == 1
    assert len(callback.history[0].repairs) == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GGNProbe(samples=0), ValueError, r"GGNProbe\(samples=0\) must be a whole number, at least 1"),
        (lambda: GGNProbe(samples=-3), ValueError, r"GGNProbe\(samples=-3\)"),
        (lambda: GGNProbe(samples=1.5), ValueError, r"GGNProbe\(samples=1.5\)"),  # type: ignore[arg-type]
        (lambda: GGNProbe(max_rows=0), ValueError, r"GGNProbe\(max_rows=0\)"),
        (lambda: SpectralCollapseCallback(interventions=Reset()), TypeError, "must be a list"),  # type: ignore[arg-type]
        (lambda: SpectralCollapseCallback(interventions=[Reset]), TypeError, "instances of"),  # type: ignore[list-item]
        (lambda: SpectralCollapseCallback(loss_fn=3), TypeError, "loss_fn=3 must be a function"),  # type: ignore[arg-type]
        (lambda: Collapse("sharpness"), ValueError, "is not a diagnostic"),
        (lambda: ShrinkPerturb(s=0), ValueError, r"ShrinkPerturb\(s=0\) must be in \(0, 1\]"),
        (lambda: ShrinkPerturb(s=1.1), ValueError, r"ShrinkPerturb\(s=1.1\)"),
        (lambda: Reset(layers=[]), ValueError, "must be a list of module names, or None"),
        (lambda: Reset(layers="net"), ValueError, "must be a list of module names, or None"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"collapse": "learnable_fraction"}, r"collapse='learnable_fraction' must be an instance of Collapse"),
        ({"collapse": Collapse}, r"collapse=<class .*> must be an instance of Collapse"),
        ({"collapse": None}, r"collapse=None must be"),
        ({"task_detector": TaskDetector}, r"task_detector=<class .*> must be an instance of TaskDetector"),
        ({"interventions": None}, r"interventions=None must be a list of interventions"),
        ({"interventions": ShrinkPerturb}, r"interventions=<class .*> must be a list of interventions"),
    ],
)
def test_arguments_of_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SpectralCollapseCallback(**arguments)


def test_repr_shows_arguments_that_differ_from_the_defaults() -> None:
    assert repr(SpectralCollapseCallback()) == "SpectralCollapseCallback()"
    callback = SpectralCollapseCallback(
        GGNProbe(samples=32),
        interventions=[ShrinkPerturb(when="task")],
        monitor_every_n_steps=50,
        task_detector=TaskDetector(every_n_epochs=2),
        name="actor",
    )
    assert repr(callback) == (
        f"SpectralCollapseCallback(probe={GGNProbe(samples=32)!r}, "
        "interventions=[ShrinkPerturb(s=0.8, when='task')], monitor_every_n_steps=50, "
        "task_detector=TaskDetector(every_n_epochs=2), name='actor')"
    )


def test_interventions_are_a_tuple() -> None:
    assert isinstance(SpectralCollapseCallback(interventions=[ShrinkPerturb()]).interventions, tuple)


def test_arguments_after_the_probe_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        SpectralCollapseCallback(GGNProbe(), Collapse())  # type: ignore[misc]
