"""Compare eigenvalues and eigenvectors with those of dense float64 matrices."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity.curvature import top_eigenvectors
from lightning_plasticity.curvature.matrix_free.eigenpairs import RestartedLanczos
from lightning_plasticity.curvature.matrix_free.linear_operators import CurvatureLinearOperator
from tests.helpers.cases import Case, dense, dense_hessian

MLP = Case(
    "mlp",
    lambda: (nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(9, 5), torch.arange(9) % 4),
)
LINEAR = Case("linear", lambda: (nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3))


class Matrix(CurvatureLinearOperator):
    """A dense matrix with the given eigenvalues in a random basis."""

    def __init__(self, values: Tensor) -> None:
        super().__init__([nn.Parameter(torch.zeros(len(values), dtype=values.dtype))])
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator)).Q
        self.matrix = ((basis * values.double()) @ basis.T).to(values.dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


def found(values: Tensor, k: int, *, seed: int = 0, tolerance: float = 1e-8) -> tuple[Tensor, Tensor]:
    operator = Matrix(values)
    process = RestartedLanczos(operator, k, tolerance, seed)
    for _ in range(3000):
        if process.finished:
            break
        process.advance()
    assert process.finished
    eigenvalues, vectors = process.pairs()
    residuals = vectors @ operator.matrix - eigenvalues.to(vectors)[:, None] * vectors
    assert residuals.norm(dim=1).max() <= 10 * tolerance * values.abs().max()
    assert (vectors @ vectors.T - torch.eye(k, dtype=values.dtype)).abs().max() <= 1e-5
    return eigenvalues, vectors


def flat(vectors: tuple[dict[str, Tensor], ...]) -> Tensor:
    return torch.stack([torch.cat([part.flatten() for part in vector.values()]) for vector in vectors])


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("case", [MLP, LINEAR], ids=["mlp", "linear"])
def test_pairs_equal_those_of_the_dense_matrix(case: Case, matrix: str) -> None:
    model, batch = case.build()
    exact = dense_hessian(case) if matrix == "hessian" else dense(case).ggn
    pairs = top_eigenvectors(model, batch, case.loss_fn, 4, matrix=matrix, tolerance=1e-9)
    values = torch.linalg.eigvalsh(exact)
    expected = values[values.abs().argsort(descending=True)[:4]]
    assert pairs.converged
    assert pairs.values.numpy() == pytest.approx(expected.numpy(), rel=1e-8)
    vectors = flat(pairs.vectors)
    residuals = (vectors @ exact - pairs.values[:, None] * vectors).norm(dim=1)
    assert residuals.max() <= 1e-9 * values.abs().max()
    assert (residuals - pairs.residuals).abs().max() <= 1e-12 * values.abs().max()
    assert (vectors @ vectors.T).numpy() == pytest.approx(torch.eye(4).numpy(), abs=1e-9)
    assert {name: part.shape for name, part in pairs.vectors[0].items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }


def test_parameters_select_a_block() -> None:
    model, batch = MLP.build()
    pairs = top_eigenvectors(model, batch, MLP.loss_fn, 3, matrix="ggn", parameters="2.*", tolerance=1e-9)
    block = dense(MLP).ggn[-52:, -52:]
    assert list(pairs.vectors[0]) == ["2.weight", "2.bias"]
    assert pairs.values.numpy() == pytest.approx(torch.linalg.eigvalsh(block).flip(0)[:3].numpy(), rel=1e-8)


def test_eigenvalues_of_both_signs_are_ordered_by_size() -> None:
    values = torch.cat([torch.tensor([5.0, -4.0, 3.0, -2.0]), torch.linspace(-1, 1, 196)]).double()
    assert found(values, 4)[0].tolist() == pytest.approx([5, -4, 3, -2])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_opposite_eigenvalues_are_both_found(k: int) -> None:
    values = torch.cat([torch.tensor([3.0, -3.0, 2.0, -2.0]), torch.linspace(-1, 1, 96)]).double()
    assert found(values, k)[0].abs().tolist() == pytest.approx([3, 3, 2, 2, 1][:k])


@pytest.mark.parametrize("seed", range(5))
def test_multiple_eigenvalues_are_found_as_often_as_they_occur(seed: int) -> None:
    values = torch.cat([torch.full((4,), 3.0), torch.full((3,), 2.0), torch.linspace(0, 1, 193)]).double()
    assert found(values, 6, seed=seed)[0].tolist() == pytest.approx([3, 3, 3, 3, 2, 2])
    assert found(values, 5, seed=seed)[0].tolist() == pytest.approx([3, 3, 3, 3, 2])


def test_more_pairs_than_the_rank() -> None:
    values = torch.cat([torch.tensor([3.0, 2.0]), torch.zeros(98)]).double()
    assert found(values, 5)[0].tolist() == pytest.approx([3, 2, 0, 0, 0], abs=1e-12)
    assert found(torch.zeros(50).double(), 3)[0].tolist() == [0, 0, 0]


def test_as_many_pairs_as_rows() -> None:
    values = torch.tensor([2.0, 2.0, -1.0, 0.5, 0.0]).double()
    assert found(values, 5)[0].tolist() == pytest.approx([2, 2, -1, 0.5, 0], abs=1e-12)


def test_restarts_reach_close_eigenvalues() -> None:
    """The basis holds 26 vectors, far fewer than the products that a relative distance of 1 % takes."""
    values = torch.linspace(0, 1, 400, dtype=torch.float64)
    values[-3:] = torch.tensor([1.01, 1.02, 1.03])
    assert found(values, 3)[0].tolist() == pytest.approx([1.03, 1.02, 1.01])


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    values = torch.linspace(-1, 3, 60, dtype=torch.float64) ** 3
    assert (found(values * scale, 3)[0] / scale).tolist() == pytest.approx(found(values, 3)[0].tolist())


def test_float32_pairs_are_close() -> None:
    values = torch.cat([torch.full((2,), 3.0), torch.tensor([-2.0]), torch.linspace(0, 1, 97)])
    assert found(values, 3, tolerance=1e-4)[0].tolist() == pytest.approx([3, 3, -2], rel=1e-5)


def test_same_seed_gives_the_same_vectors() -> None:
    model, batch = MLP.build(torch.float32)
    first, second = (top_eigenvectors(model, batch, MLP.loss_fn, 2, seed=7) for _ in range(2))
    assert torch.equal(flat(first.vectors), flat(second.vectors))


def test_products_are_limited_and_reported() -> None:
    model, batch = MLP.build()
    calls: list[tuple[int, int]] = []
    pairs = top_eigenvectors(
        model, batch, MLP.loss_fn, 3, tolerance=1e-9, max_products=5, progress=lambda *numbers: calls.append(numbers)
    )
    assert not pairs.converged
    assert pairs.residuals.max() > 1e-9 * pairs.values[0]
    assert pairs.num_products == 8
    assert calls == [(done, 8) for done in range(1, 9)]


def test_model_is_left_as_it_was() -> None:
    model, batch = MLP.build()
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    top_eigenvectors(model, batch, MLP.loss_fn, 2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 125}, "k=125 is more than the 124 parameters"),
        ({"k": 5, "max_products": 4}, "max_products=4"),
        ({"k": 1, "matrix": "fisher"}, "matrix='fisher'"),
        ({"k": 1, "tolerance": 0}, "tolerance=0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    model, batch = MLP.build()
    with pytest.raises(ValueError, match=message):
        top_eigenvectors(model, batch, MLP.loss_fn, **arguments)


def test_product_that_is_not_finite_is_refused() -> None:
    model = nn.Linear(1, 1, bias=False)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - model(batch)).sqrt().sum() + F.mse_loss(model(batch), batch)

    with pytest.raises(ValueError, match="NaN or infinite"):
        top_eigenvectors(model, torch.ones(1, 1), loss_fn, 1)
