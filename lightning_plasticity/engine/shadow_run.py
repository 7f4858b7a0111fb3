"""Train a fresh network beside the network on the batches of a task."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import Estimate
from lightning_plasticity.distributed.agreement import all_reduce_mean, all_reduce_sum
from lightning_plasticity.distributed.data_parallel import average_gradients, broadcast_buffers
from lightning_plasticity.fit_curve import LiveCurve, compare_fits, later_half
from lightning_plasticity.fit_test import MIN_BATCHES, FitTest, complete_gradients, take_step, trained_parameters
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.interventions.decoupled_steps import DecoupledSteps
from lightning_plasticity.isolation.state import isolated, training_trial
from lightning_plasticity.isolation.weights import load_weights, named_tensors, with_weights_of
from lightning_plasticity.messages import MisconfigurationError


class ShadowRun:
    """A copy of the initial weights that trains on the first batches of a task, and the losses of both networks there.

    The loss of each network on a batch is that before its training step on it, at the same random numbers, in the same
    precision, which is that of training, and with the same function. For the network, the copy takes over its weights
    for one forward pass, and a backward pass as long as no gradient has reached a parameter.

    The copy is made at the first batch. Under DDP each rank has one, and trains it on its own batches; gradients and
    losses are averaged over ranks, so that weights and losses are the same on all of them, and buffers are those of
    rank 0 at the start of each step.

    Args:
        fit_test: Which metric to record, and in which direction it is better.
        initial: The initial weights: parameters and buffers by name.
        num_batches: Number of batches to train on.
    """

    def __init__(self, fit_test: FitTest, initial: Mapping[str, Tensor], num_batches: int = MIN_BATCHES) -> None:
        self.num_batches = num_batches
        """Number of batches to train on."""
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
        self._decoupled_steps = DecoupledSteps()
        self._scaler: torch.amp.GradScaler | None = None
        self._scaler_state: dict[str, Any] | None = None
        self._starts_window = True
        # Whether a gradient of the loss has reached a parameter of the network, and of the copy.
        self._has_gradient = self._fresh_has_gradient = False

    @property
    def is_complete(self) -> bool:
        """Whether the batches suffice for the comparison that was asked for."""
        return len(self.losses) >= self.num_batches

    @property
    def fresh_is_dead(self) -> bool:
        """Whether no gradient has reached a parameter of the copy, although there is a loss."""
        return LiveCurve(tuple(self.fresh_losses), self._fresh_has_gradient).is_dead

    def train(
        self,
        context: ProbeContext,
        *,
        regularizers: Sequence[Regularizer] = (),
        window: int = 1,
        ends_window: bool = True,
    ) -> None:
        """Record the losses of both networks on a batch, and train the copy on it. All ranks must call it together.

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
        metric = self._fit_test.metric
        has_metric = metric is not None and metric in logged and metric in fresh_logged
        if metric is not None and not has_metric and not self._metrics:
            raise MisconfigurationError(
                f"FitTest(metric={metric!r}) is not logged in a training step; choose one of {sorted(logged)}"
            )
        values = [loss, fresh_loss, *([logged[metric], fresh_logged[metric]] if has_metric and metric else [])]
        means = all_reduce_mean(torch.tensor(values, dtype=torch.float64), "losses").tolist()
        for record, mean in zip(
            (self.losses, self.fresh_losses, self._metrics, self._fresh_metrics), means, strict=False
        ):
            record.append(mean)

    def compare(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the diagnostics of the network and those of the fresh one, by name, as far as they are defined.

        They are empty before the eighth batch.
        """
        if len(self.losses) < MIN_BATCHES:
            return {}, {}
        curve = LiveCurve(_diverging(self.losses), self._has_gradient)
        fresh = LiveCurve(_diverging(self.fresh_losses), self._fresh_has_gradient)
        values = {**compare_fits(curve, fresh), "fit_loss": curve.mean}
        sign = 1 if self._fit_test.higher_is_better else -1
        gaps = [sign * (fresh - own) for fresh, own in zip(self._fresh_metrics, self._metrics, strict=True)]
        later = later_half(gaps)
        if later and all(map(math.isfinite, later)):
            deviation = statistics.stdev(later) if len(later) > 1 else math.nan
            gap = math.fsum(later) / len(later)
            if curve.is_dead and gap >= 0:
                gap = math.inf
            values["live_metric_gap"] = Estimate(gap, standard_error=deviation / math.sqrt(len(later)))
        return values, {"fit_loss": fresh.mean}

    def stop(self) -> None:
        """Free the memory of the copy."""
        for regularizer in self._regularizers:
            regularizer.stop()
        self._decoupled_steps.stop()
        self._model = self._context = None
        self._optimizers, self._regularizers, self._scaler = [], [], None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, which torch loads with ``weights_only=True``."""
        if self._model is not None:
            self._weights = {name: value.detach().cpu().clone() for name, value in named_tensors(self._model).items()}
            self._optimizer_states = copy.deepcopy([optimizer.state_dict() for optimizer in self._optimizers])
            self._regularizer_states = copy.deepcopy([term.state_dict() for term in self._regularizers])
            self._scaler_state = None if self._scaler is None else self._scaler.state_dict()
        return {
            "num_batches": self.num_batches,
            "weights": dict(self._weights),
            "optimizers": self._optimizer_states,
            "regularizers": self._regularizer_states,
            "scaler": self._scaler_state,
            "has_gradient": (self._has_gradient, self._fresh_has_gradient),
            "losses": list(self.losses),
            "fresh_losses": list(self.fresh_losses),
            "metrics": list(self._metrics),
            "fresh_metrics": list(self._fresh_metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`; the copy is made anew at the next batch."""
        self.stop()
        self.num_batches, self._weights = state["num_batches"], state["weights"]
        self._optimizer_states, self._regularizer_states = state["optimizers"], state["regularizers"]
        self._scaler_state = state["scaler"]
        self._has_gradient, self._fresh_has_gradient = state["has_gradient"]
        self.losses, self.fresh_losses = list(state["losses"]), list(state["fresh_losses"])
        self._metrics, self._fresh_metrics = list(state["metrics"]), list(state["fresh_metrics"])

    def _make_copy(self, context: ProbeContext, regularizers: Sequence[Regularizer]) -> None:
        with isolated(context.model):
            model = context.copy()
            context.check_copy(model)
            load_weights(model, context.model, self._weights)
            self._optimizers = context.make_optimizers(model)
            self._regularizers = [regularizer.duplicate() for regularizer in regularizers]
            for optimizer, state in zip(self._optimizers, self._optimizer_states, strict=False):
                optimizer.load_state_dict(state)
            for regularizer, state in zip(self._regularizers, self._regularizer_states, strict=False):
                regularizer.load_state_dict(state)
            for regularizer in self._regularizers:
                regularizer.start(model, optimizers=self._optimizers)
            self._scaler = context.make_scaler()
            if self._scaler is not None and self._scaler_state is not None:
                self._scaler.load_state_dict(self._scaler_state)
        self._model, self._context, self._weights = model, context, {}

    def _loss_of_network(self, context: ProbeContext, model: nn.Module) -> tuple[float, dict[str, float]]:
        with (
            with_weights_of(model, context.model),
            training_trial(model),
            context.record_logged(model, self._fit_test.metric) as logged,
        ):
            if self._starts_window:
                broadcast_buffers(model)
            with context.training_precision():
                loss = context.loss_on(model, context.batch)
            if not self._has_gradient:
                self._has_gradient = _differentiate(self._scaled(loss), model, trained_parameters(self._optimizers))
        return loss.item(), logged

    def _train_copy(
        self, context: ProbeContext, model: nn.Module, window: int, *, ends_window: bool
    ) -> tuple[float, dict[str, float]]:
        def compute_gradients() -> Tensor:
            if self._starts_window:
                model.zero_grad()
            with context.training_precision():
                loss = context.training_loss(model, context.batch)
            self._scaled(loss / window).backward()
            if ends_window:
                self._complete_gradients(context, model, loss)
            return loss.detach()

        with isolated(model), context.record_logged(model, self._fit_test.metric) as logged:
            if self._starts_window:
                broadcast_buffers(model)
            loss = self._take_step(compute_gradients) if ends_window else compute_gradients().item()
        self._starts_window = ends_window
        return loss, logged

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self._scaler is None else self._scaler.scale(loss)

    def _complete_gradients(self, context: ProbeContext, model: nn.Module, loss: Tensor) -> None:
        parameters = trained_parameters(self._optimizers)
        average_gradients(parameters)
        self._fresh_has_gradient = self._fresh_has_gradient or _any_gradient(parameters)
        if self._scaler is not None:
            for optimizer in self._optimizers:
                self._scaler.unscale_(optimizer)
        complete_gradients(context, model, self._optimizers, self._regularizers, loss, self._decoupled_steps)

    def _take_step(self, compute_gradients: Callable[[], Tensor]) -> float:
        if self._scaler is None:
            return take_step(self._optimizers, compute_gradients)
        loss = compute_gradients()
        for optimizer in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        return loss.item()


def _differentiate(loss: Tensor, model: nn.Module, parameters: Sequence[Tensor]) -> bool:
    """Return whether a gradient of the loss reaches one of the parameters, on any rank; leave ``.grad`` as it was."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad()
    loss.backward()
    found = torch.tensor(float(_any_gradient(parameters)))
    for parameter, gradient in before:
        parameter.grad = gradient
    return bool(all_reduce_sum(found, "the numbers of ranks with a gradient"))


def _any_gradient(parameters: Sequence[Tensor]) -> bool:
    return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)


def _diverging(losses: Sequence[float]) -> tuple[float, ...]:
    return tuple(loss if math.isfinite(loss) else math.inf for loss in losses)
