"""The callback on real Trainers: what it reports, warns of, repairs and survives."""

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import (
    Collapse,
    GGNProbe,
    HessianProbe,
    PlasticityWarning,
    SpectralCollapseCallback,
    TaskDetector,
)
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.diagnostics import diagnostics_of
from lightning_plasticity.interventions import ReDo, Reset, ShrinkPerturb
from tests.helpers.modules import Classifier, LoggingByItself, loader, tasks_seen, trainer, weights


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


class Recorder(Classifier):
    """Keeps the first batch of each fit and the weights that met it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self.current_epoch == 0:
            self.first = [tensor.clone() for tensor in batch]
            self.then = {name: value.clone() for name, value in self.state_dict().items()}


def kill(module: LightningModule) -> None:
    """Makes every hidden unit dead."""
    with torch.no_grad():
        module.net[0].bias.fill_(-100)


def test_report_is_the_spectrum_of_the_loss_on_the_first_batch_of_the_task() -> None:
    callback, module = SpectralCollapseCallback(), Recorder()
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(callback).fit(module, loader())
    trainer(callback).fit(module, loader(seed=1))
    twin = Classifier()
    twin.load_state_dict(module.then)
    expected = ggn_spectrum(twin, module.first, cross_entropy)
    report = callback.history[1]
    assert torch.equal(report.spectrum.eigenvalues, expected.eigenvalues)
    assert report.metrics["learnable_fraction"] == expected.learnable_fraction()
    assert report.metrics["probe_loss"] == pytest.approx(cross_entropy(twin, module.first).item())
    twin.load_state_dict(initial)
    at_start = ggn_spectrum(twin, module.first, cross_entropy)
    for diagnostic in diagnostics_of(["ggn"]):
        ratio = report.metrics[f"{diagnostic.name}_vs_initial"]
        assert ratio == pytest.approx(diagnostic.compute(expected) / diagnostic.compute(at_start))
        assert callback.history[0].metrics[f"{diagnostic.name}_vs_initial"] == 1


def test_probe_takes_the_first_samples_and_fewer_where_outputs_are_many() -> None:
    for probe, samples in ((GGNProbe(), 16), (GGNProbe(samples=5), 5), (GGNProbe(max_rows=10), 3)):
        callback, module = SpectralCollapseCallback(probe), Recorder()
        trainer(callback).fit(module, loader(size=16))
        twin = Classifier()
        twin.load_state_dict(module.then)
        expected = ggn_spectrum(twin, [tensor[:samples] for tensor in module.first], cross_entropy)
        assert torch.equal(callback.history[0].spectrum.eigenvalues, expected.eigenvalues)


def test_collapse_is_warned_of_once_and_repaired() -> None:
    torch.manual_seed(0)
    callback = SpectralCollapseCallback(interventions=[ShrinkPerturb(), Reset(layers=["net.2"])])
    module = Classifier()
    trainer(callback, max_epochs=3).fit(module, loader())
    kill(module)
    before = weights(module)
    with pytest.warns(PlasticityWarning, match=r"task 1: learnable fraction .* losing its plasticity") as caught:
        trainer(callback, max_epochs=3).fit(module, loader())
    assert sum(issubclass(warning.category, PlasticityWarning) for warning in caught) == 1
    report = callback.history[1]
    assert report.collapsed
    assert [(repair.name, repair.num_parameters_changed) for repair in report.repairs] == [
        ("ShrinkPerturb", len(before)),
        ("Reset", 27),
    ]
    assert module.net[0].bias.max() > -25, "the dead units are back in reach"
    assert not callback.history[0].collapsed


def test_repair_in_the_loop_equals_the_same_repair_by_hand() -> None:
    class ByHand(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and self.trainer.current_epoch == 0 and self.repair_now:
                ShrinkPerturb().repair(
                    self, optimizers=self.trainer.optimizers, generator=torch.Generator().manual_seed(1000)
                )

    ends = []
    for hand in (False, True):
        torch.manual_seed(0)
        module = ByHand()
        callbacks = [] if hand else [SpectralCollapseCallback(interventions=[ShrinkPerturb()])]
        module.repair_now = False
        trainer(*callbacks).fit(module, loader())
        kill(module)
        module.repair_now = hand
        if hand:
            trainer(*callbacks).fit(module, loader())
        else:
            with pytest.warns(PlasticityWarning):
                trainer(*callbacks).fit(module, loader())
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_without_interventions_a_collapse_changes_nothing() -> None:
    ends = []
    for callbacks in ([], [SpectralCollapseCallback()]):
        torch.manual_seed(0)
        module = Classifier()
        trainer(*callbacks).fit(module, loader())
        kill(module)
        if callbacks:
            with pytest.warns(PlasticityWarning):
                trainer(*callbacks).fit(module, loader())
        else:
            trainer().fit(module, loader())
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_a_head_that_grows_is_compared_with_its_first_value() -> None:
    callback, module = SpectralCollapseCallback(), Classifier()
    trainer(callback).fit(module, loader())
    module.net[2] = nn.Linear(8, 5)
    trainer(callback).fit(module, loader())
    assert callback.history[1].spectrum.num_parameters == 4 * 8 + 8 + 8 * 5 + 5


def test_initial_weights_are_not_probed_beside_themselves() -> None:
    class Counting(GGNProbe):
        def measure(self, *arguments: Any) -> Any:
            probed.append(self)
            return super().measure(*arguments)

    probed: list[GGNProbe] = []
    callback, module, counts = SpectralCollapseCallback(Counting()), Classifier(), []
    for _ in range(3):
        trainer(callback).fit(module, loader())
        counts.append(len(probed))
    assert counts == [1, 3, 5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_history_and_initial_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    callback, module = SpectralCollapseCallback(interventions=[ShrinkPerturb()]), Classifier()
    trainer(callback).fit(module, loader())
    kill(module)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.warns(PlasticityWarning):
        trainer(callback, saver, enable_checkpointing=True, max_epochs=2).fit(module, loader())
    path = next(tmp_path.glob("*step=2.ckpt"))
    resumed, again = SpectralCollapseCallback(interventions=[ShrinkPerturb()]), Classifier()
    state = torch.load(path, weights_only=True)
    assert state["callbacks"]["SpectralCollapseCallback"]["version"] == 1
    second = trainer(resumed, saver, max_epochs=2, enable_checkpointing=True)
    second.fit(again, loader(), ckpt_path=path)
    assert [report.to_dict().keys() for report in resumed.history] == [r.to_dict().keys() for r in callback.history]
    for ours, theirs in zip(resumed.history, callback.history, strict=True):
        assert (ours.task, ours.step, ours.metrics, ours.collapsed) == (
            theirs.task,
            theirs.step,
            theirs.metrics,
            theirs.collapsed,
        )
        assert torch.equal(ours.spectrum.kernel.residual_shares, theirs.spectrum.kernel.residual_shares)
        assert [repair.to_dict() for repair in ours.repairs] == [repair.to_dict() for repair in theirs.repairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlasticityWarning)
        trainer(callback).fit(module, loader())
        trainer(resumed).fit(again, loader())
    assert callback.history[-1].step == 3 + 6
    assert resumed.history[-1].step == 3 + second.global_step


def test_evaluating_a_checkpoint_does_not_roll_back_the_history(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    callback, module = SpectralCollapseCallback(), Tested()
    one = trainer(callback)
    one.fit(module, loader())
    one.save_checkpoint(tmp_path / "first.ckpt")
    one.fit_loop.max_epochs += 1
    one.fit(module, loader())
    one.test(module, DataLoader(loader().dataset), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    one.fit_loop.max_epochs += 1
    one.fit(module, loader())
    assert tasks_seen(callback) == [(0, None, 0), (1, None, 3), (2, None, 6)]


def test_state_of_another_version_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="in version 99, and this release reads version 1"):
        SpectralCollapseCallback().load_state_dict({"version": 99})


def test_works_without_any_logger() -> None:
    callback = SpectralCollapseCallback()
    trainer(callback, logger=False).fit(Classifier(), loader())
    assert callback.history[0].metrics["learnable_fraction"] > 0


def test_works_on_a_batch_of_one_sample() -> None:
    callback = SpectralCollapseCallback()
    trainer(callback).fit(Classifier(), loader(size=1))
    assert 1 <= callback.history[0].spectrum.epsilon_rank(1e-6) <= 2, "one sample, three classes: rank 2 at most"


def test_works_in_half_precision() -> None:
    full, half = SpectralCollapseCallback(), SpectralCollapseCallback()
    for callback, precision in ((full, "32-true"), (half, "bf16-true")):
        torch.manual_seed(0)
        module = Classifier()
        with torch.no_grad():  # weights that both precisions can hold
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        data = DataLoader(TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0])), batch_size=4)
        trainer(callback, precision=precision).fit(module, data)
        assert next(module.parameters()).dtype == (torch.bfloat16 if callback is half else torch.float32)
    assert half.history[0].metrics["ggn_trace"] == pytest.approx(full.history[0].metrics["ggn_trace"], rel=1e-5)


class Multiplying(Classifier):
    """Makes a tensor in the default precision."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] @ torch.eye(4), batch[1]), batch_idx)


@pytest.mark.parametrize("probe", [None, HessianProbe(num_probes=2, num_steps=10)], ids=["ggn", "hessian"])
@pytest.mark.parametrize(("precision", "of_inputs"), [("64-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_tensors_made_in_the_step_and_inputs_in_half_precision_fit_the_weights(
    precision: Any, of_inputs: torch.dtype, probe: HessianProbe | None
) -> None:
    plain, other = (SpectralCollapseCallback(probe, interventions=[ReDo()]) for _ in range(2))
    for callback, own, dtype in ((plain, "32-true", torch.float32), (other, precision, of_inputs)):
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(torch.eye(4, dtype=dtype), torch.tensor([0, 1, 2, 0])), batch_size=4)
        trainer(callback, precision=own).fit(Multiplying() if own != "bf16-mixed" else Classifier(), data)
        assert torch.get_default_dtype() == torch.float32
    (expected,), (report,) = plain.history, other.history
    assert report.errors == {}
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)


class Step(Classifier):
    """Returns whatever it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.output(super().training_step(batch, batch_idx))


def test_training_step_may_return_a_dict_with_the_loss() -> None:
    callback = SpectralCollapseCallback()
    trainer(callback).fit(Step(lambda loss: {"loss": loss, "other": 1}), loader())
    assert len(callback.history) == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda loss: None, r"Step.training_step returned None, so the probe has no loss: return the loss or"),
        (lambda loss: {"value": loss}, r"returned a dict without a tensor under 'loss' \(keys: \['value'\]\)"),
        (lambda loss: loss * torch.nan, "the loss on the probe batch is nan: .* Look for NaN or infinite values"),
        (lambda loss: loss.detach(), "does not depend on any trainable parameter"),
    ],
    ids=["none", "dict without loss", "nan", "detached"],
)
def test_unusable_loss_is_an_error_at_the_first_probe_before_any_weight_has_changed(output: Any, message: str) -> None:
    module = Step(output)
    before = weights(module)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer(SpectralCollapseCallback()).fit(module, loader())
    assert torch.equal(weights(module), before)


def test_after_a_first_success_a_failing_probe_is_reported_and_training_goes_on() -> None:
    module = Step(lambda loss: loss)
    callback = SpectralCollapseCallback(interventions=[Reset()])
    trainer(callback).fit(module, loader())
    module.output = lambda loss: loss if module.training else loss * torch.nan  # the probe is in evaluation mode
    before = weights(module)
    with pytest.warns(PlasticityWarning, match="task 1: plasticity could not be measured, training goes on: .* nan"):
        trainer(callback).fit(module, loader())
    report = callback.history[1]
    assert report.spectrum is None
    assert report.metrics == {}
    assert not report.collapsed
    assert not torch.equal(weights(module), before), "it went on training"
    module.output = lambda loss: loss
    trainer(callback).fit(module, loader())
    assert callback.history[2].spectrum is not None


def test_module_that_cannot_be_copied_is_named_and_loss_fn_helps() -> None:
    module = Classifier()
    module.net.guard = threading.Lock()
    with pytest.raises(
        MisconfigurationException, match=r"its attribute 'net.guard' \(a lock\) cannot be copied.*loss_fn="
    ):
        trainer(SpectralCollapseCallback()).fit(module, loader())
    callback = SpectralCollapseCallback(loss_fn=cross_entropy)
    trainer(callback).fit(module, loader())
    assert callback.history[0].spectrum.exact


def test_any_use_of_a_parameter_can_be_probed() -> None:
    class Gated(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0] * self.gate), batch[1])

    callback = SpectralCollapseCallback()
    trainer(callback).fit(model := Gated(), loader())
    assert callback.history[0].spectrum.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert callback.history[0].spectrum.exact


def test_a_state_given_by_hand_counts_also_after_a_foreign_checkpoint_was_tested(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    foreign, module, first = trainer(), Tested(), SpectralCollapseCallback()
    foreign.fit(module, loader())
    foreign.save_checkpoint(tmp_path / "foreign.ckpt")
    trainer(first).fit(module, loader())
    callback = SpectralCollapseCallback()
    data = DataLoader(loader().dataset, batch_size=4)
    trainer(callback).test(module, data, ckpt_path=tmp_path / "foreign.ckpt", verbose=False)
    callback.load_state_dict(first.state_dict())
    assert tasks_seen(callback) == tasks_seen(first) == [(0, None, 0)]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_its_own_batches_is_refused_before_anything_is_trained() -> None:
    class Fetching(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return cross_entropy(self, batch)

    module = Fetching()
    before = weights(module)
    message = r"Fetching.training_step\(dataloader_iter\) fetches its batches itself"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(SpectralCollapseCallback(loss_fn=cross_entropy)).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate:UserWarning")
def test_layers_that_have_no_shape_yet_are_refused_by_name() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    with pytest.raises(MisconfigurationException, match=r"'net.0.weight' gets its shape in the first.*run Lazy on one"):
        trainer(SpectralCollapseCallback()).fit(Lazy(), loader())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_task_whose_first_batch_is_empty_says_so() -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return cross_entropy(self, batch) if len(batch[0]) else None

    empty, full = ((torch.randn(size, 4), torch.randint(3, (size,))) for size in (0, 4))
    callback, module = SpectralCollapseCallback(collapse=Collapse(below=1e-9)), Skipping()
    trainer(callback).fit(module, DataLoader([full], batch_size=None))
    with pytest.warns(PlasticityWarning, match="task 1: plasticity could not be measured.*the batch holds no samples"):
        trainer(callback).fit(module, DataLoader([empty, full], batch_size=None))
    trainer(callback).fit(module, DataLoader([full], batch_size=None))
    assert [report.spectrum is None for report in callback.history] == [False, True, False]


class Unique(nn.Linear):
    def __deepcopy__(self, memo: Any) -> "Unique":
        raise TypeError("there is one of me")


@pytest.mark.parametrize("loss_fn", [None, cross_entropy])
def test_a_module_with_a_part_that_cannot_be_copied_is_refused_and_never_touched(loss_fn: Any) -> None:
    module = Classifier()
    module.net[2] = Unique(8, 3)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"its attribute 'net.2' \(a Unique\).*__deepcopy__$"):
        trainer(SpectralCollapseCallback(loss_fn=loss_fn)).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("loss_fn", [None, cross_entropy])
def test_a_buffer_that_keeps_its_graph_leaves_no_trace(loss_fn: Any) -> None:
    class Carrying(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("hidden", torch.zeros(3), persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0]) + self.hidden.detach()
            self.hidden = 0.5 * logits.mean(0)
            return F.cross_entropy(logits, batch[1])

    ends, callback = [], SpectralCollapseCallback(collapse=Collapse(below=1e-9), loss_fn=loss_fn)
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = Carrying()
        for seed in range(2):
            trainer(*callbacks).fit(module, loader(seed=seed))
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert [report.errors for report in callback.history] == [{}, {}]


def test_manual_optimization_needs_a_loss_fn() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.raises(
        MisconfigurationException, match=r"Manual optimizes manually.*pass SpectralCollapseCallback\(loss_fn"
    ):
        trainer(SpectralCollapseCallback()).fit(Manual(), loader())
    callback = SpectralCollapseCallback(loss_fn=cross_entropy)
    trainer(callback).fit(Manual(), loader())
    assert len(callback.history) == 1


def test_interventions_that_cannot_work_are_an_error_at_the_first_probe() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no module; there are"):
        trainer(SpectralCollapseCallback(interventions=[Reset(layers=["encoder.*"])])).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GGNProbe(samples=0), ValueError, r"GGNProbe\(samples=0\) must be a whole number, 1 or larger"),
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


def test_a_sample_with_too_many_outputs_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"one sample has 3 outputs, more than GGNProbe\(max_rows=2\)"):
        trainer(SpectralCollapseCallback(GGNProbe(max_rows=2))).fit(Classifier(), loader())


def test_tokens_flattened_into_rows_are_probed_on_fewer_sequences() -> None:
    class Tokens(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[0].flatten())

    data = DataLoader(TensorDataset(torch.randint(9, (8, 5))), batch_size=8)
    callback = SpectralCollapseCallback(GGNProbe(max_rows=100))
    trainer(callback).fit(Tokens(), data)
    assert len(callback.history[0].spectrum.kernel.eigenvalues) == 2 * 5 * 9, "two sequences of 45 rows"


def test_schedulers_stepped_in_training_step_are_not_stepped_by_the_probe() -> None:
    class Scheduled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.lr_schedulers().step()
            self.optimizers().param_groups[0]["weight_decay"] += 0.01
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    ends = []
    for callbacks in ([], [SpectralCollapseCallback()]):
        torch.manual_seed(0)
        module = Scheduled()
        one = trainer(*callbacks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            one.fit(module, loader(5))
        settings = {key: value for key, value in one.optimizers[0].param_groups[0].items() if key != "params"}
        ends.append((weights(module), settings, one.lr_scheduler_configs[0].scheduler.state_dict()))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert ends[0][1:] == ends[1][1:]


def test_loggers_of_the_users_own_are_silent_in_the_probe(tmp_path: Path) -> None:
    module = LoggingByItself(CSVLogger(tmp_path))
    trainer(SpectralCollapseCallback()).fit(module, loader())
    assert len(module.own.experiment.metrics) == 3


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
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SpectralCollapseCallback(**arguments)


def test_interventions_may_come_from_a_generator() -> None:
    callback = SpectralCollapseCallback(interventions=(one for one in [ShrinkPerturb(when=1)]))  # type: ignore[arg-type]
    trainer(callback).fit(Classifier(), loader())
    assert len(callback.interventions) == 1
    assert len(callback.history[0].repairs) == 3
