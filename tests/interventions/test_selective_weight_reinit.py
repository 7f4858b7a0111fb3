"""Check SelectiveWeightReinit against its rule in NumPy: which weights it re-initialises, and with what values."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import RepairReport, SelectiveWeightReinit
from tests.helpers.interventions_in_training import ByFusedAdam
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, MemoryLogger, cross_entropy, loader, trainer
from tests.helpers.usages import half_precision


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 15), nn.LayerNorm(15), nn.Tanh(), nn.Linear(15, 4)).double()


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in model.named_parameters()}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    # Three of the inputs are constant, and weights for them get no gradient.
    x[:, :3] = 0
    F.mse_loss(model(x), torch.ones(8, 4, dtype=torch.float64)).backward()
    optimizer.step()


def set_gradients(model: nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    gradients = {name: rng.standard_normal(p.shape) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.from_numpy(gradients[name]).to(parameter)
    return gradients


def run_rule(
    model: nn.Module, intervention: SelectiveWeightReinit
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], RepairReport]:
    """Take one step with random gradients: return them, the weights before the re-initialisation, and its report."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    intervention.start(model, optimizers=[optimizer])
    # Weights that no fresh value equals, in place of a long training.
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(10 * rng.standard_normal(parameter.shape)))
    gradients = set_gradients(model)
    optimizer.step()
    before = values(model)
    report = intervention.after_step(model, optimizers=[optimizer])
    assert report is not None
    intervention.stop()
    return gradients, before, report


# Which weights


@pytest.mark.parametrize("utility", ["gradient", "magnitude"])
@pytest.mark.parametrize("factor", [0.1, 0.6])
def test_threshold_is_a_share_of_the_mean_utility(utility: str, factor: float) -> None:
    model = network()
    gradients, before, report = run_rule(model, SelectiveWeightReinit(factor, 1, utility=utility))
    count = 0
    for name, after in values(model).items():
        u = np.abs(before[name] * (gradients[name] if utility == "gradient" else 1))
        chosen = u <= factor * u.mean()
        np.testing.assert_array_equal(after != before[name], chosen)
        count += int(chosen.sum())
    assert report.num_parameters_changed == count > 0


@pytest.mark.parametrize("utility", ["gradient", "magnitude"])
def test_proportional_takes_the_smallest_share_of_each_tensor(utility: str) -> None:
    model = network()
    arguments: dict[str, Any] = {"pruning": "proportional", "utility": utility}
    gradients, before, _ = run_rule(model, SelectiveWeightReinit(0.2, 1, **arguments))
    for name, after in values(model).items():
        u = np.abs(before[name] * (gradients[name] if utility == "gradient" else 1)).ravel()
        chosen = np.flatnonzero((after != before[name]).ravel())
        # 0.2 of 4 is one with a probability of 0.8.
        assert len(chosen) == round(0.2 * u.size) or u.size == 4
        np.testing.assert_array_equal(np.sort(chosen), np.sort(np.argsort(u)[: len(chosen)]))


def test_fractions_of_a_weight_are_probabilities() -> None:
    model = nn.Linear(5, 1, bias=False)
    intervention = SelectiveWeightReinit(0.3, 1, pruning="proportional", utility="magnitude")
    intervention.start(model)
    counts = []
    for _ in range(400):
        torch.nn.init.constant_(model.weight, 7.0)
        report = intervention.after_step(model)
        assert report is not None
        counts.append(report.num_parameters_changed)
    assert set(counts) == {1, 2}
    assert np.mean(counts) == pytest.approx(1.5, abs=0.1)


def test_weights_of_equal_utility_are_chosen_at_random() -> None:
    model = nn.Linear(50, 1, bias=False)
    intervention = SelectiveWeightReinit(0.1, 1, pruning="proportional", utility="magnitude")
    intervention.start(model)
    chosen = torch.zeros(50)
    for _ in range(60):
        torch.nn.init.constant_(model.weight, 7.0)
        intervention.after_step(model)
        chosen += (model.weight.detach()[0] != 7).float()
    assert chosen.sum() == 300
    assert (chosen > 0).float().mean() > 0.9


def test_weights_that_no_sample_reaches_are_replaced_by_default() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer, intervention = torch.optim.SGD(model.parameters(), lr=0.0), SelectiveWeightReinit(every_n_steps=1)
    intervention.start(model, optimizers=[optimizer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
        model[0].bias[2] = -1000.0
    x = torch.rand(32, 6) + 1
    x[:, 4] = 0
    model(x).square().sum().backward()
    optimizer.step()
    intervention.after_step(model, [optimizer])
    unreached = torch.zeros(8, 6, dtype=torch.bool)
    unreached[2], unreached[:, 4] = True, True
    dead = torch.eye(8, dtype=torch.bool)[2]
    assert torch.equal(model[0].weight != 7, unreached)
    assert torch.equal(model[0].bias != 7, dead)
    assert model[0].bias[2] > -1
    assert torch.equal(model[2].weight != 7, dead.expand(2, 8))
    assert torch.equal(model[2].bias, torch.full((2,), 7.0))


def test_tensors_without_usable_gradients_stay() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "other head": nn.Linear(3, 3)})
    optimizer = torch.optim.SGD(model["used"].parameters(), lr=0.0)
    optimizer.add_param_group({"params": list(model["other head"].parameters())})
    intervention = SelectiveWeightReinit(1.0, 1, pruning="proportional")
    intervention.start(model, optimizers=[optimizer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 7)
    before = copy.deepcopy(model.state_dict())
    model["used"](torch.ones(2, 3)).sum().backward()
    model["used"].bias.grad[0] = 3e38
    optimizer.step()
    intervention.after_step(model, [optimizer])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # The product of the bias and its gradient is infinite.
    assert changed == {"used.weight"}


def test_every_n_steps_with_the_gradient_of_the_last() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    intervention = SelectiveWeightReinit(0.5, 3)
    intervention.start(model, optimizers=[optimizer])
    for number in range(1, 7):
        gradients = set_gradients(model, seed=number)
        optimizer.step()
        # As at the end of a training step.
        optimizer.zero_grad()
        before = values(model)
        report = intervention.after_step(model, [optimizer])
        assert (report is not None) == (number % 3 == 0)
    utility = np.abs(gradients["0.weight"] * before["0.weight"])
    changed = values(model)["0.weight"] != before["0.weight"]
    assert not changed[utility > 0.5 * utility.mean()].any()
    assert changed[utility <= 0.5 * utility.mean()].mean() > 0.95


# Which values


def test_resampled_values_are_initial_entries() -> None:
    model = network()
    initial = values(model)
    _, before, _ = run_rule(model, SelectiveWeightReinit(0.5, 1, pruning="proportional"))
    for name, after in values(model).items():
        new = after[after != before[name]]
        assert np.isin(new, initial[name]).all(), name
        if "1." not in name:
            # Each entry of a permutation at most once, not those that were there.
            assert len(np.unique(new)) == len(new)
            assert name == "3.bias" or (after != initial[name]).mean() > 0.5


def test_mean_is_that_of_the_initial_entries() -> None:
    model = network()
    initial = values(model)
    _, before, _ = run_rule(model, SelectiveWeightReinit(0.5, 1, pruning="proportional", reinit="mean"))
    for name, after in values(model).items():
        np.testing.assert_allclose(after[after != before[name]], initial[name].mean(), rtol=1e-12)


@pytest.mark.parametrize("reinit", ["resample", "mean"])
def test_entries_that_were_not_random_get_their_initial_value(reinit: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    torch.nn.init.zeros_(model[2].bias)
    run_rule(model, SelectiveWeightReinit(1.0, 1, pruning="proportional", utility="magnitude", reinit=reinit))
    assert not model[0].weight[2].any()
    assert bool(model[0].weight[[0, 1, 3, 4]].all())
    assert torch.equal(model[1].weight, torch.ones(3))
    assert not model[1].bias.any()
    assert not model[2].bias.any()


def test_initial_weights_may_be_given() -> None:
    model = network()
    given = {
        name: torch.full_like(value, 0.5).add_(torch.rand(value.shape)) for name, value in values_of(model).items()
    }
    intervention = SelectiveWeightReinit(1.0, 1, pruning="proportional", utility="magnitude", initial=given)
    run_rule(model, intervention)
    for name, value in values_of(model).items():
        assert torch.equal(value.flatten().sort().values, given[name].flatten().sort().values)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


# Optimizers and state


def test_optimizer_state_of_exactly_these_entries_is_reset() -> None:
    model = network()
    optimizer, intervention = torch.optim.Adam(model.parameters()), SelectiveWeightReinit(0.3, 2)
    intervention.start(model, optimizers=[optimizer])
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
        before = values(model)
        kept = copy.deepcopy(optimizer.state_dict()["state"])
        intervention.after_step(model, [optimizer])
    total = 0
    for (name, parameter), old in zip(model.named_parameters(), kept.values(), strict=True):
        changed = torch.from_numpy(values(model)[name] != before[name])
        for key in ("exp_avg", "exp_avg_sq"):
            now = optimizer.state[parameter][key]
            assert not now[changed].any()
            is_reset = now != old[key]
            assert not (changed & ~is_reset).any()
        total += int(changed.sum())
    assert total > 50


def test_before_start_and_after_stop_it_raises() -> None:
    model, intervention = network(), SelectiveWeightReinit(utility="magnitude")
    message = r"has no stored state of \['0.weight'.*\]: call start\(model\) before"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            intervention.after_step(model)
        intervention.start(model)
        intervention.after_step(model)
        intervention.stop()


def test_stop_and_copies_leave_no_hooks() -> None:
    model, intervention = network(), SelectiveWeightReinit()
    optimizer = torch.optim.SGD(model.parameters())
    intervention.start(model, optimizers=[optimizer])
    copy.deepcopy(intervention).stop()
    assert len(optimizer._optimizer_step_post_hooks) == 1
    intervention.stop()
    assert not optimizer._optimizer_step_post_hooks


def test_rests_where_nothing_is_selected() -> None:
    model, intervention = network(), SelectiveWeightReinit(exclude=["*"])
    with pytest.warns(PlasticityWarning, match="SelectiveWeightReinit rests, since Sequential has nothing"):
        intervention.start(model, optimizers=[torch.optim.SGD(model.parameters())])


@pytest.mark.parametrize("utility", ["gradient", "magnitude"])
def test_training_resumes_bit_for_bit(utility: str) -> None:
    def train(model: nn.Module, intervention: SelectiveWeightReinit, seeds: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        intervention.start(model, optimizers=[optimizer])
        for seed in seeds:
            train_step(model, optimizer, seed)
            intervention.after_step(model, [optimizer])
        intervention.stop()

    def make() -> SelectiveWeightReinit:
        return SelectiveWeightReinit(0.13, 2, pruning="proportional", utility=utility)

    model, intervention = network(), make()
    train(model, intervention, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "intervention": intervention.state_dict()}, file)
    train(model, intervention, range(3, 8))
    file.seek(0)
    loaded, again, resumed = torch.load(file, weights_only=True), network(), make()
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["intervention"])
    train(again, resumed, range(3, 8))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), intervention.state_dict(), rtol=0, atol=0)


def test_seeds_choose_other_values_and_the_global_generator_stays() -> None:
    models, state = [network() for _ in range(3)], torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run_rule(model, SelectiveWeightReinit(0.5, 1, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)
    assert not torch.equal(models[0][0].weight, models[2][0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_entries(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    initial = {name: value.clone() for name, value in values_of(model).items()}
    optimizer, intervention = torch.optim.SGD(model.parameters(), lr=0.1), SelectiveWeightReinit(0.5, 1)
    intervention.start(model, optimizers=[optimizer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(100)
    set_gradients(model)
    optimizer.step()
    before = {name: value.clone() for name, value in values_of(model).items()}
    intervention.after_step(model, [optimizer])
    for name, value in values_of(model).items():
        new = value[value != before[name]]
        assert value.dtype == dtype
        assert torch.isin(new, initial[name]).all()
    assert len(new)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor=0) must be a finite number, greater than 0"),
        ({"factor": 1.5, "pruning": "proportional"}, "factor=1.5) must be in (0, 1]"),
        ({"pruning": "share"}, "pruning='share') must be 'threshold' or 'proportional'"),
        ({"utility": "random"}, "utility='random') must be 'gradient' or 'magnitude'"),
        ({"reinit": "zero"}, "reinit='zero') must be 'resample' or 'mean'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SelectiveWeightReinit(**arguments)


# In a Trainer


@pytest.mark.parametrize("manual", [False, True])
def test_in_a_trainer_it_is_logged_and_draws_from_initial_weights(manual: bool) -> None:
    class ByHand(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = cross_entropy(self, batch)
            if not manual:
                return loss
            optimizer: Any = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return None

    torch.manual_seed(0)
    module, logger = ByHand(), MemoryLogger()
    initial = values(module)
    intervention = SelectiveWeightReinit(1.0, 2, pruning="proportional")
    callback = SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, logger=logger).fit(module, loader(batches=4))
    # The last step is followed by a re-initialisation of everything.
    for name, after in values(module).items():
        np.testing.assert_array_equal(np.sort(after.ravel()), np.sort(initial[name].ravel()))
    logged = logger.values("plasticity_training/SelectiveWeightReinit/parameters")
    size = sum(value.size for value in initial.values())
    assert list(logged) == [2, 4]
    assert all(0.8 * size < number <= size for number in logged.values())
    assert [report.errors for report in callback.history] == [{}]


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    class Overflowing(ByFusedAdam):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return Classifier.training_step(self, batch, 0) * (float("inf") if batch_idx == 1 else 1)

    intervention = SelectiveWeightReinit(every_n_steps=2)
    callback = SpectralCollapseCallback(**WITHOUT_FIT_TEST, interventions=[intervention], loss_fn=cross_entropy)
    trainer(callback, **half_precision()).fit(Overflowing(), loader(batches=4))
    assert intervention.steps == 3
