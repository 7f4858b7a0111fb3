"""Check interventions in a Trainer: the occasions on which they run, their errors, and checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import Collapse, PlasticityWarning, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.interventions import (
    ContinualBackprop,
    Intervention,
    ReDo,
    ReGraMa,
    Repair,
    Reset,
    ShrinkPerturb,
    StepIntervention,
)
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from tests.helpers.interventions import INTERVENTIONS, Row, for_each
from tests.helpers.interventions_in_training import (
    NEVER,
    Counting,
    hooks,
)
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_another_process
from tests.helpers.usages import Quartic


def test_interventions_of_one_kind_are_numbered_in_logs() -> None:
    logger, interventions = MemoryLogger(), [Counting(), Counting(fails=[2])]
    repairs = [ResetHead(2), ResetHead(3)]
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
    assert [(repair.name, repair.step) for repair in report.repairs] == [("ResetHead", 2), ("ResetHead_2", 3)]


def test_failing_step_intervention_only_warns() -> None:
    intervention, module = Counting(fails=[2]), Classifier()
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention])
    with pytest.warns(PlasticityWarning, match="Counting failed and changed nothing, training goes on: no luck"):
        trainer(callback).fit(module, loader(batches=4))
    assert intervention.steps == 4


def compiled_before(module: Classifier) -> None:
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    module.net(torch.randn(64, 4))


def in_evaluation_mode(module: Classifier) -> None:
    module.net.eval()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("disable_hooks", [compiled_before, in_evaluation_mode])
def test_hooks_that_never_run_warn(disable_hooks: Callable[[Classifier], None]) -> None:
    module = Classifier()
    disable_hooks(module)
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


class ResetHead(Repair):
    """A repair that resets the last layer."""

    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        return Reset(["net.2"]).plan(model, context)


@pytest.mark.parametrize(
    ("when", "by_task"),
    [("task", [[], [8], [16]]), (5, [[5], [10, 15], [20]]), (8, [[8], [16], [24]]), ("collapse", [[], [], []])],
)
def test_repairs_run_on_their_occasions(when: Any, by_task: list[list[int]]) -> None:
    callback, module = SpectralCollapseCallback(collapse=NEVER, interventions=[ResetHead(when)]), Classifier()
    for _ in range(3):
        trainer(callback, max_epochs=2).fit(module, loader(batches=4))
    assert [[repair.step for repair in report.repairs] for report in callback.history] == by_task


@pytest.mark.parametrize("when", ["never", "steps", 0, -3, 1.5, True, None])
def test_other_values_of_when_are_refused(when: Any) -> None:
    with pytest.raises(ValueError, match=rf"ReDo\(when={when!r}\) must be 'collapse' or 'task' or a number"):
        ReDo(when=when)


class Busy(Classifier):
    """A module whose ``training_step`` has side effects."""

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
    callback = SpectralCollapseCallback(collapse=Collapse(above=1e-9), interventions=[intervention])
    with torch.no_grad():
        module.net[0].bias[::2] = -100
    by_hand, first = Busy(), next(iter(loader(batches=1)))
    by_hand.load_state_dict(module.state_dict())
    expected = intervention.repair(
        by_hand,
        forward=lambda model: model.net(first[0]),
        loss=lambda model: F.cross_entropy(model.net(first[0]), first[1]),
        generator=torch.Generator().manual_seed(0),
        initial=module.state_dict(),
    )
    with pytest.warns(PlasticityWarning):
        trainer(callback, max_steps=1, logger=logger).fit(module, DataLoader(TensorDataset(*first), batch_size=64))
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
    """A module with units that are inactive most of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            self.net[0].bias -= 0.8


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
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
    uninterrupted, first, _ = fit(6, row.make())
    assert not torch.equal(weights(uninterrupted), weights(plain)), "it did nothing"
    assert uninterrupted.calls == plain.calls
    assert hooks(uninterrupted) == hooks(plain)
    fit(3, row.make())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed, second, _ = fit(6, row.make(), tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(uninterrupted)) == row.resumes_exactly
    if row.resumes_exactly:
        # The number of calls, which the module logs, is not in its checkpoint.
        reports = [[{**r.to_dict(), "logged": {}} for r in callback.history] for callback in (first, second)]
        assert str(reports[0]) == str(reports[1])


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

    state_sizes = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            state_sizes.append(len(trainer.optimizers[0].state))

    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[ShrinkPerturb(when=2)])
    trainer(callback, Record()).fit(Scheduled(), loader(batches=4))
    assert state_sizes == [4, 0, 4, 0]
