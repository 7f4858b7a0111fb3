"""Check ReDo and ReGraMa: the units that they reset, the new weights, and the optimizer state."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning
from lightning_plasticity.interventions import ReDo, ReGraMa, Repair, Reset
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.weights.optimizer_state import reset_state
from lightning_plasticity.interventions.weights.updates import apply_update


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(sizes: list[int], activation: Callable[[], nn.Module], seed: int) -> nn.Sequential:
    """Build a float64 network with weights of very different size: some units are active, some are not."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for layer in model[::2]:
            rows = torch.randn(len(layer.weight), 2, generator=generator(seed)).exp().pow(2).double()
            layer.weight.mul_(rows[:, :1])
            layer.bias.mul_(rows[:, 1])
    return model


def arrays(model: nn.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in model[::2]]


def reset_by_hand(
    weights: list[tuple[np.ndarray, np.ndarray]], fresh: list[tuple[np.ndarray, np.ndarray]], dormant: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Reset units in NumPy: first all rows, then all columns."""
    result = [(weight.copy(), bias.copy()) for weight, bias in weights]
    for (weight, bias), (new_weight, new_bias), units in zip(result, fresh, dormant, strict=False):
        weight[units], bias[units] = new_weight[units], new_bias[units]
    for (weight, _), units in zip(result[1:], dormant, strict=True):
        weight[:, units] = 0
    return result


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (nn.ReLU, lambda z: np.maximum(z, 0)),
    "tanh": (nn.Tanh, np.tanh),
    "sigmoid": (nn.Sigmoid, lambda z: np.exp(-np.logaddexp(0, -z))),
}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=5),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    threshold=st.sampled_from([0.0, 0.025, 0.1, 0.6]),
    seed=st.integers(0, 2**31),
)
def test_redo_equals_its_rule_in_numpy(sizes: list[int], activation: str, threshold: float, seed: int) -> None:
    make, phi = ACTIVATIONS[activation]
    model = mlp(sizes, make, seed)
    x = torch.randn(9, sizes[0], generator=generator(seed), dtype=torch.float64)
    before, other_model = arrays(model), copy.deepcopy(model)
    Reset().repair(other_model, generator=generator(seed))

    dormant, h = [], x.numpy()
    for weight, bias in before[:-1]:
        h = phi(h @ weight.T + bias)
        activity = np.abs(h).mean(0)
        dormant.append(np.flatnonzero(activity <= threshold * activity.mean()))
    expected = reset_by_hand(before, arrays(other_model), dormant)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ReDo: all units of")
        report = ReDo(threshold).repair(model, forward=lambda model: model(x), generator=generator(seed))
    expected_units = {f"{2 * layer}": units.tolist() for layer, units in enumerate(dormant) if len(units)}
    assert {layer: units.tolist() for layer, units in report.units.items()} == expected_units
    for (weight, bias), (expected_weight, expected_bias) in zip(arrays(model), expected, strict=True):
        np.testing.assert_array_equal(weight, expected_weight)
        np.testing.assert_array_equal(bias, expected_bias)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=3, max_size=5),
    threshold=st.sampled_from([0.0, 0.01, 0.1, 0.6]),
    seed=st.integers(0, 2**31),
)
def test_regrama_equals_its_rule_in_numpy(sizes: list[int], threshold: float, seed: int) -> None:
    model = mlp(sizes, nn.Tanh, seed)
    x, y = (
        torch.randn(9, size, generator=generator(seed + size), dtype=torch.float64) for size in (sizes[0], sizes[-1])
    )
    before, other_model = arrays(model), copy.deepcopy(model)
    Reset().repair(other_model, generator=generator(seed))

    hs = [x.numpy()]
    for weight, bias in before[:-1]:
        hs.append(np.tanh(hs[-1] @ weight.T + bias))
    delta = 2 * (hs[-1] @ before[-1][0].T + before[-1][1] - y.numpy()) / y.numel()
    dormant = []
    for layer in reversed(range(len(before) - 1)):
        delta = delta @ before[layer + 1][0] * (1 - hs[layer + 1] ** 2)
        score = np.abs(delta.T @ hs[layer]).mean(1)
        dormant.insert(0, np.flatnonzero(score <= threshold * score.mean()))
    expected = reset_by_hand(before, arrays(other_model), dormant)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ReGraMa: all units of")
        ReGraMa(threshold).repair(
            model, loss=lambda model: nn.functional.mse_loss(model(x), y), generator=generator(seed)
        )
    for (weight, bias), (expected_weight, expected_bias) in zip(arrays(model), expected, strict=True):
        np.testing.assert_array_equal(weight, expected_weight)
        np.testing.assert_array_equal(bias, expected_bias)


def test_regrama_of_transposed_convolution_with_one_output() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 1, 2), nn.Tanh(), nn.Conv2d(1, 2, 2)]
    model, x = nn.Sequential(*layers), torch.randn(4, 2, 5, 5)
    report = ReGraMa(threshold=1).repair(model, loss=lambda model: model(x).square().mean())
    assert report.units["2"].tolist() == [0], "it is the mean itself"


def with_dead_units(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    """Build a network in which units 1 and 3 of layer 0, and unit 2 of layer 2, are dead."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([5.0, -50, 5, -50, 5, 5]))
        model[2].bias.copy_(torch.tensor([9.0, 9, -99, 9, 9]))
    return model, torch.rand(16, 4)


DEAD = {"0": [1, 3], "2": [2]}


def repair(model: nn.Module, x: Tensor, *optimizers: torch.optim.Optimizer, seed: int = 0) -> dict[str, list[int]]:
    report = ReDo().repair(model, optimizers=optimizers, forward=lambda model: model(x), generator=generator(seed))
    return {layer: units.tolist() for layer, units in report.units.items()}


def test_units_with_the_lowest_scores_are_reset() -> None:
    """One public implementation resets the highest."""
    model, x = with_dead_units()
    with torch.no_grad():
        model[0].bias[0] = 50
    assert repair(model, x)["0"] == DEAD["0"]


def test_repair_changes_the_model_and_not_the_copy() -> None:
    """Public code with ``weight[:, mask].data.fill_(0)`` writes to a copy."""
    model, x = with_dead_units()
    parameters = list(model.parameters())
    pointers = [parameter.data_ptr() for parameter in parameters]
    repair(model, x)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert (model[2].weight[:, [1, 3]] == 0).all()
    assert (model[4].weight[:, 2] == 0).all()
    assert (model[0].bias[[1, 3]] > -1).all()


def test_redo_draws_from_the_layers_own_initialisation() -> None:
    """Public code draws up to 2.45 times as wide as the initialisation."""
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 2))
    with torch.no_grad():
        model[0].bias[:200] = -1000
        model[0].bias[200:] = 1000
    x = torch.rand(8, 400)
    repair(model, x)
    rows = model[0].weight[:200]
    assert rows.abs().max() <= 1 / 20, "uniform in ±1/√fan_in, torch's own"
    assert rows.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.01)
    assert model[0].bias[:200].abs().max() <= 1 / 20


def test_redo_draws_from_given_initial_weights() -> None:
    model, x = with_dead_units()
    with torch.no_grad():
        nn.init.constant_(model[0].weight, 3.5)
        nn.init.zeros_(model[0].bias)
        # The state_dict shares its memory with the model.
        redo = ReDo(initial=model.state_dict())
        nn.init.constant_(model[0].weight, 1)
        model[0].bias.copy_(torch.tensor([5.0, -50, 5, -50, 5, 5]))
    redo.repair(model, forward=lambda model: model(x))
    assert model[0].weight.tolist() == [[value] * 4 for value in (1, 3.5, 1, 3.5, 1, 1)], (
        "not those it shares memory with"
    )
    assert model[0].bias.tolist() == [5, 0, 5, 0, 5, 5]


def test_initial_weights_of_another_model_are_refused() -> None:
    model, x = with_dead_units()
    with pytest.raises(ValueError, match=r"initial has no \['0.weight', .*: it must be the state_dict\(\) of the same"):
        ReDo(initial={"net.0.weight": torch.ones(6, 4)}).repair(model, forward=lambda model: model(x))


def test_layer_of_dormant_units_is_reset_as_a_whole() -> None:
    """In public code 0/0 gives NaN, and such a layer is never reset."""
    model, x = with_dead_units()
    with torch.no_grad():
        model[0].bias.fill_(-50)
    with pytest.warns(UserWarning, match="ReDo: all units of '0' are dormant"):
        chosen = repair(model, x)
    assert chosen["0"] == list(range(6))


def test_samples_without_activation_do_not_stop_redo() -> None:
    """A mean of ratios over samples would be NaN for the whole layer."""
    model, x = with_dead_units()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].weight[[1, 3]] *= -1
        model[0].bias.fill_(0)
    assert repair(model, torch.cat([x, torch.zeros(1, 4)]))["0"] == DEAD["0"]


def test_non_finite_activations_raise() -> None:
    model, x = with_dead_units()
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match="ReDo: the units of '0' give values that are not finite"):
        repair(model, x)


def test_units_of_sequences_are_features_and_not_positions() -> None:
    """Public code treats the wrong dimension as units."""
    model, _ = with_dead_units()
    assert repair(model, torch.rand(2, 7, 4)) == DEAD


def test_the_activation_of_a_channel_is_averaged_over_positions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1, 0.01]).view(3, 1, 1, 1))
        model[0].bias.zero_()
    x = torch.zeros(4, 1, 2, 2)
    x[:, :, 0, 0] = 1
    assert repair(model, x) == {"0": [2]}


def test_activity_is_the_maximum_over_consumers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.a(torch.relu(h)), self.b(torch.relu(-h))

    model, x = Two(), torch.rand(5, 3)
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.copy_(torch.tensor([1.0, -1, 0]))
    assert repair(model, x) == {"first": [2]}


INTERVENTIONS: list[Repair] = [ReDo(), ReGraMa(0.5)]
BOTH = pytest.mark.parametrize("intervention", INTERVENTIONS, ids=lambda one: type(one).__name__)


def run(intervention: Repair, model: nn.Module, x: Tensor, *optimizers: Any, seed: int = 0) -> Any:
    return intervention.repair(
        model,
        optimizers=optimizers,
        forward=lambda model: model(x),
        loss=lambda model: model(x).square().mean(),
        generator=generator(seed),
    )


@BOTH
def test_unit_resets_are_deterministic_and_leave_gradients(
    intervention: Repair,
) -> None:
    models = [with_dead_units()[0] for _ in range(2)]
    x = torch.rand(16, 4)
    for parameter in models[0].parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    state = torch.get_rng_state()
    reports = [run(intervention, model, x) for model in models]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((parameter.grad == 3).all()) for parameter in models[0].parameters())
    assert all(parameter.grad is None for parameter in models[1].parameters())
    assert reports[0].num_parameters_changed == reports[1].num_parameters_changed > 0
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    other = with_dead_units()[0]
    run(intervention, other, x, seed=1)
    assert not torch.equal(other[0].weight, models[0][0].weight)


def test_missing_arguments_raise() -> None:
    model, x = with_dead_units()
    with pytest.raises(ValueError, match=r"ReDo needs a forward pass of the model: repair\(model, forward=lambda"):
        ReDo().repair(model)
    with pytest.raises(ValueError, match=r"ReGraMa needs gradients: repair\(model, loss=lambda"):
        ReGraMa().repair(model, forward=lambda model: model(x))
    with pytest.raises(ValueError, match=r"ReDo\(threshold=-1\) must be at least 0"):
        ReDo(-1)


@pytest.mark.parametrize("repair", [ReDo(), ReGraMa()], ids=lambda repair: repair.name)
def test_model_without_resettable_units_is_unchanged(repair: ReDo | ReGraMa) -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(PlasticityWarning, match=r"rests, since Linear has nothing that it acts on: '\(model\)': logits"):
        report = run(repair, model, torch.ones(2, 3))
    assert (report.units, report.candidates, report.num_parameters_changed) == ({}, 0, 0)


# Optimizers

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, fused=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=1e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=False),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.3),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=0),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


@EVERY_OPTIMIZER
def test_reset_entries_do_not_depend_on_earlier_training(make: Make) -> None:
    """Trainings that differ only in the reset entries are equal after the reset."""
    mask = torch.rand(4, 5) < 0.4
    common, later = ([torch.randn(4, 5) for _ in range(7)] for _ in range(2))
    futures = []
    for seed in range(2):
        parameter = nn.Parameter(torch.arange(20.0).view(4, 5) / 20)
        optimizer = make([parameter])
        past = [torch.where(mask, torch.randn(4, 5, generator=generator(seed)) * 3, gradient) for gradient in common]
        steps(optimizer, parameter, past)
        with torch.no_grad():
            parameter[mask] = 0.5
        other = copy.deepcopy(optimizer)
        other_parameter = other.param_groups[0]["params"][0]
        reset_state(optimizer, {parameter: mask})
        steps(optimizer, parameter, later)
        steps(other, other_parameter, later)
        futures.append(torch.cat([parameter.detach(), *_averages(optimizer, parameter)]))
        assert torch.equal(parameter[~mask], other_parameter[~mask]), "kept entries move as if nothing had happened"
    assert torch.equal(*futures)


@EVERY_OPTIMIZER
def test_fully_reset_parameter_has_the_state_of_a_new_one(make: Make) -> None:
    new, kept = nn.Parameter(torch.rand(4, 5)), nn.Parameter(torch.rand(3))
    optimizer = make([new, kept])
    past, future = ([(torch.randn(4, 5), torch.randn(3)) for _ in range(5)] for _ in range(2))
    both_step(optimizer, new, kept, past)
    with torch.no_grad():
        new.fill_(0.5)
    other = copy.deepcopy(optimizer)
    other_parameters = other.param_groups[0]["params"]
    fresh = nn.Parameter(new.detach().clone())
    reset_state(optimizer, {new: None})
    both_step(optimizer, new, kept, future)
    both_step(other, *other_parameters, future)
    steps(make([fresh]), fresh, [gradient for gradient, _ in future])
    assert torch.equal(new, fresh)
    assert torch.equal(kept, other_parameters[1])


def both_step(
    optimizer: torch.optim.Optimizer, one: nn.Parameter, other: nn.Parameter, gradients: list[tuple[Tensor, Tensor]]
) -> None:
    for gradient, other_gradient in gradients:
        one.grad, other.grad = gradient.clone(), other_gradient.clone()
        optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """Shares the groups of the wrapped optimizer, as many wrappers do."""

    def __init__(self, name: str, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        setattr(self, name, inner)


# ZeroRedundancyOptimizer calls it optim.
@pytest.mark.parametrize("name", ["optimizer", "optim"])
def test_state_of_a_wrapped_optimizer_is_reset(name: str) -> None:
    parameter = nn.Parameter(torch.rand(4, 5))
    inner = torch.optim.Adam([parameter])
    steps(inner, parameter, [torch.randn(4, 5)])
    reset_state(Wrapper(name, inner), {parameter: None})
    assert not inner.state


def _averages(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.ndim]


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "AdamW foreach", "ASGD", "Rprop"])
def test_without_state_reset_entries_depend_on_earlier_training(name: str) -> None:
    """The test above detects moments that are left in place, as in most public code."""
    mask = torch.rand(4, 5) < 0.4
    common, later = ([torch.randn(4, 5) for _ in range(7)] for _ in range(2))
    futures = []
    for seed in range(2):
        parameter = nn.Parameter(torch.zeros(4, 5))
        optimizer = OPTIMIZERS[name]([parameter])
        steps(
            optimizer,
            parameter,
            [torch.where(mask, torch.randn(4, 5, generator=generator(seed)) * 3, gradient) for gradient in common],
        )
        with torch.no_grad():
            parameter[mask] = 0.5
        steps(optimizer, parameter, later)
        futures.append(torch.cat([parameter.detach(), *_averages(optimizer, parameter)]))
    assert not torch.equal(*futures)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@EVERY_OPTIMIZER
def test_repair_resets_state_of_exactly_the_unit_entries(make: Make) -> None:
    model, x = with_dead_units()
    optimizer = make(list(model.parameters()))
    train(model, optimizer, x)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.ndim:
                # No entry is zero by chance.
                value.add_(1)
    before = copy.deepcopy([dict(optimizer.state[parameter]) for parameter in model.parameters()])
    assert repair(model, x, optimizer) == DEAD
    rows, columns = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    rows[DEAD["0"]], columns[DEAD["2"]] = True, True
    masks = [
        rows[:, None].expand(6, 4),
        rows,
        columns[:, None] | rows[None],
        columns,
        columns[None].expand(3, 5),
        torch.zeros(3, dtype=torch.bool),
    ]
    for parameter, old, mask in zip(model.parameters(), before, masks, strict=True):
        state = optimizer.state[parameter]
        assert set(state) == set(old), "the step count stays"
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert torch.equal(value[~mask], old[key][~mask])
                first = {"sum": 0.3, "step_size": 1e-2}.get(key, 0.0)
                expected = parameter.detach()[mask] if key == "ax" else torch.full_like(value[mask], first)
                assert torch.equal(value[mask], expected), key
            else:
                assert value == old[key]


def test_factored_moments_are_reset_where_all_weights_are_new() -> None:
    parameter = nn.Parameter(torch.randn(4, 5))
    optimizer = torch.optim.Adafactor([parameter])
    steps(optimizer, parameter, [torch.randn(4, 5) for _ in range(3)])
    before = copy.deepcopy(optimizer.state[parameter])
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1] = True
    mask[:, 3] = True
    mask[0, 0] = True
    reset_state(optimizer, {parameter: mask})
    state = optimizer.state[parameter]
    assert (state["row_var"].flatten() == 0).tolist() == [False, True, False, False]
    assert (state["col_var"].flatten() == 0).tolist() == [False, False, False, True, False]
    kept = [0, 2, 3]
    assert torch.equal(state["row_var"][kept], before["row_var"][kept])
    assert state["step"] == before["step"]


def test_repair_resets_all_state_of_lbfgs() -> None:
    model, x = with_dead_units()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    repair(model, x, optimizer)
    assert not optimizer.state


class Foreign(torch.optim.Optimizer):
    """An optimizer from another library."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "average": torch.ones_like(parameter),
                "packed": torch.ones(parameter.shape, dtype=torch.uint8),
                "rows": torch.ones(7),
                "step": torch.tensor(3.0),
                "note": "kept",
            }


def test_unknown_optimizers_reset_entries_and_name_the_rest() -> None:
    model, x = with_dead_units()
    optimizer = Foreign(model.parameters())
    with pytest.warns(UserWarning, match=r"Foreign is unknown: its state \['note', 'packed', 'rows'\] stayed"):
        repair(model, x, optimizer)
    state = optimizer.state[model[0].weight]
    assert state["average"].sum(1).tolist() == [4, 0, 4, 0, 4, 4]
    assert state["packed"].sum() == 24
    assert state["step"] == 3


@EVERY_OPTIMIZER
def test_failed_repair_restores_weights_and_optimizer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every write fail in turn: the n-th copy into a weight, the n-th assignment into a state."""
    model, x = with_dead_units()
    optimizer = make(list(model.parameters()))
    train(model, optimizer, x)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    objects = [(parameter, id(optimizer.state.get(parameter))) for parameter in model.parameters()]
    failures = {"copy_": 0, "__setitem__": 0}
    has_averages = any(_averages(optimizer, parameter) for parameter in model.parameters())
    for method in failures:
        original = getattr(Tensor, method)
        for number in range(100):
            calls = 0

            def failing(tensor: Tensor, *args: Any, number: int = number, original: Any = original) -> Any:
                nonlocal calls
                calls += 1
                if calls == number + 1:
                    original(tensor, *args)
                    raise RuntimeError("injected")
                return original(tensor, *args)

            planned = ReDo().plan(model, InterventionContext(forward=lambda model: model(x), generator=generator()))
            with monkeypatch.context() as patch:
                patch.setattr(Tensor, method, failing)
                try:
                    apply_update("ReDo", planned, [optimizer])
                except RuntimeError:
                    failures[method] += 1
                else:
                    break
            torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
            torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
            assert objects == [(p, id(optimizer.state.get(p))) for p in model.parameters()]
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        objects = [(parameter, id(optimizer.state.get(parameter))) for parameter in model.parameters()]
    assert failures["copy_"] == 0, "no tensor is new as a whole"
    assert failures["__setitem__"] >= (10 if has_averages else 5), "three weights and two biases"
