"""PyHessian's estimates against dense float64 Hessians, and without its side effects."""

import copy
import math
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_plasticity.curvature.double_backward import DoubleBackwardError, composed_weight_norm
from lightning_plasticity.curvature.pyhessian import pyhessian_spectrum, pyhessian_top_eigenvalues, pyhessian_trace
from tests.helpers.cases import CASES, Case, classes, dense_hessian, mlp


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(2, 3), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


UNUSED = Case("unused parameters", lambda: (PartlyUsed(), *mlp()[1:]))
NORMED = Case(
    "weight norm", lambda: (nn.Sequential(weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3)), *mlp()[1:])
)
TOLERANCE = 1e-3
each_case = pytest.mark.parametrize("case", [*CASES, UNUSED, NORMED], ids=lambda case: case.name)


def exact(case: Case) -> Tensor:
    with composed_weight_norm():
        return dense_hessian(case)


def start_vectors(model: nn.Module, seed: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for _ in range(number):
        signs = [torch.randint(2, p.shape, generator=generator) for p in model.parameters() if p.requires_grad]
        vector = 2.0 * torch.cat([part.flatten() for part in signs]).double() - 1
        vectors.append(vector / math.sqrt(len(vector)))
    return vectors


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quadratures_have_the_moments_and_ends_of_the_dense_hessian(case: Case, dtype: torch.dtype) -> None:
    model, batch = case.build(dtype)
    hessian = exact(case)
    values = torch.linalg.eigvalsh(hessian)
    spectrum = pyhessian_spectrum(model, batch, case.loss_fn, num_probes=2, seed=3)
    assert (spectrum.exact, spectrum.num_parameters, len(spectrum.quadratures)) == (False, len(hessian), 2)
    assert spectrum.lambda_max == pytest.approx(values[-1].item(), rel=TOLERANCE)
    assert spectrum.lambda_min == pytest.approx(values[0].item(), rel=TOLERANCE, abs=TOLERANCE * values[-1].item())
    for quadrature, v in zip(spectrum.quadratures, start_vectors(model, 3, 2), strict=True):
        nodes, weights = quadrature.nodes, quadrature.weights
        assert nodes.dtype == weights.dtype == torch.float64
        assert (nodes.diff() >= 0).all()
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        scale = hessian.norm(2).item()
        assert (weights * nodes).sum().item() == pytest.approx((v @ hessian @ v).item(), abs=TOLERANCE * scale)
        square = (hessian @ v).square().sum().item()
        assert (weights * nodes.square()).sum().item() == pytest.approx(square, rel=2 * TOLERANCE)
        assert quadrature.residuals.isinf().all()
        assert not quadrature.complete


@each_case
def test_top_eigenvalue_equals_that_of_the_dense_hessian(case: Case) -> None:
    values = torch.linalg.eigvalsh(exact(case))
    expected = values[values.abs().argmax()].item()
    (actual,) = pyhessian_top_eigenvalues(*case.build(), case.loss_fn, tolerance=1e-8, max_steps=5000)
    assert actual.item() == pytest.approx(expected, rel=1e-3)


def test_several_top_eigenvalues_equal_those_of_the_dense_hessian() -> None:
    values = torch.linalg.eigvalsh(exact(CASES[0]))
    expected = values[values.abs().argsort(descending=True)][:3]
    actual = pyhessian_top_eigenvalues(*CASES[0].build(), CASES[0].loss_fn, k=3, tolerance=1e-9, max_steps=5000)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


@each_case
def test_trace_is_within_its_standard_error(case: Case) -> None:
    hessian = exact(case)
    trace = pyhessian_trace(*case.build(), case.loss_fn, num_probes=50)
    off_diagonal = 2 * (hessian.square().sum() - hessian.diagonal().square().sum()).item()
    assert trace.standard_error == pytest.approx(math.sqrt(off_diagonal / 50), rel=0.5)
    assert abs(trace - hessian.trace().item()) <= 4 * trace.standard_error


def test_a_negative_trace_is_estimated_from_all_probes() -> None:
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    trace = pyhessian_trace(model, x, lambda m, x: -m(x).square().mean(), num_probes=30)
    assert trace == pytest.approx(-2 * (x.square().sum(1).mean().item() + 1), abs=4 * trace.standard_error)
    assert pyhessian_trace(model, x, lambda m, x: -m(x).square().mean(), num_probes=1) < 0


def test_brackets_are_infinite_and_therefore_not_resolved() -> None:
    spectrum = pyhessian_spectrum(*CASES[0].build(), CASES[0].loss_fn)
    assert (spectrum.lambda_max.lo, spectrum.lambda_max.hi) == (-math.inf, math.inf)
    assert not spectrum.lambda_max.resolved


def test_dictionaries_and_any_loss_will_do() -> None:
    model = nn.Linear(3, 2)
    batch = {"x": torch.randn(6, 3), "y": torch.arange(6) % 2, "scale": 2.0}

    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return batch["scale"] * F.cross_entropy(model(batch["x"]), batch["y"]) + penalty

    plain = pyhessian_spectrum(model, batch, lambda m, b: F.cross_entropy(m(b["x"]), b["y"]))
    shifted = pyhessian_spectrum(model, batch, loss_fn)
    assert shifted.lambda_max == pytest.approx(2 * plain.lambda_max + 2, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "curvature"), [(lambda w: w.sum(), 0.0), (lambda w: w.square().sum() / 2, 1.0)], ids=["linear", "identity"]
)
def test_hessians_that_are_constant_or_nothing(loss: Any, curvature: float) -> None:
    """Autograd returns no graph for the one, and the vector itself for the other."""
    model = nn.Linear(3, 2)
    spectrum = pyhessian_spectrum(model, None, lambda m, _: loss(m.weight) + loss(m.bias), num_steps=1)
    assert spectrum.eigenvalues.tolist() == pytest.approx([curvature], abs=1e-5)
    (top,) = pyhessian_top_eigenvalues(model, None, lambda m, _: loss(m.weight) + loss(m.bias))
    assert top.item() == pytest.approx(curvature, abs=1e-5)


@pytest.mark.parametrize(("factor", "wrong"), [(1e-3, False), (1e-6, True)])
def test_small_curvature_is_distorted_as_documented(factor: float, wrong: bool) -> None:
    """If the second one fails, PyHessian is mended, and a caution in the docstring can go."""
    model, (x, y) = CASES[0].build()
    plain = pyhessian_spectrum(model, x, lambda m, x: F.cross_entropy(m(x), y))
    scaled = pyhessian_spectrum(model, x, lambda m, x: factor * F.cross_entropy(m(x), y))
    off = abs(scaled.lambda_max / factor / plain.lambda_max - 1)
    assert (off > 0.1) == wrong


def test_sparse_gradients_are_as_good_as_dense_ones() -> None:
    tokens, y = torch.randint(7, (6, 5)), classes(6)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    dense = pyhessian_spectrum(model, tokens, lambda m, x: F.cross_entropy(m(x), y))
    model[0].sparse = True
    sparse = pyhessian_spectrum(model, tokens, lambda m, x: F.cross_entropy(m(x), y))
    assert sparse.lambda_max == pytest.approx(dense.lambda_max, rel=1e-5)


def test_seed_decides_and_progress_counts() -> None:
    model, batch = CASES[0].build()
    seen: list[tuple[int, int]] = []
    first = pyhessian_spectrum(
        model, batch, CASES[0].loss_fn, num_probes=2, num_steps=5, progress=lambda *at: seen.append(at)
    )
    assert seen == [(done, 10) for done in range(1, 11)]
    again = pyhessian_spectrum(model, batch, CASES[0].loss_fn, num_probes=2, num_steps=5)
    other = pyhessian_spectrum(model, batch, CASES[0].loss_fn, num_probes=2, num_steps=5, seed=1)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.eigenvalues, other.eigenvalues)
    more = pyhessian_spectrum(nn.Linear(2, 1, bias=False), torch.eye(2), lambda m, x: m(x).exp().sum(), num_steps=99)
    assert len(more.eigenvalues) == 2, "never more steps than parameters"


def state(model: nn.Module, batch: Any) -> Any:
    module = import_module("pyhessian.hessian")
    return (
        {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        {name: id(p.grad) for name, p in model.named_parameters()},
        [part.training for part in model.modules()],
        torch.get_rng_state(),
        copy.deepcopy(batch),
        (module.torch is torch, hasattr(torch, "eig"), id(module.hessian_vector_product)),
    )


class InterruptedProbeError(Exception):
    pass


@pytest.mark.parametrize("function", [pyhessian_spectrum, pyhessian_top_eigenvalues, pyhessian_trace])
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("case", [CASES[6], CASES[8], UNUSED, NORMED], ids=lambda case: case.name)
def test_nothing_is_left_behind(function: Any, interrupted: bool, case: Case) -> None:
    model, batch = case.build(torch.float32)
    model.train()
    next(model.children()).training = False
    case.loss_fn(model, batch).backward()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(1)
        loss = case.loss_fn(model, batch)
        if interrupted:
            loss.register_hook(_interrupt)
        return loss

    before = state(model, batch)
    if interrupted:
        with pytest.raises(InterruptedProbeError):
            function(model, batch, loss_fn)
    else:
        function(model, batch, loss_fn)
    torch.testing.assert_close(state(model, batch), before, rtol=0, atol=0)


def _interrupt(gradient: Tensor) -> None:
    raise InterruptedProbeError


def test_an_interruption_halfway_leaves_nothing_behind() -> None:
    model, batch = CASES[6].build(torch.float32)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedProbeError

    before = state(model, batch)
    with pytest.raises(InterruptedProbeError):
        pyhessian_spectrum(model, batch, CASES[6].loss_fn, progress=stop)
    torch.testing.assert_close(state(model, batch), before, rtol=0, atol=0)


def test_neither_torch_nor_pyhessian_is_patched_meanwhile() -> None:
    model, batch = CASES[0].build()
    before, seen = state(model, batch)[-1], []
    pyhessian_spectrum(
        model, batch, CASES[0].loss_fn, num_steps=3, progress=lambda *_: seen.append(state(model, batch)[-1])
    )
    assert seen == [before] * 3


def test_what_cannot_be_measured_is_refused() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), classes(5, 2))

    with pytest.raises(ValueError, match="num_probes=0"):
        pyhessian_spectrum(model, x, loss_fn, num_probes=0)
    with pytest.raises(ValueError, match="num_steps=0"):
        pyhessian_spectrum(model, x, loss_fn, num_steps=0)
    with pytest.raises(ValueError, match="k=9 is more than the 8 parameters"):
        pyhessian_top_eigenvalues(model, x, loss_fn, k=9)
    with pytest.raises(ValueError, match=r"tensor of shape \(5, 2\)"):
        pyhessian_spectrum(model, x, lambda m, x: m(x))
    other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="not of the model that the loss function was given"):
        pyhessian_spectrum(model, x, lambda _, x: loss_fn(other, x))
    nn.init.zeros_(other.weight)
    nn.init.zeros_(other.bias)
    with pytest.raises(ValueError, match="is NaN or infinite although the loss is not"):
        pyhessian_spectrum(other, x, lambda m, x: m(x).norm())
    bag = nn.Sequential(nn.EmbeddingBag(7, 3), model)
    with pytest.raises(DoubleBackwardError, match="embedding_bag"):
        pyhessian_spectrum(bag, torch.randint(7, (5, 3)), loss_fn)
