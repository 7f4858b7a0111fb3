"""Describe a model in training to the code that measures and repairs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import Self

from lightning_plasticity.curvature.problem import Progress
from lightning_plasticity.distributed.agreement import (
    PeerFailedError,
    all_gather_batch,
    all_or_none,
    broadcast_object,
    is_distributed,
)
from lightning_plasticity.isolation.attributes import preserve_attributes
from lightning_plasticity.isolation.batches import batch_size, clone_batch, slice_batch, to_device
from lightning_plasticity.isolation.module_copy import copy_module
from lightning_plasticity.isolation.precision import HALF
from lightning_plasticity.isolation.reusable_copy import ReusableCopy
from lightning_plasticity.isolation.state import default_dtype
from lightning_plasticity.isolation.weights import trained_names
from lightning_plasticity.messages import MisconfigurationError


@dataclass(frozen=True, eq=False)
class ProbeContext:
    """A model in training, the batch at hand and the loss.

    Probes, monitors and interventions are written against this class and do not depend on a Trainer. They run copies of
    the model, never the model itself. A subclass adapts a framework: it overrides how a module is copied, and what is
    restored after a copy has run.

    Args:
        model: The model that is trained.
        batch: The batch, on the device of the model. It is not changed.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss, a scalar with a graph.
        optimizers: The optimizers that hold the parameters of the model.
        weights: The parameters and buffers of copies to measure, by name; ``None``: those of the model.
        samples_per_step: Number of samples of a training step; ``None``: those of the batch.
        trained: Names of the parameters that are trained; ``None``: those that the optimizers hold.
        max_samples: Number of samples that an earlier measurement could afford; ``None`` if it could afford all.
        whole_batch: Whether an earlier measurement has shown that the loss needs the whole batch.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> context = ProbeContext(model, torch.ones(4, 2), lambda model, x: model(x).square().mean())
        >>> context.loss(context.copy()).shape, context.samples(3).shape
        (torch.Size([]), torch.Size([3, 2]))
    """

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], Tensor]
    optimizers: Sequence[torch.optim.Optimizer] = ()
    weights: Mapping[str, Tensor] | None = field(default=None, kw_only=True)
    samples_per_step: int | None = field(default=None, kw_only=True)
    trained: Collection[str] | None = field(default=None, kw_only=True, repr=False)
    max_samples: int | None = field(default=None, kw_only=True)
    whole_batch: bool = field(default=False, kw_only=True)
    _slices: dict[int, Any] = field(default_factory=dict, kw_only=True, repr=False)
    _reusable_copy: ReusableCopy = field(default_factory=ReusableCopy, kw_only=True, repr=False)

    def copy(self) -> nn.Module:
        """Return a new copy of the model that may be run, changed and discarded."""
        return self._copy_model([])

    def copy_to_measure(self) -> nn.Module:
        """Return a copy of the model with :attr:`weights` for one measurement; it is valid until the next call.

        It is the copy of the last measurement with its weights loaded again, or a new one where that measurement has
        changed more than weights.
        """
        return self._reusable_copy.get(self._copy_model, self.model, self.weights)

    def check_copy(self, model: nn.Module) -> None:
        """Check that a copy may be trained or repaired: it shares no trained parameter with the model.

        Args:
            model: The copy.

        Raises:
            MisconfigurationError: If it does, as where ``__deepcopy__`` returns the network itself.
        """
        trained = self.trained_parameters
        for name, parameter in model.named_parameters():
            if parameter is trained.get(name):
                raise MisconfigurationError(
                    f"copy.deepcopy({type(self.model).__name__}) shares the parameter {name!r} with the original, so "
                    "that copies can be neither trained nor repaired: let __deepcopy__ copy it, or pass fit_test=None "
                    "and no repairs"
                )

    def discard_copy(self) -> None:
        """Free the memory of the copy that was measured."""
        self._reusable_copy.discard()

    def _copy_model(self, copied: list[Any]) -> nn.Module:
        return copy_module(self.model, copied=copied)

    def with_weights(self, weights: Mapping[str, Tensor]) -> Self:
        """Return the same context, whose copies have other weights.

        Args:
            weights: The parameters and buffers by name.
        """
        return replace(self, weights=weights)

    def with_batch(self, batch: Any) -> Self:
        """Return the same context with another batch, on which the model is not trained."""
        return replace(self, batch=batch, samples_per_step=self.samples_per_step or self.batch_size, _slices={})

    def with_full_parameters(self, full_parameters: Mapping[Tensor, nn.Parameter]) -> Self:
        """Return the same context while the model has full parameters in place of those that the optimizers hold.

        Args:
            full_parameters: The full parameter for each sharded one.
        """
        return replace(self, trained=self._find_trained(full_parameters))

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: they require a gradient, and an optimizer holds them.

        A target network is not trained, although its parameters may require gradients. Where no optimizer holds any
        parameter of the model, all that require a gradient count.
        """
        trained = self._find_trained({}) if self.trained is None else self.trained
        return {n: p for n, p in self.model.named_parameters() if n in trained and p.requires_grad}

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the first parameter group with a positive one; of a warm-up from 0, the one after it."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = (float(group.get("lr") or group.get("initial_lr") or 0) for group in groups)
        return next((rate for rate in rates if rate > 0), None)

    def _find_trained(self, full_parameters: Mapping[Tensor, nn.Parameter]) -> set[str]:
        return trained_names(self.model, self.optimizers, full_parameters)

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a copy of the model on the batch."""
        return self.loss_on(model, self.batch)

    def loss_on(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a copy of the model on another batch; repeated calls return the same value.

        The loss function gets a copy of the batch, which augmentations may change in place, and attributes that it
        assigns to the model are restored.
        """
        with preserve_attributes(model):
            return self.training_loss(model, batch)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a copy that is trained on one batch after the other: what it assigns to itself stays.

        The loss function gets a copy of the batch.
        """
        trained = (p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point())
        dtype = next(trained, torch.float32)
        batch = clone_batch(batch)
        if dtype not in HALF:
            # Autocast would cast inputs in half precision to the precision of the weights, and is off in a probe.
            batch = apply_to_collection(batch, Tensor, lambda t: t.to(dtype) if t.dtype in HALF else t)
        with default_dtype(dtype):
            return self.loss_fn(model, batch)

    @cached_property
    def batch_size(self) -> int | None:
        """Number of samples in the batch; ``None`` if the batch holds no tensor with dimensions."""
        return batch_size(self.batch)

    def samples(self, count: int) -> Any:
        """Return the first samples of the batch. The result is cached."""
        if count not in self._slices:
            self._slices[count] = slice_batch(self.batch, count)
        return self._slices[count]

    def gather(self, count: int) -> Self:
        """Return a context on the first samples of all ranks, the same on each of them.

        All ranks must call this at the same point. On a single rank it returns the context itself.

        Args:
            count: Number of samples, of all ranks together.
        """
        if not is_distributed():
            return self
        share = -(-count // torch.distributed.get_world_size())
        try:
            with all_or_none():
                batch = all_gather_batch(self.samples(share))
        except PeerFailedError:
            # If batches cannot be joined, such as sequences of different lengths, all ranks use that of rank 0.
            with all_or_none():
                batch = to_device(broadcast_object(self.samples(count)), like=self.batch)
        return self.with_batch(batch)

    def make_optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return optimizers like those of the run for a copy of the model, without state.

        Learning rates are those before any schedule.

        Args:
            model: The copy.

        Raises:
            MisconfigurationError: If the run has no optimizer.
        """
        if not self.optimizers:
            raise MisconfigurationError(
                "there is no optimizer to train a copy of the model with: pass optimizers=[...]"
            )
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        copies = dict(model.named_parameters())
        result = []
        for optimizer in self.optimizers:
            groups = [
                {**group, "params": [copies[names[id(p)]] for p in group["params"] if id(p) in names]}
                for group in optimizer.param_groups
            ]
            settings = {name: value for name, value in optimizer.defaults.items() if name == "lr"}
            result.append(type(optimizer)([group for group in groups if group["params"]], **settings))
        set_initial_rates(result)
        return result

    def clip_gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of a copy of the model as in training. The default does nothing.

        Args:
            model: The copy.
            optimizer: The optimizer that holds its parameters.
        """

    def record_logged(self, model: nn.Module, name: str | None) -> contextlib.AbstractContextManager[dict[str, float]]:
        """Return a context manager that yields the numbers that a copy logs while it runs. The default has none.

        Args:
            model: The copy.
            name: The number that is needed; others are ``nan``.
        """
        return contextlib.nullcontext({})

    def training_precision(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager for forward passes in the precision of training. The default changes nothing."""
        return contextlib.nullcontext()

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """Return a copy of the object that scales losses in half precision; the default is ``None``: none does."""
        return None

    def preserve_training_state(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that restores, on exit, all state outside of a copy that running it may change."""
        return contextlib.nullcontext()

    def show_progress(self, description: str) -> contextlib.AbstractContextManager[Progress | None]:
        """Return a context manager that yields a function to report progress to, or ``None`` to report none."""
        return contextlib.nullcontext()


def set_initial_rates(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Set learning rates to those before any schedule: a warm-up begins at zero, a one-cycle schedule below its peak.

    Args:
        optimizers: The optimizers.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.get("max_lr", group.get("initial_lr", group.get("lr")))
