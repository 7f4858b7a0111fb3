"""Test that failing loggers disturb neither training nor the other loggers."""

import contextlib
import errno
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from packaging.version import Version

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from tests.helpers.faults import ZeroPenalty
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_another_process


class Broken(MemoryLogger):
    """Fails to write the callback's metrics from one step on."""

    def __init__(self, error: Exception, from_step: int = 0) -> None:
        super().__init__()
        self.error, self.from_step = error, from_step

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if step is not None and step >= self.from_step and any("plasticity" in name for name in metrics):
            raise self.error
        super().log_metrics(metrics, step)


class LossLogging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "OSError: [Errno 28] No space left on device"),
        (PermissionError(errno.EROFS, os.strerror(errno.EROFS)), "PermissionError: [Errno 30] Read-only file system"),
        (ConnectionError("no route to the tracking server"), "ConnectionError: no route to the tracking server"),
        (KeyError(), "KeyError"),
    ],
    ids=["full", "read-only", "offline", "bug"],
)
@pytest.mark.parametrize("from_step", [0, 2], ids=["from the start", "later"])
def test_failing_logger_affects_nothing_else(error: Exception, reason: str, from_step: int) -> None:
    trained_weights = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module, broken, sound = LossLogging(), Broken(error, from_step), MemoryLogger()
        callback = SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1, interventions=[ZeroPenalty()])
        pl_trainer = trainer(*[callback] * with_callback, logger=[broken, sound])
        if with_callback:
            with pytest.warns(PlasticityWarning, match="Broken could not log the plasticity of the network"):
                pl_trainer.fit(module, loader(batches=4))
        else:
            pl_trainer.fit(module, loader(batches=4))
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)
    assert callback.history[0].errors == {"Broken": reason}
    assert list(sound.values("plasticity_training/feature_norm")) == [0, 1, 2, 3]
    assert list(sound.values("plasticity_training/ZeroPenalty/penalty")) == [0, 1, 2, 3]
    assert list(sound.values("plasticity_by_task/learnable_fraction")) == [0]
    assert list(broken.values("loss")) == list(sound.values("loss")) == [0, 1, 2, 3], "the user's metrics are complete"
    assert list(broken.values("plasticity_training/feature_norm")) == list(range(from_step))


def test_logger_without_directory_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger, callback = MemoryLogger(), SpectralCollapseCallback(collapse=NEVER)
    assert logger.save_dir is None
    trainer(callback, logger=logger).fit(Classifier(), loader())
    assert callback.history[0].errors == {}
    assert list(logger.values("plasticity/learnable_fraction")) == [0]
    assert list(tmp_path.iterdir()) == [], "the callback creates no directory"


def forbid_file_growth(folder: Path) -> None:
    """Set a limit on file sizes, which fails like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))


def make_read_only(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # File modes do not restrict root, so become the user "nobody".
    if os.geteuid() == 0:
        os.seteuid(65534)


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file where the directory was")


def train_two_tasks(folder: Path, damage: Callable[[Path], None]) -> tuple[bool, list[int], list[dict[str, str]]]:
    """Train without the callback and with it, where the loggers' directory is damaged between two tasks.

    Returns:
        Whether the weights are equal, the steps of each last fit, and the errors of each task.
    """
    warnings.simplefilter("ignore")
    loggers = [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="table", flush_logs_every_n_steps=1)]
    callback = SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1)
    trained_weights, steps = [], []
    for callbacks, options in (([], {}), ([callback], {"logger": loggers})):
        torch.manual_seed(0)
        module = Classifier()
        trainer(*callbacks, **options).fit(module, loader())
        if callbacks:
            damage(folder)
        pl_trainer = trainer(*callbacks, **options)
        # Lightning itself closes its loggers after training, which raises too.
        with contextlib.suppress(OSError):
            pl_trainer.fit(module, loader(seed=1))
        trained_weights.append(weights(module))
        steps.append(pl_trainer.global_step)
    return torch.equal(*trained_weights), steps, [report.errors for report in callback.history]


@pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.1"),
    reason="before 2.5.1 CSVLogger writes hyperparameters anew when a fit begins, which ends it",
)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (forbid_file_growth, "File too large"),
        (make_read_only, "Permission denied"),
        (replace_by_file, "Not a directory"),
    ],
    ids=["full", "read-only", "gone"],
)
def test_unwritable_log_files_are_reported_and_training_goes_on(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    tmp_path.chmod(0o755)
    equal, steps, (before, after) = in_another_process(train_two_tasks, tmp_path / "logs", damage)
    assert equal
    assert steps == [3, 3]
    assert before == {}
    assert after.keys() == {"TensorBoardLogger", "CSVLogger"}
    assert all(reason in error for error in after.values())
