"""Check DASH against its rule in NumPy, layer by layer."""

import copy
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.interventions import DASH, Repair
from lightning_plasticity.interventions.base import InterventionContext, Loss
from lightning_plasticity.interventions.weights.updates import WeightUpdate
from tests.helpers.processes import in_two_processes


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    batches=st.integers(1, 4),
    alpha=st.floats(0.05, 1),
    shrinkage=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_dash_of_an_mlp_equals_its_rule_in_numpy(
    sizes: list[int], batches: int, alpha: float, shrinkage: float, seed: int
) -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    rng = np.random.default_rng(seed)
    data = [(rng.standard_normal((5, sizes[0])), rng.standard_normal((5, sizes[-1]))) for _ in range(batches)]
    old = [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in model[::2]]

    averages = [(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in old]
    for x, y in data:
        hs = [x]
        for weight, bias in old[:-1]:
            hs.append(np.tanh(hs[-1] @ weight.T + bias))
        delta = 2 * (hs[-1] @ old[-1][0].T + old[-1][1] - y) / y.size
        for layer in reversed(range(len(old))):
            average, average_bias = averages[layer]
            averages[layer] = (
                (1 - alpha) * average + alpha * -(delta.T @ hs[layer]),
                (1 - alpha) * average_bias + alpha * -delta.sum(0),
            )
            if layer:
                delta = delta @ old[layer][0] * (1 - hs[layer] ** 2)

    def loss(x: np.ndarray, y: np.ndarray) -> Loss:
        return lambda model: F.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y))

    losses = [loss(x, y) for x, y in data]
    DASH(alpha, shrinkage).repair(model, loss=losses if batches > 1 else losses[0])
    for layer, (weight, bias), (wanted, wanted_bias) in zip(model[::2], old, averages, strict=True):
        factors = np.array([cosine(g, w) for g, w in zip(wanted, weight, strict=True)]).clip(shrinkage, 1)
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight * factors[:, None], rtol=1e-6, atol=1e-12)
        factor = np.clip(cosine(wanted_bias, bias), shrinkage, 1)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias * factor, rtol=1e-6, atol=1e-12)


def towards(model: nn.Module, direction: dict[str, Tensor]) -> Tensor:
    """Return a loss with these negative gradients."""
    return -sum((parameter * direction[name]).sum() for name, parameter in model.named_parameters())  # type: ignore[return-value]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 2, groups=2), nn.ConvTranspose2d(3, 2, 2)])
def test_convolutions_shrink_kernel_by_kernel(layer: nn.Module) -> None:
    model = copy.deepcopy(layer).double()
    direction = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    old = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    DASH(shrinkage=0.2).repair(model, loss=lambda model: towards(model, direction))
    expected = old["weight"].copy()
    for i, j in np.ndindex(*expected.shape[:2]):
        expected[i, j] *= np.clip(cosine(direction["weight"][i, j].numpy(), expected[i, j]), 0.2, 1)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=1e-12)
    factor = np.clip(cosine(direction["bias"].numpy(), old["bias"]), 0.2, 1)
    np.testing.assert_allclose(model.bias.detach().numpy(), old["bias"] * factor, rtol=1e-12)


def test_the_projections_of_attention_shrink_row_by_row() -> None:
    model = nn.MultiheadAttention(4, 2).double()
    direction = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    old = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    DASH(shrinkage=0.2).repair(model, loss=lambda model: towards(model, direction))
    for name in ("in_proj_weight", "out_proj.weight"):
        rows = zip(direction[name].numpy(), old[name], strict=True)
        factors = np.array([cosine(g, w) for g, w in rows]).clip(0.2, 1)
        np.testing.assert_allclose(
            dict(model.named_parameters())[name].detach().numpy(), old[name] * factors[:, None], rtol=1e-12
        )


def test_only_weights_against_the_descent_direction_shrink() -> None:
    model = nn.Linear(3, 2, bias=False)
    old = model.weight.detach().clone()
    sign = torch.tensor([[1.0], [-1.0]])
    DASH(shrinkage=0.3).repair(model, loss=lambda model: -(model.weight * old * sign).sum())
    torch.testing.assert_close(model.weight, old * torch.tensor([[1.0], [0.3]]))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradient_scale_does_not_matter(size: float) -> None:
    model, direction = nn.Linear(3, 2, bias=False), torch.randn(2, 3)
    other_model = copy.deepcopy(model)
    DASH().repair(model, loss=lambda model: -(model.weight * direction).sum())
    DASH().repair(other_model, loss=lambda model: -(model.weight * (direction * size)).sum())
    torch.testing.assert_close(model.weight, other_model.weight)


def test_dead_units_shrink_and_zero_weights_stay_zero() -> None:
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight[2] = 0
    old, weight = model.weight.detach().clone(), torch.tensor([1.0, 0.0, 1.0])
    DASH(shrinkage=0.25).repair(model, loss=lambda model: (model(torch.ones(1, 2)) * weight).sum())
    torch.testing.assert_close(model.weight[1], 0.25 * old[1])
    assert torch.equal(model.weight[2], torch.zeros(2))
    assert torch.isfinite(model.weight).all()


def test_layers_unused_by_the_loss_stay() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    before = copy.deepcopy(model.state_dict())
    DASH().repair(model, loss=lambda model: model["used"](torch.ones(1, 3)).sum())
    assert torch.equal(model["unused"].weight, before["unused.weight"])
    assert not torch.equal(model["used"].weight, before["used.weight"])


def test_layer_unused_by_a_mini_batch_has_zero_gradient_there() -> None:
    model = nn.Linear(2, 1, bias=False)
    first, last = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    other_model = copy.deepcopy(model)
    nothing = torch.zeros((), requires_grad=True)
    losses = [lambda m: (m.weight * first).sum(), lambda m: nothing * 1, lambda m: (m.weight * last).sum()]
    DASH(alpha=0.5, shrinkage=0).repair(model, loss=losses)
    DASH(shrinkage=0).repair(other_model, loss=lambda m: (m.weight * (0.25 * first + last)).sum())
    torch.testing.assert_close(model.weight, other_model.weight)


def test_norms_embeddings_recurrent_and_frozen_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Embedding(2, 2), nn.GRUCell(2, 2))
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    DASH().repair(model, loss=lambda model: sum((p * p.detach().flip(0)).sum() for p in model.parameters()))  # type: ignore[arg-type,return-value]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias", "2.bias"}


def test_optimizer_state_is_kept() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    assert DASH().repair(model, optimizers=[optimizer], loss=lambda model: model(x).sum()).num_parameters_changed
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_gradients_modes_and_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    before = copy.deepcopy(model[1].state_dict())
    DASH().repair(model, loss=lambda model: model(torch.randn(5, 4)).square().mean())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)


def _dash_towards(ranks: list[int]) -> Tensor:
    """Run DASH on the data of these ranks."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    directions = [model.weight.detach() + 0.2 * torch.randn(2, 3) for _ in range(2)]
    wanted = torch.stack([directions[rank] for rank in ranks]).mean(0)
    DASH(shrinkage=0).repair(model, loss=lambda model: -(model.weight * wanted).sum())
    return model.weight.detach()


def _dash_of_one_process(rank: int) -> Tensor:
    return _dash_towards([rank])


def test_ranks_with_different_data_shrink_alike() -> None:
    weights = in_two_processes(_dash_of_one_process)
    assert torch.equal(*weights)
    torch.testing.assert_close(weights[0], _dash_towards([0, 1]))
    assert not torch.allclose(weights[0], _dash_towards([0]))


def test_missing_loss_raises() -> None:
    for loss in (None, []):
        with pytest.raises(ValueError, match=r"DASH needs gradients: .* or a list of such functions, one for each"):
            DASH().repair(nn.Linear(2, 2), loss=loss)


def test_non_finite_gradients_raise_and_change_nothing() -> None:
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="DASH: the gradient of 'weight' is not finite"):
        DASH().repair(model, loss=lambda model: (model.weight * torch.inf).sum() + model.bias.sum())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Spy(Repair):
    def plan(self, model: nn.Module, context: InterventionContext) -> WeightUpdate:
        self.loss = context.require_mean_loss(self.name)(model).item()
        self.losses = [loss(model).item() for loss in context.losses]
        return WeightUpdate({}, candidates=1)


def test_other_repairs_take_the_mean_of_several_losses() -> None:
    spy = Spy()
    spy.repair(nn.Linear(1, 1), loss=[lambda model: torch.tensor(1.0), lambda model: torch.tensor(4.0)])
    assert (spy.loss, spy.losses) == (2.5, [1.0, 4.0])
    spy.repair(nn.Linear(1, 1), loss=lambda model: torch.tensor(3.0))
    assert (spy.loss, spy.losses) == (3.0, [3.0])
