"""Train a fresh network beside the network on the batches of a task."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import Estimate
from lightning_plasticity.fit_curve import LiveCurve, compare_fits, later_half
from lightning_plasticity.fit_test import MIN_BATCHES, FitTest, complete_gradients, take_step
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.isolation.state import isolated, training_trial
from lightning_plasticity.isolation.weights import load_weights, named_tensors, with_weights_of
from lightning_plasticity.messages import MisconfigurationError


class ShadowRun:
    """A copy of the initial weights that trains on the first batches of a task, and the losses of both networks there.

    The loss of each network on a batch is that before its training step on it, at the same random numbers, in the same
    precision and with the same function. For the network, the copy takes over its weights for one forward pass.

    The copy is made at the first batch.

    Args:
        fit_test: How many batches to train on, and which metric to record.
        initial: The initial weights: parameters and buffers by name.
    """

    def __init__(self, fit_test: FitTest, initial: Mapping[str, Tensor]) -> None:
        self.losses: list[float] = []
        """The loss of the network on each batch."""
        self.fresh_losses: list[float] = []
        """That of the copy of the initial weights."""
        self._metrics: list[float] = []
        self._fresh_metrics: list[float] = []
        self._fit_test = fit_test
        self._weights = initial
        self._optimizer_states: list[dict[str, Any]] = []
        self._regularizer_states: list[dict[str, Any]] = []
        self._context: ProbeContext | None = None
        self._model: nn.Module | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._regularizers: list[Regularizer] = []
        self._starts_window = True

    @property
    def is_complete(self) -> bool:
        """Whether the batches suffice for the comparison that was asked for."""
        return len(self.losses) >= self._fit_test.num_steps

    def train(
        self,
        context: ProbeContext,
        *,
        regularizers: Sequence[Regularizer] = (),
        window: int = 1,
        ends_window: bool = True,
    ) -> None:
        """Record the losses of both networks on a batch, and train the copy on it.

        Args:
            context: The network and the batch, before the network is trained on it.
            regularizers: The terms that are added to the loss in training.
            window: Number of batches over which gradients are accumulated.
            ends_window: Whether the optimizers step after this batch.

        Raises:
            MisconfigurationError: If the metric is not logged on the first batch, or there is no optimizer.
        """
        with context.preserve_training_state():
            if self._model is None:
                self._make_copy(context, regularizers)
            assert self._model is not None
            assert self._context is not None
            # What the copy shares with the network is known to the context that made it.
            of_batch = replace(self._context, batch=context.batch, loss_fn=context.loss_fn)
            loss, logged = self._loss_of_network(of_batch, self._model)
            fresh_loss, fresh_logged = self._train_copy(of_batch, self._model, window, ends_window=ends_window)
        self.losses.append(loss)
        self.fresh_losses.append(fresh_loss)
        metric = self._fit_test.metric
        if metric is None:
            return
        if metric in logged and metric in fresh_logged:
            self._metrics.append(logged[metric])
            self._fresh_metrics.append(fresh_logged[metric])
        elif not self._metrics:
            raise MisconfigurationError(
                f"FitTest(metric={metric!r}) is not logged in a training step; choose one of {sorted(logged)}"
            )

    def compare(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the diagnostics of the network and those of the fresh one, by name, as far as they are defined.

        They are empty before the eighth batch.
        """
        if len(self.losses) < MIN_BATCHES:
            return {}, {}
        curve, fresh = LiveCurve(_diverging(self.losses)), LiveCurve(_diverging(self.fresh_losses))
        values = {**compare_fits(curve, fresh), "fit_loss": curve.mean}
        sign = 1 if self._fit_test.higher_is_better else -1
        gaps = [sign * (fresh - own) for fresh, own in zip(self._fresh_metrics, self._metrics, strict=True)]
        later = later_half(gaps)
        if later and all(map(math.isfinite, later)):
            deviation = statistics.stdev(later) if len(later) > 1 else math.nan
            gap = math.fsum(later) / len(later)
            values["live_metric_gap"] = Estimate(gap, standard_error=deviation / math.sqrt(len(later)))
        return values, {"fit_loss": fresh.mean}

    def stop(self) -> None:
        """Free the memory of the copy."""
        for regularizer in self._regularizers:
            regularizer.stop()
        self._model = self._context = None
        self._optimizers, self._regularizers = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, which torch loads with ``weights_only=True``."""
        if self._model is not None:
            self._weights = {name: value.detach().cpu().clone() for name, value in named_tensors(self._model).items()}
            self._optimizer_states = copy.deepcopy([optimizer.state_dict() for optimizer in self._optimizers])
            self._regularizer_states = copy.deepcopy([term.state_dict() for term in self._regularizers])
        return {
            "weights": dict(self._weights),
            "optimizers": self._optimizer_states,
            "regularizers": self._regularizer_states,
            "losses": list(self.losses),
            "fresh_losses": list(self.fresh_losses),
            "metrics": list(self._metrics),
            "fresh_metrics": list(self._fresh_metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`; the copy is made anew at the next batch."""
        self.stop()
        self._weights = state["weights"]
        self._optimizer_states, self._regularizer_states = state["optimizers"], state["regularizers"]
        self.losses, self.fresh_losses = list(state["losses"]), list(state["fresh_losses"])
        self._metrics, self._fresh_metrics = list(state["metrics"]), list(state["fresh_metrics"])

    def _make_copy(self, context: ProbeContext, regularizers: Sequence[Regularizer]) -> None:
        with isolated(context.model):
            model = context.copy()
            load_weights(model, context.model, self._weights)
            self._optimizers = context.make_optimizers(model)
            self._regularizers = [regularizer.duplicate() for regularizer in regularizers]
            for optimizer, state in zip(self._optimizers, self._optimizer_states, strict=False):
                optimizer.load_state_dict(state)
            for regularizer, state in zip(self._regularizers, self._regularizer_states, strict=False):
                regularizer.load_state_dict(state)
            for regularizer in self._regularizers:
                regularizer.start(model)
        self._model, self._context, self._weights = model, context, {}

    def _loss_of_network(self, context: ProbeContext, model: nn.Module) -> tuple[float, dict[str, float]]:
        with (
            with_weights_of(model, context.model),
            training_trial(model),
            context.record_logged(model, self._fit_test.metric) as logged,
        ):
            return context.loss_on(model, context.batch).item(), logged

    def _train_copy(
        self, context: ProbeContext, model: nn.Module, window: int, *, ends_window: bool
    ) -> tuple[float, dict[str, float]]:
        def compute_gradients() -> Tensor:
            if self._starts_window:
                model.zero_grad()
            loss = context.training_loss(model, context.batch)
            (loss / window).backward()
            if ends_window:
                complete_gradients(context, model, self._optimizers, self._regularizers, loss)
            return loss.detach()

        with isolated(model), context.record_logged(model, self._fit_test.metric) as logged:
            loss = take_step(self._optimizers, compute_gradients) if ends_window else compute_gradients().item()
        self._starts_window = ends_window
        return loss, logged


def _diverging(losses: Sequence[float]) -> tuple[float, ...]:
    return tuple(loss if math.isfinite(loss) else math.inf for loss in losses)
