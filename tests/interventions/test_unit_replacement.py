"""What remedies that recycle units during training have in common: when they listen, what they leave alone, state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity.interventions import ContinualBackprop, SelfNormalizedReset, describe_units
from lightning_plasticity.interventions.units.unit_replacement import UnitReplacement
from lightning_plasticity.interventions.weights import updates
from tests.helpers.interventions import select
from tests.helpers.processes import in_two_processes
from tests.helpers.unit_models import MODELS

MAKERS: dict[str, Callable[..., UnitReplacement]] = {
    **{row.name: row.make for row in select(UnitReplacement)},
    "ContinualBackprop, biases": partial(ContinualBackprop, 0.1, 1, transfer_bias=True),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def batch(number: int, size: int = 6) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(number))


def started(remedy: UnitReplacement, model: nn.Module) -> UnitReplacement:
    remedy.start(model, forward=lambda model: model(batch(-1)))
    return remedy


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    optimizer.zero_grad()
    for x in batches:
        (model(x) - 1).square().mean().backward()
    optimizer.step()


def units_of(report: Any) -> dict[str, list[int]]:
    return {} if report is None else {layer: units.tolist() for layer, units in report.units.items()}


def replaced(
    model: nn.Module, remedy: UnitReplacement, optimizer: torch.optim.Optimizer, steps: range
) -> list[dict[str, list[int]]]:
    found = []
    for number in steps:
        train(model, optimizer, batch(number))
        found.append(units_of(remedy.after_step(model, [optimizer])))
    return found


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@EVERY
def test_a_resumed_training_goes_on_bit_for_bit(make: Callable[..., UnitReplacement]) -> None:
    """peers 3.18: ages, utilities, counters, random numbers."""
    model, remedy = mlp(), make()
    started(remedy, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    first = replaced(model, remedy, optimizer, range(25))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), remedy.state_dict()], file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    twin, resumed = mlp(1), make()
    twin.load_state_dict(weights)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    twin_optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    started(resumed, twin)
    later = [replaced(*each, range(25, 60)) for each in ((model, remedy, optimizer), (twin, resumed, twin_optimizer))]
    assert later[0] == later[1]
    assert any(first)
    assert any(later[0])
    same(model.state_dict(), twin.state_dict())
    same(remedy.state_dict(), resumed.state_dict())


@EVERY
def test_state_may_be_loaded_after_the_start_too(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced(model, started(remedy, model), optimizer, range(20))
    other = started(make(), model)
    model(batch(0))
    other.load_state_dict(remedy.state_dict())
    same(other.state_dict(), remedy.state_dict())
    assert other.after_step(model) is None, "what was heard before is forgotten"
    same(other.state_dict(), remedy.state_dict())


@EVERY
def test_stop_takes_every_hook_away(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    started(remedy, model)
    assert any(module._forward_pre_hooks for module in model.modules())
    remedy.stop()
    remedy.stop()
    for module in model.modules():
        hooks = [value for name, value in vars(module).items() if name.endswith("_hooks") or "_hooks_" in name]
        assert not any(hooks)


@EVERY
def test_starting_again_keeps_the_records_and_the_hooks(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced(model, started(remedy, model), optimizer, range(10))
    state = remedy.state_dict()
    for again in (
        lambda: started(remedy, model),
        lambda: remedy.start(model),
        remedy.stop,
        lambda: remedy.start(model),
    ):
        again()
        listening = 0 if again == remedy.stop else 2
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == listening
        same(remedy.state_dict(), state)


@EVERY
def test_starting_again_notices_that_another_head_is_in_use(make: Callable[..., UnitReplacement]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads, self.task = nn.Linear(3, 6), nn.ModuleList([nn.Linear(6, 2) for _ in range(2)]), 0

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.task](self.trunk(x).relu())

    model, remedy, x = Heads(), make(), torch.randn(4, 3)
    for task in (0, 1):
        model.task = task
        remedy.start(model, forward=lambda model: model(x))
        assert [len(head._forward_pre_hooks) for head in model.heads] == [task == 0, task == 1]


class GrowingHeads(nn.Module):
    """Each task has a head of its own with hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.task = nn.Linear(4, 6), 0
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 2)) for n in (5, 7)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](self.trunk(x).relu())


@EVERY
@pytest.mark.parametrize("from_state", [False, True])
def test_units_of_another_head_are_drawn_for_it_and_resumed_bit_for_bit(
    make: Callable[..., UnitReplacement], from_state: bool
) -> None:
    def run(resume: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = GrowingHeads()
        with torch.no_grad():
            for head in model.heads:
                head[0].bias[0] = -100
        initial = copy.deepcopy(model.state_dict()) if from_state else None
        remedy = make(initial=initial)
        optimizer = torch.optim.Adam(model.parameters())
        units = set()
        for task in (0, 1):
            model.task = task
            if resume and task:
                state, remedy = remedy.state_dict(), make(initial=initial)
                remedy.load_state_dict(state)
            started(remedy, model)
            for number in range(30):
                units |= set(replaced(model, remedy, optimizer, range(number, number + 1))[0])
        assert {"heads.0.0", "heads.1.0"} <= units
        return [parameter.detach() for parameter in model.parameters()]

    same(run(resume=False), run(resume=True))


@EVERY
def test_units_of_a_layer_that_has_grown_are_drawn_for_it(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    for width in (12, 20):
        model[0], model[2] = nn.Linear(4, width), nn.Linear(width, 10)
        with torch.no_grad():
            model[0].bias[-1] = -100
        optimizer = torch.optim.SGD(model.parameters(), lr=0)
        started(remedy, model)
        found = replaced(model, remedy, optimizer, range(60))
        assert any(width - 1 in units.get("0", []) for units in found)


@EVERY
def test_another_model_is_watched_instead(make: Callable[..., UnitReplacement]) -> None:
    model, other, remedy = mlp(), mlp(1), make()
    started(remedy, model)
    started(remedy, other)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match=r"after_step\(model\) comes before start\(model, forward=lambda"):
        remedy.after_step(model)


@EVERY
def test_a_copy_may_be_traced_in_place_of_the_model(make: Callable[..., UnitReplacement]) -> None:
    model, seen, remedy = mlp(), [], make()
    remedy.start(model, forward=lambda model: (seen.append(model), model(batch(0)))[1], make_copy=lambda: mlp(1))
    assert model not in seen
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert any(replaced(model, remedy, optimizer, range(20)))


@EVERY
def test_what_is_missing_is_named(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    with pytest.raises(RuntimeError, match=r"after_step\(model\) comes before start\(model, forward=lambda"):
        remedy.after_step(model)
    with pytest.raises(ValueError, match=r"needs to see the model run: start\(model, forward=lambda"):
        remedy.start(model)
    with pytest.raises(ValueError, match=r"Linear has no units to reset \(.*logits: no layer reads it\)"):
        remedy.start(nn.Linear(4, 2), forward=lambda model: model(batch(0)))


@EVERY
def test_only_training_is_heard(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    started(remedy, model)
    state = remedy.state_dict()
    with torch.no_grad():
        model(batch(0))
    model.eval()
    model(batch(0))
    model.train()
    copy.deepcopy(model)(batch(0))
    model(torch.zeros(0, 4))
    assert remedy.after_step(model) is None
    same(remedy.state_dict(), state)


@EVERY
def test_layers_that_are_trained_unheard_are_an_error(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp().eval(), make()
    started(remedy, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"recorded no activations .*torch\.compile.*torch\.compiler\.reset\(\).*model\.train\(\)"
    ):
        replaced(model, remedy, optimizer, range(2))
    replaced(model.train(), remedy, optimizer, range(2))


@EVERY
def test_steps_of_others_and_of_before_the_start_are_no_deafness(make: Callable[..., UnitReplacement]) -> None:
    model, remedy, other = mlp(), make(), nn.Linear(4, 2)
    optimizers = [torch.optim.Adam(part.parameters()) for part in (model, other)]
    model(batch(0)).sum().backward()
    started(remedy, model)
    optimizers[0].step()  # of a forward pass before the start
    remedy.after_step(model, optimizers)
    for number in range(4):
        train(other, optimizers[1], batch(number))
        remedy.after_step(model, optimizers)
    replaced(model, remedy, optimizers[0], range(4))
    for _ in range(4):
        optimizers[0].step()  # on the same gradients
        remedy.after_step(model, optimizers)


@EVERY
def test_units_grow_no_older_without_a_forward_pass(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    started(remedy, model)
    model(batch(0))
    remedy.after_step(model)
    state = remedy.state_dict()
    assert [remedy.after_step(model) for _ in range(5)] == [None] * 5
    same(remedy.state_dict(), state)


@EVERY
def test_micro_batches_are_one_batch(make: Callable[..., UnitReplacement]) -> None:
    """Accumulated gradients, and steps that a gradient scaler skipped; parts of different size."""
    models = [mlp().double(), mlp().double()]
    remedies = [make(), make()]
    for remedy, model in zip(remedies, models, strict=True):
        remedy.start(model, forward=lambda model: model(batch(0).double()))
    for number in range(6):
        x = batch(number).double()
        models[0](x)
        for part in x.split([1, 3, 2]):
            models[1](part)
        units = [units_of(remedy.after_step(model)) for remedy, model in zip(remedies, models, strict=True)]
        assert units[0] == units[1]
    torch.testing.assert_close(*[remedy.state_dict() for remedy in remedies], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("transfer_bias", [False, True])
def test_values_that_are_not_finite_are_passed_over(transfer_bias: bool) -> None:
    model = mlp()
    remedy = started(ContinualBackprop(0.1, 1, transfer_bias=transfer_bias), model)
    state = remedy.state_dict()
    model(batch(0) * torch.inf)
    with pytest.warns(UserWarning, match="is passed over, values are not finite"):
        assert remedy.after_step(model) is None
    same(remedy.state_dict(), state)


@EVERY
def test_gradients_and_global_random_numbers_are_left_alone(make: Callable[..., UnitReplacement]) -> None:
    model, remedy = mlp(), make()
    started(remedy, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    found = []
    for number in range(30):
        train(model, optimizer, batch(number))
        gradients = [parameter.grad for parameter in model.parameters()]
        values = [gradient.clone() for gradient in gradients]
        parameters, random = list(model.parameters()), torch.get_rng_state()
        found.append(units_of(remedy.after_step(model, [optimizer])))
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert all(a is b.grad for a, b in zip(gradients, model.parameters(), strict=True))
        assert all(map(torch.equal, gradients, values))
        assert torch.equal(torch.get_rng_state(), random)
    assert any(found)


@EVERY
def test_until_something_is_replaced_training_is_as_without(make: Callable[..., UnitReplacement]) -> None:
    models = [mlp(), mlp()]
    remedy = started(make(), models[0])
    for number in range(30):
        for model in models:
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), batch(number))
        same(models[0].state_dict(), models[1].state_dict())
        if remedy.after_step(models[0]) is not None:
            break
    else:
        pytest.fail("nothing was replaced")


@EVERY
def test_all_or_nothing(make: Callable[..., UnitReplacement], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two optimizers fails; then the same step is tried again."""
    runs = []
    for fails in (False, True):
        model, remedy = mlp(), make()
        started(remedy, model)
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in (model[:2], model[2:])]
        found = []
        for number in range(30):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(batch(number)) - 1).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            if fails:
                before = copy.deepcopy([model.state_dict(), *[o.state_dict() for o in optimizers], remedy.state_dict()])
                with monkeypatch.context() as patch:
                    patch.setattr(updates, "reset_state", failing(optimizers[1]))
                    try:
                        report = remedy.after_step(model, optimizers)
                    except RuntimeError:
                        same([model.state_dict(), *[o.state_dict() for o in optimizers], remedy.state_dict()], before)
                    else:
                        found.append(units_of(report))
                        continue
            found.append(units_of(remedy.after_step(model, optimizers)))
        runs.append((found, model.state_dict(), remedy.state_dict()))
    assert any(runs[0][0])
    assert runs[0][0] == runs[1][0]
    same(runs[0][1:], runs[1][1:])


def failing(wrong: torch.optim.Optimizer) -> Callable[..., None]:
    clear = updates.reset_state

    def clear_or_fail(optimizer: torch.optim.Optimizer, renewed: Any) -> None:
        clear(optimizer, renewed)
        if optimizer is wrong:
            raise RuntimeError("injected")

    return clear_or_fail


@EVERY
def test_new_weights_come_from_the_initial_ones_where_they_are_given(make: Callable[..., UnitReplacement]) -> None:
    model = mlp()
    remedy = make(initial={name: torch.full_like(value, 7) for name, value in model.state_dict().items()})
    started(remedy, model)
    for number in range(60):
        model(batch(number))
        if (report := remedy.after_step(model)) is not None:
            break
    for layer, units in report.units.items():
        assert (model.get_parameter(f"{layer}.bias")[units] == 7).all()


DYING = [model for model in MODELS if model.name in ("mlp", "conv, flatten", "two heads", "resnet", "transformer")]


@pytest.mark.parametrize("case", DYING, ids=lambda case: case.name)
@EVERY
def test_recycling_dead_units_leaves_the_output_bit_equal(case: Any, make: Callable[..., UnitReplacement]) -> None:
    model, x = case.build(), torch.rand(case.shape)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    units = describe_units(model, lambda model: model(x))
    with torch.no_grad():
        for name in {name for site in units.groups.values() for name in site.incoming}:
            if name.endswith("bias"):
                model.get_parameter(name).fill_(30)[1] = -100
            elif name.endswith("weight"):
                model.get_parameter(name).mul_(0.01)
    remedy = make()
    remedy.start(model, forward=lambda model: model(x))
    state = remedy.state_dict()
    for layer, record in state["layers"].items():  # one unit is due
        if "counter" in record:
            record["age"] = record["age"] + 5
            record["counter"] = torch.tensor(1.01 - 0.1 * units.groups[layer].num_units, dtype=torch.float64)
        else:
            record["silence"][1] = 40
    remedy.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    outputs = model(x)
    sum(y.square().mean() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    optimizer.step()
    model.eval()
    before = model(x)
    found = units_of(remedy.after_step(model, [optimizer]))
    assert found == {layer: [1] for layer in case.groups}
    same(model(x), before)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.SiLU])
def test_units_that_are_never_silent_are_replaced_by_utility_only(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3] = 1e-4
    remedies = [ContinualBackprop(1 / 6, 0), SelfNormalizedReset(0.5, 20)]
    found = []
    for remedy in remedies:
        started(remedy, model)
        model(batch(0, 64))
        found.append(units_of(remedy.after_step(model)))
        remedy.stop()
    assert found == [{"0": [3]}, {}]


def test_sequences_are_heard_at_all_positions() -> None:
    model = mlp()
    remedy = started(ContinualBackprop(0.0, 0, 0.0), model)
    x = torch.randn(3, 5, 4)
    model(x)
    remedy.after_step(model)
    h = model[1](model[0](x)).flatten(0, 1).double()
    expected = h.mean(0) * model[2].weight.double().abs().sum(0)
    torch.testing.assert_close(remedy.state_dict()["layers"]["0"]["utility"], expected.detach(), rtol=1e-5, atol=0)


def one_of_two(rank: int) -> Any:
    """Different data, the same decisions; and one process hears nothing at all for a while."""
    results = []
    for make in MAKERS.values():
        model, remedy = mlp(), make()
        started(remedy, model)
        found = []
        for number in range(20):
            if rank == 0 or number != 7:
                model(batch(2 * number + rank, 3))
            found.append(units_of(remedy.after_step(model)))
        results.append([found, model.state_dict(), remedy.state_dict()])
    return results


@pytest.mark.slow
def test_two_processes_decide_alike_and_as_one_with_all_the_data() -> None:
    first, second = in_two_processes(one_of_two)
    same(first, second)
    for make, (found, _, _) in zip(MAKERS.values(), first, strict=True):
        model, remedy = mlp(), make()
        started(remedy, model)
        alone = []
        for number in range(20):
            ranks = (0,) if number == 7 else (0, 1)
            model(torch.cat([batch(2 * number + rank, 3) for rank in ranks]))
            alone.append(units_of(remedy.after_step(model)))
        assert alone == found
        assert any(found)
