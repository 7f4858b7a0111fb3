"""Test that a run which is killed and resumed from its last checkpoint ends bit-identical to an uninterrupted run."""

import contextlib
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from tests.helpers.killed_run import BATCHES, EPOCHS_OF_A_TASK, run
from tests.helpers.modules import NEVER, Classifier, cross_entropy, loader, tasks_seen, trainer
from tests.helpers.processes import fork_server


@pytest.fixture(scope="module")
def in_a_process() -> Callable[..., int | None]:
    """Return a function that calls another one in a new process and returns the exit code.

    The process is killed after ``seconds``, if given. All processes fork from one server, which imports torch once.
    """
    context = fork_server()

    def call(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> int | None:
        process = context.Process(target=function, args=arguments)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    return call


@pytest.fixture(scope="module")
def uninterrupted(in_a_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Any]:
    """Return a function that gives the result of an uninterrupted run, which is trained once."""

    @cache
    def result(every_n_train_steps: int | None) -> Any:
        folder = tmp_path_factory.mktemp("uninterrupted")
        assert in_a_process(run, folder, None, every_n_train_steps) == 0
        return torch.load(folder / "result.pt", weights_only=True)

    return result


def assert_same(actual: Any, expected: Any, where: str = "result") -> None:
    """Assert that two nested structures are equal to the last bit; NaN equals NaN."""
    assert type(actual) is type(expected), where
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys(), where
        for key in actual:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(actual, list | tuple):
        assert len(actual) == len(expected), where
        for index, (actual_item, expected_item) in enumerate(zip(actual, expected, strict=True)):
            assert_same(actual_item, expected_item, f"{where}[{index}]")
    elif isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual.nan_to_num(nan=1234.5), expected.nan_to_num(nan=1234.5)), where
    else:
        assert actual == expected or (actual != actual and expected != expected), f"{where}: {actual} is not {expected}"


def is_at_end_of_epoch(checkpoint: Path) -> bool:
    """Return whether a checkpoint exists and was saved after the last batch of an epoch."""
    return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["global_step"] % BATCHES == 0


def with_last_rows(result: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the result with only the last ``count`` logged rows."""
    logged = result["logged"]
    return {**result, "logged": logged[len(logged) - count :]}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("moment", "every_n_train_steps", "saved_at"),
    [
        ("on_before_optimizer_step 21", None, 16),
        # While the samples of task 1 are gathered.
        ("on_before_optimizer_step 19", 6, 18),
        # Between the probes of the current and of the initial weights at task 1; task 0 has a trial, a probe and one
        # after its repair.
        ("probe 4", None, 16),
        # In the middle of a task.
        ("repair 24", None, 24),
        # Before the first checkpoint.
        slow("on_train_batch_start 3", None, 0),
        slow("on_train_batch_start 17", None, 16),
        slow("on_train_batch_end 40", None, 32),
        slow("on_after_backward 48", None, 40),
        # After both probes of task 1, and after the one of the repaired network.
        slow("probe 5", None, 16),
        slow("probe 6", None, 16),
        slow("probe 8", None, 32),
        slow("repair 40", None, 40),
        slow("checkpoint 7", None, 24),
        slow("on_train_batch_end 18", 5, 15),
        # The checkpoint is saved after the last batch of an epoch, but before the epoch ends.
        slow("on_after_backward 28", 8, 24),
        slow("probe 8", 3, 39),
        slow("repair 30", 7, 28),
    ],
)
def test_killed_run_resumes_to_the_same_result(
    in_a_process: Any,
    uninterrupted: Any,
    tmp_path: Path,
    moment: str,
    every_n_train_steps: int | None,
    saved_at: int,
) -> None:
    assert in_a_process(run, tmp_path, moment, every_n_train_steps) == -signal.SIGKILL
    checkpoint = tmp_path / "last.ckpt"
    assert (torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else 0) == saved_at
    assert in_a_process(run, tmp_path, None, every_n_train_steps) == 0
    resumed, expected = torch.load(tmp_path / "result.pt", weights_only=True), uninterrupted(every_n_train_steps)
    # The report of a task that was not measured yet is logged at the step at which the task began.
    began_at = saved_at - saved_at % (EPOCHS_OF_A_TASK * BATCHES)
    assert resumed["logged"][0]["step"] in (saved_at, began_at), "the run continued from the checkpoint"
    assert_same(resumed, with_last_rows(expected, len(resumed["logged"])))


@pytest.mark.slow
@pytest.mark.parametrize("every_n_train_steps", [None, 3, 5, 7] * 3)
def test_run_killed_at_random_times_resumes_to_the_same_result(
    in_a_process: Any, uninterrupted: Any, tmp_path: Path, every_n_train_steps: int | None
) -> None:
    expected = uninterrupted(every_n_train_steps)
    start = time.monotonic()
    assert in_a_process(run, tmp_path / "uninterrupted", None, every_n_train_steps) == 0
    duration = time.monotonic() - start
    times: list[float] = []
    # The second kill hits a resumed run, unless the first one came before any checkpoint.
    while len(times) < 2:
        after = random.SystemRandom().uniform(0, duration)
        if in_a_process(run, tmp_path / "killed", None, every_n_train_steps, seconds=after) == -signal.SIGKILL:
            times.append(after)
            if every_n_train_steps is not None and is_at_end_of_epoch(tmp_path / "killed" / "last.ckpt"):
                # Lightning 2.6.6 itself, without the callback too, repeats batches of the next epoch when a run is
                # resumed from such a checkpoint and then again within that epoch.
                break
        else:
            # The run ended before it was killed.
            shutil.rmtree(tmp_path / "killed")
            times.clear()
    assert in_a_process(run, tmp_path / "killed", None, every_n_train_steps) == 0
    resumed = torch.load(tmp_path / "killed" / "result.pt", weights_only=True)
    assert_same(
        resumed, with_last_rows(expected, len(resumed["logged"])), f"the result after {times} of {duration} seconds"
    )


def test_resuming_a_finished_run_changes_nothing(in_a_process: Any, uninterrupted: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert in_a_process(run, tmp_path, None, None) == 0
    assert_same(torch.load(tmp_path / "result.pt", weights_only=True), with_last_rows(uninterrupted(None), 0))


def fit_and_save(path: Path) -> dict[str, Any]:
    """Save a checkpoint after one fit with the callback, and return its content."""
    pl_trainer = trainer(SpectralCollapseCallback())
    pl_trainer.fit(Classifier(), loader())
    pl_trainer.save_checkpoint(path)
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("version", [0, 99, None])
def test_checkpoint_of_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    checkpoint = fit_and_save(tmp_path / "a.ckpt")
    state = checkpoint["callbacks"]["SpectralCollapseCallback"]
    state["version"] = version
    torch.save(checkpoint, tmp_path / "a.ckpt")
    callback, module = SpectralCollapseCallback(), Classifier()
    with pytest.raises(MisconfigurationException, match=f"in version {version!r}, and this release reads version 1"):
        trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert callback.history == []
    assert module.trainer.global_step == 0


def test_checkpoint_without_callback_state_begins_a_task(tmp_path: Path) -> None:
    checkpoint = fit_and_save(tmp_path / "a.ckpt")
    del checkpoint["callbacks"]["SpectralCollapseCallback"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    callback = SpectralCollapseCallback()
    trainer(callback, max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [task for task, _, _ in tasks_seen(callback)] == [0]


class SaveAfterBatch(Callback):
    """Saves a checkpoint at the end of every batch."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
        self.saved += 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_checkpoint_saved_before_the_callback_warns_once(tmp_path: Path, first: bool) -> None:
    """A checkpoint that another callback saves earlier in the same hook misses the step that has just ended."""
    callback, saver = SpectralCollapseCallback(collapse=NEVER), SaveAfterBatch(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer(*([saver, callback] if first else [callback, saver])).fit(Classifier(), loader())
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, PlasticityWarning)]
    assert saver.saved == 6
    assert len(messages) == 2 * first
    assert all("List the callback that saves it after SpectralCollapseCallback" in message for message in messages)
    last = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert last["callbacks"]["SpectralCollapseCallback"]["steps"] == (5 if first else 6)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
def test_checkpoints_in_other_hooks_do_not_warn(tmp_path: Path) -> None:
    class SaveInEveryHook(Callback):
        """Saves a checkpoint in the hooks at which the callback has counted every step."""

        def save(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "any.ckpt")

        on_fit_start = on_train_start = on_train_epoch_start = on_train_batch_start = on_before_zero_grad = save
        on_validation_end = on_train_epoch_end = on_train_end = on_fit_end = on_exception = save

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    class Interrupted(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1 and batch_idx == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    callback = SpectralCollapseCallback(collapse=NEVER, loss_fn=cross_entropy)
    for number, module in enumerate([Validated(), Interrupted(), Validated()]):
        checkpoints = ModelCheckpoint(tmp_path / f"{number}", every_n_train_steps=1, save_top_k=-1)
        pl_trainer = trainer(
            SaveInEveryHook(), checkpoints, callback, max_epochs=2, enable_checkpointing=True, val_check_interval=1
        )
        interruption = pytest.raises(RuntimeError, match="out of luck")
        with interruption if isinstance(module, Interrupted) else contextlib.nullcontext():
            pl_trainer.fit(module, loader(), DataLoader(loader().dataset, batch_size=4))
        pl_trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(SaveInEveryHook(), SpectralCollapseCallback(collapse=NEVER), max_epochs=3)
    resumed.fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
