"""Estimates of the spectrum against dense float64 matrices, and their errors against the truth."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_plasticity.curvature import Estimate, Quadrature, Spectrum, ggn_spectrum, hessian_spectrum
from lightning_plasticity.curvature.lanczos import _Orthogonality, lanczos, lanczos_spectrum
from lightning_plasticity.curvature.products import CurvatureProduct
from tests.cases import CASES, Case, dense

each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class Matrix(CurvatureProduct):
    """A matrix that is known."""

    def __init__(self, matrix: Tensor, *, semidefinite: bool = False) -> None:
        super().__init__([nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))])
        self.matrix, self.semidefinite, self.products = matrix, semidefinite, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator(seed))).Q
    return (basis * values) @ basis.T


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def finite_difference_hessian(case: Case) -> Tensor:
    """Central differences of gradients: no second derivative of autograd's is involved."""
    model, batch = case.build()
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = nn.utils.parameters_to_vector(parameters).detach()
    columns, step = [], 1e-5

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, parameters)
        gradients = torch.autograd.grad(
            case.loss_fn(model, batch), parameters, allow_unused=True, materialize_grads=True
        )
        return nn.utils.parameters_to_vector([g.contiguous() for g in gradients])

    for index in range(len(flat)):
        move = torch.zeros_like(flat)
        move[index] = step
        columns.append((gradient(flat + move) - gradient(flat - move)) / (2 * step))
    hessian = torch.stack(columns)
    return (hessian + hessian.T) / 2


# Without kinks, and without padding, whose row is no parameter to autograd but moves the loss all the same.
SMOOTH = [case for case in CASES if not any(word in case.name for word in ("relu", "batch norm", "twice", "padding"))]


@pytest.mark.parametrize("case", SMOOTH, ids=[case.name for case in SMOOTH])
def test_hessian_extremes_and_moments_equal_those_of_finite_differences(case: Case) -> None:
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
def test_gauss_newton_products_equal_the_dense_matrix(case: Case) -> None:
    model, batch = case.build()
    expected = dense(case).eigenvalues
    spectrum = ggn_spectrum(model, batch, case.loss_fn, method="lanczos", num_probes=1, num_steps=len(expected))
    assert spectrum.lambda_max == pytest.approx(expected[0].item(), rel=1e-9)
    draw = torch.randn(len(expected), generator=generator(0), dtype=torch.float64)
    vector, matrix = draw / draw.norm(), dense(case).ggn
    assert spectrum.trace == pytest.approx(len(expected) * (vector @ matrix @ vector).item(), rel=1e-9)


def test_hessian_minus_gauss_newton_vanishes_where_the_model_is_linear() -> None:
    case = Case("linear", lambda: (nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3))
    model, batch = case.build()
    by_products = hessian_spectrum(model, batch, case.loss_fn, num_probes=1, num_steps=15)
    assert by_products.top(6).numpy() == pytest.approx(
        ggn_spectrum(model, batch, case.loss_fn).top(6).numpy(), rel=1e-9
    )


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_the_loss_does_not_matter(factor: float, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 3, 60, dtype=torch.float64)
    matrix = with_eigenvalues(values).to(dtype)
    plain = lanczos_spectrum(Matrix(matrix), num_probes=2, num_steps=30, seed=0)
    scaled = lanczos_spectrum(Matrix(matrix * factor), num_probes=2, num_steps=30, seed=0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert scaled.lambda_max / factor == pytest.approx(plain.lambda_max, rel=tolerance)
    assert scaled.epsilon_rank(0.5 * factor) == pytest.approx(plain.epsilon_rank(0.5), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_low_rank_ends_the_run_and_is_known_exactly(dtype: torch.dtype) -> None:
    values = torch.zeros(80, dtype=torch.float64)
    values[:3] = torch.tensor([5.0, 2.0, 1e-3])
    product = Matrix(with_eigenvalues(values).to(dtype), semidefinite=True)
    quadrature = lanczos(product, torch.randn(80, generator=generator(1), dtype=torch.float64).to(dtype), 50)
    assert quadrature.complete
    assert product.products <= 5
    assert quadrature.nodes.max().item() == pytest.approx(5, rel=1e-5)


def test_zero_matrix() -> None:
    spectrum = lanczos_spectrum(Matrix(torch.zeros(9, 9)), num_probes=2, num_steps=5, seed=0)
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
def test_the_bracket_holds_the_measure_of_the_start_vector(
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


def test_full_rank_below_the_resolution_is_said_to_be_unresolved() -> None:
    values = torch.cat([torch.logspace(0, -2, 40), torch.full((960,), 1e-7)]).double()
    spectrum = lanczos_spectrum(Matrix(torch.diag(values), semidefinite=True), num_probes=4, num_steps=20, seed=0)
    rank = spectrum.epsilon_rank(1e-5)
    if abs(rank - 40) > 4:
        assert not rank.resolved
    assert rank.lo - 3 * rank.standard_error <= 40 <= rank.hi + 3 * rank.standard_error


def test_stated_errors_are_honest_in_95_of_100_seeds() -> None:
    values = torch.cat([torch.logspace(1, -2, 100), torch.zeros(200)]).double()
    matrix = Matrix(with_eigenvalues(values), semidefinite=True)
    within = {"trace": 0, "rank": 0}
    for seed in range(100):
        spectrum = lanczos_spectrum(matrix, num_probes=8, num_steps=40, seed=seed)
        trace, rank = spectrum.trace, spectrum.epsilon_rank(0.1)
        within["trace"] += abs(trace - values.sum().item()) <= 3 * trace.standard_error
        exact = (values > 0.1).sum().item()
        within["rank"] += rank.lo - 3 * rank.standard_error <= exact <= rank.hi + 3 * rank.standard_error
    assert min(within.values()) >= 95, within


def test_a_block_of_parameters_is_the_block_of_the_matrix() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    model, batch = case.build()
    block = finite_difference_hessian(case)[:48, :48]  # the first layer: 5 × 8 weights and 8 biases
    values = torch.linalg.eigvalsh(block)
    spectrum = hessian_spectrum(model, batch, case.loss_fn, parameters="0.*", num_probes=1, num_steps=48)
    assert spectrum.num_parameters == 48
    assert spectrum.lambda_max == pytest.approx(values[-1].item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"parameters='head.\*' matches none of the trainable parameters \['0.weight'"):
        hessian_spectrum(model, batch, case.loss_fn, parameters="head.*")


def test_attention_kernels_without_a_second_derivative_are_not_used() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, activation="gelu").double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    spectrum = hessian_spectrum(
        model, x, lambda m, x: F.mse_loss(m(x), torch.zeros_like(x)), num_probes=2, num_steps=10
    )
    assert math.isfinite(spectrum.trace)


def test_progress_is_told_of_every_product() -> None:
    told: list[tuple[int, int]] = []
    matrix = Matrix(torch.diag(torch.arange(1.0, 21.0, dtype=torch.float64)))
    lanczos_spectrum(matrix, num_probes=2, num_steps=6, seed=0, progress=lambda done, all_: told.append((done, all_)))
    assert told == [(done, 12) for done in range(1, 13)]


def test_same_seed_same_estimate_and_no_trace_on_the_model() -> None:
    case = next(case for case in CASES if case.name == "layer norm and dropout")
    model, batch = case.build(torch.float32)
    model.train()
    state = torch.get_rng_state()
    first, second = (hessian_spectrum(model, batch, case.loss_fn, num_probes=2, num_steps=8) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_estimates_are_floats_with_more_to_say() -> None:
    nodes, weights = torch.tensor([0.0, 2.0]).double(), torch.tensor([0.25, 0.75]).double()
    quadrature = Quadrature(nodes, weights, torch.tensor([0.1, 0.2], dtype=torch.float64))
    spectrum = Spectrum.from_quadratures([quadrature, quadrature], 8)
    assert (spectrum.trace, spectrum.trace.standard_error) == (12.0, 0.0)
    assert (spectrum.lambda_max.lo, spectrum.lambda_max.hi) == (1.8, 2.2)
    assert repr(Estimate(1.5, standard_error=0.25)) == "1.5 ± 0.25"
    again = Spectrum.from_dict(spectrum.to_dict())
    assert again.epsilon_rank(1).hi == spectrum.epsilon_rank(1).hi
    assert again.distance(spectrum) == 0
    grid = torch.linspace(-5, 7, 2001, dtype=torch.float64)
    assert torch.trapezoid(spectrum.density(grid, 0.3), grid).item() == pytest.approx(1, abs=1e-6)


def test_fast_rank_counts_what_contracts_in_time() -> None:
    spectrum = Spectrum(torch.tensor([1.0, 0.1, 0.01]).double(), torch.full((3,), 1 / 3).double(), 3, exact=True)
    for lr, steps in ((0.1, 30), (0.1, 300), (1.0, 1000)):
        contracted = sum(math.exp(-lr * steps * value) < 0.1 for value in (1.0, 0.1, 0.01))
        assert spectrum.fast_rank(lr, steps) == contracted
    with pytest.raises(ValueError, match="contraction in"):
        spectrum.fast_rank(0.1, 10, contraction=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["decaying", "outliers", "low rank"])
def test_partial_reorthogonalisation_gives_the_same_quadrature_as_full_with_less_work(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "decaying": torch.logspace(2, -6, 500),
        "outliers": torch.cat([torch.linspace(-1, 1, 496), torch.tensor([50.0, 30, 20, 10])]),
        "low rank": torch.cat([torch.logspace(1, -3, 60), torch.zeros(440)]),
    }[kind].double()
    product = Matrix(with_eigenvalues(values).to(dtype))
    start = torch.randn(500, generator=generator(1), dtype=torch.float64).to(dtype)
    full = lanczos(product, start, 80, reorthogonalization="full")
    asked: list[bool] = []
    needs_care = _Orthogonality.needs_care

    def counting(self: _Orthogonality, *arguments: list[float]) -> bool:
        asked.append(needs_care(self, *arguments))
        return asked[-1]

    monkeypatch.setattr(_Orthogonality, "needs_care", counting)
    partial = lanczos(product, start, 80, reorthogonalization="partial")
    tolerance = 100 * torch.finfo(dtype).eps * full.nodes.abs().max()
    assert len(partial.nodes) == len(full.nodes)
    assert (partial.nodes - full.nodes).abs().max() <= tolerance
    assert sum(asked) <= 0.75 * len(asked)


def test_without_reorthogonalisation_the_bracket_still_holds() -> None:
    values = torch.logspace(2, -6, 500, dtype=torch.float64)
    start = torch.randn(500, generator=generator(1), dtype=torch.float64)
    quadrature = lanczos(Matrix(torch.diag(values).float()), start.float(), 80, reorthogonalization="none")
    assert (quadrature.nodes.diff() < 1e-5 * quadrature.nodes.max()).sum() > 5, "there are copies"
    measure = start.square() / start.square().sum()
    for epsilon in (10.0, 1.0, 0.1, 0.01):
        low, high = quadrature.mass_between(-epsilon, epsilon, semidefinite=True)
        assert low - 1e-4 <= measure[values <= epsilon].sum().item() <= high + 1e-4


def test_pyhessian_is_a_backend() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    native, theirs = (
        hessian_spectrum(*case.build(), case.loss_fn, num_probes=2, num_steps=40, backend=backend)  # type: ignore[arg-type]
        for backend in ("native", "pyhessian")
    )
    assert theirs.lambda_max == pytest.approx(native.lambda_max, rel=1e-3)
    assert theirs.lambda_min == pytest.approx(native.lambda_min, rel=1e-3)
    with pytest.raises(ValueError, match="backend='jax' must be 'native' or 'pyhessian'"):
        hessian_spectrum(*case.build(), case.loss_fn, backend="jax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameters='0.\*': PyHessian knows only all parameters"):
        hessian_spectrum(*case.build(), case.loss_fn, backend="pyhessian", parameters="0.*")


@pytest.mark.parametrize("kind", ["full", "partial"])
@pytest.mark.parametrize("noise", [1e-15, 1e-14, 1e-13, 1e-12])
def test_a_run_that_goes_on_in_rounding_errors_stays_within_the_spectrum(noise: float, kind: str) -> None:
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
