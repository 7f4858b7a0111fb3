"""Is this the first batch of a new task?"""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plasticity._compat import fit_datamodule

TaskId: TypeAlias = "int | str | None"

_ATTRIBUTES = ("task_id", "current_task")


class TaskDetector:
    """Recognises new tasks, by the first of these that applies.

    1. :meth:`announce` was called: the next training batch starts a task.
    2. The data module of the fit, or else the module, has an attribute ``task_id`` or ``current_task`` that is not
       ``None``: a task starts when its value changes.
    3. Otherwise every fit is a task, except one that resumes from a checkpoint.
    """

    def __init__(self) -> None:
        self._fit_began = False
        self._announced = False
        self._announced_id: TaskId = None
        self._key: TaskId = None
        self.task_id: TaskId = None
        """Name of the task that :meth:`new_task` last saw begin."""

    def announce(self, task_id: TaskId = None) -> None:
        """The next training batch is the first of a new task, named ``task_id``."""
        self._announced, self._announced_id = True, task_id

    def on_fit(self, *, resumed: bool) -> None:
        """A fit is about to train; ``resumed`` if it goes on from a checkpoint."""
        self._fit_began = not resumed

    def new_task(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the training batch at hand is the first of a new task. To be asked once a batch."""
        key = task_key(trainer, pl_module)
        is_new = self._announced or (self._fit_began if key is None else key != self._key)
        if is_new:
            self.task_id = self._announced_id if self._announced and self._announced_id is not None else key
        self._fit_began = self._announced = False
        self._key = key
        return is_new

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"announced": self._announced, "announced_id": self._announced_id, "key": self._key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._announced, self._announced_id, self._key = state["announced"], state["announced_id"], state["key"]


def task_key(trainer: Trainer, pl_module: LightningModule) -> TaskId:
    """The name of the task that the data module of the fit, or else the module, carries; ``None`` if neither does.

    Raises:
        TypeError: If it is not a whole number or a string.
    """
    for owner in (fit_datamodule(trainer), pl_module):
        for name in _ATTRIBUTES:
            value = getattr(owner, name, None)
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            if value is None or callable(value):
                continue
            if isinstance(value, Integral):
                return int(value)
            if isinstance(value, str):
                return value
            raise TypeError(
                f"{type(owner).__name__}.{name} is {value!r}; the name of a task must be an int or a str (or None). "
                "Rename the attribute if it means something else, or call callback.new_task()"
            )
    return None
