"""C-CHAIN: keep the outputs on other samples where they were before the last optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity.activations.loss_arguments import LossArguments, some_entries
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.functional.outputs import movement
from lightning_plasticity.interventions.base import InterventionContext, Regularizer, StepIntervention
from lightning_plasticity.interventions.closures import bind_closure
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.groups import Forward
from lightning_plasticity.isolation.attributes import preserve_attributes
from lightning_plasticity.isolation.batches import tensors_in
from lightning_plasticity.isolation.state import device_of, probe_mode, repeatable_rng
from lightning_plasticity.isolation.weights import with_weights_of

_Reference = tuple[Forward, list[Tensor]]
"""Runs a model on a batch; and the outputs of the network on it, of earlier weights."""


class ChurnRegularizer(StepIntervention, Regularizer):
    r"""C-CHAIN: penalise churn, the change of the outputs on other samples by the last optimizer step.

    .. math:: R_t = \lambda\,\mathrm{mean}\big(f_{\theta_t}(B) - f_{\theta_{t-1}}(B)\big)^2, \qquad B = B_{t-2}

    The mean is over samples and outputs, and only :math:`\theta_t` gets a gradient. The source draws :math:`B` from a
    buffer. Here it is the training batch of two steps before: neither the last step nor the next one is trained on it.
    With accumulated gradients it is the last of their batches. So the first two steps of a task, and of a run that
    resumes from a checkpoint, have no such term: batches are not in the state.

    :math:`f` is what the loss functions of torch receive in ``forward``, targets excluded; where it calls none, the
    tensors that it returns, which in the callback is the loss of a ``training_step`` with a loss function of its own.
    Of a tensor with more than 65536 entries evenly spaced ones count. The network is run in evaluation mode with the
    same random numbers, and in the callback on a copy, so that it leaves no trace. The outputs of earlier weights are
    kept, not the weights. What other interventions change between two steps counts as churn. Fit tests, which have no
    steps before, leave the term out.

    In its experiments the source adapts :math:`\lambda`, so that the term is a set share of the running mean of the
    loss, 1 % in one of them, and measures policies by their cross-entropy; both are left out.

    In a plain loop, :meth:`penalty` is a part of the loss, and :meth:`after_step` gets the batch::

        for inputs, targets in batches:
            optimizer.zero_grad()
            (loss_fn(model(inputs), targets) + regularizer.penalty(model)).backward()
            optimizer.step()
            regularizer.after_step(model, forward=lambda model: model(inputs))

    Args:
        coefficient: Factor of the term, :math:`\lambda`.
        include: Names of the modules and parameters that get the gradient, with wildcards; by default all.
        exclude: Names of those that do not.

    Raises:
        ValueError: If ``coefficient`` is negative; at the step, if ``forward`` is not given, or no output depends on
            the weights; at the penalty, if the number of outputs has changed.

    References:
        Tang et al. 2025, "Mitigating plasticity loss in continual reinforcement learning by reducing churn",
        arXiv 2506.00592.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> regularizer = ChurnRegularizer(coefficient=0.5)
        >>> for step in range(3):
        ...     with torch.no_grad():
        ...         _ = model.weight.fill_(step)
        ...     _ = regularizer.after_step(model, forward=lambda model: model(torch.full((4, 1), 2.0)))
        >>> regularizer.penalty(model).item()  # 0.5 (2 · 2 - 1 · 2)²
        2.0
    """

    _reference: _Reference | None
    _next: _Reference | None
    _copy: nn.Module | None

    def __init__(self, coefficient: float = 1.0, *, include: Patterns = None, exclude: Patterns = None) -> None:
        super().__init__(coefficient, include=include, exclude=exclude)
        self._forget()

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        """Forget the batches, and run the model once to see that it has outputs, if it can be run."""
        self._forget()
        self.rest_without(self.selected_parameters(model, context), model, context)
        if context.forward is not None and self.rests_because is None:
            with self._in_copy(model, context.make_copy) as model_to_run:
                self._outputs(model_to_run, context.forward)

    @override
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        """Keep the batch of the step, and the outputs of the present weights on it."""
        if self.rests_because is not None:
            return
        forward = bind_closure(context.require_forward(self.name, "after_step"))
        with self._in_copy(model, context.make_copy) as model_to_run:
            outputs = [output.detach() for output in self._outputs(model_to_run, forward)]
        self._reference, self._next = self._next, (forward, outputs)

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        """Compute the term, coefficient included: a scalar with a graph; zero without one before the third step.

        With several processes, value and gradient are means over the batches of all of them: call it in all.
        """
        if self._reference is None:
            return torch.zeros((), device=device_of(model))
        forward, before = self._reference
        parameters = self.selected_parameters(model)
        gradients: Sequence[Tensor] = ()
        has_graph = torch.is_grad_enabled() and bool(parameters)
        with self._in_copy(model, None) as model_to_run:
            after = self._outputs(model_to_run, forward)
            if [output.shape for output in after] != [output.shape for output in before]:
                raise ValueError(f"{self.name}: {type(model).__name__} has other outputs on a batch than a step ago")
            moved = torch.cat([movement(*pair).to(after[0].device) for pair in zip(before, after, strict=True)])
            value = self.coefficient * moved.square().mean()
            if has_graph:
                own = dict(model_to_run.named_parameters())
                gradients = torch.autograd.grad(value, [own[name] for name in parameters], materialize_grads=True)
        result = all_reduce_mean(value.detach(), self.name)
        if not has_graph:
            return result
        means = [all_reduce_mean(gradient, self.name) for gradient in gradients]
        # Zero, with the gradients that were computed: a copy has none of the model's own parameters in its graph, and
        # layers that recompute activations in the backward pass need its weights until then.
        linear = [((p - p.detach()) * mean).sum() for p, mean in zip(parameters.values(), means, strict=True)]
        return result + torch.stack([term.to(result) for term in linear]).sum()

    @override
    def stop(self) -> None:
        """Forget the batches and the copy of the model."""
        self._forget()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude batches and models from copies."""
        return {**vars(self), "_reference": None, "_next": None, "_copy": None}

    def _forget(self) -> None:
        self._reference = self._next = self._copy = None

    @contextlib.contextmanager
    def _in_copy(self, model: nn.Module, make_copy: Callable[[], nn.Module] | None) -> Iterator[nn.Module]:
        """Yield what is run: one copy for all steps with the weights of the model, or the model without a copy."""
        if self._copy is None and make_copy is not None:
            self._copy = make_copy()
        with contextlib.ExitStack() as stack:
            model_to_run = model if self._copy is None else self._copy
            if model_to_run is not model:
                stack.enter_context(with_weights_of(model_to_run, model))
            for enter in (probe_mode, preserve_attributes):
                stack.enter_context(enter(model_to_run))
            stack.enter_context(repeatable_rng())
            yield model_to_run

    def _outputs(self, model: nn.Module, forward: Forward) -> list[Tensor]:
        """Return the outputs of a model as vectors with a graph."""
        with LossArguments() as arguments:
            returned = forward(model)
        outputs = _with_graph(arguments.seen) or [some_entries(output) for output in _with_graph(tensors_in(returned))]
        if not outputs:
            raise ValueError(
                f"{self.name}: {type(model).__name__} has no outputs that depend on its weights: forward must return "
                "them, or pass them to a loss function of torch"
            )
        return outputs


def _with_graph(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]
