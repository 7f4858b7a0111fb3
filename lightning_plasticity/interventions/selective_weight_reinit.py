"""Selective weight reinitialization: re-initialise single weights of the least utility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_choice, check_number, check_positive_ints, check_seed
from lightning_plasticity.interventions.base import InterventionContext, StepIntervention
from lightning_plasticity.interventions.remembered_weights import RemembersInitialWeights
from lightning_plasticity.interventions.selection import Patterns
from lightning_plasticity.interventions.weights.initial_distribution import constants, fresh_values
from lightning_plasticity.interventions.weights.initialization import PicklableGenerator
from lightning_plasticity.interventions.weights.matrices import at_least_float32
from lightning_plasticity.interventions.weights.optimizer_hooks import OptimizerHooks
from lightning_plasticity.interventions.weights.updates import RepairReport, SparseUpdate, WeightUpdate, apply_update


class SelectiveWeightReinit(RemembersInitialWeights, StepIntervention):
    r"""Re-initialise single weights of the least utility, in each tensor by itself, every so many steps.

    .. math:: u_i = |g_i\,\theta_i| \ \text{or} \ |\theta_i|, \qquad \text{re-initialised where} \
        u_i \le k\,\mathrm{mean}_j\,u_j \ \text{or} \ u_i \ \text{is among the smallest share} \ k

    :math:`g` is the gradient of the step (accumulated and clipped), :math:`\theta` the weights after it. It acts on all
    trained parameters, also on biases and norm layers. New weights are drawn from the initial entries of the same
    tensor; entries that did not start at random, and those of norm layers, get their initial value. The optimizer state
    of exactly these entries is reset. Tensors without a gradient, or with utilities that are not finite, stay as they
    are.

    Weights that no sample reaches, such as those of dead units and of constant inputs, have a utility of zero, so that
    a small ``factor`` re-initialises those alone. A share may be no whole number of weights: its fraction is the
    probability of one more. Which weights of equal utility are chosen is random.

    Differences to the authors' public code: there the optimizer state stays, of weights of equal utility the same ones
    may be chosen each time, and new weights are drawn by formulas for the networks of the paper. It can also average
    utilities over steps, which its experiments do not. The text of the paper beyond its abstract was not at hand: rule
    and defaults are those of the public code and of its final runs (with ``pruning="proportional"``: a factor of 0.4
    every 4096 steps).

    Args:
        factor: :math:`k`, in (0, 1] where it is a share.
        every_n_steps: Number of optimizer steps from one re-initialisation to the next.
        pruning: ``"threshold"``: weights up to the share :math:`k` of the mean utility of the tensor;
            ``"proportional"``: the share :math:`k` of the weights of the tensor.
        utility: ``"gradient"``: :math:`|g\,\theta|`, by how much the loss would change without the weight, to first
            order; ``"magnitude"``: :math:`|\theta|`.
        reinit: ``"resample"`` draws; ``"mean"`` takes the mean of the initial entries. In the paper the latter does
            not keep plasticity.
        seed: Seed of the random numbers.
        initial: ``state_dict()`` of the model before training, to draw from. By default the weights that the callback
            has stored at its first batch, or those at :meth:`start`.
        include: Names of the modules and parameters to act on, with wildcards; by default all.
        exclude: Names of those that stay as they are.

    Raises:
        ValueError: If an argument is out of range; at the start, without optimizers for ``utility="gradient"``.
        RuntimeError: If :meth:`after_step` comes before :meth:`start`.

    Warns:
        PlasticityWarning: At the start, if no parameter is trained and selected; it rests then.

    References:
        Hernandez-Garcia, Dohare, Luo and Sutton 2025, arXiv 2508.00212; code: JFernando4/collas_2025_swr_paper.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> intervention = SelectiveWeightReinit(every_n_steps=1)
        >>> intervention.start(model, optimizers=[optimizer])
        >>> _ = torch.nn.init.ones_(model.weight)  # after some training
        >>> model(torch.tensor([[1.0, 0.0, 2.0, 3.0]])).square().sum().backward()  # nothing reaches two of the weights
        >>> optimizer.step()
        >>> print(intervention.after_step(model, optimizers=[optimizer]))
        SelectiveWeightReinit: 2 parameters changed
        >>> intervention.stop()
    """

    runs_model = False

    def __init__(
        self,
        factor: float = 1e-5,
        every_n_steps: int = 2048,
        *,
        pruning: str = "threshold",
        utility: str = "gradient",
        reinit: str = "resample",
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> None:
        super().__init__(include, exclude)
        check_choice(("threshold", "proportional"), self.name, pruning=pruning)
        check_choice(("gradient", "magnitude"), self.name, utility=utility)
        check_choice(("resample", "mean"), self.name, reinit=reinit)
        check_number("(0, 1]" if pruning == "proportional" else "(0, inf)", self.name, factor=factor)
        check_positive_ints(self.name, every_n_steps=every_n_steps)
        check_seed(seed, self.name)
        self.remember_given(initial)
        self.factor, self.every_n_steps = factor, every_n_steps
        self.pruning, self.utility, self.reinit, self.seed = pruning, utility, reinit, seed
        self.steps = 0
        self.generator = PicklableGenerator()
        self.generator.manual_seed(seed)
        self._started: dict[str, torch.Size] | None = None
        # The utilities at the step after which weights are re-initialised.
        self._utilities: dict[Tensor, Tensor] = {}
        self._hooks: OptimizerHooks | None = None

    @override
    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        self.stop()
        if self.utility == "gradient":
            context.require_optimizers(self.name)
        parameters = self._candidates(model, context)
        self.rest_without(parameters, model, context)
        self.remember(parameters, context)
        self._started = {name: parameter.shape for name, parameter in parameters.items()}
        if self.utility == "gradient":
            self._hooks = OptimizerHooks(self.name, after=self._measure)
            self._hooks.follow(context.optimizers)

    @override
    def stop(self) -> None:
        if self._hooks is not None:
            self._hooks.follow([])
        self._hooks, self._started, self._utilities = None, None, {}

    @override
    @torch.no_grad()
    def step(self, model: nn.Module, context: InterventionContext) -> RepairReport | None:
        parameters = self._candidates(model, context)
        started = self._started or {}
        self._require_start(parameters, {name for name, p in parameters.items() if started.get(name) == p.shape})
        if self._hooks is not None and context.optimizers:
            self._hooks.follow(context.optimizers)
        self.steps += 1
        if self.steps % self.every_n_steps:
            return None
        if self.utility == "magnitude":
            self._utilities = {parameter: at_least_float32(parameter).abs() for parameter in parameters.values()}
        utilities, self._utilities = self._utilities, {}
        measured = {name: parameter for name, parameter in parameters.items() if parameter in utilities}
        chosen = {name: self._least_useful(utilities[p].flatten()) for name, p in measured.items()}
        chosen = {name: positions for name, positions in chosen.items() if len(positions)}
        if not chosen:
            return None
        fresh = self._fresh(model, {name: parameters[name] for name in chosen}, context)
        parts: dict[Tensor, SparseUpdate] = {}
        for name, positions in chosen.items():
            parameter = parameters[name]
            parts[parameter] = SparseUpdate(positions, fresh[parameter].flatten()[positions])
        return apply_update(self.name, WeightUpdate({}, parts=parts), context.optimizers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "generator": self.generator.get_state(), **super().state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())
        super().load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the hooks and what they refer to from copies: these follow no optimizers."""
        return {**vars(self), "_hooks": None, "_started": None, "_utilities": {}, "_of_run": None}

    def _candidates(self, model: nn.Module, context: InterventionContext) -> dict[str, nn.Parameter]:
        """Return the parameters to act on, by name."""
        return {n: p for n, p in self.selected_parameters(model, context).items() if p.is_floating_point()}

    @torch.no_grad()
    def _measure(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the utilities after a step, if weights are re-initialised after it."""
        if (self.steps + 1) % self.every_n_steps:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.is_floating_point():
                    gradient = at_least_float32(parameter.grad.to_dense())
                    self._utilities[parameter] = (gradient * at_least_float32(parameter)).abs()

    def _least_useful(self, utility: Tensor) -> Tensor:
        """Return the positions of the weights to re-initialise, on the CPU, from the utilities of a flat tensor."""
        if not bool(utility.isfinite().all()):
            return torch.tensor([], dtype=torch.long)
        if self.pruning == "threshold":
            return _positions(utility <= self.factor * utility.mean())
        share = self.factor * len(utility)
        count = int(share) + int(torch.rand((), generator=self.generator) < share % 1)
        if not count:
            return torch.tensor([], dtype=torch.long)
        bound = utility.kthvalue(count).values
        below, ties = _positions(utility < bound), _positions(utility == bound)
        drawn = torch.randperm(len(ties), generator=self.generator)[: count - len(below)]
        return torch.cat([below, ties[drawn]])

    def _fresh(
        self, model: nn.Module, tensors: Mapping[str, Tensor], context: InterventionContext
    ) -> dict[Tensor, Tensor]:
        """Return new values of whole tensors, on the CPU."""
        fresh = fresh_values(model, tensors, self.initial_weights(context), self.generator)
        return fresh if self.reinit == "resample" else {tensor: _means(values) for tensor, values in fresh.items()}


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten().cpu()


def _means(values: Tensor) -> Tensor:
    """Replace the entries that are drawn at random by their mean."""
    fixed = constants(values)
    if fixed is None:
        fixed = torch.zeros(values.shape, dtype=torch.bool)
    return values.masked_fill(~fixed, values[~fixed].mean())
