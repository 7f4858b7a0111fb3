"""Compare kernels measured with and without a matrix with dense float64 eigendecompositions."""

import io
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lightning_plasticity.curvature import TangentKernel
from lightning_plasticity.curvature.autograd_graph import edge_of
from lightning_plasticity.curvature.double_backward import DoubleBackwardError, second_derivative_mode
from lightning_plasticity.curvature.estimates import Estimate, JacobiMatrix
from lightning_plasticity.curvature.matrix_free.lanczos import LanczosProcess
from lightning_plasticity.curvature.matrix_free.tangent_kernel import TangentKernelOperator, kernel_by_lanczos

HORIZONS = (30, 100, 300, 1000)


class Transformer(nn.Module):
    """Two layers over a vocabulary of 20 words, with position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 16), nn.Parameter(0.1 * torch.randn(6, 16))
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
        self.head = nn.Linear(16, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.words(tokens) + self.positions)).flatten(0, 1)


class LastStep(nn.Module):
    """An LSTM whose last step is read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "mlp": (mlp, lambda: torch.randn(16, 8), 16),
    "conv": (conv, lambda: torch.rand(12, 1, 8, 8), 12),
    "transformer": (Transformer, lambda: torch.randint(20, (3, 6)), 3),
    "lstm": (LastStep, lambda: torch.randn(20, 6, 3), 20),
}


class Problem:
    """A model with random labels in float64 and its dense kernel, by forward Jacobians of torch.func."""

    def __init__(self, name: str) -> None:
        make, make_inputs, self.num_samples = MODELS[name]
        torch.manual_seed(0)
        self.model, inputs = make().double().eval(), make_inputs()
        self.inputs = inputs.double() if inputs.is_floating_point() else inputs
        values = {key: parameter.detach() for key, parameter in self.model.named_parameters()}
        jacobians = jacrev(lambda p: functional_call(self.model, p, (self.inputs,)), chunk_size=1)(values)
        outputs = self.model(self.inputs).detach()
        self.labels = torch.randint(outputs.shape[1], (len(outputs),))
        jacobian = torch.cat([part.reshape(outputs.numel(), -1) for part in jacobians.values()], 1)
        self.kernel = jacobian @ jacobian.T / self.num_samples
        self.residual = torch.func.grad(F.cross_entropy)(outputs, self.labels).flatten()

    def operator(self, dtype: torch.dtype = torch.float64) -> TangentKernelOperator:
        self.model.to(dtype)
        outputs = self.model(self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs)
        edges, shapes = [edge_of(outputs)], [outputs.shape]
        return TangentKernelOperator(edges, shapes, list(self.model.parameters()), self.num_samples)


@pytest.fixture(scope="module", params=list(MODELS))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


class Matrix:
    """A dense matrix as an operator that counts its products."""

    rounding = torch.finfo(torch.float64).eps

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.dimension, self.products = matrix, len(matrix), 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def exact_fraction(matrix: Tensor, residual: Tensor, steps: int) -> float:
    """Compute the learnable fraction for the step size 1/λmax from all eigenvectors."""
    return exact_fractions(matrix, residual, [steps])[0]


def exact_fractions(matrix: Tensor, residual: Tensor, horizons: Sequence[int]) -> list[float]:
    values, vectors = torch.linalg.eigh(matrix)
    shares = (vectors.T @ residual).square() / residual.square().sum()
    return [(shares * -torch.expm1(-2 * steps * values.clamp(min=0) / values[-1])).sum().item() for steps in horizons]


def with_eigenvalues(values: Tensor, top: Tensor | None = None) -> Tensor:
    """Make a matrix with the given eigenvalues, and the eigenvector of the first if it is given."""
    columns = torch.randn(len(values), len(values), dtype=torch.float64, generator=generator(0))
    if top is not None:
        columns[:, 0] = top
    basis = torch.linalg.qr(columns).Q
    return (basis * values) @ basis.T


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=generator(seed))


def reloaded(kernel: TangentKernel) -> TangentKernel:
    file = io.BytesIO()
    torch.save(kernel.to_dict(), file)
    file.seek(0)
    return TangentKernel.from_dict(torch.load(file, weights_only=True))


def test_products_equal_the_dense_kernel(problem: Problem) -> None:
    vector = normal(len(problem.kernel))
    with second_derivative_mode(problem.model):
        product = problem.operator()(vector)
    expected = problem.kernel @ vector
    assert (product - expected).norm() <= 1e-12 * expected.norm()


def test_rows_are_the_outputs_one_tensor_after_the_other() -> None:
    torch.manual_seed(0)
    a, b, x = nn.Linear(3, 2).double(), nn.Linear(3, 1, bias=False).double(), normal(12).reshape(4, 3)
    both = [a(x), b(x)]
    operator = TangentKernelOperator(
        [edge_of(tensor) for tensor in both], [tensor.shape for tensor in both], [*a.parameters(), b.weight], 4
    )
    of_a = torch.kron(x @ x.T + 1, torch.eye(2, dtype=torch.float64))
    expected = torch.block_diag(of_a, x @ x.T) / 4
    products = torch.stack([operator(row) for row in torch.eye(12, dtype=torch.float64)])
    assert (products - expected).abs().max() <= 1e-12


def test_wrong_second_derivative_is_refused() -> None:
    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.detach()

    weight = nn.Parameter(torch.ones(3))
    outputs = Detached.apply(2 * weight)
    operator = TangentKernelOperator([edge_of(outputs)], [outputs.shape], [weight], 1)
    with pytest.raises(DoubleBackwardError, match="once_differentiable"):
        operator(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("steps", [30, 300])
def test_bracket_holds_the_exact_fraction_and_tightens(problem: Problem, steps: int) -> None:
    """For 3 to 30 products, and also for the horizons that the products were not chosen for."""
    lr = 1 / torch.linalg.eigvalsh(problem.kernel)[-1].item()
    exact = {horizon: exact_fraction(problem.kernel, problem.residual, horizon) for horizon in HORIZONS}
    before = dict.fromkeys(HORIZONS, (0.0, 1.0))
    for products in (3, 4, 5, 6, 8, 10, 13, 17, 22, 30):
        operator = Matrix(problem.kernel)
        kernel = kernel_by_lanczos(operator, problem.residual, max_products=products, tolerance=0, steps=steps)
        assert operator.products == products
        for horizon in HORIZONS:
            fraction, given = kernel.learnable_fraction(steps=horizon), kernel.learnable_fraction(lr, horizon)
            for estimate in (fraction, given):
                assert estimate.lo <= estimate <= estimate.hi
                assert estimate.lo - 1e-12 <= exact[horizon] <= estimate.hi + 1e-12
            assert before[horizon][0] - 1e-12 <= given.lo
            assert given.hi <= before[horizon][1] + 1e-12
            before[horizon] = given.lo, given.hi
    fraction = kernel.learnable_fraction(steps=steps)
    assert fraction.hi - fraction.lo <= (0.01 if steps <= 100 else 0.1)


def test_float32_bracket_holds_the_float64_fraction(problem: Problem) -> None:
    with second_derivative_mode(problem.model):
        kernel = kernel_by_lanczos(
            problem.operator(torch.float32), problem.residual.float(), max_products=60, tolerance=1e-4
        )
    problem.model.double()
    for steps in HORIZONS:
        fraction = kernel.learnable_fraction(steps=steps)
        assert fraction.lo <= exact_fraction(problem.kernel, problem.residual, steps) <= fraction.hi
    assert kernel.learnable_fraction().hi - kernel.learnable_fraction().lo <= 2e-4
    assert kernel.lambda_max == pytest.approx(torch.linalg.eigvalsh(problem.kernel)[-1].item(), rel=1e-5)


def test_given_step_size_needs_no_largest_eigenvalue(problem: Problem) -> None:
    kernel = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=40)
    values, vectors = torch.linalg.eigh(problem.kernel)
    shares = (vectors.T @ problem.residual).square() / problem.residual.square().sum()
    lr = 0.3 / values[-1].item()
    exact = (shares * -torch.expm1(-200 * lr * values.clamp(min=0))).sum().item()
    fraction = kernel.learnable_fraction(lr)
    assert fraction.lo <= exact <= fraction.hi <= fraction.lo + 0.01


def test_products_stop_when_the_bracket_is_narrow() -> None:
    problem, calls = Problem("conv"), []
    operator = Matrix(problem.kernel)
    kernel = kernel_by_lanczos(
        operator, problem.residual, max_products=100, progress=lambda *numbers: calls.append(numbers)
    )
    fraction = kernel.learnable_fraction()
    assert fraction.hi - fraction.lo <= 0.01 * fraction.hi
    assert operator.products < 25
    assert calls == [(done, 100) for done in range(1, operator.products + 1)]
    assert kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=6).learnable_fraction().lo < (
        0.99 * fraction.hi
    )


@pytest.mark.parametrize("products", [4, 8, 16, 32])
def test_residual_orthogonal_to_the_top_eigenvector(products: int) -> None:
    """Products from the residual alone would take the second eigenvalue, a tenth of the first, for the largest."""
    values = torch.cat([torch.tensor([10.0]).double(), torch.linspace(1, 0.001, 199, dtype=torch.float64)])
    matrix = with_eigenvalues(values, top=torch.ones(200).double())
    residual = normal(200) - normal(200).mean()
    kernel = kernel_by_lanczos(Matrix(matrix), residual, max_products=products, tolerance=0)
    fraction = kernel.learnable_fraction()
    assert kernel.lambda_max.lo <= 10 <= kernel.lambda_max.hi
    assert fraction.lo <= exact_fraction(matrix, residual, 100) <= fraction.hi
    if products >= 16:
        assert kernel.lambda_max == pytest.approx(10)
        assert fraction.hi - fraction.lo <= 0.005


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("products", [6, 8, 12, 16])
def test_hidden_top_eigenvector_hardly_matters(products: int, seed: int) -> None:
    """The residual is orthogonal to a top eigenvector in a random direction: λmax may be missed, at a small price."""
    values = torch.arange(1, 301, dtype=torch.float64) ** -1.0
    values[0] = 0.75
    matrix = with_eigenvalues(values, top=normal(300, 9))
    top = normal(300, 9) / normal(300, 9).norm()
    residual = normal(300, 10 + seed)
    residual -= top * (top @ residual)
    fraction = kernel_by_lanczos(Matrix(matrix), residual, max_products=products, seed=seed).learnable_fraction()
    exact = exact_fraction(matrix, residual, 100)
    assert 0.95 * fraction.lo <= exact <= 1.05 * fraction.hi


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_bracket_does_not_depend_on_scales(scale: float) -> None:
    problem = Problem("lstm")
    plain = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=16, tolerance=0)
    scaled = kernel_by_lanczos(Matrix(problem.kernel * scale), problem.residual / scale, max_products=16, tolerance=0)
    assert scaled.lambda_max == pytest.approx(plain.lambda_max * scale, rel=1e-9)
    for horizon in HORIZONS:
        a, b = plain.learnable_fraction(steps=horizon), scaled.learnable_fraction(steps=horizon)
        assert (b.lo, b, b.hi) == pytest.approx((a.lo, a, a.hi), abs=1e-9)


def test_degenerate_kernels_without_a_matrix() -> None:
    residual, direction = normal(50), normal(50, 2)
    zero = torch.zeros(50, 50, dtype=torch.float64)
    identity = torch.eye(50, dtype=torch.float64)
    rank_one = torch.outer(direction, direction)
    measured = kernel_by_lanczos(Matrix(zero), residual, max_products=10)
    assert (measured.learnable_fraction(), measured.learnable_fraction().hi) == (0, 0)
    measured = kernel_by_lanczos(Matrix(identity), 0 * residual, max_products=10)
    assert (measured.learnable_fraction(), measured.learnable_fraction().lo) == (1, 1)
    measured = kernel_by_lanczos(Matrix(rank_one), residual, max_products=10).learnable_fraction()
    share = (residual @ direction).square() / residual.square().sum() / direction.square().sum()
    assert measured == pytest.approx(share.item(), abs=1e-9)
    assert measured.hi - measured.lo <= 1e-9
    one = kernel_by_lanczos(Matrix(torch.ones(1, 1).double()), torch.ones(1).double(), max_products=10)
    assert one.learnable_fraction(steps=1) == pytest.approx(1 - math.exp(-2))


def test_kernel_without_a_matrix_says_what_it_lacks() -> None:
    problem = Problem("lstm")
    kernel = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=10)
    assert math.isnan(kernel.effective_rank)
    with pytest.raises(ValueError, match="without a matrix"):
        _ = kernel.eigenvalues
    with pytest.raises(ValueError, match="kernel matrix"):
        _ = kernel.residual_shares


def test_not_finite_numbers_are_refused() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        kernel_by_lanczos(Matrix(matrix), torch.full((4,), math.nan), max_products=4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        kernel_by_lanczos(Matrix(matrix * math.inf), torch.ones(4), max_products=4)
    with pytest.raises(ValueError, match="max_products=0"):
        kernel_by_lanczos(Matrix(matrix), torch.ones(4), max_products=0)


SPECTRA = {
    "power law": torch.arange(1, 301, dtype=torch.float64) ** -1.5,
    "clusters": torch.tensor([1.0, 0.1, 1e-3, 1e-6, 0.0]).double().repeat_interleave(60),
    "flat": torch.linspace(0.5, 1, 300, dtype=torch.float64),
    "half zero": torch.cat([torch.linspace(1, 1e-4, 150, dtype=torch.float64), torch.zeros(150).double()]),
    "exponential": 10 ** torch.linspace(0, -12, 300, dtype=torch.float64),
    "rank one": torch.cat([torch.ones(1).double(), torch.zeros(299).double()]),
}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_fraction_of_a_matrix_equals_that_of_its_eigenvectors(spectrum: str, scale: float) -> None:
    matrix, residual = with_eigenvalues(SPECTRA[spectrum] * scale), normal(300)
    horizons = (1, 10, 100, 1000, 10_000)
    for steps, expected in zip(horizons, exact_fractions(matrix, residual, horizons), strict=True):
        kernel = TangentKernel.from_matrix(matrix, residual)
        assert kernel.learnable_fraction(steps=steps) == pytest.approx(expected, abs=1e-10)
        assert kernel.lambda_max == pytest.approx(scale)
        again = kernel.learnable_fraction(steps=steps)
        assert again.lo == again == again.hi == kernel.learnable_fraction(steps=steps)


@pytest.mark.parametrize("size", [5, 300])
def test_degenerate_matrices(size: int) -> None:
    residual, identity = normal(size), torch.eye(size, dtype=torch.float64)
    assert TangentKernel.from_matrix(0 * identity, residual).learnable_fraction() == 0
    assert TangentKernel.from_matrix(identity, 0 * residual).learnable_fraction() == 1
    assert TangentKernel.from_matrix(identity, residual).learnable_fraction(0.25, 2) == pytest.approx(1 - math.exp(-1))


@pytest.mark.parametrize("size", [5, 300])
def test_residual_shares_are_those_of_the_eigenvectors(size: int) -> None:
    matrix, residual = with_eigenvalues(torch.linspace(2, 0.1, size, dtype=torch.float64)), normal(size)
    kernel = TangentKernel.from_matrix(matrix, residual)
    before = kernel.learnable_fraction()
    values, vectors = torch.linalg.eigh(matrix)
    assert kernel.eigenvalues.numpy() == pytest.approx(values.flip(0).numpy())
    shares = ((vectors.T @ residual).square() / residual.square().sum()).flip(0)
    assert kernel.residual_shares.numpy() == pytest.approx(shares.numpy(), abs=1e-12)
    assert kernel.learnable_fraction() == pytest.approx(before, abs=1e-11)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_kernel_without_its_matrix_stays_exact(spectrum: str) -> None:
    """It is exact up to 1000 steps of the default length, and after that a bracket holds the number."""
    matrix, residual = with_eigenvalues(SPECTRA[spectrum]), normal(300)
    kernel = TangentKernel.from_matrix(matrix, residual)
    restored = reloaded(kernel)
    for steps in (1, 100, 1000):
        exact = exact_fraction(matrix, residual, steps)
        assert restored.learnable_fraction(steps=steps) == pytest.approx(exact, abs=1e-10)
    assert restored.effective_rank == pytest.approx(kernel.effective_rank, rel=1e-12)
    beyond = restored.learnable_fraction(steps=100_000)
    assert beyond.lo - 1e-10 <= exact_fraction(matrix, residual, 100_000) <= beyond.hi + 1e-10
    assert kernel.compact() is kernel
    assert kernel.learnable_fraction() == pytest.approx(restored.learnable_fraction(), abs=1e-12)


def test_restored_kernels_are_equal() -> None:
    problem = Problem("lstm")
    by_products = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=12)
    restored = reloaded(by_products)
    for steps in HORIZONS:
        a, b = by_products.learnable_fraction(steps=steps), restored.learnable_fraction(steps=steps)
        assert (a.lo, a, a.hi) == (b.lo, b, b.hi)
    assert (restored.lambda_max, restored.lambda_max.hi) == (by_products.lambda_max, by_products.lambda_max.hi)
    small = TangentKernel.from_matrix(problem.kernel, problem.residual)
    assert torch.equal(reloaded(small).residual_shares, small.residual_shares)


def test_bracket_is_exact_once_the_krylov_space_is_exhausted() -> None:
    values = torch.tensor([3.0, 2.0, 0.5, 0.0]).double()
    process = LanczosProcess(lambda vector: values * vector, torch.ones(4).double(), 4)
    while not process.finished:
        process.step()
    lower, upper = process.jacobi.bracket(lambda x: -torch.expm1(-x))
    expected = (1 - torch.exp(-values)).mean().item()
    assert (lower, upper) == pytest.approx((expected, expected), abs=1e-12)


def test_lower_end_has_a_node_at_zero() -> None:
    """The Gauss-Radau rule with one free node matches the mean and the second moment of the measure."""
    jacobi = JacobiMatrix(torch.tensor([0.5]).double(), torch.tensor([0.25]).double())
    free = (0.5**2 + 0.25**2) / 0.5
    expected = 0.5 / free * -math.expm1(-free)
    assert jacobi.bracket(lambda x: -torch.expm1(-x))[0] == pytest.approx(expected, rel=1e-12)


def test_lower_end_of_the_fraction_belongs_to_the_larger_eigenvalue() -> None:
    jacobi = JacobiMatrix(torch.tensor([1.0]).double(), torch.tensor([0.0]).double())
    fraction = TangentKernel.from_quadrature(jacobi, Estimate(2.0, lo=1.0, hi=4.0)).learnable_fraction(steps=1)
    expected = (-math.expm1(-0.5), -math.expm1(-1.0), -math.expm1(-2.0))
    assert (fraction.lo, fraction, fraction.hi) == pytest.approx(expected)


@pytest.mark.parametrize("size", [5, 300])
def test_remaining_residual_is_that_of_gradient_flow(size: int) -> None:
    """The residual after a time t of gradient flow on a frozen kernel is the matrix exponential of -tΘ, times r."""
    matrix, residual = with_eigenvalues(torch.linspace(2, 0.1, size, dtype=torch.float64)), normal(size)
    whole = 4 * residual.square().sum().item()
    kernel = TangentKernel.from_matrix(matrix, residual, squared_residual=whole)
    for lr, steps in [(0.5, 1), (0.1, 7), (1 / 2, 10)]:
        left = torch.linalg.matrix_exp(-lr * steps * matrix) @ residual
        expected = pytest.approx(4 * left.square().sum().item(), rel=1e-8)
        assert kernel.remaining_residual(lr, steps) == expected
        assert reloaded(kernel).remaining_residual(lr, steps) == expected
    assert kernel.compact().squared_residual == reloaded(kernel).squared_residual == whole


def test_remaining_residual_by_products_is_in_its_bracket() -> None:
    problem = Problem("transformer")
    whole = problem.num_samples * problem.residual.square().sum().item()
    measured = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=8, squared_residual=whole)
    exact = TangentKernel.from_matrix(problem.kernel, problem.residual, whole)
    for steps in HORIZONS:
        left, fraction = measured.remaining_residual(steps=steps), measured.learnable_fraction(steps=steps)
        assert (left.lo, left.hi) == pytest.approx((whole * (1 - fraction.hi), whole * (1 - fraction.lo)))
        assert left.lo < exact.remaining_residual(steps=steps) < left.hi
    assert reloaded(measured).squared_residual == whole


@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize("lr", [0.1, 1.0, 30.0])
def test_fast_residual_share_is_that_of_the_eigenvectors(size: int, lr: float) -> None:
    """Of a large matrix, a bracket holds it."""
    matrix, residual = with_eigenvalues(torch.logspace(0, -5, size, dtype=torch.float64)), normal(size)
    kernel = TangentKernel.from_matrix(matrix, residual)
    values, vectors = torch.linalg.eigh(matrix)
    shares = (vectors.T @ residual).square() / residual.square().sum()
    expected = shares[values > math.log(10) / (lr * 50)].sum().item()
    for measured in (kernel, reloaded(kernel), kernel.compact()):
        share = measured.fast_residual_share(lr, 50)
        assert share.lo - 1e-12 <= expected <= share.hi + 1e-12
        assert share.lo <= share <= share.hi <= share.lo + (0.05 if size > 256 else 0)


@pytest.mark.parametrize("contraction", [0.1, 0.5])
def test_fast_residual_share_by_products_is_in_its_bracket(contraction: float) -> None:
    problem = Problem("mlp")
    exact = TangentKernel.from_matrix(problem.kernel, problem.residual)
    measured = kernel_by_lanczos(Matrix(problem.kernel), problem.residual, max_products=20)
    single = kernel_by_lanczos(problem.operator(torch.float32), problem.residual, max_products=20)
    for lr in (0.01, 0.1, 1.0, 10.0):
        expected = exact.residual_shares[exact.eigenvalues > -math.log(contraction) / (lr * 100)].sum().item()
        for share in (kernel.fast_residual_share(lr, 100, contraction) for kernel in (measured, single)):
            assert share.lo <= share <= share.hi
            assert share.lo - 1e-6 <= expected <= share.hi + 1e-6


def test_fast_residual_share_of_degenerate_kernels() -> None:
    identity, residual = torch.eye(3, dtype=torch.float64), normal(3)
    assert TangentKernel.from_matrix(0 * identity, residual).fast_residual_share(1, 10) == 0
    assert TangentKernel.from_matrix(identity, 0 * residual).fast_residual_share(1, 10) == 1
    for arguments in ((0.0, 10), (1.0, 0), (1.0, 10, 1.0)):
        with pytest.raises(ValueError, match=r"lr must be positive, steps at least 1 and contraction in \(0, 1\)"):
            TangentKernel.from_matrix(identity, residual).fast_residual_share(*arguments)


def test_remaining_residual_of_degenerate_kernels() -> None:
    zero, residual = torch.zeros(3, 3, dtype=torch.float64), normal(3)
    assert TangentKernel.from_matrix(zero, residual, 5.0).remaining_residual() == 5
    assert TangentKernel.from_matrix(torch.eye(3).double(), 0 * residual, 0.0).remaining_residual() == 0
    assert math.isnan(TangentKernel.from_matrix(zero, residual).remaining_residual())
