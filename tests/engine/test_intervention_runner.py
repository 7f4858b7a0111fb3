"""Check interventions in the training loop: when they act, against loops by hand, and when they fail."""

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import (
    ContinualBackprop,
    Intervention,
    L2Init,
    ReDo,
    ReGraMa,
    Regularizer,
    Repair,
    RepairReport,
    Reset,
    ShrinkPerturb,
    StepIntervention,
    WeightClipping,
)
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from tests.helpers.interventions import INTERVENTIONS, Row, for_each, select
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_another_process
from tests.helpers.usages import Quartic, half_precision

NEVER = Collapse(below=1e-9)


class Regularized(Classifier):
    """Adds the term in ``training_step``."""

    term: Regularizer | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            return None
        loss = super().training_step(batch, batch_idx)
        return loss if self.term is None else loss + self.term.penalty(self)


class BySGD(Regularized):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ByFusedAdam(Regularized):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, fused=True)


class BySparseGradients(BySGD):
    """Has an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = (4 * batch[0][:, 0].abs()).long().clamp(max=9)
        return super().training_step((self.embedding(tokens), batch[1]), batch_idx)


class ByLossBackward(BySGD):
    """Calls ``loss.backward()`` itself, which Lightning does not see."""

    use_pl_optimizer = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers(use_pl_optimizer=self.use_pl_optimizer)
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        optimizer.step()


class Skipping(BySGD):
    """Trains on every other batch, as in Lightning's example of ``optimizer_step``."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class AccumulatingItself(Skipping):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class WithNewOptimizers(BySGD):
    """Creates a new optimizer for each epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.trainer.strategy.setup_optimizers(self.trainer)


def cross_entropy(module: LightningModule, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(BySGD, {}, id="plain"),
        pytest.param(BySGD, {"accumulate_grad_batches": 3}, id="accumulation with a short last window"),
        pytest.param(BySGD, "scaler", id="fp16"),
        pytest.param(ByFusedAdam, "scaler", id="fp16 and a fused optimizer"),
        pytest.param(BySparseGradients, {}, id="sparse gradients"),
        pytest.param(ByLossBackward, {}, id="loss.backward()"),
        pytest.param(Skipping, {}, id="gradients that are dropped"),
        pytest.param(AccumulatingItself, {}, id="gradients that are kept"),
        pytest.param(WithNewOptimizers, {}, id="new optimizers"),
    ],
)
def test_regularizer_counts_only_batches_with_a_loss(kind: type[Regularized], options: Any) -> None:
    ends = []
    for by_callback in (False, True):
        torch.manual_seed(0)
        module = kind()
        if not by_callback:
            module.term = Quartic(0.1)
        callback = SpectralCollapseCallback(
            collapse=NEVER, interventions=[Quartic(0.1)] if by_callback else [], loss_fn=cross_entropy
        )
        fitted = half_precision() if options == "scaler" else options
        trainer(callback, max_epochs=2, **fitted).fit(module, loader(batches=5))
        ends.append(weights(module))
    torch.manual_seed(0)
    plain = kind()
    trainer(max_epochs=2, **(half_precision() if options == "scaler" else options)).fit(plain, loader(batches=5))
    assert (ends[0] - ends[1]).abs().max() <= 1e-6
    assert (ends[0] - weights(plain)).abs().max() > 1e-3, "without the term it is another training"


def test_penalty_is_logged_every_n_steps(tmp_path: Path) -> None:
    logger = MemoryLogger()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Quartic(0.1)])
    module = Classifier()
    first = Quartic(0.1).penalty(module).item()
    trainer(callback, logger=logger, log_every_n_steps=2).fit(module, loader(batches=6))
    penalties = logger.values("plasticity_training/Quartic/penalty")
    assert list(penalties) == [1, 3, 5]
    assert 0 < penalties[1] != first


def test_interventions_of_one_kind_are_numbered_in_logs() -> None:
    logger, interventions = MemoryLogger(), [Counting(), Counting(fails=[2])]
    repairs = [Noting(2), Noting(3)]
    terms = [Quartic(0.1), Quartic(0.2)]
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[*terms, *interventions, *repairs])
    with pytest.warns(PlasticityWarning, match="Counting_2 failed and changed nothing, training goes on: no luck"):
        trainer(callback, logger=logger).fit(Classifier(), loader(batches=3))
    first, second = (logger.values(f"plasticity_training/{name}/penalty") for name in ("Quartic", "Quartic_2"))
    assert second == pytest.approx({step: 2 * value for step, value in first.items()})
    assert logger.values("plasticity_training/Counting/units") == {1: 1, 2: 2, 3: 3}
    assert logger.values("plasticity_training/Counting_2/units") == {1: 1, 3: 3}
    report = callback.history[0]
    assert report.errors == {"Counting_2": "ValueError: no luck"}
    assert [(repair.name, repair.step) for repair in report.repairs] == [("Noting", 2), ("Noting_2", 3)]


class NotFinite(Regularizer):
    """Is not finite at some of its calls."""

    def __init__(self, fails: Sequence[int]) -> None:
        super().__init__(1.0)
        self.calls, self.fails = -1, fails

    def penalty(self, model: nn.Module) -> Tensor:
        self.calls += 1
        return weights_term(model) * (float("nan") if self.calls in self.fails else 0.0)


def weights_term(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_regularizer_failure_raises_at_first_then_warns() -> None:
    module = Classifier()
    before = weights(module)
    with pytest.raises(ValueError, match="a gradient is not finite"):
        trainer(SpectralCollapseCallback(interventions=[NotFinite([0])])).fit(module, loader())
    assert torch.equal(weights(module), before)

    ends = []
    for fails in ([], [1]):
        torch.manual_seed(0)
        module = Classifier()
        fitted = trainer(SpectralCollapseCallback(interventions=[NotFinite(fails)]))
        if fails:
            with pytest.warns(PlasticityWarning, match="left out of this step, training goes on: a gradient is not"):
                fitted.fit(module, loader())
        else:
            fitted.fit(module, loader())
        ends.append(weights(module))
    assert torch.equal(*ends)


class Counting(StepIntervention):
    """Records its calls, and fails at some steps."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self.events: list[str] = []
        self.steps, self.fails = 0, fails
        self.handle: Any = None

    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.stop()
        self.events.append("start")
        self.handle = model.register_forward_pre_hook(lambda *_: None)

    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        self.steps += 1
        if self.steps in self.fails:
            raise ValueError("no luck")
        return RepairReport(self.name, {"net.0": torch.arange(self.steps)})

    def stop(self) -> None:
        if self.handle is not None:
            self.events.append("stop")
            self.handle.remove()
            self.handle = None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_step_intervention_starts_once_and_acts_each_step(tmp_path: Path) -> None:
    intervention, module, logger = Counting(), Classifier(), MemoryLogger()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    trainer(callback, logger=logger).fit(module, loader(batches=4))
    assert (intervention.events, intervention.steps, hooks(module)) == (["start", "stop"], 4, 0)
    assert logger.values("plasticity_training/Counting/units") == {1: 1, 2: 2, 3: 3, 4: 4}
    trainer(callback, accumulate_grad_batches=3).fit(module, loader(batches=4))
    assert (intervention.events, intervention.steps, hooks(module)) == (["start", "stop"] * 2, 6, 0)


def test_steps_skipped_by_a_gradient_scaler_do_not_count() -> None:
    class Overflowing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 and not self.trainer.sanity_checking else loss

    intervention = Counting()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, **half_precision()).fit(Overflowing(), loader(batches=4))
    assert intervention.steps == 3


def test_steps_skipped_by_a_fused_optimizer_do_not_count() -> None:
    """Such an optimizer unscales gradients itself: its ``step`` is called, and does nothing."""

    class Overflowing(ByFusedAdam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Classifier.training_step(self, batch, 0) * (float("inf") if batch_idx == 1 else 1)

    intervention = Counting()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, **half_precision()).fit(Overflowing(), loader(batches=4))
    assert intervention.steps == 3


class RawOptimizer(ByLossBackward):
    use_pl_optimizer = False


def test_raw_optimizer_steps_skip_regularizers_with_one_warning() -> None:
    intervention = Counting()
    callback = SpectralCollapseCallback(
        collapse=NEVER, interventions=[Quartic(0.1), intervention], loss_fn=cross_entropy
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, max_epochs=2).fit(RawOptimizer(), loader())
    messages = [str(warning.message) for warning in caught if warning.category is PlasticityWarning]
    expected = "SGD was stepped without Lightning, as with use_pl_optimizer=False: step what self.optimizers() returns"
    assert messages == [f"Quartic is left out of steps, training goes on: {expected}"]
    assert callback.history[0].errors == {"Quartic": expected}
    assert intervention.steps == 6


@pytest.mark.parametrize("when", ["on_train_epoch_start", "on_train_batch_start"])
def test_steps_of_new_optimizers_count(when: str) -> None:
    class Renewing(Classifier):
        renewals = 0

    def renew(self: Renewing, *_: Any) -> None:
        self.renewals += 1
        self.trainer.strategy.setup_optimizers(self.trainer)

    setattr(Renewing, when, renew)
    intervention, module = Counting(), Renewing()
    fitted = trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention]), max_epochs=2)
    fitted.fit(module, loader(batches=3))
    assert intervention.steps == 6
    assert module.renewals > 1
    assert not fitted.optimizers[0]._optimizer_step_post_hooks


class Unfreezing(BaseFinetuning):
    """Trains the head alone, and all layers from the third epoch on."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.net[0])

    def finetune_function(self, module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.1)


class OfWhatIsTrained(BySGD):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Growing(BySGD):
    """Gets a fourth class in the middle of a task."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.net[2] = nn.Linear(8, 4)
            self.trainer.strategy.setup_optimizers(self.trainer)


IN_THE_MIDDLE = pytest.mark.parametrize(
    ("kind", "others"),
    [pytest.param(OfWhatIsTrained, [Unfreezing()], id="unfrozen"), pytest.param(Growing, [], id="grown")],
)


class FromTheirBeginning(Callback):
    """Starts a term before each step, which keeps the initial values that it has."""

    def __init__(self, term: Regularizer) -> None:
        self.term = term

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.term.start(module)


@IN_THE_MIDDLE
def test_regularizer_of_parameters_trained_from_mid_task_on(kind: type[Regularized], others: list[Callback]) -> None:
    ends, callback = [], SpectralCollapseCallback(collapse=NEVER, interventions=[L2Init(0.1)], loss_fn=cross_entropy)
    for term in (None, L2Init(0.1)):
        torch.manual_seed(0)
        module = kind()
        module.term = term
        hand = [callback] if term is None else [FromTheirBeginning(term)]
        trainer(*copy.deepcopy(others), *hand, max_epochs=4).fit(module, loader())
        ends.append(weights(module))
    assert (ends[0] - ends[1]).abs().max() <= 1e-6
    assert [report.errors for report in callback.history] == [{}]


@IN_THE_MIDDLE
@for_each(row for row in INTERVENTIONS if row.needs == {"start"})
def test_start_covers_parameters_trained_from_mid_task_on(
    row: Row, kind: type[Regularized], others: list[Callback]
) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[row.make()])
    trainer(callback, *copy.deepcopy(others), max_epochs=4).fit(kind(), loader())
    assert [report.errors for report in callback.history] == [{}]


def test_interventions_restart_only_for_new_parameters() -> None:
    class InTurn(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[0].requires_grad_(batch_idx % 2 == 0)

    intervention, module = Counting(), InTurn()
    module.net[0].requires_grad_(False)
    trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])).fit(module, loader(batches=8))
    assert intervention.events.count("start") == 2


@for_each(select(StepIntervention, on_units=True))
def test_start_failing_at_a_later_task_only_warns(row: Row) -> None:
    class Two(Classifier):
        task = 0

        def __init__(self) -> None:
            super().__init__()
            # This head has no hidden units.
            self.second = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy((self.second if self.task else self.net)(batch[0]), batch[1])

    callback, module = SpectralCollapseCallback(collapse=NEVER, interventions=[row.make()], monitor=False), Two()
    trainer(callback).fit(module, loader())
    module.task = 1
    with pytest.warns(
        PlasticityWarning, match="could not be started and is off for this task, training goes on: .* has no units"
    ):
        trainer(callback).fit(module, loader())
    module.task = 0
    trainer(callback).fit(module, loader())
    assert (len(callback.history), hooks(module)) == (3, 0)


def test_failing_step_intervention_only_warns() -> None:
    intervention, module = Counting(fails=[2]), Classifier()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    with pytest.warns(PlasticityWarning, match="Counting failed and changed nothing, training goes on: no luck"):
        trainer(callback).fit(module, loader(batches=4))
    assert intervention.steps == 4


def compiled_before(module: Classifier) -> None:
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    module.net(torch.randn(4, 4))


def in_evaluation_mode(module: Classifier) -> None:
    module.net.eval()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("deafened", [compiled_before, in_evaluation_mode])
def test_hooks_that_never_run_warn(deafened: Callable[[Classifier], None]) -> None:
    module = Classifier()
    deafened(module)
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ContinualBackprop(0.3, 0)])
    with pytest.warns(PlasticityWarning, match="ContinualBackprop failed and changed nothing.*recorded no activations"):
        trainer(callback).fit(module, loader())
    assert "recorded no activations" in callback.history[0].errors["ContinualBackprop"]


def test_hooks_are_removed_when_training_fails() -> None:
    class Failing(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of luck")

    intervention, module = Counting(), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(SpectralCollapseCallback(interventions=[intervention])).fit(module, loader())
    assert (intervention.events, hooks(module)) == (["start", "stop"], 0)
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


class Noting(Repair):
    """Resets one layer."""

    def __init__(self, when: Any, fails: bool = False) -> None:
        super().__init__(when)
        self.fails = fails

    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        return Reset(["net.2"]).plan(model, context)


@pytest.mark.parametrize(
    ("when", "by_task"),
    [("task", [[], [8], [16]]), (5, [[5], [10, 15], [20]]), (8, [[8], [16], [24]]), ("collapse", [[], [], []])],
)
def test_repairs_run_on_their_occasions(when: Any, by_task: list[list[int]]) -> None:
    callback, module = SpectralCollapseCallback(collapse=NEVER, interventions=[Noting(when)]), Classifier()
    for _ in range(3):
        trainer(callback, max_epochs=2).fit(module, loader(batches=4))
    assert [[repair.step for repair in report.repairs] for report in callback.history] == by_task


@pytest.mark.parametrize("when", ["never", "steps", 0, -3, 1.5, True, None])
def test_other_values_of_when_are_refused(when: Any) -> None:
    with pytest.raises(ValueError, match=rf"ReDo\(when={when!r}\) must be 'collapse' or 'task' or a number"):
        ReDo(when=when)


class Busy(Classifier):
    """Has a ``training_step`` with side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("batches", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.batches += 1
        self.log("calls", float(self.calls))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("intervention", [ReDo(), ReGraMa(0.1)], ids=lambda i: i.name)
def test_unit_reset_at_collapse_equals_one_by_hand(intervention: ReDo | ReGraMa, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, logger = Busy(), MemoryLogger()
    callback = SpectralCollapseCallback(collapse=Collapse(below=1, relative_to=None), interventions=[intervention])
    with torch.no_grad():
        module.net[0].bias[::2] = -100
    by_hand, first = Busy(), next(iter(loader(batches=1)))
    by_hand.load_state_dict(module.state_dict())
    expected = intervention.repair(
        by_hand,
        forward=lambda model: model.net(first[0]),
        loss=lambda model: F.cross_entropy(model.net(first[0]), first[1]),
        generator=torch.Generator().manual_seed(0),
    )
    with pytest.warns(PlasticityWarning):
        trainer(callback, max_steps=1, logger=logger).fit(module, DataLoader(TensorDataset(*first), batch_size=4))
    report = callback.history[0].repairs[0]
    assert report.units.keys() == {"net.0"}
    assert torch.equal(report.units["net.0"], expected.units["net.0"])
    assert report.num_parameters_changed == expected.num_parameters_changed
    assert (module.calls, module.batches) == (1, 1)
    assert logger.values("calls") == {0: 1}
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    F.cross_entropy(by_hand.net(first[0]), first[1]).backward()
    optimizer.step()
    assert torch.equal(weights(module), weights(by_hand))


def test_units_are_reset_every_n_steps() -> None:
    torch.manual_seed(0)
    module = Busy()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ReDo(threshold=0.5, when=2)])
    trainer(callback).fit(module, loader(batches=5))
    repairs = callback.history[0].repairs
    assert [repair.step for repair in repairs] == [2, 4]
    assert repairs[0].units["net.0"].numel() > 0
    assert module.calls == 5


def test_step_interventions_resume_from_a_checkpoint(tmp_path: Path) -> None:
    def callback(*interventions: Intervention) -> SpectralCollapseCallback:
        return SpectralCollapseCallback(collapse=NEVER, interventions=interventions)

    torch.manual_seed(0)
    fitted = trainer(callback(Counting(), ShrinkPerturb()), enable_checkpointing=False)
    fitted.fit(Classifier(), loader())
    fitted.save_checkpoint(tmp_path / "last.ckpt")

    again = Counting()
    resumed = trainer(callback(again, ShrinkPerturb()), max_epochs=2)
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed.fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.steps == 6

    other = Counting()
    with pytest.warns(PlasticityWarning, match=r"interventions \['Counting', 'ShrinkPerturb'\], now they are"):
        trainer(callback(other), max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert other.steps == 3


def test_interventions_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="must hold instances of Repair, StepIntervention or Regularizer"):
        SpectralCollapseCallback(interventions=[Intervention()])


class Deep(Busy):
    """Has units that are inactive most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            self.net[0].bias -= 0.8


@for_each(INTERVENTIONS)
def test_every_intervention_acts_leaves_no_hooks_and_resumes(row: Row, tmp_path: Path) -> None:
    def fit(epochs: int, intervention: Intervention | None, path: Path | None = None) -> tuple[Deep, Any, Any]:
        torch.manual_seed(0)
        module = Deep()
        callback = SpectralCollapseCallback(
            collapse=NEVER,
            interventions=[] if intervention is None else [intervention],
            task_detector=TaskDetector(every_n_epochs=2),
            monitor=False,
        )
        fitted = trainer(callback, max_epochs=epochs)
        batches = DataLoader(loader(batches=3).dataset, batch_size=4)
        fitted.fit(module, batches, ckpt_path=path)
        fitted.save_checkpoint(tmp_path / "last.ckpt")
        return module, callback, fitted

    plain, _, _ = fit(6, None)
    whole, first, _ = fit(6, row.make())
    assert not torch.equal(weights(whole), weights(plain)), "it did nothing"
    assert whole.calls == plain.calls
    assert hooks(whole) == hooks(plain)
    fit(3, row.make())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed, second, _ = fit(6, row.make(), tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert str([r.to_dict() for r in second.history]) == str([r.to_dict() for r in first.history])


@pytest.mark.filterwarnings("ignore:HareTortoise averages weights over training steps")
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_callback_can_be_copied_and_pickled(make_copy: Callable[[Any], Any]) -> None:
    callback = SpectralCollapseCallback(
        collapse=NEVER, interventions=[row.kind() for row in INTERVENTIONS], monitor_every_n_steps=1
    )
    ends = []
    for _ in range(2):
        callback = make_copy(callback)
        torch.manual_seed(0)
        trainer(callback).fit(Classifier(), loader())
        ends.append(len(callback.history))
    assert ends == [1, 2]
    assert [report.errors for report in callback.history] == [{}, {}]


def test_copies_made_in_training_keep_the_original_hooks() -> None:
    class Copying(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            copy.deepcopy(intervention).stop()

    ends = []
    for others in ([], [Copying()]):
        torch.manual_seed(0)
        module, intervention = Classifier(), ContinualBackprop(0.5, 0)
        trainer(SpectralCollapseCallback(collapse=NEVER, interventions=[intervention]), *others).fit(module, loader(8))
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_optimizers_of_frozen_parameters_are_not_regularized() -> None:
    class HalfFrozen(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            self.net[0].requires_grad_(False)
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    module = HalfFrozen()
    before = module.net[0].weight.clone(), module.net[2].weight.clone()
    callback = SpectralCollapseCallback(
        collapse=NEVER,
        interventions=[Quartic(1.0)],
        loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
    )
    trainer(callback).fit(module, loader())
    assert callback.history[0].errors == {}
    assert torch.equal(module.net[0].weight, before[0])
    assert not torch.equal(module.net[2].weight, before[1])


def test_regularizer_without_optimizer_does_nothing() -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> None:  # type: ignore[override]
            pass

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[Quartic(1.0)])
    with pytest.warns(UserWarning, match="configure_optimizers. returned .None."):
        trainer(callback).fit(Still(), loader())
    assert callback.history[0].errors == {}


@for_each(row for row in INTERVENTIONS if "seed" in row.annotations)
def test_interventions_with_random_numbers_can_be_pickled(row: Row) -> None:
    """``strategy="ddp_spawn"`` sends them to another process."""
    intervention = row.make(seed=3)
    assert in_another_process(generator_state, intervention) == generator_state(intervention)


def generator_state(intervention: StepIntervention) -> list[int]:
    state: list[int] = intervention.state_dict()["generator"].tolist()
    return state


class HoldingMoments(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that refers to the optimizer state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.moments = optimizer.state
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return list(self.base_lrs)


def test_state_is_reset_although_a_scheduler_refers_to_it() -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            return [optimizer], [HoldingMoments(optimizer)]

    remembered = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            remembered.append(len(trainer.optimizers[0].state))

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ShrinkPerturb(when=2)])
    trainer(callback, Look()).fit(Scheduled(), loader(batches=4))
    assert remembered == [4, 0, 4, 0]


def test_frozen_layers_keep_their_ages() -> None:
    class InTurn(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), self.net)

        def on_train_epoch_start(self) -> None:
            first = self.current_epoch % 2 == 0
            self.net[0].requires_grad_(first)
            self.net[3].requires_grad_(not first)

    intervention, ages = ContinualBackprop(replacement_rate=1e-6), []

    class Look(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            ages.append({layer: int(record["age"].max()) for layer, record in intervention._records.items()})

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    trainer(callback, Look(), max_epochs=4).fit(InTurn(), loader(batches=4))
    assert [own["net.0"] for own in ages] == [4, 4, 8, 8]
    assert [own.get("net.3.0", 0) for own in ages][1::2] == [4, 8]


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer without calling the constructor of torch, as some libraries do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults = optimizer.state, optimizer.defaults

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_optimizers_without_hooks_allow_only_regularizers() -> None:
    class ByHand(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(data_loss(self, batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return Wrapper(torch.optim.SGD(self.parameters(), lr=0.1))

    def data_loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module.net(batch[0]), batch[1])

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[L2Init()], loss_fn=data_loss)
    trainer(callback).fit(ByHand(), loader())
    assert callback.history[0].errors == {}
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[WeightClipping()], loss_fn=data_loss)
    with pytest.raises(MisconfigurationException, match="when Wrapper takes a step"):
        trainer(callback).fit(ByHand(), loader())
