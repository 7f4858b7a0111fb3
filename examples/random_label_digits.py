"""A network loses its plasticity on real data, is warned of it, and is repaired.

The data are scikit-learn's handwritten digits. At every task the same images get new random labels, and the network,
never reset, has to memorise them. It is trained twice: as it is, and with shrink-perturb whenever the callback sees a
collapse. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
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

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback, TaskReport
from lightning_plasticity.interventions import Intervention, ShrinkPerturb

IMAGES, BATCH, EPOCHS, CLASSES = 640, 64, 40, 10


class Memoriser(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of the callback."""

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


def run(
    name: str, interventions: list[Intervention], tasks: int, seed: int, output: Path
) -> tuple[list[float], list[TaskReport]]:
    """Trains through all tasks; returns the online accuracy of each, and what the callback saw."""
    L.seed_everything(seed, verbose=False)
    images = torch.tensor(load_digits().data[:IMAGES], dtype=torch.float32)
    images = (images - images.mean(0)) / images.std(0).clamp(min=1e-6)
    labels = torch.Generator().manual_seed(seed)

    plasticity = SpectralCollapseCallback(interventions=interventions)
    accuracy = OnlineAccuracy()
    module = Memoriser()
    trainer = L.Trainer(
        max_epochs=0,
        accelerator="cpu",
        callbacks=[plasticity, accuracy],
        logger=TensorBoardLogger(output, name=name, version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    with tqdm(range(tasks), desc=f"{name:>14}", unit="task") as bar:
        for _ in bar:
            targets = torch.randint(CLASSES, (IMAGES,), generator=labels)
            trainer.fit_loop.max_epochs += EPOCHS  # every fit is a task
            trainer.fit(module, DataLoader(TensorDataset(images, targets), batch_size=BATCH, shuffle=True))
            bar.set_postfix(
                accuracy=f"{accuracy.history[-1]:.2f}",
                learnable=f"{plasticity.history[-1].metrics['learnable_fraction']:.2f}",
            )
    return accuracy.history, plasticity.history


def did(report: TaskReport) -> str:
    """What the callback did, in a word or two."""
    if not report.collapsed:
        return ""
    return ", ".join(["warned", *(repair.name for repair in report.repairs)])


def print_table(name: str, accuracy: list[float], history: list[TaskReport]) -> None:
    """One line a task."""
    print(f"\n{name}\n{'task':>6}{'online accuracy':>17}{'learnable fraction':>20}{'ε-rank':>8}   callback")
    for value, report in zip(accuracy, history, strict=True):
        learnable, rank = report.metrics["learnable_fraction"], report.metrics["epsilon_rank"]
        print(f"{report.task:>6}{value:>17.3f}{learnable:>20.3f}{rank:>8.0f}   {did(report)}")


def plot(results: dict[str, tuple[list[float], list[TaskReport]]], path: Path) -> None:
    """Online accuracy, learnable fraction and ε-rank of every run, task by task."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (accuracy, history) in results.items():
        tasks = [report.task for report in history]
        alarms = [report.task for report in history if report.collapsed]
        curves = [accuracy, *([r.metrics[key] for r in history] for key in ("learnable_fraction", "epsilon_rank"))]
        for axis, curve in zip(axes, curves, strict=True):
            (line,) = axis.plot(tasks, curve, "-", label=name)
            axis.plot(alarms, [curve[task] for task in alarms], "v", color=line.get_color(), markersize=5)
    titles = ["online accuracy of the task", "learnable fraction at its start", "ε-rank at its start"]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="task", title=title, ylim=(0, None))
    axes[0].legend(title="▼ the callback saw a collapse", loc="lower left")
    figure.savefig(path, dpi=130)


def summarise(accuracy: list[float], history: list[TaskReport]) -> None:
    """When the warning came, and when a third of the accuracy was gone."""
    lost = next((t for t, value in enumerate(accuracy) if value < 2 / 3 * max(accuracy[: t + 1])), None)
    warned = next((report.task for report in history if report.collapsed), None)
    print(
        f"\nWithout repair: first warning at the start of task {warned}; a third of the accuracy gone at task {lost}."
    )


def main() -> None:
    """Trains both networks and shows what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # a network this small is faster so
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    show_other_warning = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, PlasticityWarning):
            tqdm.write(f"  ! {message}")  # above the progress bar
        else:
            show_other_warning(message, category, *where)

    warnings.showwarning = show_warning

    settings: dict[str, list[Intervention]] = {"plain": [], "shrink-perturb": [ShrinkPerturb()]}
    results = {
        name: run(name, interventions, arguments.tasks, arguments.seed, arguments.output)
        for name, interventions in settings.items()
    }
    for name, (accuracy, history) in results.items():
        print_table(name, accuracy, history)
    summarise(*results["plain"])
    picture = arguments.output / "plasticity.png"
    plot(results, picture)
    print(f"Curves: {picture}")
    print(f"Spectra, task by task: .venv/bin/tensorboard --logdir {arguments.output}")


if __name__ == "__main__":
    main()
