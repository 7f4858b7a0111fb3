"""Check Reset and ShrinkPerturb: the new values, their scale, and the optimizer state."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import Repair, RepairReport, Reset, ShrinkPerturb
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.weights.updates import WeightUpdate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 3) -> None:
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@settings(max_examples=20, deadline=None)
@given(s=st.floats(0.01, 1), seed=st.integers(0, 2**31))
def test_shrink_perturb_interpolates_old_and_fresh_weights(s: float, seed: int) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    old, other_model = values(model), copy.deepcopy(model)
    ShrinkPerturb(s).repair(model, generator=generator(seed))
    Reset().repair(other_model, generator=generator(seed))
    fresh = values(other_model)
    for name, value in model.state_dict().items():
        expected = (1 - s) * old[name].numpy() + s * fresh[name].numpy()
        torch.testing.assert_close(value, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_new_values_of_another_shape_are_refused() -> None:
    class OneRow(Repair):
        def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
            return WeightUpdate({model.weight: torch.ones(4)})

    model = nn.Linear(4, 3)
    before = values(model)
    with pytest.raises(ValueError, match=r"^OneRow: new values have shape \(4,\), expected \(3, 4\)"):
        OneRow().repair(model)
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


def test_shrink_perturb_keeps_norms_buffers_and_frozen_ones() -> None:
    """Public code also shrinks the scales of norm layers and buffers."""
    model = network()
    with torch.no_grad():
        model[1].weight.fill_(3)
        model[1].running_mean.fill_(2)
    model[4].bias.requires_grad_(False)
    before = values(model)
    report = ShrinkPerturb().repair(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias", "4.weight"}
    assert report.num_parameters_changed == 4 * 9 + 4 + 64 * 3


def test_reset_draws_from_the_layers_own_initialisation() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.Embedding(200, 50))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7).add_(1)
        model[1].running_var.fill_(9)
        model[1].num_batches_tracked.fill_(5)
    Reset().repair(model, generator=generator())
    assert model[0].weight.abs().max() <= 1 / 20, "uniform in ±1/√fan_in, torch's own"
    for fresh, own in ((model[0].weight, reference[0].weight), (model[2].weight, reference[2].weight)):
        assert (fresh.std() / own.std()).item() == pytest.approx(1, abs=0.02)
        assert not torch.equal(fresh, own)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(reference[1], name))


def test_reset_of_named_layers_leaves_the_rest() -> None:
    model = nn.ModuleDict({"trunk": network(), "head": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})
    before = values(model)
    report = Reset(layers=["head", "trunk.4"]).repair(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer}.{kind}" for layer in ("head.0", "head.1", "trunk.4") for kind in ("weight", "bias")}
    assert report.num_parameters_changed == 12 + 8 + 195


def test_parent_initialises_its_submodules_last() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5)
    Reset().repair(model)
    assert torch.equal(model[0].out_proj.bias, torch.zeros(8)), "MultiheadAttention starts with zero biases"
    assert torch.equal(model[0].in_proj_bias, torch.zeros(24))
    assert 0 < model[0].in_proj_weight.abs().max() <= (6 / 32) ** 0.5, "Xavier-uniform"


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.clone()
    report = Reset().repair(model)
    assert model[1].weight is model[0].weight
    assert not torch.equal(model[0].weight, before)
    assert report.num_parameters_changed == 28


@pytest.mark.parametrize("intervention", [Reset(), ShrinkPerturb()], ids=lambda one: type(one).__name__)
def test_repairs_are_deterministic_without_global_random_numbers(intervention: Repair) -> None:
    models = [network() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    state = torch.get_rng_state()
    parameters = list(models[0].parameters())
    reports = [intervention.repair(model, generator=generator(3)) for model in models]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(*(values(model).values() for model in models), strict=True))
    assert all(old is new for old, new in zip(parameters, models[0].parameters(), strict=True))
    assert reports[0].to_dict() == reports[1].to_dict() == RepairReport.from_dict(reports[0].to_dict()).to_dict()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("intervention", [Reset(), ShrinkPerturb()], ids=lambda one: type(one).__name__)
def test_repair_is_all_or_nothing(intervention: Repair) -> None:
    model = nn.Sequential(nn.Linear(3, 3), Bare())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model[0], optimizer, torch.ones(2, 3))
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"Bare '1' holds the parameter 'scale', which no reset_parameters\(\)"):
        intervention.repair(model, optimizers=[optimizer])
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_error_names_the_class_of_a_root() -> None:
    with pytest.raises(ValueError, match=r"^Bare holds the parameter 'scale'.*exclude=\['scale'\]"):
        ShrinkPerturb().repair(Bare())


def test_reset_of_a_layer_beside_a_bare_parameter_works() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Bare())
    assert Reset(layers=["0"]).repair(model).num_parameters_changed == 12


OPTIMIZERS: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    lambda p: torch.optim.Adagrad(p, lr=1e-3, initial_accumulator_value=0.3),
    lambda p: torch.optim.Adadelta(p),
    lambda p: torch.optim.Rprop(p, lr=1e-3),
    lambda p: torch.optim.NAdam(p, lr=1e-3),
    lambda p: torch.optim.RAdam(p, lr=1e-3),
    lambda p: torch.optim.ASGD(p, lr=1e-3),
    lambda p: torch.optim.Adamax(p, lr=1e-3),
    lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=2),
]


class Lazy(torch.optim.Optimizer):
    """Keeps a copy of the weights from its first step on, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "unaccepted": 1})

    def fresh(self, parameter: Tensor) -> dict[str, Any]:
        return {"anchor": parameter.detach().clone(), "step": 0}

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        for parameter in self.param_groups[0]["params"]:
            if not self.state[parameter]:
                self.state[parameter] = self.fresh(parameter)
            state = self.state[parameter]
            state["step"] += 1
            with torch.no_grad():
                parameter.add_(state["anchor"] - parameter, alpha=0.1 / state["step"]).sub_(parameter.grad, alpha=0.01)


class Eager(Lazy):
    """Creates its state in the constructor."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = self.fresh(parameter)


class Derived(torch.optim.Rprop):
    pass


class Wrapper:
    """Wraps an optimizer as Lightning does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Callable[[], Any]) -> None:
        self.optimizer.step(closure)


OPTIMIZERS += [
    lambda p: Lazy(p),
    lambda p: Eager(p),
    lambda p: Derived(p, lr=1e-3),
    lambda p: Wrapper(torch.optim.Rprop(p)),  # type: ignore[arg-type,return-value]
    lambda p: torch.optim.Adafactor(p),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizer_after_reset_equals_a_new_one(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    x = torch.randn(5, 4, generator=generator())
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = make(list(model.parameters()))
    train(model, optimizer, x)
    Reset().repair(model, optimizers=[optimizer], generator=generator())
    other_model = copy.deepcopy(model)
    train(other_model, make(list(other_model.parameters())), x)
    train(model, optimizer, x)
    torch.testing.assert_close(values(model), values(other_model), rtol=0, atol=0)


def test_state_of_parameters_that_did_not_change_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, torch.ones(2, 4))
    kept = copy.deepcopy(optimizer.state[model[0].weight])
    Reset(layers=["1"]).repair(model, optimizers=[optimizer])
    torch.testing.assert_close(optimizer.state[model[0].weight], kept, rtol=0, atol=0)
    assert model[1].weight not in optimizer.state


def test_state_of_unknown_optimizers_is_zeroed_with_a_warning() -> None:
    class Foreign(Lazy):
        def __init__(self, params: Any, needed: int) -> None:
            super().__init__(params)

    model = nn.Linear(4, 3)
    optimizer = Foreign(model.parameters(), needed=1)
    optimizer.state[model.weight] = {"average": torch.ones(3, 4), "step": torch.tensor(7.0), "rows": torch.ones(3)}
    with pytest.warns(UserWarning, match=r"Foreign is unknown: .*\['average', 'step'\] became zero and \['rows'\]"):
        Reset().repair(model, optimizers=[optimizer])
    state = optimizer.state[model.weight]
    assert state["average"].sum() == state["step"] == 0
    assert state["rows"].sum() == 3


def test_optimizer_given_twice_is_reset_once() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, torch.ones(2, 4))
    assert Reset().repair(model, optimizers=[optimizer, optimizer]).num_parameters_changed == 15
    assert not optimizer.state


def test_frozen_norm_layers_keep_their_statistics() -> None:
    model = network()
    model[1].requires_grad_(False)
    model[1].running_mean.fill_(5)
    Reset().repair(model)
    assert torch.equal(model[1].running_mean, torch.full((4,), 5.0))


def test_full_shrink_perturb_replaces_non_finite_weights() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    ShrinkPerturb(s=1).repair(model)
    assert torch.isfinite(model.weight).all()


def test_layers_that_keep_tensors_with_a_graph_can_be_reset() -> None:
    model = nn.Linear(4, 3)
    model.last = model(torch.ones(2, 4))
    assert Reset().repair(model).num_parameters_changed == 15
