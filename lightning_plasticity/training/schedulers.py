"""Restore learning rates and schedulers after a training step was run on a copy of the module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lightning_plasticity._compat import schedulers
from lightning_plasticity.isolation.attributes import Snapshot


@contextlib.contextmanager
def preserve_schedulers(trainer: Trainer) -> Iterator[None]:
    """Restore learning rates and the state of schedulers on exit.

    A copy of a module shares the Trainer, so a ``training_step`` that steps schedulers by hand steps the real ones.
    Schedulers and the collections inside of them stay the same objects, since other code may hold references to them.

    Args:
        trainer: The Trainer whose optimizers and schedulers are restored.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    # Schedulers change a learning rate that is a tensor in place.
    rates = [value for setting in settings for value in setting.values() if isinstance(value, Tensor)]
    values = [rate.detach().clone() for rate in rates]
    stepped = _with_nested_schedulers(schedulers(trainer))
    functions = [function for scheduler in stepped for function in getattr(scheduler, "lr_lambdas", ())]
    # A repair may change the optimizer's state: a scheduler that holds a reference to it must not restore it.
    states = {id(held) for one in trainer.optimizers for held in (one.state, one.param_groups, *one.param_groups)}
    attributes = [getattr(one, "__dict__", None) for one in (*stepped, *functions)]
    snapshots = [Snapshot(own, states) for own in attributes if isinstance(own, dict)]
    try:
        yield
    finally:
        for group, setting in zip(groups, settings, strict=True):
            group.update(setting)
        with torch.no_grad():
            for rate, value in zip(rates, values, strict=True):
                rate.copy_(value)
        for snapshot in snapshots:
            snapshot.restore()


def _with_nested_schedulers(schedulers: Sequence[Any]) -> list[Any]:
    """Return the schedulers and those inside of them, such as the one that follows a warm-up."""
    found = list(schedulers)
    # The list grows while it is walked through.
    for scheduler in found:
        nested = _nested_schedulers(getattr(scheduler, "__dict__", {}))
        found += [one for one in nested if not any(one is other for other in found)]
    return found


def _nested_schedulers(value: Any) -> Iterator[LRScheduler]:
    if isinstance(value, LRScheduler):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested_schedulers(item)
