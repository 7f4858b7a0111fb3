"""Check regularizers against their formulas: parameters, stored state, and side effects."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_plasticity import PlasticityWarning
from lightning_plasticity.interventions import (
    L2ER,
    L2Init,
    Parseval,
    Regularizer,
    SpectralRegularizer,
    WassersteinInit,
)
from lightning_plasticity.interventions.penalty_gradients import accumulate
from tests.helpers.unit_models import Encoder, Functional, ResNet, TwoHeads

MAKERS: dict[str, Callable[[], Regularizer]] = {
    "spectral": lambda: SpectralRegularizer(0.3),
    "spectral, exact": lambda: SpectralRegularizer(0.3, exact=True),
    "parseval": lambda: Parseval(0.3),
    "l2 init": lambda: L2Init(0.3),
    "wasserstein": lambda: WassersteinInit(0.3),
    "l2-er": lambda: L2ER(weight_decay=0.3),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
WITH_INITIAL_VALUES = pytest.mark.parametrize("make", [L2Init, WassersteinInit])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def network(seed: int = 0) -> nn.Sequential:
    """Build a float64 network away from its initialisation, scales and biases included."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return model


def started(make: Callable[[], Regularizer], model: nn.Module, moved: float = 0.3) -> Regularizer:
    """Start a regularizer, then move the model."""
    regularizer = make()
    regularizer.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved * torch.randn(parameter.shape, generator=generator(1)).to(parameter))
    return regularizer


def gradients(penalty: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(penalty, parameters, materialize_grads=True), strict=True))


# Values and gradients


@pytest.mark.parametrize("power", [1, 2, 3])
def test_spectral_regularization_equals_its_formula_in_numpy(power: int) -> None:
    model = network()
    expected = 0.0
    for layer in (model[0], model[4], model[7]):
        weight, bias = array(layer.weight), array(layer.bias)
        sigma = np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)[0]
        expected += (sigma**power - 1) ** 2 + np.linalg.norm(bias) ** (2 * power)
    for norm in (model[1], model[5]):
        expected += ((array(norm.weight) - 1) ** 2).sum() + np.linalg.norm(array(norm.bias)) ** (2 * power)
    exact = SpectralRegularizer(0.7, power, exact=True).penalty(model).item()
    assert exact == pytest.approx(0.7 * expected, rel=1e-12)


def test_spectral_target_is_one_and_not_two() -> None:
    """In public code the term is 1 for a matrix whose largest singular value is 1."""
    layer = nn.Linear(5, 3, bias=False).double()
    nn.init.orthogonal_(layer.weight)
    for exact in (False, True):
        assert SpectralRegularizer(1, exact=exact).penalty(layer).item() == pytest.approx(0, abs=1e-20)
        with torch.no_grad():
            twice = copy.deepcopy(layer)
            twice.weight.mul_(2)
        assert SpectralRegularizer(1, exact=exact).penalty(twice).item() == pytest.approx((2**2 - 1) ** 2)


def test_spectral_bias_term_has_the_power_of_the_matrices() -> None:
    """The term is ``‖b‖^2k``; public code has ``‖b‖²`` for k = 2."""
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        layer.bias.copy_(torch.tensor([1.0, 2.0, 2.0]))
    for power in (1, 2, 3):
        assert SpectralRegularizer(1, power).penalty(layer).item() == pytest.approx(3.0 ** (2 * power))


def test_kernels_are_flattened_to_outputs_by_inputs() -> None:
    """The matrix is (out, in · kh · kw), and no other grouping of the entries."""
    conv = nn.Conv2d(3, 4, 2, bias=False).double()
    sigma = np.linalg.svd(array(conv.weight).reshape(4, 12), compute_uv=False)[0]
    penalty = SpectralRegularizer(1, exact=True).penalty(conv).item()
    assert penalty == pytest.approx((sigma**2 - 1) ** 2, rel=1e-12)
    transposed = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False).double()
    # (in, out / groups, kh, kw)
    kernel = array(transposed.weight)
    rows = [kernel[2 * (out // 3) : 2 * (out // 3) + 2, out % 3].ravel() for out in range(6)]
    sigma = np.linalg.svd(np.stack(rows), compute_uv=False)[0]
    penalty = SpectralRegularizer(1, exact=True).penalty(transposed).item()
    assert penalty == pytest.approx((sigma**2 - 1) ** 2, rel=1e-12)


@pytest.mark.parametrize("dims", [{}, {"kdim": 3, "vdim": 5}])
def test_attention_projections_are_separate_matrices(dims: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(6, 2, **dims).double()
    with torch.no_grad():
        attention.in_proj_bias.copy_(torch.arange(18) / 18)
        attention.out_proj.bias.copy_(torch.arange(6) / 6)
    matrices = [attention.out_proj.weight]
    if dims:
        matrices += [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        matrices += [*attention.in_proj_weight.chunk(3)]
    biases = [*attention.in_proj_bias.chunk(3), attention.out_proj.bias]
    expected = sum((np.linalg.norm(array(matrix), 2) ** 2 - 1) ** 2 for matrix in matrices)
    expected += sum(np.linalg.norm(array(bias)) ** 4 for bias in biases)
    penalty = SpectralRegularizer(1, exact=True).penalty(attention).item()
    assert penalty == pytest.approx(expected, rel=1e-12)


def test_recurrent_gates_are_separate_matrices() -> None:
    lstm = nn.LSTM(3, 4, proj_size=2, bias=False).double()
    matrices = [*lstm.weight_ih_l0.chunk(4), *lstm.weight_hh_l0.chunk(4), lstm.weight_hr_l0]
    expected = sum((np.linalg.norm(array(matrix), 2) ** 2 - 1) ** 2 for matrix in matrices)
    assert SpectralRegularizer(1, exact=True).penalty(lstm).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_parseval_equals_its_formula_in_numpy(shape: tuple[int, int]) -> None:
    """For a tall matrix the term leaves out a constant; the gradient is the same."""
    model = nn.Sequential(nn.Linear(*shape[::-1]), nn.Linear(shape[0], 2)).double()
    weight = model[0].weight
    out, into = shape
    expected = np.linalg.norm(array(weight) @ array(weight).T - 1.5**2 * np.eye(out)) ** 2
    penalty = Parseval(0.7, gain=1.5).penalty(model)
    assert penalty.item() == pytest.approx(0.7 * (expected - 1.5**4 * max(out - into, 0)), rel=1e-12)
    written = 0.7 * (weight @ weight.T - 1.5**2 * torch.eye(out, dtype=torch.float64)).square().sum()
    computed, given_ = gradients(penalty, model), gradients(written, model)
    torch.testing.assert_close(computed, given_, rtol=1e-12, atol=1e-12)


def test_l2_init_equals_its_formula_in_numpy() -> None:
    model = network()
    before = {name: array(parameter).copy() for name, parameter in model.named_parameters()}
    regularizer = started(lambda: L2Init(0.7), model)
    moved = {
        name: array(parameter) - before[name]
        for name, parameter in model.named_parameters()
        # Modules 1 and 5 are norm layers.
        if name[0] not in "15"
    }
    penalty = regularizer.penalty(model)
    assert penalty.item() == pytest.approx(0.35 * sum((step**2).sum() for step in moved.values()), rel=1e-12)
    for name, gradient in gradients(penalty, model).items():
        np.testing.assert_allclose(array(gradient), 0.7 * moved[name] if name in moved else 0, rtol=1e-12)


def test_wasserstein_equals_its_formula_in_numpy() -> None:
    model = network()
    before = {name: np.sort(array(parameter).ravel()) for name, parameter in model.named_parameters()}
    regularizer = started(lambda: WassersteinInit(0.7), model)
    expected = sum(
        ((np.sort(array(parameter).ravel()) - before[name]) ** 2).sum() for name, parameter in model.named_parameters()
    )
    assert regularizer.penalty(model).item() == pytest.approx(0.7 * expected, rel=1e-12)


def test_the_l2_part_of_l2er_is_over_every_trainable_parameter() -> None:
    model = network()
    penalty = L2ER(weight_decay=0.7).penalty(model)
    assert penalty.item() == pytest.approx(
        0.35 * sum((array(parameter) ** 2).sum() for parameter in model.parameters()), rel=1e-12
    )
    for name, gradient in gradients(penalty, model).items():
        torch.testing.assert_close(gradient, 0.7 * model.get_parameter(name).detach(), rtol=1e-12, atol=0)


@EVERY
def test_gradients_equal_finite_differences(make: Callable[[], Regularizer]) -> None:
    """Let the power iteration converge: only then is its gradient that of the singular value."""
    model = network()
    regularizer = started(make, model)
    for _ in range(3000 if isinstance(regularizer, SpectralRegularizer) and not regularizer.exact else 1):
        penalty = regularizer.penalty(model)
    picks = generator(2)
    for name, gradient in gradients(penalty, model).items():
        direction = torch.randn(gradient.shape, generator=picks, dtype=torch.float64)
        parameter, values = model.get_parameter(name), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(regularizer.penalty(model).item())
                parameter.sub_(direction, alpha=sign * 1e-6)
        slope = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


# Invariants


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**31), scale=st.floats(2, 1e3))
def test_power_iteration_converges_from_below(rows: int, columns: int, seed: int, scale: float) -> None:
    layer = nn.Linear(columns, rows, bias=False).double()
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.float64))[0] for n in (rows, columns)
    )
    size = min(rows, columns)
    # Without a gap between the singular values, the power iteration might not converge.
    values = scale * torch.tensor([1.0, *[0.8] * (size - 1)], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(left[:, :size] * values @ right[:, :size].T)
    regularizer = SpectralRegularizer(1, power=1)
    # The norms are above 1, where the square root of the penalty determines them.
    norms = [1 + regularizer.penalty(layer).item() ** 0.5 for _ in range(80)]
    assert max(norms) <= scale * (1 + 1e-12)
    assert norms[-1] == pytest.approx(scale, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), gain=st.floats(0.1, 3), seed=st.integers(0, 2**31))
def test_parseval_is_zero_for_orthogonal_matrices_only(rows: int, columns: int, gain: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, 1)).double()
    regularizer = Parseval(1, gain)
    assert regularizer.penalty(model).item() > 0
    nn.init.orthogonal_(model[0].weight, gain)
    assert regularizer.penalty(model).item() == pytest.approx(0, abs=1e-20 * gain**4 * 100)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), moved=st.floats(1e-3, 2))
def test_wasserstein_ignores_permutations_and_is_at_most_l2(seed: int, moved: float) -> None:
    model = nn.Linear(6, 5).double()
    regularizer = WassersteinInit(1)
    regularizer.start(model)
    with torch.no_grad():
        order = torch.randperm(30, generator=generator(seed))
        model.weight.copy_(model.weight.flatten()[order].view(5, 6))
    assert regularizer.penalty(model).item() == 0
    l2 = L2Init(2)
    l2.start(model)
    with torch.no_grad():
        model.weight.add_(torch.randn(5, 6, generator=generator(seed)), alpha=moved)
    assert 0 < regularizer.penalty(model).item() <= l2.penalty(model).item() * (1 + 1e-12)


@WITH_INITIAL_VALUES
def test_the_distance_from_the_start_is_zero_at_the_start(make: type[L2Init]) -> None:
    model = network()
    regularizer = make()
    regularizer.start(model)
    penalty = regularizer.penalty(model)
    assert penalty.item() == 0
    assert all(not gradient.any() for gradient in gradients(penalty, model).values())


@EVERY
def test_no_penalty_is_negative(make: Callable[[], Regularizer]) -> None:
    for seed in range(5):
        model = network(seed)
        assert started(make, model).penalty(model).item() >= 0


@EVERY
@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e10])
def test_penalty_and_gradient_are_finite_for_extreme_weights(make: Callable[[], Regularizer], fill: float) -> None:
    model = network()
    regularizer = started(make, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    for _ in range(2):
        penalty = regularizer.penalty(model)
        assert penalty.isfinite()
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(penalty, model).values())


def test_power_iteration_recovers_from_a_zero_matrix() -> None:
    layer = nn.Linear(5, 4, bias=False).double()
    weight = layer.weight.detach().clone()
    regularizer = SpectralRegularizer(1, power=1)
    with torch.no_grad():
        layer.weight.zero_()
    assert regularizer.penalty(layer).item() == 1
    with torch.no_grad():
        layer.weight.copy_(weight)
    for _ in range(500):
        penalty = regularizer.penalty(layer).item()
    assert penalty == pytest.approx((np.linalg.norm(array(weight), 2) - 1) ** 2, rel=1e-9)


# The power iteration


def test_each_call_is_one_power_iteration_without_a_graph() -> None:
    layer = nn.Linear(7, 5, bias=False).double()
    regularizer = SpectralRegularizer(1, power=1)
    regularizer.penalty(layer)
    weight, u = array(layer.weight), array(regularizer.state_dict()["vectors"]["weight"])
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(5, 7))
    weight = array(layer.weight)
    v = weight.T @ u / np.linalg.norm(weight.T @ u)
    sigma = np.linalg.norm(weight @ v)
    penalty = regularizer.penalty(layer)
    assert penalty.item() == pytest.approx((sigma - 1) ** 2, rel=1e-12)
    new = regularizer.state_dict()["vectors"]["weight"]
    np.testing.assert_allclose(array(new), weight @ v / sigma, rtol=1e-12)
    gradient = gradients(penalty, layer)["weight"]
    np.testing.assert_allclose(array(gradient), 2 * (sigma - 1) * np.outer(array(new), v), rtol=1e-10, atol=1e-14)


def test_first_estimate_is_close_and_improves() -> None:
    layer = nn.Linear(1000, 784, bias=False)
    nn.init.normal_(layer.weight)
    regularizer = SpectralRegularizer(1, power=1)
    truth = torch.linalg.matrix_norm(layer.weight.detach(), 2).item()
    first, *_, last = (1 + regularizer.penalty(layer).item() ** 0.5 for _ in range(200))
    assert 0.95 * truth < first < last <= truth * (1 + 1e-5)
    assert last > 0.995 * truth


def test_penalty_without_gradients_keeps_the_vectors() -> None:
    model, regularizer = network(), SpectralRegularizer()
    regularizer.penalty(model)
    before = regularizer.state_dict()
    with torch.no_grad():
        value = regularizer.penalty(model)
        assert torch.equal(value, regularizer.penalty(model))
    torch.testing.assert_close(regularizer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(value, regularizer.penalty(model).detach())


def test_grown_head_gets_a_new_vector() -> None:
    model, regularizer = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), SpectralRegularizer()
    regularizer.penalty(model)
    grown = copy.deepcopy(model)
    grown[2] = nn.Linear(6, 5)
    other = copy.deepcopy(regularizer)
    regularizer.penalty(model)
    other.penalty(grown)
    vectors, others = regularizer.state_dict()["vectors"], other.state_dict()["vectors"]
    assert torch.equal(vectors["0.weight"], others["0.weight"])
    assert others["2.weight"].shape == (5,)


# Regularized parameters


@EVERY
def test_frozen_parameters_do_not_count(make: Callable[[], Regularizer]) -> None:
    model = network()
    regularizer = started(make, model)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    other_model, other = copy.deepcopy(model), copy.deepcopy(regularizer)
    with torch.no_grad():
        for parameter in (*other_model[0].parameters(), *other_model[1].parameters()):
            parameter.mul_(5)
    assert torch.equal(regularizer.penalty(model), other.penalty(other_model))
    regularizer.penalty(model).backward()
    with_gradient = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient <= {"4", "5", "7"}
    assert "4" in with_gradient


@EVERY
def test_tied_parameters_count_once(make: Callable[[], Regularizer]) -> None:
    class Tied(nn.Module):
        def __init__(self, twice: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
            if twice:
                self.embed, self.b = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
                self.embed.weight = self.b.weight = self.a.weight
                # Register the head last again.
                self.head = self._modules.pop("head")

    values = []
    for twice in (False, True):
        model = Tied(twice)
        values.append(started(make, model).penalty(model))
    assert torch.equal(*values)


def test_embeddings_tokens_and_slopes_have_no_spectral_norm() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.embed = nn.Parameter(torch.randn(1, 1, 4)), nn.Embedding(7, 4)
            self.slope, self.head = nn.PReLU(4), nn.Linear(4, 2)

    model = Model()
    for regularizer in (SpectralRegularizer(1, exact=True), SpectralRegularizer(1)):
        moved = {name for name, value in gradients(regularizer.penalty(model), model).items() if value.any()}
        assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("build", [Encoder, ResNet])
def test_every_matrix_bias_and_scale_is_regularized(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    moved = {name for name, value in gradients(SpectralRegularizer().penalty(model), model).items() if value.any()}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("embed")}


def test_parseval_excludes_the_last_layer_or_named_ones() -> None:
    # This model registers its head first.
    model = Functional()
    moved = {name for name, value in gradients(Parseval().penalty(model), model).items() if value.any()}
    assert moved == {"head.weight", "second.weight"}, "documented: the last one registered is left free"
    moved = {name for name, value in gradients(Parseval(exclude=["head"]).penalty(model), model).items() if value.any()}
    assert moved == {"first.weight", "second.weight"}
    heads = TwoHeads()
    regularizer = Parseval(exclude=["policy", "value"])
    assert {name for name, value in gradients(regularizer.penalty(heads), heads).items() if value.any()} == {
        "trunk.weight"
    }
    nested = nn.ModuleDict({"body": nn.Linear(3, 3), "heads": nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))})
    excluded = gradients(Parseval(exclude=["heads"]).penalty(nested), nested)
    assert {name for name, value in excluded.items() if value.any()} == {"body.weight"}


def test_parametrized_layers_use_the_computed_weight() -> None:
    layer = parametrizations.weight_norm(nn.Linear(5, 4).double())
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
        layer.bias.zero_()
    sigma = np.linalg.norm(array(layer.weight), 2)
    for penalty in (SpectralRegularizer(1, exact=True).penalty(layer), Parseval(1, exclude=[]).penalty(layer)):
        computed = gradients(penalty, layer)
        assert computed["parametrizations.weight.original0"].any()
    assert SpectralRegularizer(1, exact=True).penalty(layer).item() == pytest.approx((sigma**2 - 1) ** 2, rel=1e-12)
    layer.parametrizations.requires_grad_(False)
    with pytest.warns(PlasticityWarning, match="Parseval rests"):
        assert Parseval(1, exclude=[]).penalty(layer).item() == 0


HOOKS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[dict[str, Tensor]], Tensor]]] = {
    "weight_norm": (nn.utils.weight_norm, lambda t: t["weight_g"] * t["weight_v"] / t["weight_v"].norm(dim=1)[:, None]),
    "spectral_norm": (
        nn.utils.spectral_norm,
        lambda t: t["weight_orig"] / (t["weight_u"] @ t["weight_orig"] @ t["weight_v"]),
    ),
    "pruned": (
        lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 3), "weight", 4),
        lambda t: t["weight_orig"] * t["weight_mask"],
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(("hook", "formula"), HOOKS.values(), ids=HOOKS)
def test_weights_from_hooks_count_as_computed_now(
    hook: Callable[[nn.Module], nn.Module], formula: Callable[[dict[str, Tensor]], Tensor]
) -> None:
    """Between forward passes, the attribute is the weight before the last step, and its graph is freed."""
    layer = hook(nn.Linear(5, 4).double())
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(3, 5).double()).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(layer.state_dict())
    stale = layer.weight
    for regularizer in (SpectralRegularizer(1, exact=True), Parseval(1, exclude=[])):
        tensors = {name: value.clone().requires_grad_() for name, value in before.items()}
        weight = formula(tensors)
        if isinstance(regularizer, Parseval):
            expected = (weight @ weight.T - torch.eye(4)).square().sum()
        else:
            expected = (torch.linalg.matrix_norm(weight, 2) ** 2 - 1).square() + tensors["bias"].square().sum() ** 2
        names = [name for name, _ in layer.named_parameters()]
        wanted = torch.autograd.grad(expected, [tensors[name] for name in names], materialize_grads=True)
        penalty = regularizer.penalty(layer)
        torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradients(penalty, layer), dict(zip(names, wanted, strict=True)))
    assert not torch.allclose(stale, weight)
    assert layer.weight is stale
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [SpectralRegularizer, Parseval])
def test_weights_from_unknown_hooks_are_left_out_by_name(kind: type[Regularizer]) -> None:
    def halve(layer: Any, inputs: object) -> None:
        layer.weight = layer.weight_raw / 2

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight_raw = nn.Parameter(model[0].weight.detach())
    del model[0].weight
    model[0].register_forward_pre_hook(halve)
    model(torch.ones(2, 3))
    regularizer = kind()
    with pytest.warns(UserWarning, match=rf"{regularizer.name} leaves out \['0'\], whose weights") as caught:
        penalties = [regularizer.penalty(model) for _ in range(2)]
    assert len(caught) == 1
    moved = {name for name, value in gradients(penalties[0], model).items() if value.any()}
    assert {name.partition(".")[0] for name in moved} == ({"1"} if kind is Parseval else {"1", "2"})


def test_stateful_parametrizations_are_unchanged() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(5, 4))
    before = copy.deepcopy(layer.state_dict())
    SpectralRegularizer().penalty(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in layer.modules())
    assert parametrize.is_parametrized(layer, "weight")


def test_l2_init_pulls_the_parameters_behind_a_parametrization() -> None:
    layer = parametrizations.weight_norm(nn.Linear(5, 4))
    regularizer = started(L2Init, layer)
    assert set(regularizer.state_dict()["initial"]) == {name for name, _ in layer.named_parameters()}
    assert all(value.any() for value in gradients(regularizer.penalty(layer), layer).values())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(make: Callable[[], Regularizer], dtype: torch.dtype) -> None:
    model = network().to(dtype)
    regularizer, other_model = make(), network().to(dtype).float()
    other = make()
    regularizer.start(model)
    other.start(other_model)
    with torch.no_grad():
        for parameter, same in zip(model.parameters(), other_model.parameters(), strict=True):
            # Squares and their sums overflow float16.
            parameter.mul_(300)
            same.copy_(parameter)
    penalty, expected = regularizer.penalty(model), other.penalty(other_model)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, expected)
    assert next(iter(gradients(penalty, model).values())).dtype == dtype


@EVERY
def test_autocast_does_not_matter(make: Callable[[], Regularizer]) -> None:
    model = network().float()
    regularizer = started(make, model)
    other = copy.deepcopy(regularizer)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = regularizer.penalty(model)
    assert penalty.dtype == torch.float32
    assert torch.equal(penalty, other.penalty(model))


# In a loop


@EVERY
def test_training_with_penalty_equals_adding_its_gradient(make: Callable[[], Regularizer]) -> None:
    x, results = torch.randn(8, 2, 6, 6, dtype=torch.float64), []
    for by_hand in (False, True):
        model = network()
        regularizer = make()
        regularizer.start(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if by_hand:
                computed = gradients(regularizer.penalty(model), model)
                loss.backward()
                for name, parameter in model.named_parameters():
                    parameter.grad += computed[name]
            else:
                (loss + regularizer.penalty(model)).backward()
            optimizer.step()
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_l2_init_equals_decay_toward_the_start_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    other_model = copy.deepcopy(model)
    start = [parameter.detach().clone() for parameter in other_model.parameters()]
    x, regularizer = torch.randn(8, 4, dtype=torch.float64), L2Init(0.5)
    regularizer.start(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (model(x).square().mean() + regularizer.penalty(model)).backward()
        optimizer.step()
        computed = torch.autograd.grad(other_model(x).square().mean(), list(other_model.parameters()))
        with torch.no_grad():
            for parameter, gradient, first in zip(other_model.parameters(), computed, start, strict=True):
                parameter -= 0.1 * (gradient + 0.5 * (parameter - first))
    torch.testing.assert_close(model.state_dict(), other_model.state_dict(), rtol=1e-12, atol=1e-12)


def test_spectral_regularization_pulls_spectral_norms_to_one() -> None:
    model = network()
    regularizer = SpectralRegularizer(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2000):
        optimizer.zero_grad()
        regularizer.penalty(model).backward()
        optimizer.step()
    for layer in (model[0], model[4], model[7]):
        assert np.linalg.norm(array(layer.weight).reshape(len(layer.weight), -1), 2) == pytest.approx(1, abs=1e-3)
    assert model[5].weight.tolist() == pytest.approx([1] * 6, abs=1e-3)


@EVERY
def test_training_resumes_bit_for_bit(make: Callable[[], Regularizer], tmp_path: Path) -> None:
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)

    def steps(model: nn.Module, regularizer: Regularizer, count: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(count):
            optimizer.zero_grad()
            (model(x).square().mean() + regularizer.penalty(model)).backward()
            optimizer.step()

    model = network()
    regularizer = make()
    regularizer.start(model)
    steps(model, regularizer, 3)
    torch.save({"model": model.state_dict(), "regularizer": regularizer.state_dict()}, tmp_path / "checkpoint")
    steps(model, regularizer, 3)

    state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed, restored = network(seed=1), make()
    resumed.load_state_dict(state["model"])
    restored.load_state_dict(state["regularizer"])
    # The loaded initial values are kept.
    restored.start(resumed)
    steps(resumed, restored, 3)
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(restored.state_dict(), regularizer.state_dict(), rtol=0, atol=0)


@EVERY
def test_state_shares_no_memory_with_the_regularizer(make: Callable[[], Regularizer]) -> None:
    model = network()
    regularizer = started(make, model)
    regularizer.penalty(model)
    state = regularizer.state_dict()
    kept = copy.deepcopy(state)
    regularizer.penalty(model)
    restored = make()
    restored.load_state_dict(state)
    restored.penalty(model)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


@EVERY
def test_penalty_has_no_side_effects(make: Callable[[], Regularizer]) -> None:
    model = network()
    regularizer = started(make, model)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        assert not regularizer.penalty(model).requires_grad
    assert regularizer.penalty(model).requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@EVERY
def test_regularizers_ignore_the_global_generator(
    make: Callable[[], Regularizer],
) -> None:
    values = []
    for seed in range(2):
        model = network()
        torch.manual_seed(seed)
        regularizer = started(make, model)
        values.append(torch.stack([regularizer.penalty(model) for _ in range(3)]))
    assert torch.equal(*values)


# Errors


@WITH_INITIAL_VALUES
def test_penalty_before_start_raises(make: type[L2Init]) -> None:
    with pytest.raises(
        RuntimeError, match=rf"{make.__name__} has no initial value of parameter 'weight' .* call start"
    ):
        make().penalty(nn.Linear(3, 2))


@WITH_INITIAL_VALUES
def test_grown_head_needs_another_start_and_others_keep_values(make: type[L2Init]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    regularizer = started(make, model)
    first = regularizer.state_dict()["initial"]["0.weight"]
    model[2] = nn.Linear(6, 5)
    with pytest.raises(RuntimeError, match=r"parameter '2.weight' of shape \(5, 6\) \(one of shape \(3, 6\) is stored"):
        regularizer.penalty(model)
    regularizer.start(model)
    assert regularizer.penalty(model).item() > 0
    state = regularizer.state_dict()["initial"]
    assert torch.equal(state["0.weight"], first)
    assert state["2.weight"].sort().values.equal(make().reference(model[2].weight.detach()).sort().values)


@WITH_INITIAL_VALUES
def test_initial_values_stay_float32_for_bfloat16_models(make: type[L2Init]) -> None:
    model = nn.Linear(5, 4)
    regularizer = make()
    regularizer.start(model)
    before = regularizer.state_dict()
    regularizer.penalty(model.bfloat16())
    torch.testing.assert_close(regularizer.state_dict(), before, rtol=0, atol=0)
    assert regularizer.state_dict()["initial"]["weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpectralRegularizer(-1), r"SpectralRegularizer\(coefficient=-1\) must be a finite number, at least 0"),
        (lambda: SpectralRegularizer(power=0.5), r"SpectralRegularizer\(power=0.5\) must be a finite number, at least"),
        (lambda: SpectralRegularizer(power=math.nan), r"SpectralRegularizer\(power=nan\)"),
        (lambda: Parseval(gain=0), r"Parseval\(gain=0\) must be a finite number, greater than 0"),
        (lambda: Parseval(exclude="head"), r"Parseval\(exclude='head'\) must be a list of names, such as \['head'\]"),
        (lambda: L2Init(math.inf), r"L2Init\(coefficient=inf\) must be a finite number"),
        (lambda: WassersteinInit(math.nan), r"WassersteinInit\(coefficient=nan\)"),
        (lambda: L2ER(weight_decay=-1), r"L2ER\(weight_decay=-1\) must be a finite number, at least 0"),
        (lambda: Parseval(exclude=["top"]).penalty(TwoHeads()), r"Parseval\(exclude=...\): 'top' matches no module"),
        (lambda: SpectralRegularizer().penalty(nn.LazyLinear(3)), "LazyLinear is lazy and was never called"),
        (lambda: L2Init().start(nn.LazyLinear(3)), "L2Init: parameter 'weight' is lazy: call the model once before"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("regularizer", "model", "reasons"),
    [
        (
            Parseval(),
            nn.Linear(3, 2),
            r"'\(model\)': Linear without a trained matrix, apart from that of",
        ),
        (SpectralRegularizer(), nn.Embedding(3, 2), "Embedding without a trained matrix, bias or norm scale"),
        (
            L2Init(),
            nn.Sequential(nn.LayerNorm(2)),
            "'0': LayerNorm without a trained parameter, apart from those",
        ),
        (WassersteinInit(), nn.Linear(2, 2).requires_grad_(False), "frozen"),
        (L2ER(), nn.ReLU(), "it has no parameters"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_to_penalize_warns_once(regularizer: Regularizer, model: nn.Module, reasons: str) -> None:
    regularizer.start(model)
    message = f"{regularizer.name} rests, since {type(model).__name__} has nothing that it acts on: .*{reasons}"
    with pytest.warns(PlasticityWarning, match=message) as caught:
        assert [regularizer.penalty(model).item() for _ in range(3)] == [0, 0, 0]
    assert len(caught) == 1


def test_penalty_gradient_serves_fused_optimizer() -> None:
    gradient = torch.arange(-7.0, 8.0).reshape(3, 5).t()
    parameter = nn.Parameter(torch.zeros(5, 3))
    accumulate([parameter], [(1.0, [gradient])], 2.0)
    torch.optim.Adam([parameter], 0.1, fused=True).step()
    torch.testing.assert_close(parameter.detach(), -0.1 * gradient.sign(), atol=1e-6, rtol=0)


# Gradients by a formula


class Layers(nn.Module):
    """One layer of each kind whose weights are matrices, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)
        self.attention, self.rnn = nn.MultiheadAttention(4, 2), nn.GRU(4, 5)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("make", [L2Init, SpectralRegularizer, partial(SpectralRegularizer, power=1.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_closed_form_is_the_gradient_of_the_penalty(make: Callable[[], Regularizer], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Layers().to(dtype)
    by_formula, by_autograd = make(), make()
    for regularizer in (by_formula, by_autograd):
        regularizer.start(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.zero_grad()
        expected = gradients(by_autograd.penalty(model), model)
        by_formula.add_gradients(model)
        # That of a direction under a weight norm is zero up to rounding.
        atol = 50 * torch.finfo(dtype).eps * max(float(gradient.abs().max()) for gradient in expected.values())
        for name, parameter in model.named_parameters():
            summed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(summed, expected[name], rtol=0, atol=atol)
    closed = by_formula.closed_form(model, with_value=True)
    assert closed is not None
    assert closed.value is not None
    same = by_autograd.penalty(model).detach()
    torch.testing.assert_close(closed.value.double(), same.double(), rtol=1e-5, atol=0)


def halve(layer: nn.Module) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    parametrize.register_parametrization(layer, "weight", Half())


@pytest.mark.parametrize("make", [SpectralRegularizer, Parseval])
@pytest.mark.parametrize("compute", [halve, partial(prune.l1_unstructured, name="weight", amount=0.5)])
def test_weight_computed_in_mid_training_is_found(
    make: Callable[[], Regularizer], compute: Callable[[nn.Module], object]
) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(3)))
    regularizer = started(make, model)
    # Without biases, the parameters stay the same objects in the same order.
    for change in (lambda _: None, compute):
        change(model[2])
        model.zero_grad()
        expected = gradients(copy.deepcopy(regularizer).penalty(model), model)
        regularizer.add_gradients(model)
        for name, parameter in model.named_parameters():
            summed = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(summed, expected[name], rtol=0, atol=1e-12)


def test_bias_that_is_not_finite_is_an_error() -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, math.inf)
    with pytest.raises(ValueError, match="not finite"):
        SpectralRegularizer().add_gradients(model)
    assert model.weight.grad is None


def test_zero_matrix_has_no_closed_form_and_no_gradient() -> None:
    model, regularizer = nn.Linear(3, 2), SpectralRegularizer()
    nn.init.zeros_(model.weight)
    regularizer.add_gradients(model)
    expected = gradients(SpectralRegularizer().penalty(model), model)
    assert torch.equal(model.weight.grad, expected["weight"])  # type: ignore[arg-type]


def test_subclass_with_another_penalty_has_no_inherited_formula() -> None:
    class Doubled(L2Init):
        def penalty(self, model: nn.Module) -> Tensor:
            return 2 * super().penalty(model)

    model = nn.Linear(3, 2)
    regularizer = started(Doubled, model)
    regularizer.add_gradients(model)
    torch.testing.assert_close(model.weight.grad, gradients(regularizer.penalty(model), model)["weight"])


@pytest.mark.parametrize("make", [L2Init, SpectralRegularizer])
def test_autocast_does_not_round_gradients(make: Callable[[], Regularizer]) -> None:
    """With manual optimization, the optimizer steps inside of it."""
    results = []
    for enabled in (False, True):
        model = network()
        regularizer = started(make, model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            regularizer.add_gradients(model)
        results.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("make", [L2Init, SpectralRegularizer, partial(Parseval, exclude=[])])
def test_start_with_other_optimizers_acts_on_what_they_hold(make: Callable[[], Regularizer]) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    regularizer = make()
    for layer, other in ((model[0], model[1]), (model[1], model[0])):
        regularizer.start(model, optimizers=[torch.optim.SGD(layer.parameters(), 0.1)])
        with torch.no_grad():
            layer.weight.add_(0.1)
        model.zero_grad()
        regularizer.add_gradients(model)
        assert layer.weight.grad is not None
        assert layer.weight.grad.any()
        assert other.weight.grad is None or not other.weight.grad.any()
