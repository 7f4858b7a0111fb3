"""Gather the first samples of a task over its first batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import Self

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.engine.initial_weights import InitialWeights
from lightning_plasticity.isolation.batches import batch_size, join_batches, slice_batch
from lightning_plasticity.isolation.state import device_of

_PLAIN = (type(None), bool, int, float, str, torch.Size)


class Gathering:
    """The first samples of a task, and the weights that it began with, on which they are measured.

    Args:
        weights: The parameters and buffers at the start of the task.
        is_initial: Whether these are the initial weights of the model.
    """

    def __init__(self, weights: InitialWeights, *, is_initial: bool) -> None:
        self.weights = weights
        self.is_initial = is_initial
        self.batch: Any = None
        """All samples so far, as one batch; ``None`` if there is none yet."""
        self.is_complete = False
        """Whether no more samples are to be added, since batches cannot be measured together."""
        self._first_size = 0
        # The samples are on the CPU after a checkpoint was loaded.
        self._is_restored = False
        self.remarks: list[str] = []
        """What went otherwise than asked, a sentence each."""

    @classmethod
    def begin(cls, model: nn.Module, initial: Mapping[str, Tensor] | None) -> Self:
        """Begin at the start of a task, with a copy of the weights of the model.

        Args:
            model: The model.
            initial: The initial weights, if the model has them: they are shared, not copied.
        """
        weights = InitialWeights()
        if initial is not None:
            weights.load_state_dict(initial)
        weights.store(model)
        return cls(weights, is_initial=initial is not None)

    @property
    def samples(self) -> int:
        """Number of samples so far."""
        return 0 if self.batch is None else batch_size(self.batch) or 0

    @property
    def is_joined(self) -> bool:
        """Whether the samples come from more than one batch."""
        return self.samples > self._first_size

    def add(self, batch: Any) -> None:
        """Add the samples of a batch.

        Args:
            batch: A copy of the batch, on the device of the model.

        Raises:
            ValueError: If it cannot be joined with the earlier ones.
        """
        if self.batch is None:
            self.batch, self._first_size = batch, batch_size(batch) or 0
        else:
            self.batch = join_batches([self.batch, batch], like=batch)
        self._is_restored = False

    def fall_back(self, reason: str) -> None:
        """Keep the samples of the first batch only, for good, and note the reason.

        Args:
            reason: A part of a sentence.
        """
        self.batch, self.is_complete = slice_batch(self.batch, self._first_size), True
        self.remarks.append(f"{reason}; the first batch was measured alone")

    def context(self, context: ProbeContext) -> ProbeContext:
        """Return a context on all samples and on the weights that the task began with.

        Args:
            context: The context of the model at present. What has been added to the model since is taken from it.

        Raises:
            ValueError: If there are no samples.
        """
        if self.batch is None:
            raise ValueError("the task ended before its samples could be gathered anew")
        self.weights.store(context.model)
        if self._is_restored:
            device = device_of(context.model)
            self.batch = apply_to_collection(self.batch, Tensor, lambda tensor: tensor.to(device))
        measured = context.with_batch(self.batch).with_weights(self.weights.values)
        return replace(measured, samples_per_step=self._first_size or None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, which torch loads with ``weights_only=True``.

        It holds no samples if their batches consist of other objects than tensors, numbers, strings and collections.
        """
        is_plain = _is_plain(self.batch)
        return {
            "weights": self.weights.state_dict(),
            "is_initial": self.is_initial,
            "batch": self.batch if is_plain else None,
            "first_size": self._first_size if is_plain else 0,
            "is_complete": self.is_complete and is_plain,
            "remarks": list(self.remarks),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Restore the result of :meth:`state_dict`."""
        weights = InitialWeights()
        weights.load_state_dict(state["weights"])
        gathering = cls(weights, is_initial=state["is_initial"])
        gathering.is_complete = state["is_complete"]
        gathering.restore(state["batch"], state["first_size"], state["remarks"])
        return gathering

    def restore(self, batch: Any, first_size: int, remarks: list[str]) -> None:
        """Restore the samples from a checkpoint.

        Args:
            batch: All samples, as one batch; ``None`` if they could not be saved.
            first_size: The number of samples in the first batch.
            remarks: What went otherwise than asked.
        """
        self.batch, self._first_size, self._is_restored, self.remarks = batch, first_size, True, list(remarks)
        if batch is None:
            self.remarks.append(
                "the samples before the checkpoint could not be saved in it: others were gathered after the resume"
            )


def _is_plain(value: Any) -> bool:
    """Return whether ``torch.load(weights_only=True)`` restores a batch."""
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) is Tensor or type(value) in _PLAIN
