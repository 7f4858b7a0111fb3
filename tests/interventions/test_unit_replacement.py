"""Check interventions that replace units in training: recorded calls, unchanged state, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning
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


def started(intervention: UnitReplacement, model: nn.Module) -> UnitReplacement:
    intervention.start(model, forward=lambda model: model(batch(-1)))
    return intervention


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    optimizer.zero_grad()
    for x in batches:
        (model(x) - 1).square().mean().backward()
    optimizer.step()


def units_of(report: Any) -> dict[str, list[int]]:
    return {} if report is None else {layer: units.tolist() for layer, units in report.units.items()}


def replaced(
    model: nn.Module, intervention: UnitReplacement, optimizer: torch.optim.Optimizer, steps: range
) -> list[dict[str, list[int]]]:
    units_by_step = []
    for number in steps:
        train(model, optimizer, batch(number))
        units_by_step.append(units_of(intervention.after_step(model, [optimizer])))
    return units_by_step


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@EVERY
def test_training_resumes_bit_for_bit(make: Callable[..., UnitReplacement]) -> None:
    """The state holds ages, utilities, counters and random numbers."""
    model, intervention = mlp(), make()
    started(intervention, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    first = replaced(model, intervention, optimizer, range(25))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), intervention.state_dict()], file)
    file.seek(0)
    weights, moments, state = torch.load(file, weights_only=True)
    other_model, resumed = mlp(1), make()
    other_model.load_state_dict(weights)
    other_optimizer = torch.optim.Adam(other_model.parameters(), lr=0.05)
    other_optimizer.load_state_dict(moments)
    resumed.load_state_dict(state)
    started(resumed, other_model)
    later = [
        replaced(*each, range(25, 60))
        for each in ((model, intervention, optimizer), (other_model, resumed, other_optimizer))
    ]
    assert later[0] == later[1]
    assert any(first)
    assert any(later[0])
    same(model.state_dict(), other_model.state_dict())
    same(intervention.state_dict(), resumed.state_dict())


@EVERY
def test_state_can_be_loaded_after_start(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced(model, started(intervention, model), optimizer, range(20))
    other = started(make(), model)
    model(batch(0))
    other.load_state_dict(intervention.state_dict())
    same(other.state_dict(), intervention.state_dict())
    assert other.after_step(model) is None, "loading discards recorded statistics"
    same(other.state_dict(), intervention.state_dict())


@EVERY
def test_stop_removes_every_hook(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    started(intervention, model)
    assert any(module._forward_pre_hooks for module in model.modules())
    intervention.stop()
    intervention.stop()
    for module in model.modules():
        hooks = [value for name, value in vars(module).items() if name.endswith("_hooks") or "_hooks_" in name]
        assert not any(hooks)


@EVERY
def test_starting_again_keeps_the_records_and_the_hooks(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced(model, started(intervention, model), optimizer, range(10))
    state = intervention.state_dict()
    for again in (
        lambda: started(intervention, model),
        lambda: intervention.start(model),
        intervention.stop,
        lambda: intervention.start(model),
    ):
        again()
        num_hooks = 0 if again == intervention.stop else 2
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == num_hooks
        same(intervention.state_dict(), state)


@EVERY
def test_restart_follows_the_head_in_use(make: Callable[..., UnitReplacement]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads, self.task = nn.Linear(3, 6), nn.ModuleList([nn.Linear(6, 2) for _ in range(2)]), 0

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.task](self.trunk(x).relu())

    model, intervention, x = Heads(), make(), torch.randn(4, 3)
    for task in (0, 1):
        model.task = task
        intervention.start(model, forward=lambda model: model(x))
        assert [len(head._forward_pre_hooks) for head in model.heads] == [task == 0, task == 1]


class GrowingHeads(nn.Module):
    """Has one head with hidden units per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.task = nn.Linear(4, 6), 0
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 2)) for n in (5, 7)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.task](self.trunk(x).relu())


@EVERY
@pytest.mark.parametrize("from_state", [False, True])
def test_units_of_another_head_are_drawn_and_resumed(make: Callable[..., UnitReplacement], from_state: bool) -> None:
    def run(resume: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = GrowingHeads()
        with torch.no_grad():
            for head in model.heads:
                head[0].bias[0] = -100
        initial = copy.deepcopy(model.state_dict()) if from_state else None
        intervention = make(initial=initial)
        optimizer = torch.optim.Adam(model.parameters())
        units = set()
        for task in (0, 1):
            model.task = task
            if resume and task:
                state, intervention = intervention.state_dict(), make(initial=initial)
                intervention.load_state_dict(state)
            started(intervention, model)
            for number in range(30):
                units |= set(replaced(model, intervention, optimizer, range(number, number + 1))[0])
        assert {"heads.0.0", "heads.1.0"} <= units
        return [parameter.detach() for parameter in model.parameters()]

    same(run(resume=False), run(resume=True))


@EVERY
def test_units_of_a_grown_layer_are_drawn(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    for width in (12, 20):
        model[0], model[2] = nn.Linear(4, width), nn.Linear(width, 10)
        with torch.no_grad():
            model[0].bias[-1] = -100
        optimizer = torch.optim.SGD(model.parameters(), lr=0)
        started(intervention, model)
        units_by_step = replaced(model, intervention, optimizer, range(60))
        assert any(width - 1 in units.get("0", []) for units in units_by_step)


@EVERY
def test_start_with_another_model_moves_the_hooks(make: Callable[..., UnitReplacement]) -> None:
    model, other, intervention = mlp(), mlp(1), make()
    started(intervention, model)
    started(intervention, other)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match=r"after_step\(model\) comes before start\(model, forward=lambda"):
        intervention.after_step(model)


@EVERY
def test_a_copy_may_be_traced_in_place_of_the_model(make: Callable[..., UnitReplacement]) -> None:
    model, seen, intervention = mlp(), [], make()
    intervention.start(model, forward=lambda model: (seen.append(model), model(batch(0)))[1], make_copy=lambda: mlp(1))
    assert model not in seen
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert any(replaced(model, intervention, optimizer, range(20)))


@EVERY
def test_missing_arguments_raise(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    with pytest.raises(RuntimeError, match=r"after_step\(model\) comes before start\(model, forward=lambda"):
        intervention.after_step(model)
    with pytest.raises(ValueError, match=r"needs a forward pass of the model: start\(model, forward=lambda"):
        intervention.start(model)


@EVERY
def test_model_without_units_lets_it_rest(make: Callable[..., UnitReplacement]) -> None:
    intervention, model = make(), nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(PlasticityWarning, match=r"rests, since Linear has nothing .*\(model\)': logits"):
        intervention.start(model, forward=lambda model: model(batch(0)))
    intervention.start(model, forward=lambda model: model(batch(0)))
    model(batch(0)).sum().backward()
    optimizer.step()
    assert intervention.after_step(model, [optimizer]) is None
    model = nn.Sequential(model, nn.ReLU(), nn.Linear(2, 1))
    intervention.start(model, forward=lambda model: model(batch(0)))
    assert intervention.rests_because is None


@EVERY
def test_only_training_is_recorded(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    started(intervention, model)
    state = intervention.state_dict()
    with torch.no_grad():
        model(batch(0))
    model.eval()
    model(batch(0))
    model.train()
    copy.deepcopy(model)(batch(0))
    model(torch.zeros(0, 4))
    assert intervention.after_step(model) is None
    same(intervention.state_dict(), state)


@EVERY
def test_hooks_that_never_run_raise(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp().eval(), make()
    started(intervention, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"recorded no activations .*torch\.compile.*torch\.compiler\.reset\(\).*model\.train\(\)"
    ):
        replaced(model, intervention, optimizer, range(2))
    replaced(model.train(), intervention, optimizer, range(2))


@EVERY
def test_steps_without_forward_passes_do_not_raise(make: Callable[..., UnitReplacement]) -> None:
    model, intervention, other = mlp(), make(), nn.Linear(4, 2)
    optimizers = [torch.optim.Adam(part.parameters()) for part in (model, other)]
    model(batch(0)).sum().backward()
    started(intervention, model)
    # The forward pass of this step was before the start.
    optimizers[0].step()
    intervention.after_step(model, optimizers)
    for number in range(4):
        train(other, optimizers[1], batch(number))
        intervention.after_step(model, optimizers)
    replaced(model, intervention, optimizers[0], range(4))
    for _ in range(4):
        # Step on the same gradients again.
        optimizers[0].step()
        intervention.after_step(model, optimizers)


@EVERY
def test_units_do_not_age_without_a_forward_pass(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    started(intervention, model)
    model(batch(0))
    intervention.after_step(model)
    state = intervention.state_dict()
    assert [intervention.after_step(model) for _ in range(5)] == [None] * 5
    same(intervention.state_dict(), state)


@EVERY
def test_micro_batches_are_one_batch(make: Callable[..., UnitReplacement]) -> None:
    """Micro-batches of different size: accumulated gradients, and steps that a gradient scaler skipped."""
    models = [mlp().double(), mlp().double()]
    interventions = [make(), make()]
    for intervention, model in zip(interventions, models, strict=True):
        intervention.start(model, forward=lambda model: model(batch(0).double()))
    for number in range(6):
        x = batch(number).double()
        models[0](x)
        for part in x.split([1, 3, 2]):
            models[1](part)
        units = [
            units_of(intervention.after_step(model)) for intervention, model in zip(interventions, models, strict=True)
        ]
        assert units[0] == units[1]
    torch.testing.assert_close(*[intervention.state_dict() for intervention in interventions], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("transfer_bias", [False, True])
def test_non_finite_values_are_passed_over(transfer_bias: bool) -> None:
    model = mlp()
    intervention = started(ContinualBackprop(0.1, 1, transfer_bias=transfer_bias), model)
    state = intervention.state_dict()
    model(batch(0) * torch.inf)
    with pytest.warns(UserWarning, match="is skipped, values are not finite"):
        after = [intervention.after_step(model), intervention.state_dict()]
    same(after, [None, state])


@EVERY
def test_gradients_and_global_random_numbers_are_unchanged(make: Callable[..., UnitReplacement]) -> None:
    model, intervention = mlp(), make()
    started(intervention, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    units_by_step = []
    for number in range(30):
        train(model, optimizer, batch(number))
        gradients = [parameter.grad for parameter in model.parameters()]
        values = [gradient.clone() for gradient in gradients]
        parameters, random = list(model.parameters()), torch.get_rng_state()
        units_by_step.append(units_of(intervention.after_step(model, [optimizer])))
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert all(a is b.grad for a, b in zip(gradients, model.parameters(), strict=True))
        assert all(map(torch.equal, gradients, values))
        assert torch.equal(torch.get_rng_state(), random)
    assert any(units_by_step)


@EVERY
def test_training_is_unchanged_until_a_replacement(make: Callable[..., UnitReplacement]) -> None:
    models = [mlp(), mlp()]
    intervention = started(make(), models[0])
    for number in range(30):
        for model in models:
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), batch(number))
        same(models[0].state_dict(), models[1].state_dict())
        if intervention.after_step(models[0]) is not None:
            break
    else:
        pytest.fail("nothing was replaced")


@EVERY
def test_all_or_nothing(make: Callable[..., UnitReplacement], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second of two optimizers fail, then try the same step again."""
    runs = []
    for fails in (False, True):
        model, intervention = mlp(), make()
        started(intervention, model)
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in (model[:2], model[2:])]
        units_by_step = []
        for number in range(30):
            for optimizer in optimizers:
                optimizer.zero_grad()
            (model(batch(number)) - 1).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
            if fails:
                before = copy.deepcopy(
                    [model.state_dict(), *[o.state_dict() for o in optimizers], intervention.state_dict()]
                )
                with monkeypatch.context() as patch:
                    patch.setattr(updates, "reset_state", failing(optimizers[1]))
                    try:
                        report = intervention.after_step(model, optimizers)
                    except RuntimeError:
                        same(
                            [model.state_dict(), *[o.state_dict() for o in optimizers], intervention.state_dict()],
                            before,
                        )
                    else:
                        units_by_step.append(units_of(report))
                        continue
            units_by_step.append(units_of(intervention.after_step(model, optimizers)))
        runs.append((units_by_step, model.state_dict(), intervention.state_dict()))
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
def test_new_weights_come_from_given_initial_ones(make: Callable[..., UnitReplacement]) -> None:
    model = mlp()
    intervention = make(initial={name: torch.full_like(value, 7) for name, value in model.state_dict().items()})
    started(intervention, model)
    for number in range(60):
        model(batch(number))
        if (report := intervention.after_step(model)) is not None:
            break
    for layer, units in report.units.items():
        assert (model.get_parameter(f"{layer}.bias")[units] == 7).all()


DYING = [model for model in MODELS if model.name in ("mlp", "conv, flatten", "two heads", "resnet", "transformer")]


@pytest.mark.parametrize("case", DYING, ids=lambda case: case.name)
@EVERY
def test_replacing_dead_units_keeps_the_output_bit_equal(case: Any, make: Callable[..., UnitReplacement]) -> None:
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
    intervention = make()
    intervention.start(model, forward=lambda model: model(x))
    state = intervention.state_dict()
    # One unit is due.
    for layer, record in state["layers"].items():
        if "counter" in record:
            record["age"] = record["age"] + 5
            record["counter"] = torch.tensor(1.01 - 0.1 * units.groups[layer].num_units, dtype=torch.float64)
        else:
            record["silence"][1] = 40
    intervention.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    outputs = model(x)
    sum(y.square().mean() for y in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    optimizer.step()
    model.eval()
    before = model(x)
    replaced_units = units_of(intervention.after_step(model, [optimizer]))
    assert replaced_units == {layer: [1] for layer in case.groups}
    same(model(x), before)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.SiLU])
def test_never_silent_units_are_replaced_by_utility_only(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3] = 1e-4
    interventions = [ContinualBackprop(1 / 6, 0), SelfNormalizedReset(0.5, 20)]
    units_by_step = []
    for intervention in interventions:
        started(intervention, model)
        model(batch(0, 64))
        units_by_step.append(units_of(intervention.after_step(model)))
        intervention.stop()
    assert units_by_step == [{"0": [3]}, {}]


def test_sequences_are_recorded_at_all_positions() -> None:
    model = mlp()
    intervention = started(ContinualBackprop(0.0, 0, 0.0), model)
    x = torch.randn(3, 5, 4)
    model(x)
    intervention.after_step(model)
    h = model[1](model[0](x)).flatten(0, 1).double()
    expected = h.mean(0) * model[2].weight.double().abs().sum(0)
    torch.testing.assert_close(
        intervention.state_dict()["layers"]["0"]["utility"], expected.detach(), rtol=1e-5, atol=0
    )


def one_of_two(rank: int) -> Any:
    """Decide alike on different data; one rank makes no forward pass at one step."""
    results = []
    for make in MAKERS.values():
        model, intervention = mlp(), make()
        started(intervention, model)
        units_by_step = []
        for number in range(20):
            if rank == 0 or number != 7:
                model(batch(2 * number + rank, 3))
            units_by_step.append(units_of(intervention.after_step(model)))
        results.append([units_by_step, model.state_dict(), intervention.state_dict()])
    return results


@pytest.mark.slow
def test_two_ranks_decide_as_one_process_with_all_data() -> None:
    first, second = in_two_processes(one_of_two)
    same(first, second)
    for make, (units_by_step, _, _) in zip(MAKERS.values(), first, strict=True):
        model, intervention = mlp(), make()
        started(intervention, model)
        alone = []
        for number in range(20):
            ranks = (0,) if number == 7 else (0, 1)
            model(torch.cat([batch(2 * number + rank, 3) for rank in ranks]))
            alone.append(units_of(intervention.after_step(model)))
        assert alone == units_by_step
        assert any(units_by_step)
