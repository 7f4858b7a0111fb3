"""Recognise the first training batch of a new task."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_plasticity._compat import fit_datamodule, is_fetching_ahead
from lightning_plasticity._validation import check_positive_ints, is_int
from lightning_plasticity.distributed.agreement import all_gather_object, all_or_none, all_reduce_sum, format_error
from lightning_plasticity.messages import constructor_call, rank_zero_warn

# Not a string: older jsonargparse leaves out arguments whose type is given by one.
TaskId: TypeAlias = int | str | None

_ATTRIBUTES = ("task_id", "current_task")

_ATTRIBUTE_HINT = (
    ". Rename the attribute if it means something else, pass TaskDetector(task_key=...), or call callback.new_task()"
)


class DriftDetector(Protocol):
    """A detector of changes in the distribution of a stream of numbers, such as ``river.drift.ADWIN()``.

    Its attribute ``drift_detected`` is true if the last number revealed a change. The protocol declares neither it nor
    the type of the numbers: jsonargparse does not support properties in protocols, and compares argument types.
    """

    def update(self, x: Any) -> Any:
        """Take the next number."""


class UnusableDetectorError(MisconfigurationException):
    """A drift detector that cannot take losses, whatever their values."""


@dataclass(frozen=True)
class _State:
    """The state of a :class:`TaskDetector` that checkpoints hold."""

    announced: dict[int, TaskId] = field(default_factory=dict)
    """Names of the announced tasks, by the number of training batches that come before them."""

    fit_began: bool = False
    """The next training batch is the first of a fit that does not resume."""

    key: TaskId = None
    """Task key at the last training batch; with ``batch_label``, the last new label."""

    period: int = 0
    """Index of the period of ``every_n_epochs`` or ``every_n_steps`` at the last training batch."""

    labels: frozenset[int | str] = frozenset()
    """All labels in training batches so far."""


class TaskDetector:
    """A rule that recognises new tasks, by the first of these that applies.

    1. :meth:`announce` was called: the next training batch starts a task; if the data set called it, the batch that
       holds the next sample.
    2. ``batch_label`` is given: a task starts with the first batch that holds a label not seen before.
    3. ``task_key`` is given, or the data module of the fit, or else the module, has an attribute ``task_id`` or
       ``current_task`` that is not ``None``: a task starts when that value changes.
    4. Otherwise every fit is a task, except one that resumes from a checkpoint; and within a fit every
       ``every_n_epochs`` epochs or ``every_n_steps`` optimizer steps start another, if given. Both are counted by the
       Trainer, which goes on counting over its fits: with two fits of 3 epochs by one Trainer, ``every_n_epochs=2``
       starts tasks at epochs 0, 2, 3 and 4.

    The first training batch that a callback sees starts a task in any case. Batches of the epoch that
    ``StochasticWeightAveraging`` appends to update the statistics of BatchNorm train nothing, and start none.

    Lightning fetches the batches of a data set without length one ahead. If such a data set sets ``task_id`` itself,
    the change is noticed one batch too early: let it call ``new_task()``, or use ``batch_label``.

    With ``drift_detector``, a task also starts after each batch whose loss reveals a drift, or, with
    ``drift_statistic``, at each batch whose statistic does.

    Args:
        task_key: ``task_key(trainer, module)`` returns the name of the current task, an int or a string, or ``None``
            if it is not known; the same on all ranks. In a configuration file, its import path.
        batch_label: Where a batch holds the task label of its samples: an index, such as 2 for batches ``(x, y, t)``,
            or a key.
        every_n_epochs: Length of a task in epochs.
        every_n_steps: Length of a task in optimizer steps.
        drift_detector: Monitors the training loss of every batch for shifts that are not announced: an object with
            ``update(x)`` and ``drift_detected``, such as all of ``river.drift`` (the extra ``drift``). Checkpoints do
            not hold its state.
        drift_statistic: ``drift_statistic(batch)`` returns the number to monitor instead of the loss, such as the mean
            of the inputs. In a configuration file, its import path.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a length is not a positive int, or both are given.

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback, TaskDetector
        >>> TaskDetector(every_n_epochs=10)
        TaskDetector(every_n_epochs=10)
        >>> callback = SpectralCollapseCallback(task_detector=TaskDetector(every_n_epochs=10))
    """

    def __init__(
        self,
        task_key: Callable[[Trainer, LightningModule], TaskId] | None = None,
        batch_label: int | str | None = None,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        drift_detector: DriftDetector | None = None,
        drift_statistic: Callable[[Any], Any] | None = None,
    ) -> None:
        if task_key is not None and not callable(task_key):
            raise TypeError(f"task_key={task_key!r} must be a function task_key(trainer, module) -> int, str or None")
        if batch_label is not None and not (is_int(batch_label) or isinstance(batch_label, str)):
            raise TypeError(f"batch_label={batch_label!r} must be an index or a key of the batch")
        check_positive_ints(optional=True, every_n_epochs=every_n_epochs, every_n_steps=every_n_steps)
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(f"every_n_epochs={every_n_epochs} and every_n_steps={every_n_steps}: give one of them")
        complete = callable(getattr(drift_detector, "update", None)) and hasattr(drift_detector, "drift_detected")
        if drift_detector is not None and not complete:
            raise TypeError(f"drift_detector={drift_detector!r} must have update(x) and drift_detected")
        if drift_statistic is not None and not callable(drift_statistic):
            raise TypeError(f"drift_statistic={drift_statistic!r} must be a function drift_statistic(batch) -> number")
        if drift_statistic is not None and drift_detector is None:
            raise ValueError("drift_statistic needs a drift_detector to monitor it, such as river.drift.ADWIN()")
        self._task_key = task_key
        self._batch_label = batch_label
        self._every_n_epochs = every_n_epochs
        self._every_n_steps = every_n_steps
        self._drift_detector: Any = drift_detector
        self._drift_statistic = drift_statistic
        self._state = _State()
        # The state after the last training batch, until its task, if it started one, is committed.
        self._state_after_batch = _State()
        self._trainer: Trainer | None = None
        self._is_paused = False
        self._drift_detector_has_run = False
        self.task_id: TaskId = None
        """Name of the task that started last."""

    def __repr__(self) -> str:
        arguments = {
            "task_key": self._task_key,
            "batch_label": self._batch_label,
            "every_n_epochs": self._every_n_epochs,
            "every_n_steps": self._every_n_steps,
            "drift_detector": self._drift_detector,
            "drift_statistic": self._drift_statistic,
        }
        return constructor_call(self, arguments)

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer belongs to the fit.
        return {**vars(self), "_trainer": None}

    def announce(self, task_id: TaskId = None) -> None:
        """Start a new task, named ``task_id``, with the next training batch; for a data set, that of its next sample.

        Raises:
            TypeError: If the name is neither an int nor a string.
        """
        task_id = _plain_task_id(task_id, "new_task(task_id)")
        if get_worker_info() is not None:
            rank_zero_warn(
                f"new_task({'' if task_id is None else repr(task_id)}) was called in a worker process of a DataLoader "
                "and starts no task in the process that trains: pass TaskDetector(batch_label=...) and let batches "
                "hold the label of their task, or use DataLoader(num_workers=0)"
            )
        if not self._is_paused:
            batches_before = int(self._trainer is not None and is_fetching_ahead(self._trainer))
            self._state = replace(self._state, announced={**self._state.announced, batches_before: task_id})

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore announcements inside the block: they come from a probe or a repair, which run ``training_step``."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def begin_fit(self, trainer: Trainer, *, resumed: bool, first: bool) -> None:
        """Prepare for the training of a fit.

        Args:
            trainer: The Trainer.
            resumed: The fit goes on from a checkpoint.
            first: No task has started yet.
        """
        self._trainer = trainer
        if not resumed:
            self._state = replace(self._state, fit_began=True)
        if first:
            # Another callback may have used this detector.
            self._state = replace(self._state, key=None, labels=frozenset())
            self._dry_run_drift_detector()

    def end_fit(self) -> None:
        """Let tasks that were announced for later batches start with the next fit."""
        self._trainer = None
        announced = self._state.announced
        if announced:
            self._state = replace(self._state, announced={0: announced[max(announced)]})

    def expected_steps(self, trainer: Trainer, last: int | None) -> int | None:
        """Return the number of optimizer steps that a task takes, as far as it is known when it starts.

        It counts the steps of all optimizers, and expects one step of each for a batch.

        It is ``every_n_steps`` or ``every_n_epochs``; else, for the first task that the Trainer trains, the steps of
        the whole fit; else those of the last task.

        Args:
            trainer: The Trainer.
            last: Number of optimizer steps of the last task; ``None`` if there is none.
        """
        if self._every_n_steps is not None:
            return self._every_n_steps
        if self._every_n_epochs is not None and math.isfinite(trainer.num_training_batches):
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            return self._every_n_epochs * steps * len(trainer.optimizers)
        left = _steps_left(trainer)
        return last if last is not None and (trainer.global_step or left is None) else left

    def new_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> bool:
        """Return whether the training batch is the first of a new task. Call it once per batch.

        The new task is forgotten, and the next call may return it again, unless :meth:`commit` is called.

        Raises:
            TypeError: If the name of the task is neither an int nor a string.
            ValueError: If the batch holds no ``batch_label``.
        """
        if self._drift_statistic is not None:
            with all_or_none():
                self._detect_drift(_as_number(self._drift_statistic(batch)))
        state, period, labels = self._state, self._period(trainer), self._state.labels
        if self._batch_label is not None:
            new_labels = self._new_labels(batch, self._batch_label)
            key, is_new = (new_labels[0], True) if new_labels else (state.key, False)
            labels = labels.union(new_labels)
        else:
            key = self._current_key(trainer, pl_module)
            is_new = (state.fit_began or period != state.period) if key is None else key != state.key
        unchanged = (state.fit_began, state.key, state.period, state.labels) == (False, key, period, labels)
        if unchanged and not is_new and not state.announced:
            # As at nearly all batches.
            self._state_after_batch = state
            return False
        name = state.announced.get(0)
        return self._end_decision(
            starts=0 in state.announced or is_new,
            name=key if name is None else name,
            state=replace(state, fit_began=False, key=key, period=period, labels=labels),
        )

    def start_announced(self) -> bool:
        """Return whether a task was announced for this training batch. Call it if :meth:`new_task` failed."""
        announced = self._state.announced
        return self._end_decision(starts=0 in announced, name=announced.get(0), state=self._state)

    def commit(self) -> None:
        """Take the task that :meth:`new_task` has returned as started.

        Call it as soon as checkpoints hold the task elsewhere: a run that resumes from one saved before detects it
        again, and one saved afterwards does not.
        """
        self._state = self._state_after_batch

    def on_batch_end(self, outputs: Any) -> None:
        """Pass the loss of a training batch to the drift detector; ``outputs`` as in ``on_train_batch_end``."""
        if self._drift_detector is None or self._drift_statistic is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            with all_or_none():
                self._detect_drift(loss.item())

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without a task that is not committed."""
        return {**vars(self._state), "labels": sorted(self._state.labels, key=str)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`."""
        self._state = _State(**{**state, "labels": frozenset(state["labels"])})

    def _end_decision(self, *, starts: bool, name: TaskId, state: _State) -> bool:
        """Return ``starts``, and set the name of the task and the state after this batch."""
        announced = {batches - 1: name for batches, name in state.announced.items() if batches > 0}
        self._state_after_batch = replace(state, announced=announced)
        if starts:
            self.task_id = name
        else:
            self.commit()
        return starts

    def _new_labels(self, batch: Any, where: int | str) -> list[int | str]:
        """Return the labels in the batches of all ranks that no earlier batch held, in order."""
        with all_or_none():
            labels: list[set[int | str]] = all_gather_object(_labels(batch, where))
        return sorted(set().union(*labels) - self._state.labels, key=str)

    def _current_key(self, trainer: Trainer, pl_module: LightningModule) -> TaskId:
        if self._task_key is None:
            # Reading an attribute hardly ever fails, so ranks need not synchronise at every batch.
            return attribute_key(trainer, pl_module)
        with all_or_none():
            return _plain_task_id(self._task_key(trainer, pl_module), getattr(self._task_key, "__name__", "task_key"))

    def _period(self, trainer: Trainer) -> int:
        """Return the index of the current period of ``every_n_epochs`` or ``every_n_steps``, or 0 without either."""
        if self._every_n_epochs is not None:
            return trainer.current_epoch // self._every_n_epochs
        return 0 if self._every_n_steps is None else trainer.global_step // self._every_n_steps

    def _dry_run_drift_detector(self) -> None:
        """Update a copy of the drift detector, so that one that takes no numbers fails before the first step."""
        try:
            detector = copy.deepcopy(self._drift_detector)
        except Exception:
            # Without a copy, the first loss shows whether the detector works.
            return
        if detector is not None:
            # Losses may exceed 1, which detectors of binary errors refuse; a statistic may be such an error.
            for value in (0.0, 2.5) if self._drift_statistic is None else (0.0,):
                self._update(detector, value)

    def _update(self, detector: Any, value: float) -> None:
        try:
            detector.update(value)
        except Exception as error:
            if self._drift_detector_has_run:
                raise
            raise UnusableDetectorError(
                f"drift_detector={self._drift_detector!r} cannot take a number, as update({value}) shows: "
                f"{format_error(error)}"
            ) from error

    def _detect_drift(self, value: float) -> None:
        """Pass the mean of the value over ranks to the drift detector, and announce a task if it detects a drift."""
        values: list[float] = all_gather_object(value)
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            # After one NaN, the running mean of a detector would stay NaN.
            return
        self._update(self._drift_detector, mean)
        self._drift_detector_has_run = True
        # After a failure on one rank, its detector has seen fewer numbers than the others: a drift on any rank counts.
        detected = bool(all_reduce_sum(torch.tensor(float(self._drift_detector.drift_detected)), "drifts"))
        # An announced task keeps its name.
        if detected and 0 not in self._state.announced:
            self.announce()


def attribute_key(trainer: Trainer, pl_module: LightningModule) -> TaskId:
    """Return the task name that the data module of the fit, or else the module, holds; ``None`` if neither does.

    Raises:
        TypeError: If it is neither an int nor a string.
    """
    for owner in (fit_datamodule(trainer), pl_module):
        for name in _ATTRIBUTES:
            value = getattr(owner, name, None)
            if value is not None and not callable(value):
                return _plain_task_id(value, f"{type(owner).__name__}.{name}", _ATTRIBUTE_HINT)
    return None


def _steps_left(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps that are left in the fit; ``None`` if it has no known end."""
    # Lightning counts the steps of all optimizers, and estimates those of one.
    limit = math.inf if trainer.max_steps == -1 else trainer.max_steps
    left = min(trainer.estimated_stepping_batches * len(trainer.optimizers), limit) - trainer.global_step
    return int(left) if math.isfinite(left) and left > 0 else None


def _plain_task_id(value: Any, source: str, hint: str = "") -> TaskId:
    """Return a task name as a plain int or string, which checkpoints loaded with ``weights_only=True`` can hold."""
    if value is None or type(value) is int:
        return value
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, str):
        # str(value) may be something else: for an enum, it names the member.
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    raise TypeError(f"{source} is {value!r}; the name of a task must be an int or a str (or None){hint}")


def _as_number(value: Any) -> float:
    try:
        return float(value)
    # Torch raises a RuntimeError for a tensor of several elements.
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"drift_statistic returned {value!r}; it must return a number") from error


def _labels(batch: Any, where: int | str) -> set[int | str]:
    """Return the task labels that a batch holds under an index or key."""
    try:
        labels = batch[where]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"batch_label={where!r}, but a batch is a {type(batch).__name__} without it: name the index or key that "
            "holds the task labels"
        ) from error
    items = labels.flatten().tolist() if isinstance(labels, Tensor) else labels
    items = items if isinstance(items, list | tuple) else [items]
    return {label for item in items if (label := _plain_task_id(item, f"a label in batch[{where!r}]")) is not None}
