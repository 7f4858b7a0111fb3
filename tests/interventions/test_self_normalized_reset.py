"""Check SelfNormalizedReset against its rule in NumPy: it resets units with unusually long silences only."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import SelfNormalizedReset
from lightning_plasticity.interventions.self_normalized_reset import _buckets
from tests.helpers.unit_models import TwoHeads


def echo(units: int) -> nn.Sequential:
    """Build a network whose unit ``i`` equals input ``i``."""
    model = nn.Sequential(nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(units))
        model[0].bias.zero_()
    return model


def started(model: nn.Module, intervention: SelfNormalizedReset, shape: tuple[int, ...]) -> SelfNormalizedReset:
    intervention.start(model, forward=lambda model: model(torch.ones(shape)))
    return intervention


def step(model: nn.Module, intervention: SelfNormalizedReset, *batches: Tensor) -> dict[str, list[int]]:
    for x in batches:
        model(x)
    report = intervention.after_step(model)
    return {} if report is None else {layer: units.tolist() for layer, units in report.units.items()}


class ByHand:
    """Apply the rule to one unit, with a plain list of its silences."""

    def __init__(self, rejection: float, cap: int) -> None:
        self.rejection, self.cap = rejection, cap
        self.silence, self.past = 0, list[int]()

    def step(self, fires: bool, samples: int) -> bool:
        if fires:
            self.past += [self.silence] if self.silence else []
            self.silence = 0
            return False
        self.silence += samples
        longer = sum(past >= self.silence for past in self.past)
        if (1 + longer) / (1 + len(self.past)) <= self.rejection or self.silence >= self.cap:
            self.silence, self.past = 0, []
            return True
        return False


@settings(max_examples=30, deadline=None)
@given(
    units=st.integers(1, 6),
    rejection=st.sampled_from([0.02, 0.1, 0.25, 0.5]),
    cap=st.sampled_from([5, 14, 1000]),
    batch=st.integers(1, 3),
    rate=st.floats(0.02, 0.9),
    seed=st.integers(0, 2**31),
)
def test_training_equals_the_rule_in_numpy(
    units: int, rejection: float, cap: int, batch: int, rate: float, seed: int
) -> None:
    """Silences stay below 14 samples where buckets are exact, or above the cap."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = echo(units)
    intervention = started(model, SelfNormalizedReset(rejection, cap, seed=seed), (2, units))
    rules = [ByHand(rejection, cap) for _ in range(units)]
    for _ in range(60):
        fires = rng.random((batch, units)) < rate
        fires |= np.array([rule.silence + batch > 13 and cap > 14 for rule in rules])
        x = torch.from_numpy(np.where(fires, rng.random((batch, units)) + 0.1, -rng.random((batch, units)))).float()
        expected = [i for i, rule in enumerate(rules) if rule.step(bool(fires[:, i].any()), batch)]
        assert step(model, intervention, x) == ({"0": expected} if expected else {})
        with torch.no_grad():
            # Units that were reset equal their inputs again.
            model[0].weight.copy_(torch.eye(units))
            model[0].bias.zero_()
        record = intervention.state_dict()["layers"]["0"]
        assert record["silence"].tolist() == [rule.silence for rule in rules]
        assert record["past silences"].sum(1).tolist() == [len(rule.past) for rule in rules]


FIRES, SILENT = torch.ones(1, 1), -torch.ones(1, 1)


def silences(*lengths: int) -> list[Tensor]:
    return [x for length in lengths for x in [*[SILENT] * length, FIRES]]


def run(intervention: SelfNormalizedReset, xs: list[Tensor]) -> list[int]:
    """Return the steps at which the one unit is reset."""
    model = echo(1)
    started(model, intervention, (2, 1))
    return [number for number, x in enumerate(xs) if step(model, intervention, x)]


def test_a_silence_must_exceed_the_percentile() -> None:
    """Of 9 silences of 3 and one more, a tenth may be as long: 3 is not enough, 4 is."""
    past = silences(*[3] * 9)
    assert run(SelfNormalizedReset(0.1), [*past, *[SILENT] * 5]) == [len(past) + 3]


def test_few_past_silences_never_reset() -> None:
    assert run(SelfNormalizedReset(0.1), [*silences(*[3] * 8), *[SILENT] * 200]) == []
    assert run(SelfNormalizedReset(0.1, cap=100), [*silences(*[3] * 8), *[SILENT] * 102]) == [8 * 4 + 99]


def test_each_unit_is_compared_with_itself() -> None:
    model = echo(2)
    intervention = started(model, SelfNormalizedReset(0.1), (2, 2))
    for _ in range(12):
        for number in range(8):
            x = torch.tensor([[1.0 if number % 2 else -1.0, 1.0 if number == 7 else -1.0]])
            assert step(model, intervention, x) == {}
    steps = [step(model, intervention, -torch.ones(1, 2)) for _ in range(9)]
    assert [number for number, resets in enumerate(steps) if resets] == [1, 7]
    assert steps[1] == {"0": [0]}
    assert steps[7] == {"0": [1]}


def test_first_pause_of_a_firing_unit_is_no_reset() -> None:
    assert run(SelfNormalizedReset(0.1), [*[FIRES] * 100, SILENT, SILENT, FIRES]) == []


def test_silence_is_counted_in_samples() -> None:
    model = echo(1)
    intervention = started(model, SelfNormalizedReset(cap=100), (2, 1))
    assert [step(model, intervention, SILENT.expand(40, 1)) for _ in range(3)] == [{}, {}, {"0": [0]}]


def test_one_sample_at_one_position_is_enough_to_fire() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1]).view(2, 1, 1, 1))
        model[0].bias.zero_()
    intervention = started(model, SelfNormalizedReset(), (2, 1, 3, 3))
    x = torch.zeros(4, 1, 3, 3)
    x[2, 0, 1, 1] = 1
    step(model, intervention, x)
    assert intervention.state_dict()["layers"]["0"]["silence"].tolist() == [0, 4]


def test_unit_fires_if_one_of_two_heads_reads_it() -> None:
    class Two(TwoHeads):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.trunk(x)
            return self.policy(torch.relu(h)), self.value(torch.relu(-h))

    model = Two()
    with torch.no_grad():
        model.trunk.weight.zero_()
        model.trunk.bias.copy_(torch.tensor([1.0, -1, 0, 1, -1, 0]))
    intervention = started(model, SelfNormalizedReset(), (2, 4))
    step(model, intervention, torch.ones(3, 4))
    assert intervention.state_dict()["layers"]["trunk"]["silence"].tolist() == [0, 0, 3, 0, 0, 3]


def test_micro_batches_are_one_step() -> None:
    models = [echo(2), echo(2)]
    interventions = [started(model, SelfNormalizedReset(), (2, 2)) for model in models]
    parts = [torch.tensor([[1.0, -1], [-1, -1]]), torch.tensor([[-1.0, -1]])]
    step(models[0], interventions[0], *parts)
    step(models[1], interventions[1], torch.cat(parts))
    records = [intervention.state_dict()["layers"]["0"] for intervention in interventions]
    assert records[0]["silence"].tolist() == records[1]["silence"].tolist() == [0, 3]


def test_false_reset_rate_is_at_most_the_rejection_level() -> None:
    generator = torch.Generator().manual_seed(0)
    model = echo(400)
    intervention = started(model, SelfNormalizedReset(0.02), (2, 400))
    resets = ended = 0
    for _ in range(600):
        x = (torch.rand(1, 400, generator=generator) < 0.5).float() - 0.5
        silent = intervention.state_dict()["layers"]["0"]["silence"] > 0
        ended += int((silent & (x[0] > 0)).sum())
        units = step(model, intervention, x).get("0", [])
        resets += len(units)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(400))
            model[0].bias.zero_()
    assert 0.002 < resets / (ended + resets) <= 0.02


@pytest.mark.parametrize("cap", [1, 2, 13, 100, 20_000, 10**6])
def test_buckets_are_exact_below_14_and_narrow_beyond(cap: int) -> None:
    starts = _buckets(cap).tolist()
    assert starts[:13] == list(range(1, min(cap, 13) + 1))
    assert starts == sorted(set(starts))
    assert starts[-1] <= cap
    for start, following in zip(starts, [*starts[1:], cap + 1], strict=True):
        assert (following - 1) / start < 1.1, "the longest silence of a bucket is at most that much longer"


def test_memory_is_bounded() -> None:
    intervention = started(echo(3), SelfNormalizedReset(), (2, 3))
    assert intervention.state_dict()["layers"]["0"]["past silences"].shape == (3, 97)


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"SelfNormalizedReset\(rejection=0\) must be in \(0, 1\)"):
        SelfNormalizedReset(0)
    with pytest.raises(ValueError, match=r"SelfNormalizedReset\(cap=0\) must be a whole number, at least 1"):
        SelfNormalizedReset(cap=0)
    with pytest.raises(ValueError, match=r"SelfNormalizedReset\(cap=20000.0\) must be a whole number, at least 1"):
        SelfNormalizedReset(cap=2e4)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_are_no_silence(value: float) -> None:
    model = echo(3)
    intervention = started(model, SelfNormalizedReset(cap=2), (1, 3))
    state = intervention.state_dict()
    for _ in range(3):
        with pytest.warns(UserWarning, match="is skipped, values are not finite"):
            assert step(model, intervention, torch.full((1, 3), value)) == {}
    torch.testing.assert_close(intervention.state_dict(), state, rtol=0, atol=0)
