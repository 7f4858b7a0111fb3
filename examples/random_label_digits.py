"""Train a network that loses its plasticity on real data, with and without repair.

The data are scikit-learn's handwritten digits. Each task gives the same images new random labels, which the network
must memorise; the network is never reset. It is trained twice: without repair, and with shrink-perturb whenever the
callback detects a collapse. Beside them a fresh network, with the same initial weights for every task, shows what is
lost. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_plasticity import FitTest, PlasticityWarning, SpectralCollapseCallback, TaskReport
from lightning_plasticity.interventions import Intervention, ShrinkPerturb

IMAGES, BATCH, EPOCHS, CLASSES = 640, 64, 40, 10


class Memoriser(L.LightningModule):
    """An ordinary LightningModule, without any code for the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class OnlineAccuracy(L.Callback):
    """Mean accuracy over all training batches of each fit."""

    def __init__(self) -> None:
        self.history: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epochs: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epochs.append(trainer.callback_metrics["accuracy"].item())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.history.append(sum(self._epochs) / len(self._epochs))
        for logger in trainer.loggers:
            logger.log_metrics({"plasticity_by_task/online_accuracy": self.history[-1]}, step=len(self.history) - 1)


class StartAfresh(L.Callback):
    """Reset the network to its first weights at every fit."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(self, "initial"):
            self.initial = copy.deepcopy(pl_module.state_dict())
        pl_module.load_state_dict(self.initial)


class AboveBar(logging.Handler):
    """Print what the callback says of a task above the progress bar, and nothing else that Lightning says."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("task "):
            tqdm.write(f"  ▲ {record.getMessage()}")


def run(name: str, callback: L.Callback, tasks: int, seed: int, output: Path) -> list[float]:
    """Train on all tasks with a callback, and return the online accuracy of each."""
    L.seed_everything(seed, verbose=False)
    images = torch.tensor(load_digits().data[:IMAGES], dtype=torch.float32)
    images = (images - images.mean(0)) / images.std(0).clamp(min=1e-6)
    labels = torch.Generator().manual_seed(seed)

    accuracy = OnlineAccuracy()
    module = Memoriser()
    trainer = L.Trainer(
        max_epochs=0,
        accelerator="cpu",
        callbacks=[callback, accuracy],
        logger=TensorBoardLogger(output, name=name, version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    with tqdm(range(tasks), desc=f"{name:>14}", unit="task") as bar:
        for _ in bar:
            targets = torch.randint(CLASSES, (IMAGES,), generator=labels)
            # The callback begins a new task at each fit.
            trainer.fit_loop.max_epochs += EPOCHS
            trainer.fit(module, DataLoader(TensorDataset(images, targets), batch_size=BATCH, shuffle=True))
            bar.set_postfix(accuracy=f"{accuracy.history[-1]:.2f}")
    return accuracy.history


def describe_actions(report: TaskReport) -> str:
    """Return what the callback did at a task, such as ``"warned, ShrinkPerturb"``."""
    if not report.collapsed:
        return ""
    return ", ".join(["warned", *(repair.name for repair in report.repairs)])


def print_table(name: str, accuracy: list[float], history: list[TaskReport]) -> None:
    """Print one line per task."""
    print(f"\n{name}\n{'task':>6}{'online accuracy':>17}{'fresh better by':>17}{'learnable fraction':>20}   callback")
    for value, report in zip(accuracy, history, strict=True):
        gap, learnable = report.metrics["live_metric_gap"], report.metrics["learnable_fraction"]
        print(f"{report.task:>6}{value:>17.3f}{gap:>17.3f}{learnable:>20.3f}   {describe_actions(report)}")


def plot(results: dict[str, tuple[list[float], list[TaskReport]]], fresh: list[float], path: Path) -> None:
    """Plot the accuracy, the lead of a fresh network and the learnable fraction of each run over the tasks."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (accuracy, history) in results.items():
        tasks = [report.task for report in history]
        collapses = [report.task for report in history if report.collapsed]
        curves = [accuracy, *([r.metrics[key] for r in history] for key in ("live_metric_gap", "learnable_fraction"))]
        for axis, curve in zip(axes, curves, strict=True):
            (line,) = axis.plot(tasks, curve, "-", label=name)
            axis.plot(collapses, [curve[task] for task in collapses], "v", color=line.get_color(), markersize=5)
    axes[0].plot(fresh, ":", color="gray", label="fresh network for each task")
    axes[1].axhline(0, color="gray", linestyle=":")
    titles = [
        "online accuracy of the task",
        "lead of a fresh network, first fifth of it",
        "learnable fraction at its start",
    ]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="task", title=title)
    axes[0].set_ylim(0, None)
    axes[2].set_ylim(0, None)
    axes[0].legend(title="▼ the callback saw a collapse", loc="lower left")
    figure.savefig(path, dpi=130)


def summarise(accuracy: list[float], history: list[TaskReport]) -> None:
    """Print at which task the first warning came, and at which a third of the accuracy was lost."""
    lost = next((t for t, value in enumerate(accuracy) if value < 2 / 3 * max(accuracy[: t + 1])), None)
    warned = next((report.task for report in history if report.collapsed), None)
    print(
        f"\nWithout repair: first warning at the start of task {warned}; a third of the accuracy lost at task {lost}."
    )


def main() -> None:
    """Train both networks, then print a table and save a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()

    # So small a network trains faster on one thread.
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").handlers = [AboveBar()]
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    show_other_warning = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, PlasticityWarning):
            # Print above the progress bar instead of through it.
            tqdm.write(f"  ▼ {message}")
        else:
            show_other_warning(message, category, *where)

    warnings.showwarning = show_warning

    settings: dict[str, list[Intervention]] = {"plain": [], "shrink-perturb": [ShrinkPerturb()]}
    results = {}
    for name, interventions in settings.items():
        # A network that memorises more slowly is told by its accuracy, beside a fresh one, on a part of the task.
        fit_test = FitTest(live=True, steps=80, metric="accuracy")
        callback = SpectralCollapseCallback(fit_test=fit_test, interventions=interventions)
        accuracy = run(name, callback, arguments.tasks, arguments.seed, arguments.output)
        results[name] = accuracy, callback.history
    fresh = run("fresh", StartAfresh(), arguments.tasks, arguments.seed, arguments.output)
    for name, (accuracy, history) in results.items():
        print_table(name, accuracy, history)
    summarise(*results["plain"])
    picture = arguments.output / "plasticity.png"
    plot(results, fresh, picture)
    print(f"Curves: {picture}")
    print(f"Task by task: .venv/bin/tensorboard --logdir {arguments.output}")


if __name__ == "__main__":
    main()
