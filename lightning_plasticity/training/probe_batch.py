"""Get the batch that a user gives to measure on, without an effect on the run."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_plasticity._compat import transfer_batch
from lightning_plasticity.isolation.attributes import preserve_attributes
from lightning_plasticity.isolation.batches import batch_size, clone_batch, join_batches
from lightning_plasticity.isolation.state import isolated_rng
from lightning_plasticity.messages import MisconfigurationError
from lightning_plasticity.training.sandbox import preserve_generators

ProbeBatch: TypeAlias = Callable[[Trainer, LightningModule], Any] | Iterable[Any]
"""A function that returns a batch, or an iterable over batches, such as a ``DataLoader``."""


def check_probe_batch(source: Any) -> None:
    """Check that a batch can be taken at every task.

    Raises:
        TypeError: If it is neither a function nor an iterable that can be iterated again.
    """
    if callable(source):
        return
    if not isinstance(source, Iterable):
        raise TypeError(f"probe_batch={source!r} must be a function probe_batch(trainer, module) -> batch, or a loader")
    if isinstance(source, Iterator):
        raise TypeError(f"probe_batch={source!r} gives its batches only once: pass a DataLoader, or a list of batches")


def fixed_batch(source: ProbeBatch, trainer: Trainer, module: LightningModule, samples: int) -> Any:
    """Return the batch that a function gives, or the first batches of an iterable, as the Trainer would pass it on.

    The random numbers inside are the same at every call, so that a loader that shuffles gives the same samples.

    Args:
        source: The function or the iterable.
        trainer: The Trainer.
        module: The module, whose hooks transfer batches to its device.
        samples: Number of samples to take from an iterable.

    Raises:
        MisconfigurationError: If an iterable is empty, or its batches cannot be joined.
    """
    with isolated_rng(), preserve_attributes(module):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (the global generator, which loaders may use)
        if callable(source):
            return transfer_batch(trainer, module, clone_batch(source(trainer, module)))
        loaders = [source] if isinstance(source, DataLoader) else []
        with preserve_generators(loaders):
            return _first_batches(source, trainer, module, samples)


def _first_batches(source: Iterable[Any], trainer: Trainer, module: LightningModule, samples: int) -> Any:
    batches: list[Any] = []
    missing = samples
    with contextlib.closing(_iterate(source)) as iterator:
        for batch in iterator:
            batches.append(transfer_batch(trainer, module, clone_batch(batch)))
            missing -= batch_size(batch) or samples
            if missing <= 0:
                break
    if not batches:
        raise MisconfigurationError(f"probe_batch={source!r} gives no batches")
    if len(batches) == 1:
        return batches[0]
    try:
        return join_batches(batches)
    except (ValueError, RuntimeError) as error:
        raise MisconfigurationError(
            f"probe_batch={source!r}: {error}; give one batch of {samples} samples instead"
        ) from error


def _iterate(source: Iterable[Any]) -> Generator[Any]:
    if isinstance(source, DataLoader):
        # Workers that are kept for the next epoch belong to the loop that started them.
        loader = copy.copy(source)
        loader._iterator = None
        source = loader
    yield from source
