"""Is this the first batch of a new task?"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_plasticity._compat import fit_datamodule
from lightning_plasticity._validation import check_positive_ints, is_int
from lightning_plasticity.distributed.agreement import all_gather_object, all_or_none, all_reduce_sum, format_error

TaskId: TypeAlias = int | str | None  # no string: older jsonargparse would leave out the argument of this type

_ATTRIBUTES = ("task_id", "current_task")

_ANOTHER_MEANING = (
    ". Rename the attribute if it means something else, pass TaskDetector(task_key=...), or call callback.new_task()"
)


class DriftDetector(Protocol):
    """What watches a stream of numbers for a change of its distribution, such as ``river.drift.ADWIN()``.

    Its attribute ``drift_detected`` says whether the last number gave a change away. It is not declared here, nor are
    numbers: jsonargparse, which looks whether a class fits, knows no protocols with properties, and compares types.
    """

    def update(self, x: Any) -> Any:
        """Takes the next number."""


class UnusableDetectorError(MisconfigurationException):
    """The drift detector cannot work, whatever the losses are."""


class TaskDetector:
    """Recognises new tasks, by the first of these that applies.

    1. :meth:`announce` was called: the next training batch starts a task.
    2. ``batch_label`` is given: a task starts with the first batch with a label that none before it had.
    3. ``task_key`` is given, or the data module of the fit, or else the module, has an attribute ``task_id`` or
       ``current_task`` that is not ``None``: a task starts when that value changes.
    4. Otherwise every fit is a task, except one that resumes from a checkpoint; and within a fit every
       ``every_n_epochs`` epochs or ``every_n_steps`` optimizer steps begin another, if asked for. Both are counted by
       the Trainer, which goes on counting over its fits: of two of 3 epochs by one Trainer, ``every_n_epochs=2`` begins
       tasks at epochs 0, 2, 3 and 4.

    The first training batch of a callback's life starts a task in any case.

    With ``drift_detector`` a task starts also after every batch by whose loss it detects a drift; or with every batch
    by whose ``drift_statistic`` it does.

    Args:
        task_key: ``task_key(trainer, module)`` returns the name of the current task, an int or a string, or ``None``:
            not known; the same in every process. In a configuration file, its import path.
        batch_label: Where a batch holds the task label of its samples: an index, as 2 for batches ``(x, y, t)``, or a
            key.
        every_n_epochs: Length of a task in epochs.
        every_n_steps: Length of a task in optimizer steps.
        drift_detector: Watches the training loss of every batch for shifts that nobody announces: an object with
            ``update(x)`` and ``drift_detected``, as all of ``river.drift`` (the extra ``drift``). What it has seen is
            not kept in checkpoints.
        drift_statistic: ``drift_statistic(batch)`` returns what it watches instead, such as the mean of the inputs: a
            number. In a configuration file, its import path.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a length is not a whole number, at least 1, or both are given.

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback, TaskDetector
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
            raise ValueError("drift_statistic is watched by a drift_detector: give one, such as river.drift.ADWIN()")
        self._task_key = task_key if task_key is not None else attribute_key
        self._batch_label = batch_label
        self._every_n_epochs = every_n_epochs
        self._every_n_steps = every_n_steps
        self._drift_detector: Any = drift_detector
        self._drift_statistic = drift_statistic
        self._has_watched = False
        self._fit_began = False
        self._announced = False
        self._announced_id: TaskId = None
        self._is_listening = True
        self._key: TaskId = None
        self._period = 0
        self._labels: set[int | str] = set()
        self.task_id: TaskId = None
        """Name of the task that :meth:`new_task` last saw begin."""

    def announce(self, task_id: TaskId = None) -> None:
        """The next training batch is the first of a new task, named ``task_id``.

        Raises:
            TypeError: If the name is no int and no string.
        """
        task_id = _checked(task_id, "new_task(task_id)")
        if self._is_listening:
            self._announced, self._announced_id = True, task_id

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is announced in here is said in a probe or a repair, not in training, and is forgotten."""
        before, self._is_listening = self._is_listening, False
        try:
            yield
        finally:
            self._is_listening = before

    def consume_announcement(self) -> bool:
        """Whether a task was announced that :meth:`new_task` has not begun, since it failed: it begins now."""
        if self._announced:
            self.task_id, self._announced = self._announced_id, False
            return True
        return False

    def postpone(self) -> None:
        """What was a new task a moment ago has not begun: the next training batch is its first."""
        self._announced = True

    def on_fit(self, *, resumed: bool, first: bool) -> None:
        """A fit is about to train; ``resumed`` if it goes on from a checkpoint, ``first`` if no task was seen yet."""
        self._fit_began = not resumed
        if first:  # what a callback before this one, or a fit that has failed, has seen
            self._key, self._labels = None, set()
            self._rehearse()

    def new_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> bool:
        """Whether the training batch at hand is the first of a new task. To be asked once a batch.

        Raises:
            TypeError: If the name of the task is no int and no string.
            ValueError: If the batch holds no label where one was promised.
        """
        if self._drift_statistic is not None:
            with all_or_none():
                self._watch(_as_number(self._drift_statistic(batch)))
        period = self._period_of(trainer)
        if self._batch_label is not None:
            with all_or_none():
                everywhere: list[set[int | str]] = all_gather_object(_labels(batch, self._batch_label))
            new_labels = sorted(set().union(*everywhere) - self._labels, key=str)
            self._labels.update(new_labels)
            key, is_new = (new_labels[0], True) if new_labels else (self._key, False)
        else:
            # An attribute is as good as never an error: no message a batch for it.
            with contextlib.nullcontext() if self._task_key is attribute_key else all_or_none():
                key = _checked(self._task_key(trainer, pl_module), getattr(self._task_key, "__name__", "task_key"))
            is_new = (self._fit_began or period != self._period) if key is None else key != self._key
        if self._announced and self._announced_id is not None:
            self.task_id = self._announced_id
        elif self._announced or is_new:
            self.task_id = key
        is_new |= self._announced
        if not self._announced:
            self._announced_id = None  # of an earlier task, which is not to be taken back any more
        self._fit_began = self._announced = False
        self._key, self._period = key, period
        return is_new

    def on_batch_end(self, outputs: Any) -> None:
        """A batch was trained on; ``outputs`` as in ``on_train_batch_end``."""
        if self._drift_detector is None or self._drift_statistic is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            with all_or_none():
                self._watch(loss.item())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "announced": self._announced,
            "announced_id": self._announced_id,
            "key": self._key,
            "period": self._period,
            "labels": sorted(self._labels, key=str),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._announced, self._announced_id, self._key = state["announced"], state["announced_id"], state["key"]
        self._period, self._labels = state["period"], set(state["labels"])

    def _rehearse(self) -> None:
        """Tries a copy of the drift detector, or one that takes no numbers would be known after the first step only."""
        try:
            detector = copy.deepcopy(self._drift_detector)
        except Exception:  # the first loss will tell
            return
        if detector is not None:
            for value in (0.0, 2.5) if self._drift_statistic is None else (0.0,):  # losses may be larger than one
                self._update(detector, value)

    def _update(self, detector: Any, value: float) -> None:
        try:
            detector.update(value)
        except Exception as error:
            if self._has_watched:
                raise
            raise UnusableDetectorError(
                f"drift_detector={self._drift_detector!r} cannot take a number, as update({value}) shows: "
                f"{format_error(error)}"
            ) from error

    def _watch(self, value: float) -> None:
        """Announces a new task if the value, in the mean of all processes, is of another distribution."""
        values: list[float] = all_gather_object(value)
        if not math.isfinite(mean := sum(values) / len(values)):
            return  # after one NaN a detector would have no mean to compare with any more
        self._update(self._drift_detector, mean)
        self._has_watched = True
        # That of a process which has failed before has seen less than the others: one is enough.
        detected = bool(all_reduce_sum(torch.tensor(float(self._drift_detector.drift_detected)), "drifts"))
        if detected and not self._announced:  # whose name would be lost
            self.announce()

    def _period_of(self, trainer: Trainer) -> int:
        """Which stretch of the Trainer's epochs or steps this is."""
        if self._every_n_epochs is not None:
            return trainer.current_epoch // self._every_n_epochs
        return 0 if self._every_n_steps is None else trainer.global_step // self._every_n_steps


def attribute_key(trainer: Trainer, pl_module: LightningModule) -> TaskId:
    """The name of the task that the data module of the fit, or else the module, carries; ``None`` if neither does.

    Raises:
        TypeError: If it is not a whole number or a string.
    """
    for owner in (fit_datamodule(trainer), pl_module):
        for name in _ATTRIBUTES:
            value = getattr(owner, name, None)
            if value is not None and not callable(value):
                return _checked(value, f"{type(owner).__name__}.{name}", _ANOTHER_MEANING)
    return None


def _checked(value: Any, source: str, otherwise: str = "") -> TaskId:
    if value is None or type(value) is int:
        return value
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)  # a plain one, which any checkpoint can hold
    if isinstance(value, Integral):
        return int(value)
    raise TypeError(f"{source} is {value!r}; the name of a task must be an int or a str (or None){otherwise}")


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # torch: of tensors of several numbers
        raise TypeError(f"drift_statistic returned {value!r}; it must return a number") from error


def _labels(batch: Any, where: int | str) -> set[int | str]:
    try:
        labels = batch[where]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"batch_label={where!r}, but a batch is a {type(batch).__name__} without it: name the index or key that "
            "holds the task labels"
        ) from error
    items = labels.flatten().tolist() if isinstance(labels, Tensor) else labels
    items = items if isinstance(items, list | tuple) else [items]
    return {label for item in items if (label := _checked(item, f"a label in batch[{where!r}]")) is not None}
