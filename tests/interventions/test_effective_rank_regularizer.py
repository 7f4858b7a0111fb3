"""Check the ascent on the effective rank: its gradient, its features, and what it leaves unchanged."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning
from lightning_plasticity.functional import effective_rank
from lightning_plasticity.interventions import L2ER, EffectiveRankRegularizer, Regularizer, StepIntervention
from tests.helpers.processes import in_two_processes
from tests.helpers.unit_models import MODELS, Encoder, Functional, Gru, Model, ResNet


def mlp(seed: int = 0, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(4, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3)),
    ).double()


def inputs(samples: int = 20, seed: int = 0) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x)


def rank(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_rank(weights: list[np.ndarray], x: np.ndarray, phi: Callable[[np.ndarray], np.ndarray]) -> float:
    """Compute the mean effective rank of the two hidden layers of :func:`mlp` in NumPy."""
    first = phi(x @ weights[0].T + weights[1])
    return (rank(first) + rank(phi(first @ weights[2].T + weights[3]))) / 2


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


PHI: dict[str, tuple[Callable[[], nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "relu": (nn.ReLU, relu),
    "tanh": (nn.Tanh, np.tanh),
}


def arrays(model: nn.Module) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


# The step


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("samples", [20, 5], ids=["more samples than units", "fewer"])
def test_the_step_is_plain_ascent_along_finite_differences(activation: str, samples: int) -> None:
    make, phi = PHI[activation]
    model, x = mlp(activation=make), inputs(samples)
    before = arrays(model)
    EffectiveRankRegularizer(learning_rate=1e-2, every_n_samples=1).after_step(model, forward=on(x))
    for index, (old, new) in enumerate(zip(before, arrays(model), strict=True)):
        for entry in np.ndindex(old.shape):
            values = []
            for sign in (1, -1):
                changed = [weights.copy() for weights in before]
                changed[index][entry] += sign * 1e-6
                values.append(mean_rank(changed, x.numpy(), phi))
            slope = (values[0] - values[1]) / 2e-6
            assert new[entry] - old[entry] == pytest.approx(1e-2 * slope, rel=1e-4, abs=1e-9), (index, entry)


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 12), seed=st.integers(0, 2**31), activation=st.sampled_from(sorted(PHI)))
def test_the_penalty_is_minus_the_mean_effective_rank(samples: int, seed: int, activation: str) -> None:
    make, phi = PHI[activation]
    model, x = mlp(seed, make), inputs(samples, seed)
    penalty = EffectiveRankRegularizer().rank_penalty(model, on(x), coefficient=0.3).item()
    expected = 0.0
    h = x.numpy()
    weights = arrays(model)
    for layer in range(2):
        h = phi(h @ weights[2 * layer].T + weights[2 * layer + 1])
        expected += rank(h) / 2 if h.any() else 0.0
    assert penalty == pytest.approx(-0.3 * expected, rel=1e-6)
    assert -0.3 * min(samples, 7) <= penalty <= 0


def test_the_gradient_of_the_penalty_passes_gradcheck() -> None:
    x = inputs(9)

    def penalty(weight: Tensor) -> Tensor:
        model = mlp(activation=nn.Tanh)
        return EffectiveRankRegularizer().rank_penalty(
            model, lambda model: torch.func.functional_call(model, {"0.weight": weight}, x)
        )

    assert torch.autograd.gradcheck(penalty, mlp()[0].weight.detach().requires_grad_())


def test_step_uses_all_pending_minibatches_and_current_weights() -> None:
    model, batches = mlp(), [inputs(8, seed) for seed in range(6)]
    other_model = copy.deepcopy(model)
    intervention = EffectiveRankRegularizer(learning_rate=0.1, every_n_samples=20)
    other = EffectiveRankRegularizer(learning_rate=0.1, every_n_samples=1)
    for number, x in enumerate(batches):
        before = arrays(model)
        # Stand in for an optimizer step.
        with torch.no_grad():
            for parameter in (*model.parameters(), *other_model.parameters()):
                parameter.mul_(0.99)
        scaled = arrays(model)
        intervention.after_step(model, forward=on(x))
        stepped = any((old != new).any() for old, new in zip(scaled, arrays(model), strict=True))
        assert stepped == (number in (2, 5)), "8 + 8 + 8 ≥ 20"
        assert any((old != new).any() for old, new in zip(before, arrays(model), strict=True))
        if stepped:
            other.after_step(other_model, forward=on(torch.cat(batches[number - 2 : number + 1])))
            torch.testing.assert_close(model.state_dict(), other_model.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_closures_keep_the_inputs_of_their_iteration(scope: str) -> None:
    """Unbound closures are called after the loop and would all use the last inputs."""
    batches, results = [inputs(10, seed) for seed in range(3)], []
    loop = (
        "for x in batches:\n    intervention.after_step(model, forward=lambda model, *, factor=1: model(factor * x))\n"
    )
    local: dict[str, Any] = {}
    exec("def run(batches, intervention, model):\n    " + loop.replace("\n", "\n    "), local)
    for run in ("as written", "bound"):
        model, intervention = mlp(), EffectiveRankRegularizer(0.1, 30)
        if run == "bound":
            for batch in batches:
                intervention.after_step(model, forward=on(batch))
        elif scope == "local":
            local["run"](batches, intervention, model)
        else:
            exec(loop, {"batches": batches, "intervention": intervention, "model": model})
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_few_steps_raise_the_effective_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 16) @ torch.diag(torch.tensor([1.0] * 3 + [0.05] * 13))

    def ranks() -> list[float]:
        with torch.no_grad():
            return [effective_rank(model[:count](x)).item() for count in (2, 4)]

    intervention, before = EffectiveRankRegularizer(learning_rate=1e-2, every_n_samples=64), ranks()
    for _ in range(30):
        intervention.after_step(model, forward=on(x))
    assert all(new > old + 1 for old, new in zip(before, ranks(), strict=True))


def test_the_gradient_is_clipped_where_features_are_small() -> None:
    """The gradient grows as 1 / ‖F‖."""
    model, x = mlp(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-5)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for max_norm, expected in ((0.5, 0.05), (float("inf"), None)):
        trial = copy.deepcopy(model)
        EffectiveRankRegularizer(0.1, 1, max_norm).after_step(trial, forward=on(x))
        moved = (torch.nn.utils.parameters_to_vector(trial.parameters()) - before).norm().item()
        assert moved == pytest.approx(expected, rel=1e-9) if expected else moved > 1e3


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e-30])
def test_features_that_vanish_give_no_nan(scale: float) -> None:
    model, x = mlp(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    before = arrays(model)
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
    after = arrays(model)
    assert all(np.isfinite(array).all() for array in after)
    if scale == 0:
        assert all((old == new).all() for old, new in zip(before, after, strict=True))


def test_dead_or_rank_deficient_layers_give_finite_gradients() -> None:
    """The derivative of p log p is infinite at p = 0."""
    model, x = mlp(), inputs()
    with torch.no_grad():
        # Make three units dead, and two others equal.
        model[0].bias[:3] = -100
        model[2].weight[1] = model[2].weight[0]
        model[2].bias[1] = model[2].bias[0]
    dead = model[0].weight[:3].detach().clone()
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
    assert all(np.isfinite(array).all() for array in arrays(model))
    assert torch.equal(model[0].weight[:3], dead), "documented: dead units get no gradient"
    with torch.no_grad():
        model[2].bias.fill_(-100)
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
    assert all(np.isfinite(array).all() for array in arrays(model))


# Unchanged state


def test_optimizer_state_and_gradients_are_unchanged() -> None:
    model, x = mlp(), inputs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    state, grads = (
        copy.deepcopy(optimizer.state_dict()),
        [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
    )
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    before = arrays(model)
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, [optimizer], forward=on(x))
    assert any((old != new).any() for old, new in zip(before, arrays(model), strict=True))
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_buffers_modes_hooks_and_random_numbers_are_unchanged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3))
    model[1].eval()
    x = torch.randn(16, 4)
    buffers, state = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    intervention = EffectiveRankRegularizer(every_n_samples=1)
    intervention.after_step(model, forward=on(x))
    intervention.rank_penalty(model, on(x)).backward()
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_parameters_stay() -> None:
    model, x = mlp(), inputs()
    model[0].requires_grad_(False)
    frozen = arrays(model[0])
    moving = arrays(model[2])
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
    assert all((old == new).all() for old, new in zip(frozen, arrays(model[0]), strict=True))
    assert all((old != new).any() for old, new in zip(moving, arrays(model[2]), strict=True))
    # No feature depends on the head.
    for trainable in (model[4], None):
        model.requires_grad_(False)
        if trainable is not None:
            trainable.requires_grad_(True)
        before = arrays(model)
        reason = "'0', '2', '4': frozen" if trainable is None else "features depend on no parameter"
        with pytest.warns(PlasticityWarning, match=f"EffectiveRankRegularizer rests, since Sequential .*{reason}"):
            EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
        assert all((old == new).all() for old, new in zip(before, arrays(model), strict=True))


def test_only_the_copy_is_run() -> None:
    model, x = mlp(), inputs()
    other_model = copy.deepcopy(model)

    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    copies: list[nn.Module] = []

    def make_copy() -> nn.Module:
        copies.append(copy.deepcopy(other_model).requires_grad_())
        copies[-1].load_state_dict(model.state_dict())
        return copies[-1]

    model.register_forward_pre_hook(fail)
    EffectiveRankRegularizer(0.1, 1).after_step(model, forward=on(x), make_copy=make_copy)
    EffectiveRankRegularizer(0.1, 1).after_step(other_model, forward=on(x))
    torch.testing.assert_close(model.state_dict(), other_model.state_dict(), rtol=0, atol=0)
    assert copies


def test_it_is_deterministic() -> None:
    results = []
    for seed in range(2):
        model, intervention = mlp(), EffectiveRankRegularizer(0.1, 30)
        torch.manual_seed(seed)
        for number in range(6):
            intervention.after_step(model, forward=on(inputs(10, number)))
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0, atol=0)


# Selection of features


@pytest.mark.parametrize(
    ("build", "shape", "layers"),
    [
        (Functional, (8, 4), {"first": (8, 5), "second": (8, 6)}),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)),
            (5, 1, 4, 4),
            {"0": (45, 3)},
        ),
        (Gru, (3, 5, 4), {"inputs": (15, 6), "gru": (15, 5), "hidden": (3, 7)}),
    ],
)
def test_features_are_outputs_of_activations_that_feed_a_layer(
    build: Callable[[], nn.Module], shape: tuple[int, ...], layers: dict[str, tuple[int, int]]
) -> None:
    from lightning_plasticity.activations.features import hidden_features

    x = torch.randn(*shape)
    features, samples = hidden_features(build(), on(x))
    assert {name: tuple(torch.cat(rows).shape) for name, rows in features.items()} == layers
    assert samples == len(x)
    assert all(rows.requires_grad for several in features.values() for rows in several)


def test_features_are_recorded_before_in_place_changes() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(self.first(x))
            h += 100
            return self.second(h)

    model, x = InPlace(), torch.randn(20, 4)
    expected = effective_rank(F.relu(model.first(x)).detach()).item()
    assert EffectiveRankRegularizer().rank_penalty(model, on(x), 1).item() == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize("build", [Encoder, ResNet, Gru])
def test_the_step_works_on_real_networks(build: Callable[[], nn.Module]) -> None:
    shapes = {Encoder: (6, 5), ResNet: (4, 3, 8, 8), Gru: (6, 5, 4)}
    torch.manual_seed(0)
    model, x = build(), torch.randn(*shapes[build])  # type: ignore[index]
    intervention = EffectiveRankRegularizer(learning_rate=1e-4, every_n_samples=4)
    before = intervention.rank_penalty(model, on(x), 1).item()
    intervention.after_step(model, forward=on(x[:4]))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    for _ in range(3):
        intervention.after_step(model, forward=on(x))
    assert intervention.rank_penalty(model, on(x), 1).item() < before


@pytest.mark.parametrize(
    "case", [case for case in MODELS if case.name in ("shared", "gated", "two heads", "depthwise")]
)
def test_the_step_leaves_finite_weights_on_all_kinds_of_models(case: Model) -> None:
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(*case.shape)
    EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(x))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# State and processes


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Save between two windows: pending minibatches are not saved."""
    model, intervention = mlp(), EffectiveRankRegularizer(0.1, 20)
    for number in range(4):
        intervention.after_step(model, forward=on(inputs(10, number)))
    torch.save([model.state_dict(), intervention.state_dict()], tmp_path / "checkpoint")
    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed, restored = mlp(seed=1), EffectiveRankRegularizer(0.1, 20)
    resumed.load_state_dict(weights)
    restored.load_state_dict(state)
    for number in range(4, 9):
        intervention.after_step(model, forward=on(inputs(10, number)))
        restored.after_step(resumed, forward=on(inputs(10, number)))
        torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert restored.state_dict() == intervention.state_dict() == {"samples_per_batch": 10.0}


def test_stop_discards_pending_minibatches() -> None:
    model, intervention = mlp(), EffectiveRankRegularizer(0.1, 20)
    intervention.after_step(model, forward=on(inputs(10, 0)))
    intervention.stop()
    before = arrays(model)
    intervention.after_step(model, forward=on(inputs(10, 1)))
    assert all((old == new).all() for old, new in zip(before, arrays(model), strict=True))


def _weights_of(process: int) -> dict[str, Any]:
    model = mlp(activation=nn.Tanh)
    intervention = EffectiveRankRegularizer(0.1, 14)
    for number in range(2):
        # Uneven minibatches, 6 and 8: 7 on average, so that both processes step after two.
        intervention.after_step(model, forward=on(inputs(6 + 2 * process, number + 2 * process)))
    assert dist.get_world_size() == 2
    return dict(model.state_dict())


def test_ranks_average_gradients_and_stay_equal() -> None:
    first, second = in_two_processes(_weights_of)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    steps = []
    for process in range(2):
        alone = mlp(activation=nn.Tanh)
        x = torch.cat([inputs(6 + 2 * process, number + 2 * process) for number in range(2)])
        EffectiveRankRegularizer(0.1, 1).after_step(alone, forward=on(x))
        steps.append(alone.state_dict())
    mean = {name: (steps[0][name] + steps[1][name]) / 2 for name in first}
    torch.testing.assert_close(first, mean, rtol=1e-9, atol=1e-12)


# L2-ER


def test_l2er_is_a_step_intervention_and_a_regularizer() -> None:
    intervention = L2ER(learning_rate=0.1, weight_decay=0.5, every_n_samples=20)
    assert isinstance(intervention, Regularizer)
    assert isinstance(intervention, StepIntervention)
    model, other_model, x = mlp(), mlp(), inputs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    other = torch.optim.Adam(other_model.parameters(), lr=1e-2, weight_decay=0.5)
    rank_only = EffectiveRankRegularizer(0.1, 20)
    intervention.start(model)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x).square().mean() + intervention.penalty(model)).backward()
        optimizer.step()
        intervention.after_step(model, [optimizer], forward=on(x))
        other.zero_grad()
        other_model(x).square().mean().backward()
        other.step()
        rank_only.after_step(other_model, forward=on(x))
    torch.testing.assert_close(model.state_dict(), other_model.state_dict(), rtol=1e-9, atol=1e-12)
    assert intervention.state_dict() == rank_only.state_dict()
    restored = L2ER()
    restored.load_state_dict(intervention.state_dict())
    assert restored.state_dict() == intervention.state_dict()
    intervention.stop()


# Errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EffectiveRankRegularizer(-1), r"EffectiveRankRegularizer\(learning_rate=-1\) must be a finite number"),
        (
            lambda: EffectiveRankRegularizer(every_n_samples=0),
            r"\(every_n_samples=0\) must be a whole number, at least 1",
        ),
        (lambda: EffectiveRankRegularizer(every_n_samples=2.5), r"\(every_n_samples=2.5\) must be a whole number"),
        (
            lambda: EffectiveRankRegularizer(max_norm=0),
            r"\(max_norm=0\) must be greater than 0: float\('inf'\) never clips",
        ),
        (lambda: L2ER(max_norm=0), r"L2ER\(max_norm=0\) must be greater than 0"),
        (
            lambda: EffectiveRankRegularizer().after_step(mlp()),
            r"needs a forward pass of the model: after_step\(model, forward=",
        ),
        (
            lambda: EffectiveRankRegularizer(every_n_samples=1).after_step(mlp(), forward=on(inputs() * torch.nan)),
            "the features of '0' hold NaN or infinite numbers",
        ),
    ],
)
def test_wrong_and_missing_arguments_raise(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_failed_step_changes_neither_weights_nor_hooks() -> None:
    model, before = mlp(), arrays(mlp())
    with pytest.raises(ValueError, match="NaN"):
        EffectiveRankRegularizer(every_n_samples=1).after_step(model, forward=on(inputs() * torch.nan))
    assert all((old == new).all() for old, new in zip(before, arrays(model), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_failed_step_discards_its_minibatches() -> None:
    regularizer, expected = (EffectiveRankRegularizer(every_n_samples=1) for _ in range(2))
    model, other_model = mlp(), mlp()
    with pytest.raises(ValueError, match="NaN"):
        regularizer.after_step(model, forward=on(inputs() * torch.nan))
    for either, network in ((regularizer, model), (expected, other_model)):
        either.after_step(network, forward=on(inputs()))
    assert all((one == other).all() for one, other in zip(arrays(model), arrays(other_model), strict=True))


def test_without_features_it_rests_and_l2_goes_on() -> None:
    reason = "called no activation function of Linear whose results feed another layer"
    model, x = nn.Linear(4, 2), inputs().float()
    before = arrays(model)
    for regularizer, message in (
        (EffectiveRankRegularizer(every_n_samples=1), "EffectiveRankRegularizer rests, since Linear has nothing"),
        (L2ER(every_n_samples=1, weight_decay=2), "L2ER adds its L2 penalty alone to Linear: "),
    ):
        with pytest.warns(PlasticityWarning, match=f"{message}.*{reason}"):
            regularizer.after_step(model, forward=on(x))
        if isinstance(regularizer, L2ER):
            squares = sum((value**2).sum() for value in before)
            assert regularizer.penalty(model).item() == pytest.approx(squares, rel=1e-6)
        # Another warning would fail the test.
        regularizer.after_step(model, forward=on(x))
    assert all((old == new).all() for old, new in zip(before, arrays(model), strict=True))
