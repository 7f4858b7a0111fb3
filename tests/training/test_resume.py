"""A run that is killed and resumed from its last checkpoint ends as if nothing had happened, to the last bit."""

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
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_plasticity import Collapse, PlasticityWarning, SpectralCollapseCallback
from tests.helpers.killed_run import BATCHES, run
from tests.helpers.modules import Classifier, loader, tasks_seen, trainer
from tests.helpers.processes import fork_server

NEVER = Collapse(below=1e-9)


@pytest.fixture(scope="module")
def in_a_process() -> Callable[..., int | None]:
    """Calls a function in a new process, returns its exit code. What is imported is imported once for all of them.

    After ``seconds``, if given, the process is killed.
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
    """What came out of the run that nobody killed."""

    @cache
    def result(every_n_train_steps: int | None) -> Any:
        folder = tmp_path_factory.mktemp("uninterrupted")
        assert in_a_process(run, folder, None, every_n_train_steps) == 0
        return torch.load(folder / "result.pt", weights_only=True)

    return result


def assert_same(ours: Any, theirs: Any, where: str = "result") -> None:
    """Equal to the last bit, whatever is nested in what."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{number}]")
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours.nan_to_num(nan=1234.5), theirs.nan_to_num(nan=1234.5)), where
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), f"{where}: {ours} is not {theirs}"


def is_of_a_last_batch(checkpoint: Path) -> bool:
    """Whether it holds the last batch of an epoch."""
    return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["global_step"] % BATCHES == 0


def with_rows(result: dict[str, Any], count: int) -> dict[str, Any]:
    """The result, and of what was logged only so much, the last of it."""
    logged = result["logged"]
    return {**result, "logged": logged[len(logged) - count :]}


def slow(*moment: Any) -> Any:
    return pytest.param(*moment, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("moment", "every_n_train_steps", "saved_at"),
    [
        ("on_before_optimizer_step 21", None, 16),
        ("probe 2", None, 16),  # task 1: the weights of now were probed, the initial ones were not
        ("repair 24", None, 24),  # in the middle of a task
        slow("on_train_batch_start 3", None, 0),  # before there is any checkpoint
        slow("on_train_batch_start 17", None, 16),
        slow("on_train_batch_end 40", None, 32),
        slow("on_after_backward 48", None, 40),
        slow("probe 3", None, 16),  # after both
        slow("probe 5", None, 32),
        slow("repair 40", None, 40),
        slow("checkpoint 7", None, 24),
        slow("on_train_batch_end 18", 5, 15),
        slow("on_after_backward 28", 8, 24),  # the checkpoint holds the last batch of an epoch, but not its end
        slow("probe 5", 3, 30),
        slow("repair 30", 7, 28),
    ],
)
def test_a_killed_run_resumes_to_the_same_end(
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
    assert resumed["logged"][0]["step"] == saved_at, "it did not begin anew"
    assert_same(resumed, with_rows(expected, len(resumed["logged"])))


@pytest.mark.slow
@pytest.mark.parametrize("every_n_train_steps", [None, 3, 5, 7] * 3)
def test_a_run_that_is_killed_at_any_time_resumes_to_the_same_end(
    in_a_process: Any, uninterrupted: Any, tmp_path: Path, every_n_train_steps: int | None
) -> None:
    expected = uninterrupted(every_n_train_steps)
    began = time.monotonic()
    assert in_a_process(run, tmp_path / "whole", None, every_n_train_steps) == 0
    whole = time.monotonic() - began
    times: list[float] = []
    while len(times) < 2:  # the second time it has been resumed, unless there was nothing to resume from
        after = random.SystemRandom().uniform(0, whole)
        if in_a_process(run, tmp_path / "killed", None, every_n_train_steps, seconds=after) == -signal.SIGKILL:
            times.append(after)
            if every_n_train_steps is not None and is_of_a_last_batch(tmp_path / "killed" / "last.ckpt"):
                # A run that goes on from there, and then once more from the epoch behind it, takes batches of that one
                # twice, in Lightning 2.6.6 itself: without the callback too.
                break
        else:  # it was faster this time
            shutil.rmtree(tmp_path / "killed")
            times.clear()
    assert in_a_process(run, tmp_path / "killed", None, every_n_train_steps) == 0
    resumed = torch.load(tmp_path / "killed" / "result.pt", weights_only=True)
    assert_same(resumed, with_rows(expected, len(resumed["logged"])), f"the result after {times} of {whole} seconds")


def test_a_run_that_was_over_is_the_same_after_it_has_been_resumed(
    in_a_process: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    for _ in range(2):
        assert in_a_process(run, tmp_path, None, None) == 0
    assert_same(torch.load(tmp_path / "result.pt", weights_only=True), with_rows(uninterrupted(None), 0))


def checkpoint_of_a_fit(path: Path) -> dict[str, Any]:
    one = trainer(SpectralCollapseCallback())
    one.fit(Classifier(), loader())
    one.save_checkpoint(path)
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("version", [0, 99, None])
def test_a_checkpoint_of_another_version_is_refused_before_anything_is_trained(tmp_path: Path, version: Any) -> None:
    checkpoint = checkpoint_of_a_fit(tmp_path / "a.ckpt")
    state = checkpoint["callbacks"]["SpectralCollapseCallback"]
    state["version"] = version
    torch.save(checkpoint, tmp_path / "a.ckpt")
    callback, module = SpectralCollapseCallback(), Classifier()
    with pytest.raises(MisconfigurationException, match=f"in version {version!r}, and this release reads version 1"):
        trainer(callback, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert callback.history == []
    assert module.trainer.global_step == 0


def test_a_checkpoint_from_before_the_callback_begins_with_a_task(tmp_path: Path) -> None:
    checkpoint = checkpoint_of_a_fit(tmp_path / "a.ckpt")
    del checkpoint["callbacks"]["SpectralCollapseCallback"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    callback = SpectralCollapseCallback()
    trainer(callback, max_epochs=2).fit(Classifier(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert [task for task, _, _ in tasks_seen(callback)] == [0]


class Saving(Callback):
    """Saves a checkpoint at the end of every batch."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")
        self.saved += 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_checkpoint_of_before_the_end_of_a_batch_is_warned_of_once(tmp_path: Path, first: bool) -> None:
    callback, saving = SpectralCollapseCallback(collapse=NEVER), Saving(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer(*([saving, callback] if first else [callback, saving])).fit(Classifier(), loader())
    said = [str(warning.message) for warning in caught if issubclass(warning.category, PlasticityWarning)]
    assert saving.saved == 6
    assert len(said) == 2 * first
    assert all("List the callback that saves it after SpectralCollapseCallback" in message for message in said)
    last = torch.load(tmp_path / "3.ckpt", weights_only=True)
    assert last["callbacks"]["SpectralCollapseCallback"]["steps"] == (5 if first else 6)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
def test_no_other_checkpoint_is_warned_of(tmp_path: Path) -> None:
    class Always(Callback):
        """Saves a checkpoint whenever there is no step that nobody has seen yet."""

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

    callback = SpectralCollapseCallback(
        collapse=NEVER, loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1])
    )
    for number, module in enumerate([Validated(), Interrupted(), Validated()]):
        checkpoints = ModelCheckpoint(tmp_path / f"{number}", every_n_train_steps=1, save_top_k=-1)
        fitted = trainer(Always(), checkpoints, callback, max_epochs=2, enable_checkpointing=True, val_check_interval=1)
        broken = pytest.raises(RuntimeError, match="out of luck")
        with broken if isinstance(module, Interrupted) else contextlib.nullcontext():
            fitted.fit(module, loader(), DataLoader(loader().dataset, batch_size=4))
        fitted.save_checkpoint(tmp_path / "last.ckpt")
    resumed = trainer(Always(), SpectralCollapseCallback(collapse=NEVER), max_epochs=3)
    resumed.fit(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt")
