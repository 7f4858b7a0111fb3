"""Train copies of a network for a few steps, to see how well it still fits the samples of a new task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature.problem import Progress
from lightning_plasticity.fit_curve import FitCurve
from lightning_plasticity.interventions import Regularizer
from lightning_plasticity.interventions.penalty_gradients import accumulate, differentiate_penalty
from lightning_plasticity.isolation.batches import micro_batches
from lightning_plasticity.isolation.precision import in_full_precision
from lightning_plasticity.isolation.state import training_trial


@dataclass(frozen=True)
class FitTest:
    """A test of how well a network still fits the samples of a new task, compared with its initial weights.

    The samples of the probe are split into small batches. For each of them, a copy of the network and a copy of its
    initial weights are trained on this batch alone, with the loss, the regularizers, the gradient clipping and the
    optimizers of the run. The optimizers come from ``configure_optimizers`` of the copy, so their state is new, and
    their learning rates are those before any schedule. The network is not changed.

    A few steps on few samples show as much as many steps on many: what a network can still memorise, and how fast.
    Several batches tell how far the result depends on the samples.

    Args:
        steps: Number of optimizer steps on each batch.
        batch_size: Number of samples of a batch, or half of them all if there are fewer than two batches. A loss that
            couples the samples of its batch, or fails on fewer, gets all of them.

    Raises:
        ValueError: If an argument is not a positive whole number.

    References:
        Lyle et al. 2023, arXiv 2303.01486, who measure plasticity by how well probe tasks are fitted.

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

    steps: int = 20
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_positive_ints(type(self).__name__, steps=self.steps, batch_size=self.batch_size)

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

        Raises:
            MisconfigurationError: If there is no optimizer to train the copies with.
            ValueError: If the gradient of a regularizer is not finite.
            TypeError: If a regularizer does not return a scalar tensor.
        """
        if samples is not None and not context.whole_batch:
            # Some losses work on a whole batch only; any other error comes again.
            with contextlib.suppress(Exception):
                return self._fit(context, self._split(context, samples), regularizers, progress)
        return self._fit(context, [context.batch], regularizers, progress)

    def _fit(
        self,
        context: ProbeContext,
        batches: Sequence[Any],
        regularizers: Sequence[Regularizer],
        progress: Progress | None,
    ) -> FitCurve:
        curves = []
        for place, batch in enumerate(batches):

            def advance(done: int, place: int = place) -> None:
                if progress is not None:
                    progress(place * self.steps + done, len(batches) * self.steps)

            curves.append(self._fit_batch(context, batch, regularizers, advance))
        return FitCurve.of(curves)

    def _split(self, context: ProbeContext, samples: int) -> list[Any]:
        # One batch alone has no standard error.
        size = max(min(self.batch_size, samples // 2), 1)
        batches = list(micro_batches(context.samples(samples), size))
        # A last batch with few samples would count as much as the others.
        return batches[:-1] if samples % size else batches

    def _fit_batch(
        self, context: ProbeContext, batch: Any, regularizers: Sequence[Regularizer], advance: Callable[[int], None]
    ) -> FitCurve:
        """Train a copy of the model on a batch."""
        model, losses = context.copy_to_measure(), []
        with (
            training_trial(model),
            in_full_precision(model, batch) as converted,
            _started_copies(regularizers, model) as terms,
        ):
            optimizers = context.make_optimizers(model)
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

            def compute_gradients() -> Tensor:
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss = context.loss_on(model, converted)
                loss.backward()
                # After divergence, the gradient of a penalty is not finite.
                for term in terms if loss.isfinite() else ():
                    accumulate(parameters, differentiate_penalty(term, model, parameters)[1], 1.0)
                for optimizer in optimizers:
                    context.clip_gradients(model, optimizer)
                return loss.detach()

            for step in range(self.steps):
                losses.append(_step(optimizers, compute_gradients))
                advance(step + 1)
            with torch.no_grad():
                losses.append(context.loss_on(model, converted).item())
            has_gradient = any(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
            model.zero_grad()
        return FitCurve(tuple(_until_divergence(losses)), has_gradient)


@contextlib.contextmanager
def _started_copies(regularizers: Sequence[Regularizer], model: nn.Module) -> Iterator[list[Regularizer]]:
    """Yield copies of regularizers that act on a copy of the model."""
    copies = [regularizer.duplicate() for regularizer in regularizers]
    try:
        for regularizer in copies:
            regularizer.start(model)
        yield copies
    finally:
        for regularizer in copies:
            regularizer.stop()


def _step(optimizers: Sequence[torch.optim.Optimizer], compute_gradients: Callable[[], Tensor]) -> float:
    """Step all optimizers and return the loss before the step."""
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
