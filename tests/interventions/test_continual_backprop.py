"""Check ContinualBackprop against its rule in NumPy, and that nothing of the old units is left."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import ContinualBackprop
from tests.helpers.unit_models import TwoHeads

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (nn.ReLU, lambda z: np.maximum(z, 0)),
    "tanh": (nn.Tanh, np.tanh),
}
SLOPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"relu": lambda h: h > 0, "tanh": lambda h: 1 - h**2}
"""The derivatives of the activation functions, as functions of their values."""


def mlp(sizes: list[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).double()


def arrays(model: nn.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in model[::2]]


def hidden(
    weights: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, phi: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    result = []
    for weight, bias in weights[:-1]:
        x = phi(x @ weight.T + bias)
        result.append(x)
    return result


def hidden_gradients(
    weights: list[tuple[np.ndarray, np.ndarray]], h: list[np.ndarray], slope: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Return the gradients of the loss of :func:`train` with respect to hidden activations."""
    weight, bias = weights[-1]
    output = h[-1] @ weight.T + bias
    gradient, result = 2 * (output - 1) / output.size, []
    for (weight, _), below in zip(weights[:0:-1], h[::-1], strict=True):
        gradient = gradient @ weight
        result.insert(0, gradient)
        gradient = gradient * slope(below)
    return result


class ByHand:
    """Apply the rule to one layer, unit by unit."""

    def __init__(self, size: int, rate: float, maturity: int, decay: float) -> None:
        self.rate, self.maturity, self.decay = rate, maturity, decay
        self.utility, self.age, self.counter = [0.0] * size, [0] * size, 0.0

    def step(self, contributions: np.ndarray) -> list[int]:
        for i, contribution in enumerate(contributions):
            self.utility[i] = self.decay * self.utility[i] + (1 - self.decay) * contribution
            self.age[i] += 1
        mature = [i for i, age in enumerate(self.age) if age > self.maturity]
        self.counter += self.rate * len(mature)
        replaced = []
        while self.counter >= 1:
            lowest = min(mature, key=lambda i: self.utility[i] / (1 - self.decay ** self.age[i]))
            mature.remove(lowest)
            replaced.append(lowest)
            self.counter -= 1
        for i in replaced:
            self.utility[i], self.age[i] = 0.0, 0
        return sorted(replaced)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    optimizer.zero_grad()
    for x in batches:
        output = model(x)
        outputs = output if isinstance(output, tuple) else (output,)
        sum((one - 1).square().mean() for one in outputs).backward()
    optimizer.step()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=5),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    rate=st.sampled_from([0.01, 0.07, 0.3, 1.0]),
    maturity=st.sampled_from([0, 1, 4]),
    decay=st.sampled_from([0.0, 0.9, 0.99]),
    utility=st.sampled_from(["contribution", "gradient"]),
    seed=st.integers(0, 2**31),
)
def test_training_equals_the_rule_in_numpy(
    sizes: list[int], activation: str, rate: float, maturity: int, decay: float, utility: str, seed: int
) -> None:
    """Compare the replaced units of each step, utilities, ages and every weight."""
    torch.manual_seed(seed)
    make, phi = ACTIVATIONS[activation]
    model = mlp(sizes, make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    intervention = ContinualBackprop(rate, maturity, decay, utility=utility, seed=seed)
    intervention.start(model, forward=lambda model: model(torch.randn(4, sizes[0], dtype=torch.float64)))
    rules, initial = [ByHand(size, rate, maturity, decay) for size in sizes[1:-1]], arrays(model)
    for _ in range(15):
        x = torch.randn(5, sizes[0], dtype=torch.float64)
        h = hidden(arrays(model), x.numpy(), phi)
        g = hidden_gradients(arrays(model), h, SLOPES[activation])
        train(model, optimizer, x)
        before = arrays(model)
        report = intervention.after_step(model, [optimizer])
        after = arrays(model)

        if utility == "gradient":
            costs = [np.abs(of_layer * values).sum(0) for of_layer, values in zip(g, h, strict=True)]
            rated = [cost / cost.mean() if cost.any() else cost for cost in costs]
        else:
            rated = [np.abs(h[i]).mean(0) * np.abs(before[i + 1][0]).sum(0) for i in range(len(rules))]
        replaced = [rule.step(contributions) for rule, contributions in zip(rules, rated, strict=True)]
        replaced_units = {} if report is None else {layer: units.tolist() for layer, units in report.units.items()}
        assert replaced_units == {f"{2 * i}": units for i, units in enumerate(replaced) if units}
        for i, (weight, bias) in enumerate(before):
            rows = replaced[i] if i < len(replaced) else []
            columns = replaced[i - 1] if i else []
            new_weight, new_bias = after[i]
            kept = np.ones_like(weight, dtype=bool)
            kept[rows], kept[:, columns] = False, False
            np.testing.assert_array_equal(new_weight[kept], weight[kept])
            np.testing.assert_array_equal(np.delete(new_bias, rows), np.delete(bias, rows))
            assert (new_weight[:, columns] == 0).all(), "zeros win over fresh rows"
            fresh = np.delete(new_weight[rows], columns, axis=1)
            assert np.isin(fresh, initial[i][0]).all(), "drawn from the initial entries"
        layers = intervention.state_dict()["layers"]
        for i, rule in enumerate(rules):
            record = layers[f"{2 * i}"]
            assert record["age"].tolist() == rule.age
            assert record["counter"].item() == pytest.approx(rule.counter, abs=1e-12)
            # A gradient is rounded in another order.
            np.testing.assert_allclose(record["utility"], rule.utility, rtol=1e-12 if utility != "gradient" else 1e-9)


def constant_units(values: list[float], outgoing: list[list[float]]) -> nn.Sequential:
    """Build a network whose hidden units are constant."""
    model = mlp([2, len(values), len(outgoing)])
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor(values))
        model[2].weight.copy_(torch.tensor(outgoing))
    return model


X = torch.ones(4, 2, dtype=torch.float64)


def started(model: nn.Module, intervention: ContinualBackprop, x: Tensor = X) -> ContinualBackprop:
    intervention.start(model, forward=lambda model: model(x))
    return intervention


def step(model: nn.Module, intervention: ContinualBackprop, *batches: Tensor) -> dict[str, list[int]]:
    """Take a step with learning rate zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, optimizer, *batches or (X,))
    report = intervention.after_step(model, [optimizer])
    return {} if report is None else {layer: units.tolist() for layer, units in report.units.items()}


def test_units_of_lowest_utility_are_replaced() -> None:
    """One public implementation replaces the units of the highest utility."""
    model = constant_units([5.0, 1, 4, 2, 3], [[1.0] * 5])
    assert step(model, started(model, ContinualBackprop(0.4, 0))) == {"0": [1, 3]}


def test_utility_is_activation_times_outgoing_weights() -> None:
    # The utilities are 1, 4 and 8.
    model = constant_units([5.0, 1, 4], [[0.1, 2, -1], [0.1, 2, 1]])
    assert step(model, started(model, ContinualBackprop(1 / 3, 0))) == {"0": [0]}


def test_average_is_corrected_by_the_age_of_each_unit() -> None:
    """Without correction, the average of a young unit is near zero, and it would be replaced again and again."""
    model = constant_units([2.0, 1, 3], [[1.0, 1, 1]])
    intervention = started(model, ContinualBackprop(0.0, 2))
    for _ in range(200):
        step(model, intervention)
    state = intervention.state_dict()
    record = state["layers"]["0"]
    record["utility"], record["age"] = record["utility"].clone(), record["age"].clone()
    # Unit 0 is new, and contributes more than unit 1.
    record["utility"][0], record["age"][0] = 0, 0
    intervention.load_state_dict(state)
    for _ in range(3):
        step(model, intervention)
    utility = intervention.state_dict()["layers"]["0"]["utility"]
    assert utility[0] < utility[1], "the order of the raw averages"
    intervention.replacement_rate = 1 / 3
    assert step(model, intervention) == {"0": [1]}


def test_units_that_are_not_mature_are_safe() -> None:
    model = constant_units([2.0, 1, 3], [[1.0, 1, 1]])
    intervention = started(model, ContinualBackprop(1.0, 3))
    assert [step(model, intervention) for _ in range(4)] == [{}, {}, {}, {"0": [0, 1, 2]}]
    assert [step(model, intervention) for _ in range(4)] == [{}, {}, {}, {"0": [0, 1, 2]}]


def test_fractions_of_units_accumulate_over_steps() -> None:
    """Fractions are neither truncated nor drawn: 3 units at 0.25 make one after 2 steps, others after 3, 4 and 6."""
    model = constant_units([2.0, 1, 3], [[1.0, 1, 1]])
    intervention = started(model, ContinualBackprop(0.25, 0))
    counts = [len(step(model, intervention).get("0", [])) for _ in range(8)]
    assert counts == [0, 1, 1, 1, 0, 1, 1, 1]


def test_replaced_units_have_no_effect_until_the_next_step() -> None:
    """A reset inside backward lets the step refill the zeroed column from stale gradients and moments."""
    torch.manual_seed(0)
    model = mlp([3, 8, 8, 2])
    x = torch.randn(16, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    intervention = started(model, ContinualBackprop(0.5, 3), x)
    for _ in range(3):
        train(model, optimizer, x)
        assert intervention.after_step(model, [optimizer]) is None
    optimizer.zero_grad()
    weights = copy.deepcopy(model.state_dict())
    (model(x) - 1).square().mean().backward()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    optimizer.step()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    report = intervention.after_step(model, [optimizer])
    assert report is not None
    for consumer, units in ((model[2], report.units["0"]), (model[4], report.units["2"])):
        assert len(units) == 4
        assert (consumer.weight[:, units] == 0).all()
        for key in ("exp_avg", "exp_avg_sq"):
            assert (optimizer.state[consumer.weight][key][:, units] == 0).all(), "moments are reset in place"
    kept = [unit for unit in range(8) if unit not in report.units["2"].tolist()]
    assert (optimizer.state[model[4].weight]["exp_avg"][:, kept] != 0).all()
    for producer, units in ((model[0], report.units["0"]), (model[2], report.units["2"])):
        for parameter in (producer.weight, producer.bias):
            assert (optimizer.state[parameter]["exp_avg"][units] == 0).all()
    assert all(int(state["step"]) == 4 for state in optimizer.state.values()), "the common step count stays"
    assert all(map(torch.equal, gradients, (parameter.grad for parameter in model.parameters())))


def test_outgoing_zeros_win_over_fresh_incoming_weights() -> None:
    """Replace all units of both layers at once."""
    model = mlp([3, 4, 5, 2])
    assert step(
        model, started(model, ContinualBackprop(1.0, 0), torch.randn(4, 3).double()), torch.randn(4, 3).double()
    ) == {
        "0": [0, 1, 2, 3],
        "2": [0, 1, 2, 3, 4],
    }
    assert (model[0].weight != 0).all()
    assert (model[2].weight == 0).all()
    assert (model[2].bias != 0).all()
    assert (model[4].weight == 0).all()


def test_new_units_differ_from_each_other_and_from_earlier_ones() -> None:
    model = mlp([3, 4, 2])
    x = torch.randn(4, 3).double()
    intervention = started(model, ContinualBackprop(1.0, 0), x)
    rows = []
    for _ in range(3):
        step(model, intervention, x)
        rows += model[0].weight.detach().clone().tolist()
    assert len({tuple(row) for row in rows}) == 12


def test_mean_of_a_replaced_unit_is_added_to_biases() -> None:
    """In the authors' code the mean is cleared before it is read, and no bias ever changes."""
    model = constant_units([2.0, 1, 3], [[1.0, 0.25, 1], [-1, 0.5, 1]])
    before, bias = model(X), model[2].bias.detach().clone()
    assert step(model, started(model, ContinualBackprop(1 / 3, 0, transfer_bias=True))) == {"0": [1]}
    torch.testing.assert_close(model[2].bias - bias, torch.tensor([0.25, 0.5]).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=0)


def test_the_mean_is_signed_and_averaged_over_steps() -> None:
    model = mlp([1, 2, 1], nn.Tanh)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [3.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[0.5, 5.0]]))
    xs = [torch.full((3, 1), value).double() for value in (-1.0, 0.5, 2.0)]
    intervention = started(model, ContinualBackprop(1 / 2, 2, 0.8, transfer_bias=True), xs[0])
    bias = model[2].bias.item()
    assert [step(model, intervention, x) for x in xs] == [{}, {}, {"0": [0]}]
    shares = np.array([0.8**2, 0.8, 1]) * 0.2 / (1 - 0.8**3)
    mean = (shares * np.tanh([-1.0, 0.5, 2.0])).sum()
    assert model[2].bias.item() - bias == pytest.approx(0.5 * mean, rel=1e-12)


def test_biases_stay_by_default() -> None:
    model = constant_units([2.0, 1, 3], [[1.0, 0.25, 1], [-1, 0.5, 1]])
    bias = model[2].bias.detach().clone()
    assert step(model, started(model, ContinualBackprop(1 / 3, 0))) == {"0": [1]}
    assert torch.equal(model[2].bias, bias)


def test_transferred_biases_keep_their_optimizer_state() -> None:
    model = constant_units([2.0, 1, 3], [[1.0, 0.25, 1], [-1, 0.5, 1]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9)
    intervention = started(model, ContinualBackprop(1 / 3, 0, transfer_bias=True))
    train(model, optimizer, X)
    moments = optimizer.state[model[2].bias]["exp_avg"].clone()
    assert intervention.after_step(model, [optimizer]) is not None
    assert torch.equal(optimizer.state[model[2].bias]["exp_avg"], moments)
    assert (moments != 0).all()


CONSUMERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)),
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 2)),
    "strided": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2)),
    "groups": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2)),
    "transposed": lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2)),
}


@pytest.mark.parametrize("build", CONSUMERS.values(), ids=list(CONSUMERS))
def test_utility_and_mean_are_right_for_every_kind_of_consumer(build: Callable[[], nn.Module]) -> None:
    """Constant units contribute |h| times the change of the output, if all weights are positive."""
    torch.manual_seed(0)
    model = build().double()
    x = torch.zeros(2, 1, 6, 6).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0.3, 0.1, 0.4, 0.2]))
        model[-1].weight.abs_()
    # The taps of a transposed convolution fall on different positions.
    averaged = isinstance(model[-1], nn.ConvTranspose2d)

    def outputs(model: nn.Module) -> Tensor:
        return model(x).detach().mean((2, 3)) if averaged else model(x).detach()

    before, gone = outputs(model), []
    for unit in range(4):
        other_model = copy.deepcopy(model)
        with torch.no_grad():
            other_model[0].bias[unit] = 0
        lost = (before - outputs(other_model))[0].unflatten(0, (len(before[0]), -1)).flatten(1).mean(1).sum()
        gone.append(lost * (model[-1].stride[0] ** 2 if averaged else 1))
    intervention = started(model, ContinualBackprop(0.0, 0, 0.9, transfer_bias=True), x)
    step(model, intervention, x)
    utility = intervention.state_dict()["layers"]["0"]["utility"] / 0.1
    torch.testing.assert_close(utility, torch.stack(gone), rtol=1e-10, atol=0)
    intervention.replacement_rate = 1 / 4
    assert step(model, intervention, x) == {"0": [int(utility.argmin())]}
    torch.testing.assert_close(outputs(model), before, rtol=1e-10, atol=0)


def test_two_heads_add_up_and_only_those_called_count() -> None:
    model = TwoHeads().double()
    x = torch.rand(5, 4).double()
    intervention = started(model, ContinualBackprop(0.0, 0, 0.0), x)
    h = F.relu(model.trunk(x)).mean(0)
    both = sum(h * head.weight.abs().sum(0) for head in (model.policy, model.value))
    step(model, intervention, x)
    torch.testing.assert_close(
        intervention.state_dict()["layers"]["trunk"]["utility"], both.detach(), rtol=1e-12, atol=0
    )
    model.policy(F.relu(model.trunk(x)))
    intervention.after_step(model)
    one = h * model.policy.weight.abs().sum(0)
    torch.testing.assert_close(
        intervention.state_dict()["layers"]["trunk"]["utility"], one.detach(), rtol=1e-12, atol=0
    )


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"ContinualBackprop\(replacement_rate=1.5\) must be in \[0, 1\]"):
        ContinualBackprop(1.5)
    with pytest.raises(ValueError, match=r"ContinualBackprop\(maturity_threshold=-1\) must be at least 0"):
        ContinualBackprop(maturity_threshold=-1)
    with pytest.raises(ValueError, match=r"ContinualBackprop\(decay=1\) must be in \[0, 1\)"):
        ContinualBackprop(decay=1)


# Steps that wait


@pytest.mark.parametrize("threshold", [0, 2.5, 7])
def test_records_are_the_same_however_many_steps_wait(threshold: float) -> None:
    """Also with values that are not finite, layers that are not called in some steps, and checkpoints."""
    waits, does_not = _run_of_two_paths(threshold, waits=True), _run_of_two_paths(threshold, waits=False)
    assert waits[0] == does_not[0]
    assert any(waits[0])
    torch.testing.assert_close(waits[1:], does_not[1:], rtol=0, atol=0)


def _run_of_two_paths(threshold: float, *, waits: bool) -> list[Any]:
    torch.manual_seed(0)
    layers = {"trunk": nn.Linear(4, 7), "hidden": nn.Linear(7, 5), "head": nn.Linear(5, 2), "skip": nn.Linear(7, 2)}
    model = nn.ModuleDict(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)

    def forward(x: Tensor, *, skips: bool = False) -> Tensor:
        features = layers["trunk"](x).relu()
        y: Tensor = layers["skip"](features)
        return y if skips else y + layers["head"](layers["hidden"](features).relu())

    intervention = ContinualBackprop(0.02, threshold, decay=0.9)
    intervention.start(model, forward=lambda _: forward(torch.randn(3, 4)))
    if not waits:
        intervention._steps_until_due = lambda record: 1  # type: ignore[method-assign]
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(60):
            x = torch.randn(6, 4, generator=generator)
            optimizer.zero_grad()
            forward(x, skips=number % 5 == 4).square().mean().backward()
            if number == 23:
                forward(x * torch.inf)
            optimizer.step()
            report = intervention.after_step(model, [optimizer])
            seen.append(None if report is None else {layer: units.tolist() for layer, units in report.units.items()})
            if waits and number % 17 == 0:
                intervention.state_dict()
    intervention.stop()
    return [seen, intervention.state_dict(), model.state_dict()]
