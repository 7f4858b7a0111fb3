"""Raise the effective rank of the features, by gradient ascent steps between the optimizer's steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.functional.layouts import finite
from lightning_plasticity.functional.ranks import entropy_rank
from lightning_plasticity.interventions.base import Intervention, InterventionContext, Regularizer, StepIntervention
from lightning_plasticity.interventions.closures import bind_closure
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.units.groups import Forward
from lightning_plasticity.interventions.weights.matrices import at_least_float32
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.isolation.weights import untrained_copies


class EffectiveRankRegularizer(StepIntervention):
    r"""Raise the effective rank of the hidden layers' features by a separate gradient step every so many samples.

    .. math:: \theta \leftarrow \theta + \eta\,\nabla_\theta \frac{1}{L} \sum_\ell
        \exp\Big(-\sum_i p_{\ell i} \log p_{\ell i}\Big), \qquad
        p_{\ell i} = \frac{\sigma_i(F_\ell)}{\sum_j \sigma_j(F_\ell)}

    In spite of its name it is a :class:`StepIntervention`, not a :class:`Regularizer`: it adds nothing to the loss.
    :meth:`rank_penalty` is the same objective as a term of the loss, for plain loops.

    :math:`F_\ell`, ``(N, d)``, are the outputs of the activation functions that feed another layer, not centred, for
    the inputs of all minibatches since the last such step, computed with the current weights in evaluation mode. Every
    position of a convolution and every token is a row. Target networks, which no optimizer trains, do not count. The
    step is plain gradient ascent after the optimizer's own: it enters neither momentum nor second moments, and
    ``.grad`` is not touched.

    A rank cannot exceed ``min(N, d)``: with fewer samples than units, the step spreads the samples. Singular values
    that are zero up to rounding (1e-7 of the largest for 1000 units) get no gradient, since it is infinite there; nor
    do dead ReLU units, so that the step does not revive them. The gradient grows as :math:`1 / \lVert F_\ell \rVert`:
    its norm over all parameters is clipped. Where all features are zero, or the gradient is not finite, nothing is
    changed. In the paper this has little effect alone, and a large one together with L2: see :class:`L2ER`.

    With several processes each one uses its own minibatches, and the gradients are averaged. Minibatches are kept in
    memory until the next step, by the functions that run them: ``lambda model: model(inputs)`` in a loop keeps the
    inputs of its iteration, which must not be changed in place. They are not in the state: after a checkpoint is
    loaded, the count starts again.

    Args:
        learning_rate: :math:`\eta`, the size of the steps that raise the rank.
        every_n_samples: Number of samples per process between two steps, rounded up to whole minibatches. The size of a
            minibatch is measured by one extra forward pass at the start, and from then on at each step.
        max_norm: Largest norm of the gradient, as a safeguard. That of some new networks with ReLU and tanh was 8 to
            400, and up to 3000 with weights ten times smaller.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If an argument is out of range; at the step, if ``forward`` is not given, or the hidden features
            are not finite.

    Warns:
        PlasticityWarning: Once, if the model has no hidden features that depend on its parameters; it rests then.

    References:
        "Spectral Collapse Drives Loss of Plasticity in Deep Continual Learning", arXiv 2509.22335. Roy and Vetterli
        2007, "The effective rank".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, regularizer = torch.randn(16, 4), EffectiveRankRegularizer(learning_rate=0.1, every_n_samples=32)
        >>> before = regularizer.rank_penalty(model, lambda model: model(x), coefficient=1)
        >>> for _ in range(4):  # two steps, each on two minibatches
        ...     regularizer.after_step(model, forward=lambda model: model(x))
        >>> bool(regularizer.rank_penalty(model, lambda model: model(x), coefficient=1) < before)
        True
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        every_n_samples: int = 500,
        max_norm: float = 1000,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        Intervention.__init__(self, include, exclude)
        check_number("[0, inf)", self.name, learning_rate=learning_rate)
        check_positive_ints(self.name, every_n_samples=every_n_samples)
        check_number("(0, inf]", self.name, "float('inf') never clips", max_norm=max_norm)
        self.learning_rate = learning_rate
        self.every_n_samples = every_n_samples
        self.max_norm = max_norm
        self._pending: list[Forward] = []
        self._samples_per_batch: float | None = None

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        """Measure the size of a minibatch, and rest if no features can be changed, if the model can be run."""
        # Importing this at the top would load torchmetrics with `import lightning_plasticity.interventions`.
        from lightning_plasticity.activations.features import NoFeaturesError

        if context.forward is None:
            return
        names, model_to_run = self.selected_parameters(model, context), context.model_to_run(model)
        known = self._samples_per_batch
        try:
            with probe_mode(model_to_run), torch.enable_grad():
                features = self._count_samples(model_to_run, [context.forward], self._left_out(model, context))
                parameters = [p for name, p in model_to_run.named_parameters() if name in names]
                depend = _depend(list(features.values()), parameters)
        except NoFeaturesError as error:
            self._rest_without_features(model, str(error))
            return
        if known is not None:
            self._samples_per_batch = known
        if depend:
            self.rests_because = None
        elif names:
            self._rest_without_features(model, "its hidden features depend on no parameter that it may change")
        else:
            self.rest_without(names, model, context)

    @override
    def step(self, model: nn.Module, context: InterventionContext) -> None:
        """Keep the minibatch, and take the ascent step when there are enough samples."""
        forward = context.require_forward(self.name, "after_step")
        if self._samples_per_batch is None and self.rests_because is None:
            self.prepare(model, context)
        if self.rests_because is not None:
            return
        assert self._samples_per_batch is not None
        self._pending.append(bind_closure(forward))
        if len(self._pending) * self._samples_per_batch >= self.every_n_samples:
            self._ascend(model, context.model_to_run(model), context)

    @override
    def stop(self) -> None:
        """Discard the pending minibatches."""
        self._pending = []

    def rank_penalty(self, model: nn.Module, forward: Forward, coefficient: float = 1e-3) -> Tensor:
        """Compute the negative effective rank as a term of the loss, for loops whose optimizer takes the step.

        Args:
            model: The model.
            forward: Runs the model, in evaluation mode and without side effects on its state.
            coefficient: Factor of the mean effective rank.

        Returns:
            The mean effective rank of the hidden layers times ``-coefficient``, a scalar with a graph.
        """
        with probe_mode(model):
            return -coefficient * _mean_rank(_features(model, [forward], self._left_out(model, None))[0])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples_per_batch": self._samples_per_batch}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples_per_batch = state["samples_per_batch"]
        self._pending = []

    def _rest_without_features(self, model: nn.Module, reason: str) -> None:
        self._rest(model, {"": reason})

    def _ascend(self, model: nn.Module, model_to_run: nn.Module, context: InterventionContext) -> None:
        parameters = self.selected_parameters(model, context)
        parameters_to_run = dict(model_to_run.named_parameters())
        # Discard the pending minibatches first, so that one that fails does not fail again at the next step.
        pending, self._pending = self._pending, []
        with probe_mode(model_to_run):
            rank = _mean_rank(self._count_samples(model_to_run, pending, self._left_out(model, context)))
            # All parameters before the features are frozen.
            if not rank.requires_grad:
                return
            inputs = [parameters_to_run[name] for name in parameters]
            local_gradients = torch.autograd.grad(rank, inputs, materialize_grads=True)
        gradients = [all_reduce_mean(gradient) for gradient in local_gradients]
        norm = sum(gradient.double().square().sum().item() for gradient in gradients) ** 0.5
        if 0 < norm < float("inf"):
            step_size = self.learning_rate * min(1.0, self.max_norm / norm)
            with torch.no_grad():
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter.add_(gradient.to(parameter.device), alpha=step_size)

    def _left_out(self, model: nn.Module, context: InterventionContext | None) -> list[str]:
        """Return the networks that no optimizer trains, such as target networks: their features do not count."""
        trained = self._trained_names(model, context)
        return [] if trained is None else untrained_copies(model, trained)

    def _count_samples(
        self, model: nn.Module, forwards: Sequence[Forward], left_out: Collection[str]
    ) -> dict[str, Tensor]:
        """Compute the features, and store the number of samples per minibatch, averaged over all processes."""
        features, samples = _features(model, forwards, left_out)
        per_batch = torch.tensor(samples / len(forwards), device=next(iter(features.values())).device)
        self._samples_per_batch = all_reduce_mean(per_batch).item()
        return features


class L2ER(EffectiveRankRegularizer, Regularizer):
    r"""L2-ER: ascent steps on the effective rank of the features, and an L2 penalty in the loss.

    .. math:: \text{in the loss: } \frac{w}{2} \lVert \theta \rVert^2, \qquad
        \text{every so many samples: } \theta \leftarrow \theta + \eta\,\nabla_\theta \operatorname{mean}_\ell
        \operatorname{erank}(F_\ell)

    The penalty is over all trainable parameters, including biases and norm layers, and goes through the optimizer
    (coupled, as ``weight_decay`` of ``torch.optim.Adam``, not as AdamW's): set the optimizer's own ``weight_decay`` to
    zero. The steps are those of :class:`EffectiveRankRegularizer`. In a plain loop, call both :meth:`penalty` and
    :meth:`after_step`.

    Args:
        learning_rate: :math:`\eta`, the size of the steps that raise the rank.
        weight_decay: :math:`w`, the factor of the L2 penalty.
        every_n_samples: Number of samples per process between two such steps, rounded up to whole minibatches.
        max_norm: Largest norm of their gradient, as a safeguard.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If an argument is out of range.

    References:
        "Spectral Collapse Drives Loss of Plasticity in Deep Continual Learning", arXiv 2509.22335.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1)
        ...     _ = model.bias.fill_(1)
        >>> round(L2ER(weight_decay=0.5).penalty(model).item(), 6)  # 0.5 / 2 · 8
        2.0
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
        every_n_samples: int = 500,
        max_norm: float = 1000,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        check_number("[0, inf)", self.name, weight_decay=weight_decay)
        EffectiveRankRegularizer.__init__(self, learning_rate, every_n_samples, max_norm)
        Regularizer.__init__(self, weight_decay, include=include, exclude=exclude)

    @property
    def weight_decay(self) -> float:
        """Factor of the L2 penalty."""
        return self.coefficient

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        """Compute the L2 term, coefficient included: a scalar with a graph."""
        terms = [at_least_float32(parameter).square().sum() for parameter in self.selected_parameters(model).values()]
        return 0.5 * self.total(terms, model)

    @override
    def rest_without(
        self, targets: Collection[object], model: nn.Module, context: InterventionContext | None = None
    ) -> None:
        # Parameters to penalize do not mean that there are features to raise.
        if not targets:
            super().rest_without(targets, model, context)

    @override
    def _rest_without_features(self, model: nn.Module, reason: str) -> None:
        self._warn_once(f"{self.name} adds its L2 penalty alone to {type(model).__name__}: {reason}")


def _features(
    model: nn.Module, forwards: Sequence[Forward], left_out: Collection[str]
) -> tuple[dict[str, Tensor], int]:
    """Return the feature matrices of all forward passes together, and the number of samples."""
    # This imports torchmetrics, which `import lightning_plasticity.interventions` must not load.
    from lightning_plasticity.activations.features import hidden_features

    rows_by_layer: dict[str, list[Tensor]] = {}
    num_samples = 0
    for forward in forwards:
        features, samples = hidden_features(model, forward, left_out)
        num_samples += samples
        for name, rows in features.items():
            rows_by_layer.setdefault(name, []).extend(rows)
    return {name: torch.cat(rows) for name, rows in rows_by_layer.items()}, num_samples


def _depend(features: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Return whether some features have a gradient by some parameters."""
    with_graph = [rows.sum() for rows in features if rows.requires_grad]
    if not with_graph or not parameters:
        return False
    total = torch.stack([term.to(with_graph[0].device) for term in with_graph]).sum()
    return any(gradient is not None for gradient in torch.autograd.grad(total, parameters, allow_unused=True))


def _mean_rank(features: dict[str, Tensor]) -> Tensor:
    ranks = [_effective_rank(finite(rows, f"features of {name!r}")) for name, rows in features.items()]
    return torch.stack([rank.to(ranks[0].device) for rank in ranks]).mean()


def _effective_rank(features: Tensor) -> Tensor:
    """Compute the effective rank of a matrix ``(N, d)`` from the smaller Gram matrix, with a finite gradient."""
    rows = features.double()
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    rounding_error = 4 * len(gram) ** 0.5 * torch.finfo(gram.dtype).eps * eigenvalues.detach().max()
    return entropy_rank(eigenvalues[eigenvalues > rounding_error.clamp(min=0)].sqrt())
