"""Define the three kinds of interventions: repairs, step interventions and regularizers."""

from __future__ import annotations

import copy
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import Self, override

from lightning_plasticity._validation import check_choice, check_number, is_int, is_str_list
from lightning_plasticity.interventions.penalty_gradients import (
    ClosedForm,
    accumulate,
    differentiate_penalty,
    sum_terms,
)
from lightning_plasticity.interventions.selection import Patterns, check_patterns, find_module, selected_tensors
from lightning_plasticity.interventions.units.groups import Forward
from lightning_plasticity.interventions.weights.linear_layers import (
    LinearParameter,
    computed_layers,
    is_computed,
    linear_parameters,
    opaque_layers,
)
from lightning_plasticity.interventions.weights.matrices import LayerWeights, weight_matrices
from lightning_plasticity.interventions.weights.updates import RepairReport, WeightUpdate, apply_update
from lightning_plasticity.isolation.weights import trained_names
from lightning_plasticity.messages import constructor_call, listed, rank_zero_warn

When = int | str
"""The occasion on which the callback repairs: ``"collapse"``, ``"task"`` (at the start of every task but the first), or
the number of optimizer steps between two repairs."""

Loss = Callable[[nn.Module], Tensor]
"""Returns a scalar loss with a graph."""


@dataclass(frozen=True)
class InterventionContext:
    """Everything besides the model that an intervention may use.

    Args:
        optimizers: The optimizers that hold the model's parameters.
        forward: Runs one representative forward pass and returns the outputs.
        losses: One loss function per mini-batch.
        make_copy: Makes a copy of the model; see :meth:`model_to_run`.
        generator: Source of the random numbers (a CPU generator); by default one seeded from torch's global one.
        initial: The initial weights of the model by name, to draw fresh values from; by default each layer's
            ``reset_parameters`` draws them.
        trained: Names of the parameters that are trained; by default those that the optimizers hold. It must be given
            where the model is a copy.
    """

    optimizers: Sequence[torch.optim.Optimizer] = ()
    forward: Forward | None = None
    losses: Sequence[Loss] = ()
    make_copy: Callable[[], nn.Module] | None = None
    generator: torch.Generator | None = None
    initial: Mapping[str, Tensor] | None = None
    trained: Collection[str] | None = None

    def model_to_run(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model where ``make_copy`` is given, else the model itself.

        Running the model that is trained may have side effects, such as on counters or logged values.
        """
        return model if self.make_copy is None else self.make_copy()

    def require_forward(self, owner: str, method: str) -> Forward:
        """Return ``forward``.

        Args:
            owner: Name of the intervention, for the message.
            method: The public method that takes ``forward``, for the message.

        Raises:
            ValueError: If there is none.
        """
        if self.forward is None:
            raise ValueError(
                f"{owner} needs a forward pass of the model: {method}(model, forward=lambda model: model(inputs))"
            )
        return self.forward

    def require_optimizers(self, owner: str) -> Sequence[torch.optim.Optimizer]:
        """Return the optimizers.

        Args:
            owner: Name of the intervention, for the message.

        Raises:
            ValueError: If there are none.
        """
        if not self.optimizers:
            raise ValueError(f"{owner} follows the steps of optimizers: start(model, optimizers=[optimizer])")
        return self.optimizers

    def require_losses(self, owner: str) -> Sequence[Loss]:
        """Return the loss functions, one per mini-batch.

        Args:
            owner: Name of the intervention, for the message.

        Raises:
            ValueError: If there are none.
        """
        if not self.losses:
            raise ValueError(
                f"{owner} needs gradients: repair(model, loss=lambda model: loss_fn(model(inputs), targets)), or a "
                "list of such functions, one for each mini-batch"
            )
        return self.losses

    def require_mean_loss(self, owner: str) -> Loss:
        """Return one function that computes the mean of the losses; raises as :meth:`require_losses`."""
        losses = self.require_losses(owner)
        if len(losses) == 1:
            return losses[0]
        return lambda model: torch.stack([loss(model) for loss in losses]).mean()


class Intervention:
    """An intervention against loss of plasticity: a :class:`Repair`, :class:`StepIntervention` or :class:`Regularizer`.

    Each kind has its public methods here, once. Subclasses implement hooks that take the model and an
    :class:`InterventionContext`: :meth:`prepare`, and the hook of their kind.

    Args:
        include: Names of the modules and parameters to act on, with ``*``, ``?`` and ``[...]`` as wildcards; a module
            stands for all that is in it. By default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If ``include`` or ``exclude`` is no list of names.
    """

    include: Patterns = None
    exclude: Patterns = None
    acts_on: ClassVar[str] = "parameter"
    """The kind of tensor that it acts on, in the singular, for the reasons why it rests."""

    acts_on_computed: ClassVar[bool] = True
    """Whether it acts on layers whose weights are computed from other tensors."""

    _has_named_computed_layers = False
    warns: bool = True
    """Whether it warns of what it cannot act on: a duplicate, on a copy of the model, leaves that to the original."""
    # The names of the parameters that were trained at the start, for hooks without a context.
    _trained: Collection[str] | None = None

    rests_because: str | None = None
    """Why it has nothing to act on in the model that it last saw, as a sentence; ``None`` if it has."""

    def __init__(self, include: Patterns = None, exclude: Patterns = None) -> None:
        check_patterns(self.name, include=include, exclude=exclude)
        self.include = None if include is None else list(include)
        self.exclude = None if exclude is None else list(exclude)

    @override
    def __repr__(self) -> str:
        """Return the constructor call with the current values, without arguments that are ``None``."""
        names = inspect.signature(type(self)).parameters
        return constructor_call(self, {name: getattr(self, name, None) for name in names})

    @property
    def name(self) -> str:
        """The name in reports, logs and messages."""
        return type(self).__name__

    def start(
        self,
        model: nn.Module,
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare for training: store initial weights, find units, register hooks.

        Call it before the first training step, and again after :meth:`stop`, :meth:`load_state_dict` or a change of the
        model or of how it runs, such as another head for the next task. State that is already stored is kept.

        Args:
            model: The model. It is not changed.
            forward: Runs one representative forward pass and returns the outputs, for interventions on units.
            make_copy: Makes a copy of the model to run ``forward`` on, where running the model itself would have side
                effects, such as on counters or logged values. By default the model is run.
            optimizers: The optimizers. Parameters that none of them holds are left alone; by default no frozen ones.
            initial: The initial weights of the model by name, for interventions that draw fresh values. By default
                those that the model has at the first start.
        """
        self._trained = trained_names(model, optimizers) if optimizers else None
        self.prepare(model, InterventionContext(optimizers, forward, make_copy=make_copy, initial=initial))

    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        """Implement :meth:`start`. The default does nothing."""

    def stop(self) -> None:
        """Remove all hooks. The stored state is kept."""

    def selected_parameters(
        self, model: nn.Module, context: InterventionContext | None = None
    ) -> dict[str, nn.Parameter]:
        """Return the parameters to act on: those that are trained and that ``include`` and ``exclude`` leave.

        A parameter that requires a gradient, but that no optimizer holds, is not trained, such as that of a target
        network.

        Args:
            model: The model, or a copy of it.
            context: What is known about the training, unless it was known at :meth:`start`.

        Raises:
            ValueError: If a pattern of ``include`` or ``exclude`` matches nothing.
        """
        trained = self._trained_names(model, context)
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (trained is None or name in trained)
        }
        if self.include is None and self.exclude is None:
            return parameters
        selected = selected_tensors(self.name, model, self.include, self.exclude)
        return {name: parameter for name, parameter in parameters.items() if parameter in selected}

    def _trained_names(self, model: nn.Module, context: InterventionContext | None) -> Collection[str] | None:
        """Return the names of the parameters that are trained; ``None`` if no optimizer is known."""
        if context is not None and context.trained is not None:
            return context.trained
        # Not at every step.
        if self._trained is None and context is not None and context.optimizers:
            return trained_names(model, context.optimizers)
        return self._trained

    def linear_parameters(self, model: nn.Module, context: InterventionContext) -> dict[str, LinearParameter]:
        """Return the weights and biases of linear layers among :meth:`selected_parameters`, by name.

        Warns:
            UserWarning: If layers are left out because their weights are computed from other tensors; once.
        """
        selected = set(self.selected_parameters(model, context).values())
        result = linear_parameters(model, selected)
        # If there is nothing else, it rests, and warns of that.
        if result and not self._has_named_computed_layers:
            self._warn_of_computed(model, selected, computed_layers(model))
        return result

    def _warn_of_computed(self, model: nn.Module, selected: set[nn.Parameter], layers: Iterable[str]) -> None:
        """Warn, once, of layers with selected parameters that are left out because their weights are computed."""
        computed = [name for name in layers if selected.intersection(model.get_submodule(name).parameters())]
        if computed and self.warns:
            warnings.warn(
                f"{self.name} leaves out {computed}, whose weights are computed from other tensors, such as by a "
                "parametrization or a pruning mask",
                stacklevel=3,
            )
        self._has_named_computed_layers = True

    def duplicate(self) -> Self:
        """Return a new intervention with the same arguments and a copy of the stored state, for a copy of the model.

        It rests where the original does, without a warning.
        """
        names = inspect.signature(type(self)).parameters
        result = type(self)(**{name: getattr(self, name) for name in names})
        result.load_state_dict(copy.deepcopy(self.state_dict()))
        result.warns = False
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the stored state as plain Python and tensors, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of :meth:`state_dict`."""

    def rest_without(
        self, targets: Collection[object], model: nn.Module, context: InterventionContext | None = None
    ) -> None:
        """Rest if there is nothing to act on.

        Args:
            targets: What it acts on.
            model: The model.
            context: As for :meth:`selected_parameters`.

        Warns:
            PlasticityWarning: On rank 0, once, if there are no targets.
        """
        if targets:
            self.rests_because = None
        # Finding the reasons takes time, and this may be called at every step.
        elif self.rests_because is None:
            self._rest(model, self._reasons(model, context))

    def _rest(self, model: nn.Module, skipped: Mapping[str, str]) -> None:
        """Warn that there is nothing to act on, unless that was the last warning.

        Args:
            model: The model.
            skipped: Why layers are left out, by name of the layer.

        Warns:
            PlasticityWarning: On rank 0.
        """
        layers: dict[str, list[str]] = {}
        for layer, reason in skipped.items():
            layers.setdefault(reason, []).append(layer or "(model)")
        reasons = "; ".join(f"{listed(names)}: {reason}" for reason, names in layers.items())
        self._warn_once(
            f"{self.name} rests, since {type(model).__name__} has nothing that it acts on: "
            f"{reasons or 'it has no parameters'}"
        )

    def _warn_once(self, reason: str) -> None:
        """Store why it rests and warn of it, unless that was the last warning."""
        if reason != self.rests_because and self.warns:
            rank_zero_warn(reason, stacklevel=5)
        self.rests_because = reason

    def _reasons(self, model: nn.Module, context: InterventionContext | None) -> dict[str, str]:
        """Return why it does not act on the layers of a model, by name of the layer."""
        trained, selected = self._trained_names(model, context), self.selected_parameters(model, context)
        chosen = set(selected.values())
        reasons: dict[str, str] = {}
        for path, module in model.named_modules():
            # Parametrizations belong to their layer.
            own = dict(module.named_parameters(path, recurse=is_parametrized(module)))
            if not own or ".parametrizations." in f".{path}.":
                continue
            if not any(parameter.requires_grad for parameter in own.values()):
                reasons[path] = "frozen"
            elif trained is not None and own.keys().isdisjoint(trained):
                reasons[path] = "no optimizer trains it"
            elif chosen.isdisjoint(own.values()):
                reasons[path] = "left out by include= or exclude="
            elif not self.acts_on_computed and is_computed(module):
                reasons[path] = "its weight is computed from other tensors"
            else:
                reasons[path] = f"{type(module).__name__} without a trained {self.acts_on}"
        return reasons


class ParametersOf:
    """The parameters of a model: equal while the same objects have the same names and the same ones are frozen.

    A parametrization or a pruning mask that is added to a layer renames its parameter and keeps the object.

    Args:
        model: The model.
        trained: Names of those that optimizers hold, as found at the start: each start finds them anew.
    """

    def __init__(self, model: nn.Module, trained: Collection[str] | None) -> None:
        self.trained = trained
        self._parameters = dict(model.named_parameters())
        self.key = [(name, id(parameter), parameter.requires_grad) for name, parameter in self._parameters.items()]

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParametersOf) and self.trained is other.trained and self.key == other.key

    __hash__ = None  # type: ignore[assignment]


class Repair(Intervention, ABC):
    """An intervention that changes the weights at once. Subclasses implement :meth:`plan`.

    Args:
        when: When the callback runs it: ``"collapse"``, when a collapse is detected; ``"task"``, at the start of every
            task but the first; or a number ``n``, every ``n`` optimizer steps. Without effect on :meth:`repair`.
        include: As for every intervention.
        exclude: As for every intervention.
        also: Modules that follow others: ``{"target": "online"}`` copies the parameters and buffers of the module
            ``online`` to the module ``target`` after a repair. Copies that no optimizer trains stay as they are
            otherwise.

    Raises:
        ValueError: If ``when`` has another value, or one that this repair does not support.
    """

    occasions: ClassVar[tuple[str, ...]] = ("collapse", "task", "steps")
    """The kinds of ``when`` that this repair supports; ``"steps"`` stands for a number."""

    also: Mapping[str, str] | None = None

    def __init__(
        self,
        when: When = "collapse",
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        also: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(include, exclude)
        if also is not None and not (isinstance(also, Mapping) and is_str_list([*also, *also.values()], at_least=0)):
            raise ValueError(f"{self.name}(also={also!r}) must be a dict, such as {{'target': 'online'}}, or None")
        self.also = None if also is None else dict(also)
        if is_int(when):
            supported = "steps" in self.occasions and when > 0
        else:
            supported = when in self.occasions and when != "steps"
        if not supported:
            number = "a number of optimizer steps, at least 1"
            choices = [number if occasion == "steps" else repr(occasion) for occasion in self.occasions]
            raise ValueError(f"{self.name}(when={when!r}) must be {' or '.join(choices)}")
        self.when = when

    def repair(
        self,
        model: nn.Module,
        *,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        forward: Forward | None = None,
        loss: Loss | Sequence[Loss] | None = None,
        generator: torch.Generator | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> RepairReport:
        """Change the model in place, completely or not at all, and reset the optimizer state of re-initialised weights.

        Call it between an optimizer step and the next backward pass: gradients are left as they are.

        Args:
            model: The model to repair. Its parameters stay the same objects.
            optimizers: The optimizers that hold its parameters.
            forward: Runs one representative forward pass and returns the outputs, for repairs that need activations.
            loss: Returns a loss with a graph, for repairs that need gradients; or a list, one for each mini-batch, for
                repairs that process mini-batches one by one. Others take the mean.
            generator: Source of the random numbers (a CPU generator); by default one seeded from torch's global one.
            make_copy: Makes a copy of the model to run ``forward`` and ``loss`` on, where running the model itself
                would have side effects, such as on counters or logged values. By default the model is run.
            initial: The initial weights of the model by name, for repairs that draw fresh values. Arguments of the
                constructor and the weights at :meth:`start` come first; without any, ``reset_parameters`` draws.

        Returns:
            The units and the number of parameters that changed, and the layers that were left out.

        Warns:
            PlasticityWarning: Once, if the model has nothing that the repair acts on.
        """
        losses = [loss] if callable(loss) else list(loss or ())
        model_to_run = model if make_copy is None else make_copy()
        trained = trained_names(model, optimizers)
        context = InterventionContext(
            optimizers, forward, losses, generator=generator, initial=initial, trained=trained
        )
        update = self.plan(model_to_run, context)
        if update.has_no_target:
            self._rest(model, update.skipped or self._reasons(model, context))
        else:
            self.rests_because = None
        if model_to_run is not model:
            update = update.transfer(source=model_to_run, target=model)
        for follower, leader in (self.also or {}).items():
            modules = [find_module(self.name, "also", name, model) for name in (follower, leader)]
            update = update.followed_by(*modules)
        return apply_update(self.name, update, optimizers)

    @abstractmethod
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        """Return the new weights; change nothing.

        Args:
            model: The model, or a copy of it. It may be run: side effects are discarded where they matter.
            context: Everything else.
        """


class StepIntervention(Intervention, ABC):
    """An intervention that acts after every optimizer step. Subclasses implement :meth:`step`.

    In a plain loop::

        intervention.start(model, forward=lambda model: model(inputs))
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
            intervention.after_step(model, optimizers=[optimizer], forward=lambda model: model(inputs))
        intervention.stop()
    """

    runs_model: ClassVar[bool] = True
    """Whether :meth:`step` calls ``forward`` or ``make_copy``; the callback protects learning rates and schedulers from
    what a model does when it is run."""

    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> RepairReport | None:
        """Act after an optimizer step, unless the step was skipped, as by a gradient scaler.

        Args:
            model: The model that was trained.
            optimizers: The optimizers that hold its parameters.
            forward: Runs the model on the batch of the step, for interventions that need more of it than hooks record.
            make_copy: As in :meth:`Repair.repair`.

        Returns:
            The units that were re-initialised; ``None`` if there were none.

        Raises:
            RuntimeError: If :meth:`start` was not called, where it is needed.
        """
        return self.step(model, InterventionContext(optimizers, forward, make_copy=make_copy))

    @abstractmethod
    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        """Implement :meth:`after_step`."""

    def _require_start(self, needed: Iterable[str], stored: Container[str]) -> None:
        missing = [name for name in needed if name not in stored]
        if missing:
            raise RuntimeError(
                f"{self.name} has no stored state of {missing}: call start(model) before the first training step, and "
                "again when the model has changed"
            )


class Regularizer(Intervention, ABC):
    """A term that is added to the loss. Subclasses implement :meth:`penalty`.

    In a plain loop::

        regularizer.start(model)
        for inputs, targets in batches:
            (loss_fn(model(inputs), targets) + regularizer.penalty(model)).backward()

    or, at less cost, ``regularizer.add_gradients(model)`` after the backward pass of the loss.

    A decoupled term goes past the optimizer and its moments, as the weight decay of AdamW does. In a plain loop::

            loss_fn(model(inputs), targets).backward()
            regularizer.descend(model, [optimizer])
            optimizer.step()

    Args:
        coefficient: Factor of the term.
        decoupled: Whether the callback subtracts the gradient of the term, times the learning rate, from the weights,
            instead of adding it to the gradient of the loss.

    Raises:
        ValueError: If ``coefficient`` is negative or not finite, or ``decoupled`` is no truth value.
    """

    decoupled: bool = False

    # The weights by layer, and the parameters that they were found for.
    _known_matrices: tuple[ParametersOf, dict[str, LayerWeights]] | None = None

    def __init__(
        self,
        coefficient: float,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        decoupled: bool = False,
    ) -> None:
        super().__init__(include, exclude)
        check_number("[0, inf)", self.name, coefficient=coefficient)
        check_choice((True, False), self.name, decoupled=decoupled)
        self.coefficient = coefficient
        self.decoupled = decoupled

    @abstractmethod
    def penalty(self, model: nn.Module) -> Tensor:
        """Compute the term, coefficient included: a scalar with a graph, or zero where it has nothing to act on."""

    @override
    def stop(self) -> None:
        super().stop()
        self._known_matrices = None

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the model's parameters from copies."""
        return {**vars(self), "_known_matrices": None}

    def weight_matrices(self, model: nn.Module) -> dict[str, LayerWeights]:
        """Return the weights of the layers with parameters among :meth:`selected_parameters`, as matrices by layer.

        Warns:
            UserWarning: If layers are left out because a hook that is not of torch computes their weights; once.
        """
        parameters = ParametersOf(model, self._trained)
        if self._known_matrices is not None and self._known_matrices[0] == parameters:
            return self._known_matrices[1]
        selected = set(self.selected_parameters(model).values())
        result = weight_matrices(model, selected)
        # Weights that are computed from other tensors are new each time.
        tensors = [tensor for layer in result.values() for tensor in layer.tensors]
        is_known = all(isinstance(tensor, nn.Parameter) for tensor in tensors)
        self._known_matrices = (parameters, result) if is_known else None
        if result and not self._has_named_computed_layers:
            self._warn_of_computed(model, selected, opaque_layers(model))
        return result

    def total(self, terms: Sequence[Tensor], model: nn.Module) -> Tensor:
        """Add up the parts of the term, and multiply by the coefficient; without any, rest and return zero.

        Args:
            terms: Scalars with a graph, on any devices.
            model: The model.

        Warns:
            PlasticityWarning: Once, if there are no terms.
        """
        self.rest_without(terms, model)
        if not terms:
            return torch.zeros(())
        return self.coefficient * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def descend(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        r"""Take a step down the gradient of the term, past the optimizers: ``θ ← θ - η ∇R(θ)``.

        Call it between the backward pass and the optimizer's step, so that both gradients are at the same weights.

        Args:
            model: The model.
            optimizers: The optimizers: :math:`\eta` is the learning rate of the group of each parameter. Parameters
                that none of them holds stay as they are.

        Raises:
            ValueError: If a gradient is not finite; nothing is changed then.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        parameters = [p for p in model.parameters() if p.requires_grad and p in rates]
        gradients = sum_terms(differentiate_penalty(self, model, parameters).terms, len(parameters))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rates[parameter] * gradient)

    def closed_form(self, model: nn.Module, *, with_value: bool) -> ClosedForm | None:
        """Return the gradient of the penalty by a formula that is cheaper than autograd; ``None`` if there is none.

        The callback uses it in place of :meth:`penalty`, once before every optimizer step; not that of a base class,
        whose penalty may be another one.

        Args:
            model: The model.
            with_value: Whether the value of the penalty is needed, too.
        """
        return None

    def add_gradients(self, model: nn.Module) -> None:
        """Add the gradient of the penalty to ``.grad`` of the parameters, as if it had been a term of the loss.

        Call it between the backward pass and the optimizer step, in place of ``loss + penalty(model)``. It saves time
        where the gradient has a :meth:`closed_form`.

        Args:
            model: The model.

        Raises:
            ValueError: If a gradient is not finite; a :meth:`closed_form` may leave that unchecked, as that of
                ``L2Init`` does, whose gradient is finite where the parameters are.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        accumulate(parameters, differentiate_penalty(self, model, parameters).terms, 1.0)
