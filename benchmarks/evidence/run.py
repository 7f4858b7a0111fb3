"""Train a network on a stream with the callback in a Trainer, and beside it what the callback is to be judged by.

The truth beside a task: the network's initial weights learn the same batches in the same order with a new optimizer of
the same settings (*fresh*). The verdict of a task is about the network as it was before any repair at its start, so
where there was one, a copy of that network with its optimizer learns the same batches as well (*unrepaired*).
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import numpy
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_plasticity
from benchmarks.evidence.methods import METHODS, Method
from benchmarks.evidence.stream import Batch, Stream, Task
from benchmarks.evidence.streams import STREAMS
from lightning_plasticity import Collapse, FitTest, GGNProbe, HessianProbe, SpectralCollapseCallback, TaskReport
from lightning_plasticity.interventions import Repair

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "lightning": lightning.__version__,
    "lightning_plasticity": lightning_plasticity.__version__,
    "numpy": numpy.__version__,
}
# The ends and the middle of the range in which the authors of arXiv 2509.22335 look for the best ε for their figure.
EPSILONS = (0.01, 0.1, 1.0)


class Learner(LightningModule):
    """A network that learns a stream. A last layer that changes does so at the start of a task."""

    def __init__(self, stream: Stream, weight_decay: float, seed: int) -> None:
        super().__init__()
        self.stream = stream
        self.weight_decay = weight_decay
        self.seed = seed
        self.net = stream.network()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss, accuracy = self.stream.evaluate(self.net, batch)
        self.log("accuracy", accuracy)
        return {"loss": loss, "accuracy": accuracy}

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.stream.optimizer(self.parameters(), self.weight_decay)

    @override
    def on_train_epoch_start(self) -> None:
        before = list(self.parameters())
        change_head(self.net, self.stream, self.current_epoch, self.seed)
        for optimizer in self.trainer.optimizers:
            replace_parameters(optimizer, before, list(self.parameters()))


class Tasks(LightningDataModule):
    """Gives the tasks of a stream, one in each epoch of a fit, and announces them by ``task_id``."""

    def __init__(self, module: Learner, tasks: Iterator[Task]) -> None:
        super().__init__()
        self._module = module
        self._tasks = tasks
        self.task_id = -1
        self.task: Task = []

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        if self.task_id != self.trainer.current_epoch:
            self.task_id, self.task = self.trainer.current_epoch, next(self._tasks)
        return DataLoader(self._module.stream.batches(self.task, self._module.net), batch_size=None)


class Outcomes(Callback):
    """Records the mean loss and accuracy of a task, each on a batch before the step on it.

    Attributes:
        rows: Per task these means by name of the network.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, dict[str, float]]] = []
        self._outputs: list[dict[str, float]] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._outputs.append({name: value.item() for name, value in outputs.items()})

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({"network": mean(self._outputs)})
        self._outputs = []


class Truth(Outcomes):
    """Trains the fresh and, where there was a repair, the unrepaired network; place it before the callback.

    Args:
        module: The module, with its initial weights.
        data: The tasks.
        plasticity: The callback.
        fresh: The outcomes of the fresh network, if they are known.
    """

    def __init__(
        self,
        module: Learner,
        data: Tasks,
        plasticity: SpectralCollapseCallback,
        fresh: Sequence[dict[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self._fresh = fresh
        self._module = module
        self._data = data
        self._plasticity = plasticity
        self._initial = copy.deepcopy(module.net)
        self._at_start = {
            each.name
            for each in plasticity.interventions
            if plasticity.fit_test is not None and isinstance(each, Repair) and not isinstance(each.when, int)
        }

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._unrepaired = copy_with_optimizer(self._module, trainer.optimizers[0])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        stream, task, row = self._module.stream, self._data.task, self.rows[-1]
        row["fresh"] = self._learn_fresh(task) if self._fresh is None else self._fresh[self._data.task_id]
        repaired = self._at_start & {repair.name for repair in self._plasticity.history[-1].repairs}
        row["unrepaired"] = learn(stream, *self._unrepaired, task) if repaired else row["network"]

    def _learn_fresh(self, task: Task) -> dict[str, float]:
        stream = self._module.stream
        change_head(self._initial, stream, self._data.task_id, self._module.seed)
        network = copy.deepcopy(self._initial)
        return learn(stream, network, stream.optimizer(network.parameters(), self._module.weight_decay), task)


class Clock:
    """Sums up the process time in the hooks of a callback."""

    def __init__(self, callback: Callback) -> None:
        self.seconds = 0.0
        for name in dir(Callback):
            if getattr(type(callback), name) is not getattr(Callback, name) and name.startswith("on_"):
                setattr(callback, name, self._timed(getattr(callback, name)))

    def _timed(self, hook: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return hook(*arguments, **options)
            finally:
                self.seconds += time.process_time() - began

        return timed


def run(
    name: str, method: str, seed: int, tasks: int, fresh: Sequence[dict[str, float]] | None = None
) -> dict[str, Any]:
    """Train on the tasks of a stream, and return the numbers, verdicts and truth of each.

    Args:
        name: Name of the stream.
        method: Name of the method.
        seed: Seed of the run.
        tasks: Number of tasks.
        fresh: The outcomes of the fresh network, from another run with this seed and weight decay. By default it is
            trained.
    """
    began = time.perf_counter()
    stream, of_method = STREAMS[name], METHODS[method]
    torch.manual_seed(seed)
    module = Learner(stream, of_method.weight_decay, seed)
    plasticity = callback_of(of_method, stream, seed, module)
    data = Tasks(module, stream.draw(seed))
    truth, clock = Truth(module, data, plasticity, fresh), Clock(plasticity)
    fit(module, data, tasks, [truth, plasticity])
    reports = zip(plasticity.history, truth.rows, strict=True)
    return {
        "stream": name,
        "method": method,
        "seed": seed,
        "regression": stream.regression,
        "versions": VERSIONS,
        "seconds": time.perf_counter() - began,
        "seconds_in_callback": clock.seconds,
        "tasks": [described(report) | row for report, row in reports],
    }


def fit(module: Learner, data: Tasks, tasks: int, callbacks: list[Callback]) -> None:
    """Train a module on tasks."""
    Trainer(
        max_epochs=tasks,
        reload_dataloaders_every_n_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)


def callback_of(method: Method, stream: Stream, seed: int, module: Learner) -> SpectralCollapseCallback:
    """Return the callback of a new run."""
    if not method.measured:
        # No measurement costs less than that of dormant units; more than all of them is no collapse.
        rule = Collapse("dormant_fraction", above=1.0)
        return SpectralCollapseCallback(None, fit_test=None, collapse=rule, interventions=method.interventions())
    # As many steps as the ranks need not to change any more.
    probe = HessianProbe(num_probes=2, num_steps=200) if method.hessian else GGNProbe()
    fit_test = live_fit_test(stream, seed, module) if method.live else FitTest()
    return SpectralCollapseCallback(probe, fit_test=fit_test, interventions=method.interventions())


def live_fit_test(stream: Stream, seed: int, module: Learner) -> FitTest:
    """Return a fit test on as many batches of each task as are a fifth of the first one."""
    first = next(stream.draw(seed))
    return FitTest(live=True, steps=len(stream.batches(first, module.net)) // 5, metric=stream.live_metric)


def described(report: TaskReport) -> dict[str, Any]:
    """Return the numbers but those of single layers, the verdict and what was done at a task."""
    metrics = {name: value for name, value in report.metrics.items() if "/" not in name}
    if report.spectrum is not None and report.matrix == "hessian":
        metrics |= {f"hessian_epsilon_rank@{epsilon}": report.spectrum.epsilon_rank(epsilon) for epsilon in EPSILONS}
    return {
        "metrics": {name: rounded(value) for name, value in metrics.items()},
        "fit_curves": [[rounded(loss) for loss in curve] for curve in (report.fit_curve, report.fresh_fit_curve)],
        "collapsed": report.collapsed,
        "repairs": [repair.name for repair in report.repairs],
        "remarks": report.remarks,
        "errors": report.errors,
    }


def rounded(value: float) -> float:
    """Return a number with five digits, which keeps files short."""
    return float(f"{value:.5g}")


def learn(stream: Stream, network: nn.Module, optimizer: Optimizer, task: Task) -> dict[str, float]:
    """Train a network on a task in a plain loop, and return its mean loss and accuracy."""
    network.train()
    outputs = []
    for batch in stream.batches(task, network):
        loss, accuracy = stream.evaluate(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs.append({"loss": loss.item(), "accuracy": accuracy.item()})
    return mean(outputs)


def mean(outputs: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each number over batches."""
    return {name: statistics.fmean(each[name] for each in outputs) for name in outputs[0]}


def copy_with_optimizer(module: Learner, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Return copies of a module's network and of its optimizer, state included."""
    network = copy.deepcopy(module.net)
    of_copy = module.stream.optimizer(network.parameters(), module.weight_decay)
    of_copy.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return network, of_copy


def change_head(network: nn.Module, stream: Stream, task: int, seed: int) -> None:
    """Give the last layer the outputs or the weights of a task; new ones are the same for all networks of a run."""
    if stream.outputs is None and stream.head == "kept":
        return
    assert isinstance(network, nn.Sequential)
    old = network[-1]
    assert isinstance(old, nn.Linear)
    outputs = old.out_features if stream.outputs is None else stream.outputs(task)
    if stream.head == "kept" and old.out_features == outputs:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1000 * seed + task)
        new = nn.Linear(old.in_features, outputs)
        if stream.head == "kept":
            new.weight[: old.out_features] = old.weight
            new.bias[: old.out_features] = old.bias
        elif stream.head == "zero":
            new.weight.zero_()
            new.bias.zero_()
    network[-1] = new


def replace_parameters(optimizer: Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]) -> None:
    """Train new parameters in the place of others, whose optimizer state is dropped."""
    new = dict(zip(before, after, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    for parameter in before:
        if new[parameter] is not parameter:
            optimizer.state.pop(parameter, None)
