"""Check the modules, losses, batches and precisions that the callback can probe, and errors for all others."""

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import GGNProbe, HessianProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.interventions import ReDo, Reset
from lightning_plasticity.probes import Probe
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


def test_probe_works_on_one_sample() -> None:
    callback = SpectralCollapseCallback(GGNProbe(samples=1))
    with pytest.warns(PlasticityWarning, match="on 1 samples, fewer than the 8 that a verdict needs"):
        trainer(callback).fit(Classifier(), loader(size=1))
    assert 1 <= callback.history[0].spectrum.epsilon_rank(1e-6) <= 2, "one sample of three classes has rank 2 at most"


def test_half_precision_matches_full_precision() -> None:
    full, half = (SpectralCollapseCallback(GGNProbe(samples=16)) for _ in range(2))
    for callback, precision in ((full, "32-true"), (half, "bf16-true")):
        torch.manual_seed(0)
        module = Classifier()
        # Both precisions can represent these weights.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        data = DataLoader(TensorDataset(torch.eye(4).repeat(4, 1), torch.arange(16) % 3), batch_size=16)
        trainer(callback, precision=precision).fit(module, data)
        assert next(module.parameters()).dtype == (torch.bfloat16 if callback is half else torch.float32)
    assert half.history[0].metrics["ggn_trace"] == pytest.approx(full.history[0].metrics["ggn_trace"], rel=1e-5)


class MatrixMultiplication(Classifier):
    """Multiplies by a tensor of the default dtype."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] @ torch.eye(4), batch[1]), batch_idx)


@pytest.mark.parametrize(
    "probe", [GGNProbe(samples=16), HessianProbe(samples=16, num_probes=2, num_steps=10)], ids=["ggn", "hessian"]
)
@pytest.mark.parametrize(("precision", "input_dtype"), [("64-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_probe_casts_new_tensors_and_inputs_to_weight_dtype(
    precision: Any, input_dtype: torch.dtype, probe: Probe
) -> None:
    full, other = (SpectralCollapseCallback(probe, interventions=[ReDo()]) for _ in range(2))
    for callback, trainer_precision, dtype in (
        (full, "32-true", torch.float32),
        (other, precision, input_dtype),
    ):
        torch.manual_seed(0)
        x = torch.eye(4, dtype=dtype).repeat(4, 1)
        data = DataLoader(TensorDataset(x, torch.arange(16) % 3), batch_size=16)
        module = Classifier() if trainer_precision == "bf16-mixed" else MatrixMultiplication()
        trainer(callback, precision=trainer_precision).fit(module, data)
        assert torch.get_default_dtype() == torch.float32
    (expected,), (report,) = full.history, other.history
    assert report.errors == {}
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)


class Cast(Classifier):
    """Computes in half precision, however a cast to it may be written, or without the casts."""

    casts = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        first, _, last = self.net
        if not self.casts:
            return F.cross_entropy(last(first(x).relu() + 1), y)
        h = F.linear(x.bfloat16(), first.weight.to(torch.bfloat16), first.bias.to(dtype=torch.bfloat16)).relu()
        h = h + torch.ones(8, dtype=torch.bfloat16)
        weight, bias = (parameter.type(torch.bfloat16) for parameter in (last.weight, last.bias))
        one_hot = F.one_hot(y, 3).bfloat16()
        return -(one_hot * F.linear(h, weight, bias).log_softmax(1, dtype=torch.bfloat16)).sum(1).mean()


@pytest.mark.parametrize("probe", [GGNProbe(), GGNProbe(max_rows=1), HessianProbe(64, num_probes=1, num_steps=4)])
def test_casts_to_half_precision_are_left_out(probe: Probe) -> None:
    """The numbers are those of the same network without them; monitor and fit test run the network as it is."""
    metrics = []
    for casts in (True, False):
        torch.manual_seed(0)
        module = Cast()
        module.casts = casts
        callback = SpectralCollapseCallback(probe, monitor=False, **WITHOUT_FIT_TEST)
        trainer(callback).fit(module, DataLoader(loader(batches=1).dataset, batch_size=64))
        metrics.append(callback.history[0].metrics)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)


class Step(Classifier):
    """Returns the loss as changed by ``output``."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.output(super().training_step(batch, batch_idx))


def test_training_step_may_return_a_dict() -> None:
    callback = SpectralCollapseCallback()
    trainer(callback).fit(Step(lambda loss: {"loss": loss, "other": 1}), loader())
    assert len(callback.history) == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda loss: {"value": loss}, r"returned a dict without a tensor under 'loss' \(keys: \['value'\]\)"),
        (lambda loss: loss * torch.nan, "the loss on the probe batch is nan: .* Look for NaN or infinite values"),
        (lambda loss: loss.detach(), "does not depend on any trainable parameter"),
    ],
    ids=["dict without loss", "nan", "detached"],
)
def test_unusable_loss_fails_before_any_weight_changes(output: Any, message: str) -> None:
    module = Step(output)
    before = weights(module)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        trainer(SpectralCollapseCallback()).fit(module, loader())
    assert torch.equal(weights(module), before)


class Skipping(Classifier):
    """Skips batches without labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if (batch[1] < 0).all() else super().training_step(batch, batch_idx)


returned_none = pytest.mark.filterwarnings("ignore:.*training_step.* returned .None.")


@returned_none
@pytest.mark.parametrize(("size", "tasks"), [(64, 2), (20, 1)])
@pytest.mark.parametrize("probe", [GGNProbe(), HessianProbe(64, num_probes=1, num_steps=4)], ids=["ggn", "hessian"])
def test_skipped_batches_do_not_start_a_task(size: int, tasks: int, probe: Any) -> None:
    """The report is that of a run whose batches begin with the first one that has a loss."""
    histories = []
    for count in (2, 0):
        torch.manual_seed(0)
        callback, module = SpectralCollapseCallback(probe, collapse=NEVER), Skipping()
        for seed in range(tasks):
            data = list(DataLoader(loader(batches=6, size=size, seed=seed).dataset, batch_size=size))
            unlabelled = [(x, -torch.ones_like(y)) for x, y in data[:count]]
            trainer(callback).fit(module, DataLoader(unlabelled + data, batch_size=None))
        histories.append(callback.history)
    for skipped, plain in zip(*histories, strict=True):
        assert skipped.metrics == plain.metrics
        assert skipped.errors == {}
        assert (
            "begins with batch 2, counted from 0: training_step returned None for the batches before"
            in skipped.remarks[0]
        )
        assert skipped.remarks[1:] == plain.remarks


@returned_none
def test_task_of_skipped_batches_warns_at_its_end() -> None:
    callback = SpectralCollapseCallback()
    with pytest.warns(PlasticityWarning, match="could not be measured: training_step returned None for all of its"):
        trainer(callback).fit(Skipping(), DataLoader([(torch.ones(64, 4), -torch.ones(64))] * 2, batch_size=None))
    assert callback.history == []


class InTrainingOnly(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.training else None


def test_batch_that_is_skipped_in_the_probe_only_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"in evaluation mode, in which the probe runs, InTrainingOnly"):
        trainer(SpectralCollapseCallback()).fit(InTrainingOnly(), loader())


def test_later_probe_failure_only_warns() -> None:
    module = Step(lambda loss: loss)
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Reset()])
    trainer(callback).fit(module, loader())
    # The probe runs in evaluation mode.
    module.output = lambda loss: loss if module.training else loss * torch.nan
    before = weights(module)
    with pytest.warns(PlasticityWarning, match="task 1: plasticity could not be measured, training goes on: .* nan"):
        trainer(callback).fit(module, loader())
    report = callback.history[1]
    assert report.spectrum is None
    assert report.metrics == {}
    assert not report.collapsed
    assert not torch.equal(weights(module), before), "training went on"
    module.output = lambda loss: loss
    trainer(callback).fit(module, loader())
    assert callback.history[2].spectrum is not None


def test_uncopyable_attribute_needs_loss_fn() -> None:
    module = Classifier()
    module.net.guard = threading.Lock()
    with pytest.raises(
        MisconfigurationException, match=r"its attribute 'net.guard' \(a lock\) cannot be copied.*loss_fn="
    ):
        trainer(SpectralCollapseCallback()).fit(module, loader())
    callback = SpectralCollapseCallback(loss_fn=cross_entropy)
    trainer(callback).fit(module, loader())
    assert callback.history[0].spectrum.exact


def test_parameter_outside_any_layer_is_probed() -> None:
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


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_dataloader_iter_in_training_step_is_refused() -> None:
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
def test_lazy_layers_are_refused_by_name() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    with pytest.raises(MisconfigurationException, match=r"'net.0.weight' gets its shape in the first.*run Lazy on one"):
        trainer(SpectralCollapseCallback()).fit(Lazy(), loader())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_task_without_samples_only_warns() -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return cross_entropy(self, batch) if len(batch[0]) else None

    empty, full = ((torch.randn(size, 4), torch.randint(3, (size,))) for size in (0, 64))
    callback, module = SpectralCollapseCallback(collapse=NEVER), Skipping()
    trainer(callback).fit(module, DataLoader([full], batch_size=None))
    with pytest.warns(PlasticityWarning, match="task 1: plasticity could not be measured.*the batch holds no samples"):
        trainer(callback).fit(module, DataLoader([empty], batch_size=None))
    trainer(callback).fit(module, DataLoader([empty, full], batch_size=None))
    assert [report.spectrum is None for report in callback.history] == [False, True, False]


class Unique(nn.Linear):
    """A layer that cannot be deep-copied."""

    def __deepcopy__(self, memo: Any) -> "Unique":
        raise TypeError("not copyable")


@pytest.mark.parametrize("loss_fn", [None, cross_entropy])
def test_uncopyable_layer_is_refused(loss_fn: Any) -> None:
    module = Classifier()
    module.net[2] = Unique(8, 3)
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"its attribute 'net.2' \(a Unique\).*__deepcopy__$"):
        trainer(SpectralCollapseCallback(loss_fn=loss_fn)).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("loss_fn", [None, cross_entropy])
def test_buffer_with_graph_trains_unchanged(loss_fn: Any) -> None:
    class HiddenState(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("hidden", torch.zeros(3), persistent=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0]) + self.hidden.detach()
            self.hidden = 0.5 * logits.mean(0)
            return F.cross_entropy(logits, batch[1])

    trained_weights, callback = [], SpectralCollapseCallback(collapse=NEVER, loss_fn=loss_fn)
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = HiddenState()
        for seed in range(2):
            trainer(*callbacks).fit(module, loader(seed=seed))
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)
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


@pytest.mark.parametrize("max_rows", [2, 64 * 3 - 1])
def test_more_outputs_than_max_rows_are_measured_by_products(max_rows: int) -> None:
    module = FirstBatchRecorder()
    callback = SpectralCollapseCallback(GGNProbe(max_rows=max_rows, max_steps=60))
    trainer(callback).fit(module, loader())
    copy = Classifier()
    copy.load_state_dict(module.first_state)
    exact = ggn_spectrum(copy, module.first_batch, cross_entropy).learnable_fraction()
    (report,) = callback.history
    assert report.spectrum is None
    assert "epsilon_rank" not in report.metrics
    assert report.metrics["learnable_fraction_lo"] <= exact <= report.metrics["learnable_fraction_hi"]
    assert report.metrics["learnable_fraction"] == pytest.approx(exact, rel=0.02)
    assert "more than max_rows" in report.remarks[0]
    assert "a bracket, from" in report.remarks[1]


def test_outputs_that_couple_no_samples_are_not_a_reason_to_take_fewer() -> None:
    """Of flattened tokens, all samples are measured although the rows exceed max_rows."""

    class Tokens(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[0].flatten())

    data = DataLoader(TensorDataset(torch.randint(9, (32, 5))), batch_size=32)
    callback = SpectralCollapseCallback(GGNProbe(samples=32, max_rows=16 * 45 + 9, positions=64))
    trainer(callback).fit(Tokens(), data)
    (report,) = callback.history
    assert report.metrics["probe_samples"] == 32
    assert report.outputs == 2 * 9
    assert "2 of the 5 output positions of a sample were drawn at random" in report.remarks


def test_probe_does_not_step_schedulers_in_training_step() -> None:
    class Scheduled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.lr_schedulers().step()
            self.optimizers().param_groups[0]["weight_decay"] += 0.01
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    results = []
    for callbacks in ([], [SpectralCollapseCallback()]):
        torch.manual_seed(0)
        module = Scheduled()
        pl_trainer = trainer(*callbacks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            pl_trainer.fit(module, loader(5))
        settings = {key: value for key, value in pl_trainer.optimizers[0].param_groups[0].items() if key != "params"}
        results.append((weights(module), settings, pl_trainer.lr_scheduler_configs[0].scheduler.state_dict()))
    (weights_without, *settings_without), (weights_with, *settings_with) = results
    torch.testing.assert_close(weights_with, weights_without, rtol=0, atol=0)
    assert settings_with == settings_without


def test_direct_loggers_are_silent_in_the_probe(tmp_path: Path) -> None:
    module = DirectLogging(CSVLogger(tmp_path))
    trainer(SpectralCollapseCallback()).fit(module, loader())
    assert len(module.direct_logger.experiment.metrics) == 3
