"""Check UPGD against its rule in NumPy, with every kind of optimizer, and in a Trainer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import UPGD, ContinualBackprop
from tests.helpers.interventions_in_training import NEVER, ByFusedAdam
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, trainer
from tests.helpers.usages import half_precision

Arrays = dict[str, np.ndarray]
Step = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""Returns the step of an optimizer, to be subtracted, for a parameter of a name, from weights and gradient."""


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def arrays(model: nn.Module) -> Arrays:
    return {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}


def random_gradients(model: nn.Module, steps: int, seed: int = 0) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{name: rng.standard_normal(p.shape) for name, p in model.named_parameters()} for _ in range(steps)]


def set_gradients(model: nn.Module, gradients: Arrays) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = torch.from_numpy(gradients[name]).to(parameter)


class Rule:
    """The rule of the paper, from the formula."""

    def __init__(self, decay: float, noise: float, seed: int = 0) -> None:
        self.decay, self.noise = decay, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.utilities: Arrays = {}
        self.counts: dict[str, int] = {}

    def step(
        self, theta: Arrays, gradients: Arrays, step: Step, lr: float, weight_decay: float = 0.0, sign: int = -1
    ) -> None:
        for name, g in gradients.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            before = self.utilities.get(name, np.zeros_like(g))
            self.utilities[name] = self.decay * before + (1 - self.decay) * sign * g * theta[name]
        corrected = {name: u / (1 - self.decay ** self.counts[name]) for name, u in self.utilities.items()}
        largest = max(u.max() for u in corrected.values())
        if largest <= 0:
            largest = max(np.abs(u).max() for u in corrected.values())
        for name, g in gradients.items():
            useful = 1 / (1 + np.exp(-corrected[name] / largest))
            xi = torch.randn(g.shape, generator=self.generator, dtype=torch.float64).numpy() if self.noise else 0.0
            change = step(name, theta[name], g) + lr * self.noise * xi
            theta[name] = (1 - lr * weight_decay) * theta[name] - change * (1 - useful)


def compare(model: nn.Module, theta: Arrays, tolerance: float = 1e-12) -> None:
    for name, value in arrays(model).items():
        np.testing.assert_allclose(value, theta[name], rtol=tolerance, atol=tolerance)


# The rule


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_with_sgd_it_is_the_rule_of_the_paper(noise: float, weight_decay: float, maximize: bool) -> None:
    model, rule = network(), Rule(0.9, noise, seed=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=weight_decay, maximize=maximize)
    intervention, theta = UPGD(0.9, noise, seed=7), arrays(model)
    intervention.start(model, optimizers=[optimizer])
    descent = -1 if maximize else 1
    for gradients in random_gradients(model, 6):
        set_gradients(model, gradients)
        optimizer.step()
        assert intervention.after_step(model, optimizers=[optimizer]) is None
        rule.step(theta, gradients, lambda _, __, g: descent * 0.1 * g, 0.1, weight_decay, sign=-descent)
    compare(model, theta)


@pytest.mark.parametrize(("kind", "weight_decay"), [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.2)])
def test_with_adam_its_step_takes_the_place_of_the_gradient(kind: type[torch.optim.Adam], weight_decay: float) -> None:
    model, rule, moments = network(), Rule(0.99, 0.5), {}
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=weight_decay)
    intervention, theta = UPGD(0.99, 0.5), arrays(model)
    intervention.start(model, optimizers=[optimizer])

    def adam(name: str, _: np.ndarray, g: np.ndarray) -> np.ndarray:
        first, second = moments.get(name, (0.0, 0.0))
        moments[name] = first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        t = rule.counts[name]
        corrected = first / (1 - 0.9**t), second / (1 - 0.999**t)
        result: np.ndarray = 0.01 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        return result

    for gradients in random_gradients(model, 6):
        set_gradients(model, gradients)
        optimizer.step()
        intervention.after_step(model, optimizers=[optimizer])
        rule.step(theta, gradients, adam, 0.01, weight_decay)
    compare(model, theta, 1e-10)


def test_coupled_weight_decay_of_momentum_is_gated_with_the_step() -> None:
    model, rule, buffers = network(), Rule(0.9, 0.0), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    intervention, theta = UPGD(0.9, 0), arrays(model)
    intervention.start(model, optimizers=[optimizer])

    def momentum(name: str, weights: np.ndarray, g: np.ndarray) -> np.ndarray:
        buffers[name] = 0.9 * buffers.get(name, 0.0) + g + 0.3 * weights
        result: np.ndarray = 0.1 * buffers[name]
        return result

    for gradients in random_gradients(model, 5):
        set_gradients(model, gradients)
        optimizer.step()
        rule.step(theta, gradients, momentum, 0.1)
    compare(model, theta)


def test_memory_format_makes_no_difference() -> None:
    model, rule = nn.Sequential(nn.Conv2d(3, 7, 5), nn.Linear(6, 5)).double(), Rule(0.9, 1.0)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    intervention, theta = UPGD(0.9, 1.0), arrays(model)
    intervention.start(model, optimizers=[optimizer])
    for gradients in random_gradients(model, 2):
        set_gradients(model, gradients)
        optimizer.step()
        rule.step(theta, gradients, lambda _, __, g: 0.1 * g, 0.1)
    compare(model, theta)


def test_without_positive_utility_the_order_stays() -> None:
    model, optimizer, intervention = one_layer([1.0, 1.0, 1.0], lr=1.0)
    intervention.start(model, optimizers=[optimizer])
    # Each weight makes the loss larger.
    model.weight.grad = torch.tensor([[1.0, 4.0, 2.0]])
    optimizer.step()
    moved = (1 - model.weight.detach()) / torch.tensor([1.0, 4.0, 2.0])
    torch.testing.assert_close(moved, torch.sigmoid(torch.tensor([[0.25, 1.0, 0.5]])))


def test_zero_utilities_halve_the_step() -> None:
    model, optimizer, intervention = one_layer([0.0, 0.0, 0.0], lr=1.0)
    intervention.start(model, optimizers=[optimizer])
    model.weight.grad = torch.tensor([[1.0, 4.0, -2.0]])
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[-0.5, -2.0, 1.0]]))


def one_layer(weights: Sequence[float], lr: float) -> tuple[nn.Linear, torch.optim.Optimizer, UPGD]:
    model = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
    return model, torch.optim.SGD(model.parameters(), lr=lr), UPGD(noise=0)


# Between steps


def test_changes_between_steps_are_not_gated() -> None:
    model, rule = network(), Rule(0.9, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    intervention, theta = UPGD(0.9, 0), arrays(model)
    intervention.start(model, optimizers=[optimizer])
    for number, gradients in enumerate(random_gradients(model, 4)):
        set_gradients(model, gradients)
        optimizer.step()
        # Another intervention, before and after this one.
        for _ in range(2):
            with torch.no_grad():
                model[0].weight.mul_(-2.0).add_(number)
            intervention.after_step(model, optimizers=[optimizer])
        rule.step(theta, gradients, lambda _, __, g: 0.1 * g, 0.1)
        theta["0.weight"] = -2 * (-2 * theta["0.weight"] + number) + number
    compare(model, theta)


def test_learning_rates_of_the_groups_at_the_step_count() -> None:
    model, rates = network(), {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.02, "2.bias": 0.02}
    groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[2].parameters()), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    intervention = UPGD(noise=3.0)
    intervention.start(model, optimizers=[optimizer])
    xi, theta = torch.Generator().manual_seed(0), arrays(model)
    for number in range(3):
        # Without a gradient, the noise alone moves the weights, by half of it.
        set_gradients(model, {name: np.zeros(value.shape) for name, value in theta.items()})
        optimizer.step()
        scheduler.step()
        intervention.after_step(model, optimizers=[optimizer])
        for name in theta:
            draw = torch.randn(theta[name].shape, generator=xi, dtype=torch.float64).numpy()
            theta[name] = theta[name] - rates[name] * 0.5**number * 3.0 * draw / 2
    compare(model, theta)


def test_all_optimizers_share_the_maximum() -> None:
    model, rule = network(), Rule(0.9, 0.0)
    optimizers = {name: torch.optim.SGD(model.get_submodule(name).parameters(), lr=0.1) for name in "02"}
    intervention, theta = UPGD(0.9, 0), arrays(model)
    intervention.start(model, optimizers=list(optimizers.values()))
    for number, gradients in enumerate(random_gradients(model, 6)):
        # Not the same number of steps.
        for layer in "0" if number == 3 else "02":
            set_gradients(model, gradients)
            optimizers[layer].step()
            own = {name: g for name, g in gradients.items() if name.startswith(layer)}
            rule.step(theta, own, lambda _, __, g: 0.1 * g, 0.1)
        intervention.after_step(model, optimizers=list(optimizers.values()))
    compare(model, theta)


def test_parameters_without_gradient_stay_as_they_are() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[2].bias.requires_grad_(False)
    intervention, before = UPGD(noise=1.0), copy.deepcopy(model.state_dict())
    intervention.start(model, optimizers=[optimizer])
    model[0](torch.ones(3, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    intervention.after_step(model, optimizers=[optimizer])
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == {"0.weight", "0.bias"}
    assert intervention.steps == {"0.weight": 1, "0.bias": 1, "2.weight": 0}


def test_new_optimizers_are_followed_from_their_next_step() -> None:
    model, intervention = network(), UPGD(noise=0)
    old, new = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    intervention.start(model, optimizers=[old])
    for expected, optimizer in enumerate([new, new, old, new]):
        set_gradients(model, random_gradients(model, 1)[0])
        optimizer.step()
        assert intervention.steps["0.weight"] == min(expected, 1) + (expected == 3)
        intervention.after_step(model, optimizers=[new])


def test_lbfgs_is_gated_by_its_last_gradient() -> None:
    plain, gated = network(), network()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    before, intervention = arrays(plain), UPGD(0.9, 0)
    for model in (plain, gated):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        if model is gated:
            intervention.start(model, optimizers=[optimizer])
        optimizer.step(closure)
    utilities = {name: -p.grad.numpy() * before[name] for name, p in gated.named_parameters() if p.grad is not None}
    largest = max(u.max() for u in utilities.values())
    for name, value in arrays(gated).items():
        step = arrays(plain)[name] - before[name]
        np.testing.assert_allclose(value, before[name] + step / (1 + np.exp(utilities[name] / largest)), rtol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_count_as_unscaled(fused: bool) -> None:
    utilities = []
    for scale in (1.0, 1024.0):
        model, intervention = network(torch.float32), UPGD()
        optimizer = torch.optim.Adam(model.parameters(), fused=fused)
        intervention.start(model, optimizers=[optimizer])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
        scaler.step(optimizer)
        utilities.append(intervention.utilities)
    torch.testing.assert_close(utilities[0], utilities[1], rtol=1e-5, atol=0)


def test_stop_and_copies_leave_the_optimizer_alone() -> None:
    plain, model, intervention = network(), network(), UPGD()
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (plain, model)]
    intervention.start(model, optimizers=[optimizers[1]])
    copied = copy.deepcopy(intervention)
    intervention.stop()
    with pytest.raises(RuntimeError, match=r"UPGD has not followed the step: call start\(model, optimizers="):
        intervention.after_step(model)
    copied.stop()
    for one, optimizer in zip((plain, model), optimizers, strict=True):
        set_gradients(one, random_gradients(one, 1)[0])
        optimizer.step()
    compare(model, arrays(plain), 0)
    assert not optimizers[1]._optimizer_step_pre_hooks
    assert not optimizers[1]._optimizer_step_post_hooks


def test_optimizer_without_learning_rate_raises() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    model = network()
    with pytest.raises(ValueError, match="UPGD needs a learning rate, and Rateless has no 'lr'"):
        UPGD().start(model, optimizers=[Rateless(model.parameters())])


def test_optimizer_without_hooks_raises() -> None:
    class Hookless(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            self.param_groups, self.state = [{"params": list(params), "lr": 0.1}], {}

    model = network()
    with pytest.raises(ValueError, match="UPGD cannot follow the steps of Hookless: its constructor does not call"):
        UPGD().start(model, optimizers=[Hookless(model.parameters())])


def test_rests_where_nothing_is_selected() -> None:
    model, intervention = network(), UPGD(exclude=["*"])
    with pytest.warns(PlasticityWarning, match="UPGD rests, since Sequential has nothing that it acts on"):
        intervention.start(model, optimizers=[torch.optim.SGD(model.parameters())])


# Dtypes, random numbers and state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_rule(dtype: torch.dtype) -> None:
    model, rule = network(dtype), Rule(0.9, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    intervention, theta = UPGD(0.9, 0), arrays(model)
    intervention.start(model, optimizers=[optimizer])
    for gradients in random_gradients(model, 4):
        set_gradients(model, gradients)
        optimizer.step()
        rule.step(theta, gradients, lambda _, __, g: 0.1 * g, 0.1)
    assert intervention.utilities["0.weight"].dtype == torch.float32
    compare(model, theta, 8 * torch.finfo(dtype).eps)


def test_sparse_gradients_equal_dense_ones() -> None:
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(6, 3, sparse=sparse)
        optimizer, intervention = torch.optim.SGD(model.parameters(), lr=0.5), UPGD()
        intervention.start(model, optimizers=[optimizer])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 4, 4])).square().sum().backward()
            optimizer.step()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)


def test_global_generator_and_optimizer_state_are_untouched() -> None:
    states = []
    for intervention in (None, UPGD(noise=1.0)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if intervention is not None:
            intervention.start(model, optimizers=[optimizer])
        torch.manual_seed(1)
        for gradients in random_gradients(model, 3):
            set_gradients(model, gradients)
            optimizer.step()
        states.append((optimizer.state_dict(), torch.rand(3)))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_seeds_give_different_noise() -> None:
    ends = []
    for seed in (0, 1):
        model, intervention = network(), UPGD(noise=1.0, seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        intervention.start(model, optimizers=[optimizer])
        set_gradients(model, random_gradients(model, 1)[0])
        optimizer.step()
        ends.append(model[0].weight.detach())
    assert not torch.equal(*ends)


def test_training_resumes_bit_for_bit() -> None:
    def train(model: nn.Module, intervention: UPGD, gradients: list[Arrays]) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        intervention.start(model, optimizers=[optimizer])
        for one in gradients:
            set_gradients(model, one)
            optimizer.step()
            intervention.after_step(model, optimizers=[optimizer])
        intervention.stop()

    model, intervention, gradients = network(), UPGD(noise=1.0), random_gradients(network(), 6)
    train(model, intervention, gradients[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "intervention": intervention.state_dict()}, file)
    taken, saved = copy.deepcopy(intervention.state_dict()), intervention.state_dict()
    train(model, intervention, gradients[3:])
    torch.testing.assert_close(saved, taken, rtol=0, atol=0)
    file.seek(0)
    loaded, again, resumed = torch.load(file, weights_only=True), network(), UPGD(noise=1.0)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["intervention"])
    train(again, resumed, gradients[3:])
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), intervention.state_dict(), rtol=0, atol=0)


# In a Trainer


class Linear(Classifier):
    """A softmax regression by SGD, whose gradient is written out in NumPy below."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3)).double()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=0.1)


class InTwoSteps(Linear):
    """Takes two steps in each batch, and clears the gradients after each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for part in range(2):
            loss = F.cross_entropy(self.net(batch[0][part::2]), batch[1][part::2])
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def gradient(theta: Arrays, x: np.ndarray, y: np.ndarray) -> Arrays:
    logits = x @ theta["net.0.weight"].T + theta["net.0.bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(3)[y]) / len(x)
    return {"net.0.weight": error.T @ x, "net.0.bias": error.sum(0)}


@pytest.mark.parametrize("mode", ["plain", "accumulated", "two steps"])
def test_in_a_trainer_it_is_the_rule(mode: str) -> None:
    torch.manual_seed(5)
    x, y = torch.randn(96, 4, dtype=torch.float64), torch.randint(3, (96,))
    module = InTwoSteps() if mode == "two steps" else Linear()
    theta, rule = arrays(module), Rule(0.9, 0.7, seed=2)
    intervention = UPGD(0.9, 0.7, seed=2)
    callback = SpectralCollapseCallback(
        **WITHOUT_FIT_TEST,
        interventions=[intervention],
        loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
    )
    accumulation = {"accumulate_grad_batches": 2} if mode == "accumulated" else {}
    trainer(callback, **accumulation).fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    parts = {"plain": 6, "accumulated": 3, "two steps": 12}[mode]
    for batch in np.split(np.arange(96), 6 if mode == "two steps" else parts):
        for half in (batch[::2], batch[1::2]) if mode == "two steps" else (batch,):
            gradients = gradient(theta, x.numpy()[half], y.numpy()[half])
            rule.step(theta, gradients, lambda _, __, g: 0.5 * g, 0.5, weight_decay=0.1)
    compare(module, theta, 1e-10)
    assert rule.counts == intervention.steps == dict.fromkeys(theta, parts)
    assert [report.errors for report in callback.history] == [{}]


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    class Overflowing(ByFusedAdam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Classifier.training_step(self, batch, 0) * (float("inf") if batch_idx == 1 else 1)

    intervention, module = UPGD(), Overflowing()
    callback = SpectralCollapseCallback(
        collapse=NEVER,
        interventions=[intervention],
        loss_fn=lambda module, batch: F.cross_entropy(module.net(batch[0]), batch[1]),
    )
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    trainer(callback, **half_precision()).fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    assert set(intervention.steps.values()) == {3}
    assert all(bool(u.isfinite().all()) for u in intervention.utilities.values())


def test_units_replaced_after_the_same_step_stay_new() -> None:
    """Outgoing weights of zero stay zero, whatever the order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 4)
    interventions = [ContinualBackprop(0.5, 0), UPGD(noise=1.0)]
    for intervention in interventions:
        intervention.start(model, forward=lambda model: model(x), optimizers=[optimizer])
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    reports = [i.after_step(model, [optimizer]) for i in interventions]  # type: ignore[attr-defined]
    for intervention in interventions:
        intervention.stop()
    units = reports[0].units["0"]
    assert len(units)
    assert not model[2].weight[:, units].any()
