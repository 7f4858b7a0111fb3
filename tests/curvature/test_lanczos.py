"""Compare Lanczos estimates with dense float64 matrices, and their stated errors with the observed ones."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.curvature import Estimate, Spectrum, ggn_spectrum, hessian_spectrum
from lightning_plasticity.curvature.double_backward import DoubleBackwardError
from lightning_plasticity.curvature.matrix_free.lanczos import OrthogonalityEstimate, lanczos, run_lanczos
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from lightning_plasticity.curvature.matrix_free.stochastic_lanczos import LanczosOptions, lanczos_spectrum
from tests.helpers.cases import CASES, Case, case_named, dense, finite_difference_hessian

each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class Matrix(CurvatureLinearOperator):
    """A dense matrix as an operator."""

    def __init__(self, matrix: Tensor, *, semidefinite: bool = False) -> None:
        super().__init__([nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))])
        self.matrix, self.semidefinite, self.products = matrix, semidefinite, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def estimated(operator: CurvatureLinearOperator, **options: Any) -> Spectrum:
    return lanczos_spectrum(operator, LanczosOptions(**options))


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator(seed))).Q
    return (basis * values) @ basis.T


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Finite differences cross kinks, and they see the padding row of an embedding, which is a constant to autograd.
SMOOTH = [case for case in CASES if not any(word in case.name for word in ("relu", "batch norm", "twice", "padding"))]


@pytest.mark.parametrize("case", SMOOTH, ids=[case.name for case in SMOOTH])
def test_hessian_spectrum_matches_finite_differences(case: Case) -> None:
    """The extreme eigenvalues and the moments of each start vector equal those of a finite-difference Hessian."""
    model, batch = case.build()
    exact = finite_difference_hessian(case)
    values = torch.linalg.eigvalsh(exact)
    spectrum = hessian_spectrum(model, batch, case.loss_fn, num_probes=3, num_steps=len(exact))
    scale = values.abs().max().item()
    assert spectrum.lambda_max == pytest.approx(values[-1].item(), abs=1e-6 * scale)
    assert spectrum.lambda_min == pytest.approx(values[0].item(), abs=1e-6 * scale)
    for number, quadrature in enumerate(spectrum.quadratures):
        draws = generator(0)
        starts = [torch.randn(len(exact), generator=draws, dtype=torch.float64) for _ in range(number + 1)]
        vector = starts[-1] / starts[-1].norm()
        for power, moment in ((1, vector @ exact @ vector), (2, (exact @ vector).square().sum())):
            assert (quadrature.weights * quadrature.nodes**power).sum().item() == pytest.approx(
                moment.item(), abs=1e-6 * scale**power
            )


@each_case
def test_ggn_products_equal_the_dense_matrix(case: Case) -> None:
    model, batch = case.build()
    expected = dense(case).eigenvalues
    spectrum = ggn_spectrum(model, batch, case.loss_fn, method="lanczos", num_probes=1, num_steps=len(expected))
    assert spectrum.lambda_max == pytest.approx(expected[0].item(), rel=1e-9)
    draw = torch.randn(len(expected), generator=generator(0), dtype=torch.float64)
    vector, matrix = draw / draw.norm(), dense(case).ggn
    assert spectrum.trace == pytest.approx(len(expected) * (vector @ matrix @ vector).item(), rel=1e-9)


def test_hessian_equals_ggn_for_a_linear_model() -> None:
    case = Case("linear", lambda: (nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3))
    model, batch = case.build()
    by_products = hessian_spectrum(model, batch, case.loss_fn, num_probes=1, num_steps=15)
    assert by_products.top(6).numpy() == pytest.approx(
        ggn_spectrum(model, batch, case.loss_fn).top(6).numpy(), rel=1e-9
    )


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimate_is_independent_of_the_loss_scale(factor: float, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 3, 60, dtype=torch.float64)
    matrix = with_eigenvalues(values).to(dtype)
    plain = estimated(Matrix(matrix), num_probes=2, num_steps=30, seed=0)
    scaled = estimated(Matrix(matrix * factor), num_probes=2, num_steps=30, seed=0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert scaled.lambda_max / factor == pytest.approx(plain.lambda_max, rel=tolerance)
    assert scaled.epsilon_rank(0.5 * factor) == pytest.approx(plain.epsilon_rank(0.5), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_matrix_completes_the_run(dtype: torch.dtype) -> None:
    values = torch.zeros(80, dtype=torch.float64)
    values[:3] = torch.tensor([5.0, 2.0, 1e-3])
    product = Matrix(with_eigenvalues(values).to(dtype), semidefinite=True)
    quadrature = lanczos(product, torch.randn(80, generator=generator(1), dtype=torch.float64).to(dtype), 50)
    assert quadrature.complete
    assert product.products <= 5
    assert quadrature.nodes.max().item() == pytest.approx(5, rel=1e-5)


def test_zero_matrix() -> None:
    spectrum = estimated(Matrix(torch.zeros(9, 9)), num_probes=2, num_steps=5, seed=0)
    assert spectrum.trace == spectrum.lambda_max == spectrum.epsilon_rank(1e-12) == spectrum.effective_rank == 0
    assert spectrum.epsilon_rank(1e-12).resolved


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    decay=st.floats(0.5, 12),
    steps=st.integers(5, 40),
    epsilon=st.floats(1e-8, 0.5),
    semidefinite=st.booleans(),
)
def test_bracket_contains_the_spectral_measure(
    seed: int, decay: float, steps: int, epsilon: float, semidefinite: bool
) -> None:
    values = torch.logspace(0, -decay, 60, dtype=torch.float64)
    if not semidefinite:
        values = values * torch.sign(torch.randn(60, generator=generator(seed), dtype=torch.float64))
    start = torch.randn(60, generator=generator(seed + 1), dtype=torch.float64)
    start = start / start.norm()
    quadrature = lanczos(Matrix(torch.diag(values)), start, steps)
    truth = start.square()[values.abs() <= epsilon].sum().item()
    low, high = quadrature.mass_between(-epsilon, epsilon, semidefinite=semidefinite)
    assert low - 1e-9 <= truth <= high + 1e-9


def test_full_rank_below_the_resolution_is_not_resolved() -> None:
    values = torch.cat([torch.logspace(0, -2, 40), torch.full((960,), 1e-7)]).double()
    spectrum = estimated(Matrix(torch.diag(values), semidefinite=True), num_probes=4, num_steps=20, seed=0)
    rank = spectrum.epsilon_rank(1e-5)
    if abs(rank - 40) > 4:
        assert not rank.resolved
    assert rank.lo - 3 * rank.standard_error <= 40 <= rank.hi + 3 * rank.standard_error


def test_stated_errors_hold_for_95_of_100_seeds() -> None:
    values = torch.cat([torch.logspace(1, -2, 100), torch.zeros(200)]).double()
    matrix = Matrix(with_eigenvalues(values), semidefinite=True)
    within = {"trace": 0, "rank": 0}
    for seed in range(100):
        spectrum = estimated(matrix, num_probes=8, num_steps=40, seed=seed)
        trace, rank = spectrum.trace, spectrum.epsilon_rank(0.1)
        within["trace"] += abs(trace - values.sum().item()) <= 3 * trace.standard_error
        exact = (values > 0.1).sum().item()
        within["rank"] += rank.lo - 3 * rank.standard_error <= exact <= rank.hi + 3 * rank.standard_error
    assert min(within.values()) >= 95, within


def test_parameters_select_a_block_of_the_hessian() -> None:
    case = case_named("mlp")
    model, batch = case.build()
    # The first layer has 5 × 8 weights and 8 biases.
    block = finite_difference_hessian(case)[:48, :48]
    values = torch.linalg.eigvalsh(block)
    spectrum = hessian_spectrum(model, batch, case.loss_fn, parameters="0.*", num_probes=1, num_steps=48)
    assert spectrum.num_parameters == 48
    assert spectrum.lambda_max == pytest.approx(values[-1].item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"parameters='head.\*' matches none of the trainable parameters \['0.weight'"):
        hessian_spectrum(model, batch, case.loss_fn, parameters="head.*")


def test_attention_runs_without_fused_kernels() -> None:
    """Fused attention kernels have no second derivative."""
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, activation="gelu").double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    spectrum = hessian_spectrum(
        model, x, lambda m, x: F.mse_loss(m(x), torch.zeros_like(x)), num_probes=2, num_steps=10
    )
    assert math.isfinite(spectrum.trace)


def test_progress_is_called_for_every_product() -> None:
    calls: list[tuple[int, int]] = []
    matrix = Matrix(torch.diag(torch.arange(1.0, 21.0, dtype=torch.float64)))
    estimated(matrix, num_probes=2, num_steps=6, seed=0, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 12) for done in range(1, 13)]


def test_estimate_is_reproducible_and_leaves_model_unchanged() -> None:
    case = case_named("layer norm and dropout")
    model, batch = case.build(torch.float32)
    model.train()
    state = torch.get_rng_state()
    first, second = (hessian_spectrum(model, batch, case.loss_fn, num_probes=2, num_steps=8) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["decaying", "outliers", "low rank"])
def test_partial_reorthogonalization_equals_full(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the same quadrature with at most 75 % of the reorthogonalizations."""
    values = {
        "decaying": torch.logspace(2, -6, 500),
        "outliers": torch.cat([torch.linspace(-1, 1, 496), torch.tensor([50.0, 30, 20, 10])]),
        "low rank": torch.cat([torch.logspace(1, -3, 60), torch.zeros(440)]),
    }[kind].double()
    product = Matrix(with_eigenvalues(values).to(dtype))
    start = torch.randn(500, generator=generator(1), dtype=torch.float64).to(dtype)
    full = lanczos(product, start, 80, reorthogonalization="full")
    decisions: list[bool] = []
    needs_reorthogonalization = OrthogonalityEstimate.needs_reorthogonalization

    def counting(self: OrthogonalityEstimate, *arguments: list[float]) -> bool:
        decisions.append(needs_reorthogonalization(self, *arguments))
        return decisions[-1]

    monkeypatch.setattr(OrthogonalityEstimate, "needs_reorthogonalization", counting)
    partial = lanczos(product, start, 80, reorthogonalization="partial")
    tolerance = 100 * torch.finfo(dtype).eps * full.nodes.abs().max()
    assert len(partial.nodes) == len(full.nodes)
    assert (partial.nodes - full.nodes).abs().max() <= tolerance
    assert sum(decisions) <= 0.75 * len(decisions)


def test_bracket_holds_without_reorthogonalization() -> None:
    values = torch.logspace(2, -6, 500, dtype=torch.float64)
    start = torch.randn(500, generator=generator(1), dtype=torch.float64)
    quadrature = lanczos(Matrix(torch.diag(values).float()), start.float(), 80, reorthogonalization="none")
    assert (quadrature.nodes.diff() < 1e-5 * quadrature.nodes.max()).sum() > 5, "there are copies"
    measure = start.square() / start.square().sum()
    for epsilon in (10.0, 1.0, 0.1, 0.01):
        low, high = quadrature.mass_between(-epsilon, epsilon, semidefinite=True)
        assert low - 1e-4 <= measure[values <= epsilon].sum().item() <= high + 1e-4


def test_pyhessian_backend_matches_native() -> None:
    case = case_named("mlp")
    native, theirs = (
        hessian_spectrum(*case.build(), case.loss_fn, num_probes=2, num_steps=40, backend=backend)  # type: ignore[arg-type]
        for backend in ("native", "pyhessian")
    )
    assert theirs.lambda_max == pytest.approx(native.lambda_max, rel=1e-3)
    assert theirs.lambda_min == pytest.approx(native.lambda_min, rel=1e-3)
    with pytest.raises(ValueError, match="backend='jax' must be 'native' or 'pyhessian'"):
        hessian_spectrum(*case.build(), case.loss_fn, backend="jax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameters='0.\*': PyHessian supports only all parameters"):
        hessian_spectrum(*case.build(), case.loss_fn, backend="pyhessian", parameters="0.*")


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("noise", [1e-15, 1e-14, 1e-13, 1e-12])
def test_runs_beyond_breakdown_stay_within_the_spectrum(noise: float, kind: str) -> None:
    """Noise just above the breakdown limit keeps the run going in directions of rounding error."""
    values = torch.zeros(80, dtype=torch.float64)
    values[:5] = torch.tensor([5.0, 2.0, 1.0, -1.0, 1e-3])
    error = torch.randn(80, 80, dtype=torch.float64, generator=generator(2)) * noise
    matrix = with_eigenvalues(values) + error + error.T
    start = torch.randn(80, generator=generator(1), dtype=torch.float64)
    quadrature = lanczos(Matrix(matrix), start, 80, reorthogonalization=kind)  # type: ignore[arg-type]
    assert quadrature.nodes.max() <= 5 + 1e-9
    assert quadrature.nodes.min() >= -1 - 1e-9
    assert (quadrature.weights * quadrature.nodes).sum().item() == pytest.approx(
        (start @ matrix @ start / (start @ start)).item(), rel=1e-9
    )


def after_tasks(*widths: int, tasks: int = 5, samples: int = 64) -> Tensor:
    """Train a ReLU network on several tasks of random labels and return its dense float64 Hessian on the last one."""
    torch.manual_seed(0)
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(tasks):
        x, y = torch.randn(samples, widths[0], dtype=torch.float64), torch.randint(widths[-1], (samples,))
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    flat = nn.utils.parameters_to_vector(gradients)
    blocks = []
    for rows in torch.eye(len(flat), dtype=torch.float64).split(256):
        block = torch.autograd.grad(flat, parameters, rows, retain_graph=True, is_grads_batched=True)
        blocks.append(torch.cat([piece.reshape(len(rows), -1) for piece in block], 1))
    hessian = torch.cat(blocks)
    return (hessian + hessian.T) / 2


@pytest.fixture(scope="module")
def collapsed() -> Tensor:
    return after_tasks(20, 16, 16, 5)


class Diagonal(CurvatureLinearOperator):
    """A diagonal operator. The distribution of Gaussian start vectors is the same in every basis."""

    def __init__(self, values: Tensor) -> None:
        super().__init__([nn.Parameter(torch.zeros_like(values))])
        self.values = values

    def __call__(self, vector: Tensor) -> Tensor:
        return self.values * vector


def test_deflated_estimates_and_their_errors_are_right(collapsed: Tensor) -> None:
    """Deflation lowers the error, keeps the mean, and its standard error matches the observed spread."""
    values = torch.linalg.eigvalsh(collapsed)
    epsilon = 0.03 * values.abs().max().item()
    exact = {"trace": values.sum().item(), "rank": (values.abs() > epsilon).sum().item()}
    estimates: dict[tuple[str, bool], list[Estimate]] = {key: [] for key in itertools.product(exact, (False, True))}
    for deflate, seed in [*itertools.product([False], range(30)), *itertools.product([True], range(100))]:
        spectrum = estimated(Diagonal(values), num_probes=8, num_steps=32, seed=seed, deflate=deflate)
        estimates["trace", deflate].append(spectrum.trace)
        estimates["rank", deflate].append(spectrum.epsilon_rank(epsilon))
    for name, truth in exact.items():
        plain, deflated = (torch.tensor(estimates[name, deflate], dtype=torch.float64) for deflate in (False, True))
        within = [e.lo - 3 * e.standard_error <= truth <= e.hi + 3 * e.standard_error for e in estimates[name, True]]
        assert sum(within) >= 95, name
        stated = root_mean_square([e.standard_error for e in estimates[name, True]])
        assert 0.75 <= stated / deflated.std() <= 1.33, name
        assert stated <= 0.75 * root_mean_square([e.standard_error for e in estimates[name, False]]), name
        difference = deflated[: len(plain)] - plain
        assert abs(difference.mean()) <= 3 * difference.std() / math.sqrt(len(plain)), name
    trace = torch.tensor(estimates["trace", True], dtype=torch.float64)
    assert abs(trace.mean() - exact["trace"]) <= 3 * trace.std() / 10


def test_model_spectra_are_deflated() -> None:
    case = case_named("mlp")
    model, batch = case.build()
    values = torch.linalg.eigvalsh(finite_difference_hessian(case))
    for spectrum_of in (hessian_spectrum, partial(ggn_spectrum, method="lanczos")):
        plain, deflated = (
            spectrum_of(model, batch, case.loss_fn, num_probes=8, num_steps=20, deflate=deflate).trace
            for deflate in (False, True)
        )
        assert deflated.standard_error < 0.5 * plain.standard_error
    trace = hessian_spectrum(model, batch, case.loss_fn, num_steps=12).trace
    assert abs(trace - values.sum().item()) <= 3 * trace.standard_error


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12), decay=st.floats(0, 8))
def test_deflation_corrections_have_mean_zero(seed: int, steps: int, decay: float) -> None:
    """The mean over an orthonormal basis of start vectors vanishes, as does the sum of each correction."""
    values = torch.logspace(0, -decay, 12, dtype=torch.float64)
    run = run_lanczos(Diagonal(values), torch.randn(12, generator=generator(seed)).double(), steps, None, "full")
    vectors = torch.linalg.qr(torch.randn(12, 12, generator=generator(seed + 1), dtype=torch.float64)).Q
    corrections = [run.quadrature.deflated(run.quadrature, run.overlaps(v), 12).corrections for v in vectors]
    assert torch.stack(corrections).mean(0).abs().max() <= 1e-13
    assert torch.stack(corrections).sum(1).abs().max() <= 1e-13


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    factor=st.sampled_from([1e-12, 1e-3, 7.0, 1e6]),
    steps=st.integers(1, 9),
    rank=st.integers(0, 6),
)
def test_deflated_estimate_scales_with_the_matrix(seed: int, factor: float, steps: int, rank: int) -> None:
    values = torch.zeros(200, dtype=torch.float64)
    values[:rank] = torch.linspace(-2, 3, rank)
    one, many = (estimated(Diagonal(values * f), num_probes=3, num_steps=steps, seed=seed) for f in (1, factor))
    size = values.abs().sum().item()
    assert many.trace / factor == pytest.approx(one.trace, abs=1e-6 * size)
    assert many.trace.standard_error / factor == pytest.approx(one.trace.standard_error, abs=1e-6 * size)
    assert many.weights.sum().item() == pytest.approx(1)
    assert one.epsilon_rank(2 * size + 1) == 0
    # The Krylov space then holds all eigenvectors with a non-zero eigenvalue.
    if steps > rank:
        assert one.trace == pytest.approx(values.sum().item(), abs=1e-6 * size)
        assert one.trace.standard_error <= 1e-6 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 30])
def test_deflated_estimate_is_exact_for_a_full_krylov_space(rows: int, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 2, rows + 1)[1:].to(dtype)
    for scale in (1e-12, 1.0):
        spectrum = estimated(Diagonal(scale * values), num_probes=3, num_steps=rows, seed=0)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        for epsilon in (0.33 * scale, 1.51 * scale):
            rank = spectrum.epsilon_rank(epsilon)
            assert rank == pytest.approx((values.double().abs() > epsilon / scale).sum().item(), abs=tolerance)
            assert rank.hi - rank.lo <= tolerance
        assert spectrum.trace == pytest.approx(scale * values.sum().item(), abs=tolerance * scale)


def test_deflated_bracket_contains_the_rank(collapsed: Tensor) -> None:
    values = torch.linalg.eigvalsh(collapsed)
    contained = dict.fromkeys((0.3, 0.1, 0.03, 0.01, 0.001, 0.0001), 0)
    for seed, relative in itertools.product(range(20), contained):
        epsilon = relative * values.abs().max().item()
        rank = estimated(Diagonal(values), num_probes=8, num_steps=25, seed=seed).epsilon_rank(epsilon)
        exact = (values.abs() > epsilon).sum().item()
        contained[relative] += rank.lo - 3 * rank.standard_error <= exact <= rank.hi + 3 * rank.standard_error
        assert 0 <= rank.lo <= rank <= rank.hi <= len(values)
    assert min(contained.values()) >= 19, contained


def test_deflation_changes_only_the_weights() -> None:
    """It has no effect on Ritz values and density, with fewer than three probes, or without reorthogonalization."""
    product = Matrix(with_eigenvalues(torch.logspace(0, -4, 50, dtype=torch.float64)))

    def spectra(num_probes: int, kind: str) -> list[Spectrum]:
        return [
            estimated(product, num_probes=num_probes, num_steps=10, seed=3, reorthogonalization=kind, deflate=deflate)  # type: ignore[arg-type]
            for deflate in (False, True)
        ]

    for num_probes, kind in ((1, "full"), (2, "partial"), (5, "none")):
        plain, deflated = spectra(num_probes, kind)
        assert torch.equal(plain.weights, deflated.weights)
    plain, deflated = spectra(5, "partial")
    grid = torch.linspace(-0.5, 1.5, 200, dtype=torch.float64)
    assert torch.equal(plain.top(10), deflated.top(10))
    assert torch.equal(plain.density(grid, 0.01), deflated.density(grid, 0.01))
    assert (plain.lambda_max, plain.lambda_max.hi) == (deflated.lambda_max, deflated.lambda_max.hi)
    assert deflated.trace.standard_error < 0.5 * plain.trace.standard_error
    state = deflated.to_dict()
    assert Spectrum.from_dict(state).epsilon_rank(0.1).hi == deflated.epsilon_rank(0.1).hi
    # Checkpoints from before deflation have no corrections.
    for quadrature in state["quadratures"]:
        del quadrature["known"], quadrature["corrections"]
    old = Spectrum.from_dict({**state, "eigenvalues": plain.eigenvalues, "weights": plain.weights}).epsilon_rank(0.1)
    assert (old, old.lo, old.hi) == (lambda rank: (rank, rank.lo, rank.hi))(plain.epsilon_rank(0.1))


def assert_a_third_of_the_products(values: Tensor, relative: float, num_probes: int, num_steps: int) -> None:
    """Check that deflated estimates are within 5 % of the rank, and plain ones of three times the products are not.

    The plain products are divided into start vectors and steps in several ways.
    """
    epsilon, products = relative * values.abs().max().item(), num_probes * num_steps
    exact = (values.abs() > epsilon).sum().item()
    errors, stated = [], []
    for seed in range(40):
        rank = estimated(Diagonal(values), num_probes=num_probes, num_steps=num_steps, seed=seed).epsilon_rank(epsilon)
        errors.append(rank / exact - 1)
        stated.append(rank.standard_error / exact)
    assert root_mean_square(errors) <= 0.05
    assert root_mean_square(stated) <= 0.05
    for steps in (10, 15, 20, 30, 45, 60, 90):
        each = [
            estimated(Diagonal(values), num_probes=1, num_steps=steps, seed=seed).epsilon_rank(epsilon)
            for seed in range(60)
        ]
        error = torch.tensor(each, dtype=torch.float64) / exact - 1
        # The squared bias, without the sampling error of the mean.
        bias = (error.mean().square() - error.var() / len(error)).clamp(min=0)
        assert (bias + error.var() / (3 * products // steps)).sqrt() > 0.05, steps


def root_mean_square(numbers: list[float]) -> float:
    return torch.tensor(numbers, dtype=torch.float64).square().mean().sqrt().item()


def test_deflation_needs_a_third_of_the_products(collapsed: Tensor) -> None:
    """An error of 5 % of a small rank takes a third of the products."""
    assert_a_third_of_the_products(torch.linalg.eigvalsh(collapsed), 0.1, 3, 40)


@pytest.mark.slow
def test_deflation_needs_a_third_after_five_tasks() -> None:
    """An error of 5 % of the rank takes a third of the products, for a larger network."""
    values = torch.linalg.eigvalsh(after_tasks(64, 32, 32, 10, samples=128))
    assert_a_third_of_the_products(values, 0.2, 3, 40)
    assert_a_third_of_the_products(values, 0.15, 3, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "vectors"), [("full", 20), ("partial", 20), ("none", 2)])
def test_peak_memory_is_the_basis_and_six_vectors(kind: str, vectors: int, dtype: torch.dtype) -> None:
    product = Diagonal(torch.rand(50_000, generator=generator(0)).to(dtype))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        estimated(product, num_probes=3, num_steps=20, seed=0, reorthogonalization=kind)  # type: ignore[arg-type]
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    numbers = peak / dtype.itemsize / product.dimension
    assert vectors < numbers <= vectors + 6


@pytest.mark.parametrize("block", ["dropout", "batch norm", "attention", "weight norm"])
def test_checkpointed_block_gives_the_same_spectrum(block: str) -> None:
    """Recomputation runs in the same mode as the first computation."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]

    blocks: dict[str, Callable[[], nn.Module]] = {
        "dropout": lambda: nn.Dropout(0.5),
        "batch norm": lambda: nn.BatchNorm1d(8),
        "attention": Attention,
        "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    }

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
            self.block = nn.Sequential(nn.Linear(8, 8), blocks[block](), nn.Tanh())
            self.checkpointed = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x))

    model, batch = Checkpointed().double(), (torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    for spectrum_of in (hessian_spectrum, partial(ggn_spectrum, method="lanczos")):
        for options in ({}, {"micro_batch_size": 6}):
            model.checkpointed = True
            actual = spectrum_of(model, batch, loss_fn, num_probes=1, num_steps=20, **options)
            model.checkpointed = False
            expected = spectrum_of(model, batch, loss_fn, num_probes=1, num_steps=20, **options)
            torch.testing.assert_close(actual.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-11)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_extreme_scales_neither_underflow_nor_overflow(factor: float) -> None:
    matrix = with_eigenvalues(torch.linspace(-1, 3, 60, dtype=torch.float64)).float()
    plain = estimated(Matrix(matrix), num_probes=3, num_steps=30, seed=0)
    scaled = estimated(Matrix(matrix * factor), num_probes=3, num_steps=30, seed=0)
    torch.testing.assert_close(scaled.eigenvalues / factor, plain.eigenvalues, rtol=1e-3, atol=1e-4)
    assert scaled.trace / factor == pytest.approx(plain.trace, rel=1e-3)
    assert scaled.effective_rank == pytest.approx(plain.effective_rank, rel=1e-2)
    assert scaled.negative_mass == pytest.approx(plain.negative_mass, rel=1e-2)


def test_products_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the curvature of the loss .* is NaN or infinite"):
        estimated(Matrix(torch.full((4, 4), math.nan)), num_probes=1, num_steps=3, seed=0)


def test_few_start_vectors_rarely_resolve_a_wrong_rank() -> None:
    """The rank is 5 of 200: one start vector alone determines nothing."""
    matrix = with_eigenvalues(torch.cat([torch.linspace(1, 2, 5), torch.zeros(195)]).double())
    wrong = dict.fromkeys((1, 2, 3, 8), 0)
    for count in wrong:
        for seed in range(60):
            rank = estimated(Matrix(matrix), num_probes=count, num_steps=20, seed=seed).epsilon_rank(0.5)
            wrong[count] += rank.resolved and abs(rank - 5) > 0.5
    assert wrong[1] == 0
    # 5 % of 60 seeds, with a margin for chance.
    assert max(wrong.values()) <= 6, wrong


def test_estimates_of_unknown_bias_are_never_resolved() -> None:
    spectrum = estimated(Matrix(with_eigenvalues(torch.rand(50).double())), num_probes=8, num_steps=10, seed=0)
    assert not spectrum.effective_rank.resolved
    assert not spectrum.negative_mass.resolved
    assert 0 <= spectrum.negative_mass <= 1
    exact = Spectrum(torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5]), 2, exact=True)
    assert exact.effective_rank.resolved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brackets_contain_the_extreme_eigenvalues(dtype: torch.dtype) -> None:
    values = torch.cat([torch.tensor([1e6]), torch.linspace(0, 1, 99)]).double()
    matrix = with_eigenvalues(values).to(dtype)
    truth = torch.linalg.eigvalsh(matrix.double())
    for seed in range(20):
        spectrum = estimated(Matrix(matrix), num_probes=2, num_steps=60, seed=seed)
        for estimate, exact in ((spectrum.lambda_max, truth[-1]), (spectrum.lambda_min, truth[0])):
            assert estimate.lo <= exact <= estimate.hi
    assert spectrum.lambda_max.hi - spectrum.lambda_max.lo <= 1e-4 * truth[-1]


def test_operation_without_second_derivative_is_named() -> None:
    model = nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 2))
    for spectrum_of in (hessian_spectrum, partial(ggn_spectrum, method="lanczos")):
        with pytest.raises(DoubleBackwardError, match="no second derivative of '_embedding_bag"):
            spectrum_of(model, torch.randint(7, (5, 3)), lambda m, x: F.cross_entropy(m(x), torch.zeros(5).long()))


def test_default_device_has_no_effect() -> None:
    case = case_named("mlp")
    model, batch = case.build()
    expected = hessian_spectrum(model, batch, case.loss_fn, num_probes=3, num_steps=5)
    sketch = ggn_spectrum(model, batch, case.loss_fn, sketch=2)
    with torch.device("meta"):
        assert torch.equal(
            hessian_spectrum(model, batch, case.loss_fn, num_probes=3, num_steps=5).eigenvalues, expected.eigenvalues
        )
        assert torch.equal(ggn_spectrum(model, batch, case.loss_fn, sketch=2).eigenvalues, sketch.eigenvalues)
