"""Compare PyHessian's estimates with dense float64 Hessians, and check that its side effects are gone."""

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
from tests.helpers.cases import CASES, Case, case_named, classes, dense_hessian, mlp


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
MLP, DROPOUT, BATCH_NORM = map(case_named, ("mlp", "layer norm and dropout", "batch norm of features"))
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
def test_quadratures_match_the_dense_hessian(case: Case, dtype: torch.dtype) -> None:
    """Their first two moments and extreme nodes equal those of the dense Hessian."""
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
def test_top_eigenvalue_matches_the_dense_hessian(case: Case) -> None:
    values = torch.linalg.eigvalsh(exact(case))
    expected = values[values.abs().argmax()].item()
    (actual,) = pyhessian_top_eigenvalues(*case.build(), case.loss_fn, tolerance=1e-8, max_steps=5000)
    assert actual.item() == pytest.approx(expected, rel=1e-3)


def test_top_eigenvalues_match_the_dense_hessian() -> None:
    values = torch.linalg.eigvalsh(exact(MLP))
    expected = values[values.abs().argsort(descending=True)][:3]
    actual = pyhessian_top_eigenvalues(*MLP.build(), MLP.loss_fn, k=3, tolerance=1e-9, max_steps=5000)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


@each_case
def test_trace_is_within_its_standard_error(case: Case) -> None:
    hessian = exact(case)
    trace = pyhessian_trace(*case.build(), case.loss_fn, num_probes=50)
    off_diagonal = 2 * (hessian.square().sum() - hessian.diagonal().square().sum()).item()
    assert trace.standard_error == pytest.approx(math.sqrt(off_diagonal / 50), rel=0.5)
    assert abs(trace - hessian.trace().item()) <= 4 * trace.standard_error


def test_negative_trace_uses_all_probes() -> None:
    """PyHessian's own stopping rule ends the run as soon as the mean is negative."""
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    trace = pyhessian_trace(model, x, lambda m, x: -m(x).square().mean(), num_probes=30)
    assert trace == pytest.approx(-2 * (x.square().sum(1).mean().item() + 1), abs=4 * trace.standard_error)
    assert pyhessian_trace(model, x, lambda m, x: -m(x).square().mean(), num_probes=1) < 0


def test_brackets_are_infinite_and_not_resolved() -> None:
    spectrum = pyhessian_spectrum(*MLP.build(), MLP.loss_fn)
    assert (spectrum.lambda_max.lo, spectrum.lambda_max.hi) == (-math.inf, math.inf)
    assert not spectrum.lambda_max.resolved


def test_dict_batches_and_any_loss_are_supported() -> None:
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
def test_zero_and_identity_hessians(loss: Any, curvature: float) -> None:
    """Autograd returns no graph for the zero Hessian, and the vector itself for the identity."""
    model = nn.Linear(3, 2)
    spectrum = pyhessian_spectrum(model, None, lambda m, _: loss(m.weight) + loss(m.bias), num_steps=1)
    assert spectrum.eigenvalues.tolist() == pytest.approx([curvature], abs=1e-5)
    (top,) = pyhessian_top_eigenvalues(model, None, lambda m, _: loss(m.weight) + loss(m.bias))
    assert top.item() == pytest.approx(curvature, abs=1e-5)


@pytest.mark.parametrize(("factor", "wrong"), [(1e-3, False), (1e-6, True)])
def test_small_curvature_is_distorted_as_documented(factor: float, wrong: bool) -> None:
    """If the second case fails, PyHessian is fixed, and the warning in the docstring can go."""
    model, (x, y) = MLP.build()
    plain = pyhessian_spectrum(model, x, lambda m, x: F.cross_entropy(m(x), y))
    scaled = pyhessian_spectrum(model, x, lambda m, x: factor * F.cross_entropy(m(x), y))
    error = abs(scaled.lambda_max / factor / plain.lambda_max - 1)
    assert (error > 0.1) == wrong


def test_sparse_gradients_give_the_same_spectrum() -> None:
    tokens, y = torch.randint(7, (6, 5)), classes(6)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3))
    dense = pyhessian_spectrum(model, tokens, lambda m, x: F.cross_entropy(m(x), y))
    model[0].sparse = True
    sparse = pyhessian_spectrum(model, tokens, lambda m, x: F.cross_entropy(m(x), y))
    assert sparse.lambda_max == pytest.approx(dense.lambda_max, rel=1e-5)


def test_seed_determines_estimate_and_progress_counts() -> None:
    model, batch = MLP.build()
    calls: list[tuple[int, int]] = []
    first = pyhessian_spectrum(
        model, batch, MLP.loss_fn, num_probes=2, num_steps=5, progress=lambda *counts: calls.append(counts)
    )
    assert calls == [(done, 10) for done in range(1, 11)]
    again = pyhessian_spectrum(model, batch, MLP.loss_fn, num_probes=2, num_steps=5)
    other = pyhessian_spectrum(model, batch, MLP.loss_fn, num_probes=2, num_steps=5, seed=1)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert not torch.equal(first.eigenvalues, other.eigenvalues)
    more = pyhessian_spectrum(nn.Linear(2, 1, bias=False), torch.eye(2), lambda m, x: m(x).exp().sum(), num_steps=99)
    assert len(more.eigenvalues) == 2, "never more steps than parameters"


def snapshot(model: nn.Module, batch: Any) -> Any:
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
@pytest.mark.parametrize("case", [DROPOUT, BATCH_NORM, UNUSED, NORMED], ids=lambda case: case.name)
def test_model_batch_and_globals_are_unchanged(function: Any, interrupted: bool, case: Case) -> None:
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

    before = snapshot(model, batch)
    if interrupted:
        with pytest.raises(InterruptedProbeError):
            function(model, batch, loss_fn)
    else:
        function(model, batch, loss_fn)
    torch.testing.assert_close(snapshot(model, batch), before, rtol=0, atol=0)


def _interrupt(gradient: Tensor) -> None:
    raise InterruptedProbeError


def test_interrupted_run_leaves_state_unchanged() -> None:
    model, batch = DROPOUT.build(torch.float32)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedProbeError

    before = snapshot(model, batch)
    with pytest.raises(InterruptedProbeError):
        pyhessian_spectrum(model, batch, DROPOUT.loss_fn, progress=stop)
    torch.testing.assert_close(snapshot(model, batch), before, rtol=0, atol=0)


def test_torch_and_pyhessian_are_not_patched_during_a_run() -> None:
    model, batch = MLP.build()
    before, seen = snapshot(model, batch)[-1], []
    pyhessian_spectrum(
        model, batch, MLP.loss_fn, num_steps=3, progress=lambda *_: seen.append(snapshot(model, batch)[-1])
    )
    assert seen == [before] * 3


def test_invalid_arguments_and_losses_are_refused() -> None:
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
