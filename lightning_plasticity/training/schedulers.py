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
    all_schedulers = _with_nested_schedulers(schedulers(trainer))
    functions = [function for scheduler in all_schedulers for function in getattr(scheduler, "lr_lambdas", ())]
    # A repair may change the state of an optimizer, which must not be restored through a reference in a scheduler.
    optimizer_state = {id(state) for o in trainer.optimizers for state in (o.state, o.param_groups, *o.param_groups)}
    attributes = [getattr(value, "__dict__", None) for value in (*all_schedulers, *functions)]
    snapshots = [Snapshot(values, optimizer_state) for values in attributes if isinstance(values, dict)]
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
    result = list(schedulers)
    # The list grows during the iteration.
    for scheduler in result:
        nested = _nested_schedulers(getattr(scheduler, "__dict__", {}))
        result += [inner for inner in nested if not any(inner is other for other in result)]
    return result


def _nested_schedulers(value: Any) -> Iterator[LRScheduler]:
    if isinstance(value, LRScheduler):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested_schedulers(item)
