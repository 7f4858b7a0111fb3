"""Keeping the effective rank of the features high, by steps of its own beside the optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import as_float
from lightning_plasticity.distributed.agreement import all_reduce_mean
from lightning_plasticity.functional.layouts import finite
from lightning_plasticity.functional.ranks import entropy_rank
from lightning_plasticity.interventions.base import Regularizer, StepIntervention
from lightning_plasticity.interventions.weights.matrices import at_least_float32
from lightning_plasticity.isolation.state import probe_mode

Forward = Callable[[nn.Module], object]


class EffectiveRankRegularizer(StepIntervention):
    r"""Raises the effective rank of the hidden layers' features by a gradient step of its own every so many samples.

    .. math:: \theta \leftarrow \theta + \eta\,\nabla_\theta \frac{1}{L} \sum_\ell
        \exp\Big(-\sum_i p_{\ell i} \log p_{\ell i}\Big), \qquad
        p_{\ell i} = \frac{\sigma_i(F_\ell)}{\sum_j \sigma_j(F_\ell)}

    :math:`F_\ell`, ``(N, d)``, are the outputs of the activation functions that feed another layer, not centred, for
    the inputs of all minibatches since the last such step, taken with the weights of now and in evaluation mode. Every
    position of a convolution and every token is a row. The step is plain gradient ascent after the optimizer's own:
    momentum and second moments never see it, and ``.grad`` is left alone.

    A rank cannot exceed ``min(N, d)``: with fewer samples than units it is the samples that are spread. Singular values
    that are zero up to rounding (1e-7 of the largest for 1000 units) get no gradient, for there it is infinite; nor do
    dead ReLU units, so that this does not revive them. The gradient grows as :math:`1 / \lVert F_\ell \rVert`: its norm
    over all parameters is clipped. Where features are zero throughout, or the gradient is not finite, nothing is done.
    In the paper this alone does about nothing, and much together with L2: see :class:`L2ER`.

    With several processes each one looks at its own minibatches, and the gradients are averaged. Minibatches that
    wait for the next step are kept in memory, by the functions that run them: ``lambda model: model(inputs)`` in a loop
    keeps the inputs of its turn, which must not be changed in place. They are not in the state: after a checkpoint is
    loaded, the count begins anew.

    Args:
        learning_rate: :math:`\eta`, the size of the steps that raise the rank.
        every_n_samples: Number of samples a process sees between two steps, rounded up to whole minibatches. How many a
            minibatch holds is told by one extra forward pass at the beginning, and from then on by the last step.
        max_norm: Largest norm of the gradient: a guard. That of some new networks with ReLU and tanh was 8 to 400, and
            up to 3000 with weights ten times smaller.

    Raises:
        ValueError: If an argument is out of range; at the step, if ``forward`` is not given, the model has no hidden
            features, or they are not finite.

    References:
        "Spectral Collapse Drives Loss of Plasticity in Deep Continual Learning", arXiv 2509.22335. Roy and Vetterli
        2007, "The effective rank".

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x, regularizer = torch.randn(16, 4), EffectiveRankRegularizer(learning_rate=0.1, every_n_samples=32)
        >>> before = regularizer.penalty(model, lambda model: model(x), coefficient=1)
        >>> for _ in range(4):  # two steps, each on two minibatches
        ...     regularizer.after_step(model, forward=lambda model: model(x))
        >>> bool(regularizer.penalty(model, lambda model: model(x), coefficient=1) < before)
        True
    """

    def __init__(self, learning_rate: float = 1e-3, every_n_samples: int = 500, max_norm: float = 1000) -> None:
        if not 0 <= as_float(learning_rate) < float("inf"):
            raise ValueError(f"{self.name}(learning_rate={learning_rate!r}) must be a finite number, at least 0")
        self._check_count(every_n_samples=every_n_samples)
        if not as_float(max_norm) > 0:
            raise ValueError(f"{self.name}(max_norm={max_norm!r}) must be positive; float('inf') never clips")
        self.learning_rate = learning_rate
        self.every_n_samples = every_n_samples
        self.max_norm = max_norm
        self._waiting: list[Forward] = []
        self._samples_per_batch: float | None = None

    @override
    def start(
        self,
        model: nn.Module,
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Sees whether there are features, and how many samples a minibatch holds, if it can run the model."""
        if forward is not None and self._samples_per_batch is None:
            stage = model if make_copy is None else make_copy()
            with probe_mode(stage), torch.no_grad():
                self._count(stage, [forward])

    @override
    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Takes note of the minibatch, and takes the step when there are enough."""
        if forward is None:
            raise ValueError(
                f"{self.name} needs to see the model run: after_step(model, forward=lambda model: model(inputs))"
            )
        self.start(model, forward=forward, make_copy=make_copy)
        assert self._samples_per_batch is not None
        self._waiting.append(_bind_closure(forward))
        if len(self._waiting) * self._samples_per_batch >= self.every_n_samples:
            self._step(model, model if make_copy is None else make_copy())

    @override
    def stop(self) -> None:
        """Lets go of the minibatches that wait."""
        self._waiting = []

    def penalty(self, model: nn.Module, forward: Forward, coefficient: float = 1e-3) -> Tensor:
        """The same as a term of the loss, for loops that want the optimizer to take the step.

        Args:
            model: The model.
            forward: Runs it. It is run in evaluation mode and leaves no trace.
            coefficient: Factor of the mean effective rank.

        Returns:
            The mean effective rank of the hidden layers times ``-coefficient``, a scalar with a graph.
        """
        with probe_mode(model):
            return -coefficient * _mean_rank(_features(model, [forward])[0])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples_per_batch": self._samples_per_batch}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._samples_per_batch = state["samples_per_batch"]
        self._waiting = []

    def _step(self, model: nn.Module, stage: nn.Module) -> None:
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        twins = dict(stage.named_parameters())
        waiting, self._waiting = self._waiting, []  # also if it fails: a broken minibatch must not come again
        with probe_mode(stage):
            rank = _mean_rank(self._count(stage, waiting))
            if not rank.requires_grad:  # whatever leads to the features is frozen
                return
            found = torch.autograd.grad(rank, [twins[name] for name in parameters], materialize_grads=True)
        gradients = [all_reduce_mean(gradient) for gradient in found]
        norm = sum(gradient.double().square().sum().item() for gradient in gradients) ** 0.5
        if 0 < norm < float("inf"):
            size = self.learning_rate * min(1.0, self.max_norm / norm)
            with torch.no_grad():
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter.add_(gradient.to(parameter.device), alpha=size)

    def _count(self, stage: nn.Module, forwards: Sequence[Forward]) -> dict[str, Tensor]:
        """The features; takes note of the number of samples, the same number in all processes."""
        features, samples = _features(stage, forwards)
        per_batch = torch.tensor(samples / len(forwards), device=next(iter(features.values())).device)
        self._samples_per_batch = all_reduce_mean(per_batch).item()
        return features


class L2ER(StepIntervention, Regularizer):
    r"""L2-ER: steps that raise the effective rank of the features, and an L2 penalty in the loss.

    .. math:: \text{in the loss: } \frac{w}{2} \lVert \theta \rVert^2, \qquad
        \text{every so many samples: } \theta \leftarrow \theta + \eta\,\nabla_\theta \operatorname{mean}_\ell
        \operatorname{erank}(F_\ell)

    The penalty is over all trainable parameters, biases and norm layers too, and goes through the optimizer (coupled,
    as ``weight_decay`` of ``torch.optim.Adam``, not as AdamW's): set the optimizer's own ``weight_decay`` to zero. The
    steps are those of :class:`EffectiveRankRegularizer`. In a plain loop, both :meth:`penalty` and :meth:`after_step`
    are called.

    Args:
        learning_rate: :math:`\eta`, the size of the steps that raise the rank.
        weight_decay: :math:`w`, the factor of the L2 penalty.
        every_n_samples: Number of samples a process sees between two such steps, rounded up to whole minibatches.
        max_norm: Largest norm of their gradient: a guard.

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
    ) -> None:
        if not 0 <= as_float(weight_decay) < float("inf"):
            raise ValueError(f"{self.name}(weight_decay={weight_decay!r}) must be a finite number, at least 0")
        super().__init__(weight_decay)
        self.rank_regularizer = _NamedRankRegularizer(learning_rate, every_n_samples, max_norm)

    @override
    def penalty(self, model: nn.Module) -> Tensor:
        terms = [
            at_least_float32(parameter).square().sum() for parameter in model.parameters() if parameter.requires_grad
        ]
        if not terms:
            raise ValueError(f"{self.name}: {type(model).__name__} has no trainable parameter to regularize")
        return 0.5 * self.coefficient * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @override
    def start(
        self,
        model: nn.Module,
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.rank_regularizer.start(model, forward=forward, make_copy=make_copy)

    @override
    def after_step(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        forward: Forward | None = None,
        make_copy: Callable[[], nn.Module] | None = None,
    ) -> None:
        """As :meth:`EffectiveRankRegularizer.after_step`."""
        self.rank_regularizer.after_step(model, optimizers, forward=forward, make_copy=make_copy)

    @override
    def stop(self) -> None:
        self.rank_regularizer.stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.rank_regularizer.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank_regularizer.load_state_dict(state)


class _NamedRankRegularizer(EffectiveRankRegularizer):
    """Speaks in the name of the whole."""

    name = "L2ER"


def _bind_closure(forward: Forward) -> Forward:
    """The function with the variables it uses as they are now: it is called when a loop has gone on to other inputs."""
    if not isinstance(forward, FunctionType):
        return forward
    cells = tuple(_copied(cell) for cell in forward.__closure__ or ())
    bound = FunctionType(forward.__code__, {**forward.__globals__}, forward.__name__, forward.__defaults__, cells)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return bound


def _copied(cell: CellType) -> CellType:
    try:
        return CellType(cell.cell_contents)
    except ValueError:  # not assigned yet
        return cell


def _features(model: nn.Module, forwards: Sequence[Forward]) -> tuple[dict[str, Tensor], int]:
    """Feature matrices of all forward passes together, and how many samples these were."""
    from lightning_plasticity.activations.features import hidden_features  # imports torchmetrics

    found: dict[str, list[Tensor]] = {}
    total = 0
    for forward in forwards:
        features, samples = hidden_features(model, forward)
        total += samples
        for name, rows in features.items():
            found.setdefault(name, []).extend(rows)
    return {name: torch.cat(rows) for name, rows in found.items()}, total


def _mean_rank(features: dict[str, Tensor]) -> Tensor:
    ranks = [_effective_rank(finite(rows, f"features of {name!r}")) for name, rows in features.items()]
    return torch.stack([rank.to(ranks[0].device) for rank in ranks]).mean()


def _effective_rank(features: Tensor) -> Tensor:
    """Of the matrix ``(N, d)``, with a gradient that is finite everywhere, from the smaller Gram matrix."""
    rows = features.double()
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    squares: Tensor = torch.linalg.eigvalsh(gram)
    floor = 4 * len(gram) ** 0.5 * torch.finfo(gram.dtype).eps * squares.detach().max()
    return entropy_rank(squares[squares > floor.clamp(min=0)].sqrt())
