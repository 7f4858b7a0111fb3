"""Train copies of a network for a few steps, to see how well it still fits the samples of a new task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_number, check_positive_ints, is_int
from lightning_plasticity.churn import churn_of_step, outputs_on
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature.cost import Cost, ForwardCounter
from lightning_plasticity.curvature.problem import Progress
from lightning_plasticity.distributed.agreement import format_error
from lightning_plasticity.fit_curve import FitCurve
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.interventions.decoupled_steps import DecoupledSteps
from lightning_plasticity.interventions.penalty_gradients import Terms, accumulate, differentiate_penalty, sum_terms
from lightning_plasticity.isolation.batches import micro_batches
from lightning_plasticity.isolation.precision import in_full_precision
from lightning_plasticity.isolation.state import device_of, training_trial

MetricMode = Literal["max", "min"]

MIN_BATCHES = 8
"""Number of batches that a live comparison needs."""

_STEPS, _LIVE_STEPS = 12, 200
"""Default number of steps on the probe's samples, and of batches of the task."""


_COST = 40
"""Training steps that the test may cost, unless two batches cost more."""

_FEWEST_SAMPLES = 8
"""Smallest number of samples of a batch, if there are as many for two batches."""


@dataclass(frozen=True)
class FitTest:
    """A test of how well a network still fits the samples of a new task, compared with its initial weights.

    The samples of the probe are split into small batches. For each of them, a copy of the network and a copy of its
    initial weights are trained on this batch alone, with the loss, the regularizers, the gradient clipping and the
    optimizers of the run. The optimizers come from ``configure_optimizers`` of the copy, so their state is new, and
    their learning rates are those before any schedule. The network is not changed.

    A few steps on few samples show as much as many steps on many: what a network can still memorise, and how fast.
    Several batches tell how far the result depends on the samples: as many as cost about 40 training steps, and two at
    least.

    The first step on the first batch also tells the churn: how far it moves the outputs on the second batch, relative
    to those on the first (:func:`~lightning_plasticity.functional.churn`).

    With ``live=True`` the copy of the initial weights is instead trained beside the network, from the start of the task
    on its own batches. The verdict then comes after ``steps`` batches, or when the task ends before, and repairs with
    it: both networks are compared by the later half of these batches, each before its training step. It needs no
    samples but those of training, so that batches may hold a single one, and sees more of the task. It costs a training
    step and a forward pass for each of these batches, and memory for one more network and its optimizer state. Both
    networks run in the precision of training. With several devices, each trains a copy on its own batches, gradients
    are averaged as in training, and losses are means over the devices.

    Args:
        steps: Number of optimizer steps on each batch, by default 12; with ``live=True`` number of batches, by default
            200.
        share: Share of the task to compare the networks on, in (0, 1], for ``live=True`` instead of ``steps``: 0.2 for
            its first fifth, and at least 8 batches. The length of the task is an estimate, ``expected_steps`` of the
            report; where it is not known, the default number of batches is taken, which the ``remarks`` say.
        batch_size: Number of samples of a batch, or half of them all if there are fewer than two batches. A loss that
            couples the samples of its batch, or fails on fewer, gets all of them. Without effect with ``live=True``.
        live: Whether to compare the networks on the batches of the task.
        metric: Name of a number that ``training_step`` logs, such as ``"train_acc"``, for ``live=True``: the networks
            are compared by it, as ``live_metric_gap``.
        metric_mode: ``"max"`` if the metric is better when it is higher, ``"min"`` if it is better when it is lower.
            By default ``"min"`` for names that contain "loss" or "error".

    Raises:
        ValueError: If ``steps`` or ``batch_size`` is not a positive whole number, or ``steps`` less than 8 with
            ``live=True``; if ``share`` is not in (0, 1], or given with ``steps``; if ``share`` or ``metric`` is given
            without ``live=True``, or ``metric_mode`` without ``metric``.

    References:
        Lyle et al. 2023, arXiv 2303.01486, who measure plasticity by how well probe tasks are fitted. Tang et al. 2025,
        arXiv 2506.00592, on churn.

    Example:
        >>> from lightning_plasticity.context import ProbeContext
        >>> model, x = nn.Linear(2, 1), torch.ones(4, 2)
        >>> context = ProbeContext(
        ...     model, x, lambda model, x: (model(x) - 1).square().mean(), [torch.optim.SGD(model.parameters(), 0.1)]
        ... )
        >>> losses = FitTest(steps=3).fit(context, 4).losses
        >>> len(losses), losses[0] > losses[1] > losses[2] > losses[3]
        (4, True)
    """

    steps: int | None = None
    batch_size: int = 16
    live: bool = False
    share: float | None = None
    metric: str | None = None
    metric_mode: MetricMode | None = None

    def __post_init__(self) -> None:
        if self.live and self.steps is not None and not is_int(self.steps):
            raise ValueError(
                f"FitTest(live=True, steps={self.steps!r}) must be a whole number of batches; for a share of the task, "
                "such as its first fifth, write share=0.2"
            )
        check_positive_ints(type(self).__name__, optional=True, steps=self.steps)
        check_positive_ints(type(self).__name__, batch_size=self.batch_size)
        if self.live and self.num_steps < MIN_BATCHES:
            raise ValueError(f"FitTest(live=True, steps={self.steps}) must be at least {MIN_BATCHES} batches")
        if self.share is not None:
            self._check_share(self.share)
        if self.metric is not None and not self.live:
            raise ValueError(f"FitTest(metric={self.metric!r}) compares what training logs: write live=True, too")
        if self.metric_mode is not None and self.metric is None:
            raise ValueError(f"FitTest(metric_mode={self.metric_mode!r}) has no effect without metric=")
        if self.metric_mode not in (*get_args(MetricMode), None):
            raise ValueError(
                f"FitTest(metric_mode={self.metric_mode!r}) must be one of {[*get_args(MetricMode), None]}"
            )

    def _check_share(self, share: float) -> None:
        if not self.live:
            raise ValueError(f"FitTest(share={share!r}) is a share of the batches of the task: write live=True, too")
        if self.steps is not None:
            raise ValueError(f"FitTest(steps={self.steps}, share={share!r}): write one of them")
        check_number("(0, 1]", "FitTest", "a share of the task, 0.2 for its first fifth", share=share)

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps; with ``live=True`` number of batches, unless it follows from a share."""
        if self.steps is not None:
            return self.steps
        return _LIVE_STEPS if self.live else _STEPS

    def num_batches(self, length: float | None) -> int:
        """Return the number of batches that networks are compared on with ``live=True``.

        Args:
            length: Number of batches of the task; ``None`` if it is not known.

        Example:
            >>> fit_test = FitTest(live=True, share=0.2)
            >>> fit_test.num_batches(1000), fit_test.num_batches(20), fit_test.num_batches(None)
            (200, 8, 200)
        """
        if self.share is None or length is None:
            return self.num_steps
        return max(round(self.share * length), MIN_BATCHES)

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric is better when it is higher."""
        if self.metric_mode is not None or self.metric is None:
            return self.metric_mode != "min"
        return not any(word in self.metric.lower() for word in ("loss", "error"))

    @property
    def measures(self) -> list[str]:
        """Names of the diagnostics that the test measures."""
        if self.live:
            return ["handicap", "fit_loss", "fit_gap", *([] if self.metric is None else ["live_metric_gap"])]
        return ["handicap", "fit_loss", "fit_gap", "churn"]

    def fit(
        self,
        context: ProbeContext,
        samples: int | None = None,
        *,
        regularizers: Sequence[Regularizer] = (),
        progress: Progress | None = None,
    ) -> FitCurve:
        """Train copies of the model and return their losses.

        Args:
            context: The model, the batch, the loss and the optimizers.
            samples: Number of samples, the first ones of the batch; ``None`` to train on the whole batch at once.
            regularizers: The terms that are added to the loss in training. They are not part of the losses that are
                returned.
            progress: Called after each step with the number of steps done and their total.

        Returns:
            The losses. Their ``remark`` says so if small batches failed and the whole batch was taken.

        Raises:
            MisconfigurationError: If there is no optimizer to train the copies with.
            ValueError: If the gradient of a regularizer is not finite.
            TypeError: If a regularizer does not return a scalar tensor.
        """
        remark = ""
        if samples is not None and not context.whole_batch:
            try:
                return self._fit(context, self._split(context, samples), regularizers, progress)
            except Exception as error:
                # Some losses work on a whole batch only; any other error comes again.
                remark = f"copies were fitted to the whole batch at once, since small ones fail: {format_error(error)}"
        return replace(self._fit(context, [context.batch], regularizers, progress), remark=remark)

    def _fit(
        self,
        context: ProbeContext,
        batches: Sequence[Any],
        regularizers: Sequence[Regularizer],
        progress: Progress | None,
    ) -> FitCurve:
        curves = []
        for place, batch in enumerate(batches):
            # The churn of one step costs two training steps, that of all of them too many.
            others = batches[1:2] if place == 0 else []

            def advance(done: int, place: int = place) -> None:
                if progress is not None:
                    progress(place * self.num_steps + done, len(batches) * self.num_steps)

            curves.append(self._fit_batch(context, batch, others, regularizers, advance))
        return FitCurve.of(curves)

    def _split(self, context: ProbeContext, samples: int) -> list[Any]:
        per_step = context.samples_per_step or context.batch_size or samples
        # One batch alone has no standard error.
        size = max(min(self.batch_size, max(per_step, _FEWEST_SAMPLES), samples // 2), 1)
        batches = list(micro_batches(context.samples(samples), size))
        cost = self._cost_of_step(context, batches[0]).training_steps(per_step / size)
        affordable = round(_COST / (2 * self.num_steps * cost))
        # A last batch with few samples would count as much as the others.
        return batches[: min(max(affordable, 2), samples // size)]

    def _cost_of_step(self, context: ProbeContext, batch: Any) -> Cost:
        """Return the estimated cost of a step, from the operations of a forward pass."""
        model = context.copy_to_measure()
        with (
            training_trial(model),
            in_full_precision(model, batch) as converted,
            torch.no_grad(),
            ForwardCounter() as counter,
        ):
            context.loss_on(model, converted)
        num_parameters = sum(parameter.numel() for parameter in context.trained_parameters.values())
        return Cost(counter.flops, counter.calls, device_of(model), num_parameters)

    def _fit_batch(
        self,
        context: ProbeContext,
        batch: Any,
        others: Sequence[Any],
        regularizers: Sequence[Regularizer],
        advance: Callable[[int], None],
    ) -> FitCurve:
        """Train a copy of the model on a batch, and see how far the first step moves its outputs on others."""
        model = context.copy_to_measure()
        context.check_copy(model)
        losses: list[float] = []
        churn = math.nan
        with (
            training_trial(model),
            in_full_precision(model, [batch, *others]) as observed,
            contextlib.nullcontext(context.make_optimizers(model)) as optimizers,
            _started_copies(regularizers, model, optimizers) as terms,
        ):
            converted = observed[0]
            _fuse(optimizers)
            parameters = trained_parameters(optimizers)
            decoupled_steps = DecoupledSteps()

            def compute_gradients() -> Tensor:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = context.training_loss(model, converted)
                loss.backward()
                complete_gradients(context, model, optimizers, terms, loss, decoupled_steps)
                return loss.detach()

            before = outputs_on(context, model, observed) if others else []
            for step in range(self.num_steps):
                losses.append(take_step(optimizers, compute_gradients))
                if others and step == 0:
                    churn = churn_of_step(before, outputs_on(context, model, observed))
                advance(step + 1)
            with torch.no_grad():
                losses.append(context.loss_on(model, converted).item())
            has_gradient = any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
            model.zero_grad()
        return FitCurve(tuple(_until_divergence(losses)), has_gradient, churn=churn)


def _fuse(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let Adam and AdamW step in one kernel on the CPU, which takes a third of the time and differs by rounding."""
    for optimizer in optimizers:
        for group in optimizer.param_groups if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) else ():
            plain = all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
            if plain and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                group["fused"] = True


@contextlib.contextmanager
def _started_copies(
    regularizers: Sequence[Regularizer], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Iterator[list[Regularizer]]:
    """Yield copies of regularizers that act on what optimizers train of a copy of the model."""
    copies = [regularizer.duplicate() for regularizer in regularizers]
    try:
        for regularizer in copies:
            regularizer.start(model, optimizers=optimizers)
        yield copies
    finally:
        for regularizer in copies:
            regularizer.stop()


def trained_parameters(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """Return the parameters that optimizers train."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


def complete_gradients(
    context: ProbeContext,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    regularizers: Sequence[Regularizer],
    loss: Tensor,
    decoupled_steps: DecoupledSteps,
) -> None:
    """Add the gradients of regularizers to those of the loss, and clip them as in training.

    Args:
        context: The context that the model is a copy of.
        model: The copy.
        optimizers: The optimizers of the copy.
        regularizers: The terms, started on the copy.
        loss: The loss; after its divergence the gradient of a penalty is not finite, and is left out.
        decoupled_steps: Takes the gradients of those that are decoupled.
    """
    parameters = trained_parameters(optimizers)
    decoupled: Terms = []
    for regularizer in regularizers if loss.isfinite() else ():
        terms = differentiate_penalty(regularizer, model, parameters).terms
        if regularizer.decoupled:
            decoupled += terms
        else:
            accumulate(parameters, terms, 1.0)
    for optimizer in optimizers:
        decoupled_steps.schedule(optimizer, parameters, sum_terms(decoupled, len(parameters)))
        context.clip_gradients(model, optimizer)


def take_step(optimizers: Sequence[torch.optim.Optimizer], compute_gradients: Callable[[], Tensor]) -> float:
    """Step all optimizers and return the loss before the step.

    Args:
        optimizers: The optimizers.
        compute_gradients: Computes the gradients and returns the loss.
    """
    losses = []

    def closure() -> Tensor:
        losses.append(compute_gradients())
        return losses[-1]

    if len(optimizers) == 1:
        # Some, such as LBFGS, evaluate the loss several times.
        optimizers[0].step(closure)  # type: ignore[arg-type]
    else:
        closure()
        for optimizer in optimizers:
            optimizer.step()
    return losses[0].item()


def _until_divergence(losses: Sequence[float]) -> Iterator[float]:
    diverged = False
    for loss in losses:
        diverged |= not math.isfinite(loss)
        yield math.inf if diverged else loss
