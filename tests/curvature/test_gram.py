"""Compare the exact curvature with dense float64 Jacobians."""

import copy
import math
import re
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.curvature import Spectrum, TooManyRowsError, UnsupportedModelError, custom_loss, ggn_spectrum
from lightning_plasticity.curvature.exact.gram import gram
from tests.helpers.cases import (
    BARE_PARAMETER_CASES,
    CASES,
    ROW_BY_ROW_CASES,
    Case,
    Positions,
    case_named,
    classes,
    dense,
)

ALL_CASES = [*CASES, *BARE_PARAMETER_CASES]
each_case = pytest.mark.parametrize("case", ALL_CASES, ids=[case.name for case in ALL_CASES])


def padded(spectrum: Spectrum) -> Tensor:
    """Return all eigenvalues, each repeated by its multiplicity."""
    counts = (spectrum.weights * spectrum.num_parameters).round().long()
    return spectrum.eigenvalues.repeat_interleave(counts)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest deviation, relative to the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@each_case
def test_spectrum_equals_dense_ggn(case: Case) -> None:
    spectrum = ggn_spectrum(*case.build(), case.loss_fn)
    expected = dense(case).eigenvalues
    assert spectrum.exact
    assert spectrum.num_parameters == len(expected)
    assert relative_error(padded(spectrum), expected) <= 1e-10


@each_case
def test_float32_spectrum_is_close_to_dense_ggn(case: Case) -> None:
    """The error is at most 1e-4 of the largest eigenvalue."""
    spectrum = ggn_spectrum(*case.build(torch.float32), case.loss_fn)
    assert relative_error(padded(spectrum), dense(case).eigenvalues) <= 1e-4


@each_case
def test_tangent_kernel_equals_dense_kernel(case: Case) -> None:
    matrices = gram(*case.build(), case.loss_fn)
    expected = dense(case)
    if case.name == "mixup and a penalty on the outputs":
        assert len(matrices.residual) == len(expected.residual), "outputs shared by several losses must count once"
    assert relative_error(matrices.tangent_kernel, expected.tangent_kernel) <= 1e-10
    assert relative_error(matrices.residual, expected.residual) <= 1e-10


@each_case
def test_ranks_and_trace_equal_dense_values(case: Case) -> None:
    spectrum, expected = ggn_spectrum(*case.build(), case.loss_fn), dense(case)
    values = expected.eigenvalues
    for epsilon in (1e-1, 1e-2, 1e-3):
        if (values.abs() / epsilon - 1).abs().min() > 1e-6:
            assert spectrum.epsilon_rank(epsilon) == (values.abs() > epsilon).sum().item()
            assert spectrum.epsilon_fraction(epsilon) == pytest.approx((values.abs() > epsilon).double().mean().item())
    assert spectrum.trace == pytest.approx(expected.ggn.trace().item(), rel=1e-10)
    assert spectrum.lambda_max == pytest.approx(values[0].item(), rel=1e-10)
    share = values.clamp(min=0) / values.clamp(min=0).sum()
    assert spectrum.effective_rank == pytest.approx(torch.exp(-torch.xlogy(share, share).sum()).item(), rel=1e-6)
    # The matrix exponential gives the residual that is left after gradient flow.
    kernel, residual = expected.tangent_kernel, expected.residual
    time = 100 / torch.linalg.eigvalsh(kernel)[-1]
    remaining = torch.linalg.matrix_exp(-time * kernel) @ residual
    fraction = 1 - (remaining.square().sum() / residual.square().sum()).item()
    assert spectrum.learnable_fraction() == pytest.approx(fraction, abs=1e-9)


def test_curvatures_of_two_heads_add_up() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.trunk(x))
            return self.a(h), self.b(h)

    torch.manual_seed(0)
    model, x = TwoHeads().double(), torch.randn(5, 4, dtype=torch.float64)
    labels, targets = torch.arange(5) % 3, torch.randn(5, 1, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        a, b = model(batch)
        return F.cross_entropy(a, labels) + 0.3 * F.mse_loss(b, targets)

    def head_loss(f: Tensor, y: None) -> Tensor:
        return F.cross_entropy(f[:, :3], labels) + 0.3 * F.mse_loss(f[:, 3:], targets)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(self.model(x), 1)

    expected = dense(Case("two heads", lambda: (Joined(), x, torch.zeros(5)), head_loss)).eigenvalues
    assert relative_error(padded(ggn_spectrum(model, x, loss_fn)), expected) <= 1e-10


def test_flattened_tokens_equal_unflattened_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    tokens, labels = torch.randint(7, (4, 5)), torch.randint(3, (4, 5))
    flat = ggn_spectrum(model, None, lambda m, _: F.cross_entropy(m(tokens).flatten(0, 1), labels.flatten()))
    split = ggn_spectrum(model, None, lambda m, _: F.cross_entropy(m(tokens).mT, labels))
    assert relative_error(flat.eigenvalues, split.eigenvalues) <= 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-6, 1e6))
def test_loss_factor_scales_eigenvalues(seed: int, factor: float) -> None:
    torch.manual_seed(seed)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        torch.randn(5, 3),
        torch.arange(5) % 2,
    )
    plain = ggn_spectrum(model, x.double(), lambda m, b: F.cross_entropy(m(b), y))
    scaled = ggn_spectrum(model, x.double(), lambda m, b: factor * F.cross_entropy(m(b), y))
    assert relative_error(scaled.eigenvalues, factor * plain.eigenvalues) <= 1e-10
    assert scaled.learnable_fraction() == pytest.approx(plain.learnable_fraction(), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_sample_order_and_input_rotation_do_not_matter(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        torch.randn(5, 3).double(),
        torch.arange(5) % 2,
    )
    order, rotation = torch.randperm(5), torch.linalg.qr(torch.randn(3, 3).double()).Q
    plain = ggn_spectrum(model, x, lambda m, b: F.cross_entropy(m(b), y))
    shuffled = ggn_spectrum(model, x[order], lambda m, b: F.cross_entropy(m(b), y[order]))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight @ rotation)
    rotated = ggn_spectrum(model, x @ rotation, lambda m, b: F.cross_entropy(m(b), y))
    for other in (shuffled, rotated):
        assert relative_error(other.eigenvalues, plain.eigenvalues) <= 1e-10


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(0, 1e3), st.floats(0, 1e3))
def test_epsilon_rank_counts_eigenvalues_and_decreases(values: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    weights = torch.full_like(eigenvalues, 1 / len(values))
    spectrum = Spectrum(eigenvalues, weights, len(values), exact=True)
    assert spectrum.epsilon_rank(low) == sum(value > low for value in values)
    assert spectrum.epsilon_rank(high) <= spectrum.epsilon_rank(low)
    assert spectrum.trace == pytest.approx(sum(values), abs=1e-9)


def test_dead_network_has_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    spectrum = ggn_spectrum(model, torch.rand(6, 4), lambda m, x: F.cross_entropy(m(x), torch.arange(6) % 3))
    assert spectrum.epsilon_rank(1e-12) == spectrum.relative_epsilon_rank(1e-3) == spectrum.trace == 0
    assert spectrum.effective_rank == spectrum.learnable_fraction() == 0


def test_zero_residual_is_fully_learnable() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    target = model(x).detach()
    assert ggn_spectrum(model, x, lambda m, b: F.mse_loss(m(b), target)).learnable_fraction() == 1.0


def test_unused_parameters_count_as_flat_directions() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(7, 7)})
    spectrum = ggn_spectrum(model, torch.randn(4, 3), lambda m, x: F.mse_loss(m["used"](x), torch.zeros(4, 2)))
    assert spectrum.num_parameters == 8 + 56
    assert spectrum.weights.sum().item() == pytest.approx(1)


class Shifted(nn.Module):
    """A linear layer plus a parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(3, 2, bias=False), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.extra


class Siamese(nn.Sequential):
    """A model that sends two views of each sample through its layers in one batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(super().forward(torch.cat([x, x.flip(1)])))
        return h[: len(x)] - h[len(x) :]


class BatchStatistics(nn.Sequential):
    """Two layers with the batch mean subtracted in between."""

    def forward(self, x: Tensor) -> Tensor:
        h = self[0](x)
        return self[1](h - h.mean(0))


def regress(model: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), torch.zeros(len(x), 2))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("computed from a parameter and the data", r"'bare.0' \(used by .*add_"),
        (
            "batch norm with statistics of the batch",
            r"'1.weight' \(used by batch_norm\), '1.bias' \(used by batch_norm",
        ),
        ("gru", r"'rnn.weight_ih_l0' \(used by gru\)"),
        ("a function of the user's own", r"'w' \(used by an unknown function\)"),
    ],
)
def test_row_by_row_parameters_are_logged_with_reason(
    case: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    model_case = next(candidate for candidate in CASES if candidate.name == case)
    with caplog.at_level("INFO", "lightning_plasticity"):
        ggn_spectrum(*model_case.build(), model_case.loss_fn)
    assert re.search(message, caplog.messages[0])


@each_case
def test_only_missing_closed_forms_go_row_by_row(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning_plasticity"):
        ggn_spectrum(*case.build(), case.loss_fn)
    assert len(caplog.messages) == (case in ROW_BY_ROW_CASES)


def test_computed_parameters_without_batched_backward() -> None:
    """The backward pass of a sparse embedding cannot be batched, so positions take one each."""
    case = case_named("language model, 4 sequences, flattened")
    model, batch = case.build()
    model.wpe.sparse = True
    kernel = gram(model, batch, case.loss_fn, max_passes=0).tangent_kernel
    assert relative_error(kernel, dense(case).tangent_kernel) <= 1e-10


def test_large_jacobian_through_computation_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed anew for each group of rows of the parameter."""
    for name in ("parameter_uses._HELD_ELEMENTS", "parameter_uses._CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"lightning_plasticity.curvature.exact.{name}", 1)
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_closed_form._CHUNK_ELEMENTS", 1)
    for name in ("weight norm", "language model, 4 sequences"):
        case = case_named(name)
        kernel = gram(*case.build(), case.loss_fn, max_passes=0).tangent_kernel
        assert relative_error(kernel, dense(case).tangent_kernel) <= 1e-10


def test_parameter_with_tiny_influence_is_found() -> None:
    """The dependence is exact: a tolerance would miss a use 10⁵ times smaller than the first sample."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e5
    case = Case("shifted", lambda: (Shifted(), x, classes(8, 2)))
    kernel, linear = gram(*case.build(), case.loss_fn).tangent_kernel, nn.Linear(3, 2, bias=False).double()
    without = gram(linear, case.build()[1], case.loss_fn).tangent_kernel
    ones = torch.eye(2, dtype=torch.float64).repeat(8, 8) / 8
    assert torch.allclose((kernel - without)[2:, 2:], ones[2:, 2:], atol=1e-10)


def test_parameters_of_another_model_are_refused() -> None:
    other = nn.Linear(3, 2)
    with pytest.raises(UnsupportedModelError, match=r"a parameter of shape \(2, 3\) that is not the model's own"):
        ggn_spectrum(nn.Linear(3, 2), torch.randn(5, 3), lambda m, x: F.mse_loss(m(x) + other(x), torch.zeros(5, 2)))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: BatchStatistics(nn.Linear(3, 4), nn.Linear(4, 2)), id="statistics of the batch"),
        pytest.param(lambda: Positions(5), id="positions as many as samples"),
        pytest.param(lambda: nn.Sequential(Siamese(nn.Linear(3, 2))), id="two views in one batch"),
    ],
)
def test_interacting_samples_form_one_block(model: Callable[[], nn.Module]) -> None:
    case = Case("coupled", lambda: (model(), torch.randn(5, 3), torch.zeros(5, 2)), F.mse_loss)
    assert relative_error(padded(ggn_spectrum(*case.build(), case.loss_fn)), dense(case).eigenvalues) <= 1e-10


@pytest.mark.parametrize(("name", "logged"), [("one block", 0), ("a few parameters at a time", 1)])
def test_jacobian_larger_than_held_at_once(
    name: str, logged: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is computed in one block if that fits, else for a few parameters at a time."""
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_rows._HELD_ELEMENTS", 10 * 15)
    if name != "one block":
        monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian._DENSE_ELEMENTS", 0)
    model = nn.Sequential(
        BatchStatistics(nn.Linear(3, 4), nn.Linear(4, 3)), BatchStatistics(nn.Tanh(), nn.Linear(3, 2))
    )
    case = Case(name, lambda: (copy.deepcopy(model), torch.randn(5, 3), torch.zeros(5, 2)), F.mse_loss)
    with caplog.at_level("INFO", "lightning_plasticity"):
        spectrum = ggn_spectrum(*case.build(), case.loss_fn)
    assert len(caplog.messages) == logged
    assert relative_error(padded(spectrum), dense(case).eigenvalues) <= 1e-10


def test_too_large_jacobian_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian._DENSE_ELEMENTS", 0)
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_rows._HELD_ELEMENTS", 10 * 12 - 1)
    with pytest.raises(
        UnsupportedModelError,
        match=r"'0.weight', shape \(4, 3\), has no closed form \(its layer mixes samples\), .* 10 rows of 12 numbers",
    ):
        ggn_spectrum(BatchStatistics(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3), regress, method="gram")


def test_non_finite_gradients_are_refused() -> None:
    class Norm(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(0 * x).sub(self.bias).square().sum(1, keepdim=True).sqrt()

    with pytest.raises(ValueError, match="NaN or infinite although the loss is not"):
        ggn_spectrum(Norm(3, 2), torch.randn(5, 3), regress)


@pytest.mark.parametrize("change", ["relu", "add", "assign"])
def test_layer_output_changed_in_place(change: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            # torch returns a view from a linear layer with a bias and positions.
            h = self.first(x)
            if change == "relu":
                F.relu_(h)
            elif change == "add":
                h += x
            else:
                h[:, 0] = 0
            return self.second(h).mean(1)

    case = Case("changed", lambda: (Changed(), torch.randn(5, 6, 4), classes(5)))
    assert relative_error(padded(ggn_spectrum(*case.build(), case.loss_fn)), dense(case).eigenvalues) <= 1e-10


class Checkpointed(nn.Sequential):
    """A model that recomputes all of its activations in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.use_reentrant)


def test_only_reentrant_checkpoints_are_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    reentrant, non_reentrant = Checkpointed(use_reentrant=True), Checkpointed(use_reentrant=False)
    plain = ggn_spectrum(nn.Sequential(*non_reentrant), x, lambda m, x: F.cross_entropy(m(x), classes(6)))
    spectrum = ggn_spectrum(non_reentrant, x, lambda m, x: F.cross_entropy(m(x), classes(6)))
    assert relative_error(spectrum.eigenvalues, plain.eigenvalues) <= 1e-6
    with pytest.raises(UnsupportedModelError, match="pass use_reentrant=False"):
        ggn_spectrum(reentrant, x, lambda m, x: F.cross_entropy(m(x), classes(6)))


def test_loss_scaled_in_place() -> None:
    def scaled(f: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(f, y)
        loss *= 0.5
        loss /= 3
        return loss

    case = Case("scaled", lambda: (nn.Linear(3, 3), torch.randn(5, 3), classes(5)), scaled)
    plain = dense(Case("plain", case.make)).eigenvalues
    assert relative_error(padded(ggn_spectrum(*case.build(), case.loss_fn)), plain / 6) <= 1e-10


@pytest.mark.parametrize("dim", [1, -1])
def test_log_softmax_in_model_counts_as_part_of_loss(dim: int) -> None:
    case = Case("log-softmax", lambda: (nn.Linear(3, 3), torch.randn(5, 3), classes(5)))
    model, batch = case.build()
    matrices = gram(nn.Sequential(model, nn.LogSoftmax(dim)), batch, lambda m, b: F.nll_loss(m(b[0]), b[1]))
    expected = dense(case)
    assert relative_error(padded(matrices.spectrum()), expected.eigenvalues) <= 1e-10
    assert relative_error(matrices.tangent_kernel, expected.tangent_kernel) <= 1e-10


def test_outputs_that_depend_on_other_outputs() -> None:
    """Deep supervision: one loss of an output and another of a function of it."""
    case = Case(
        "nested",
        lambda: (nn.Linear(3, 3), torch.randn(5, 3), classes(5)),
        lambda f, y: F.cross_entropy(f, y) + F.cross_entropy(f / 2, y),
    )
    assert relative_error(padded(ggn_spectrum(*case.build(), case.loss_fn)), dense(case).eigenvalues) <= 1e-10


def test_kernel_is_independent_of_loss_decomposition() -> None:
    """A mean over all samples equals the mean of the means over two halves."""
    model, x, y = nn.Linear(3, 3).double(), torch.randn(6, 3, dtype=torch.float64), classes(6)

    def halves(model: nn.Module, x: Tensor) -> Tensor:
        return (F.cross_entropy(model(x[:3]), y[:3]) + F.cross_entropy(model(x[3:]), y[3:])) / 2

    single = ggn_spectrum(model, x, lambda m, x: F.cross_entropy(m(x), y))
    split = ggn_spectrum(model, x, halves, samples=6)
    assert relative_error(split.eigenvalues, single.eigenvalues) <= 1e-12
    assert relative_error(split.kernel.eigenvalues, single.kernel.eigenvalues) <= 1e-12


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, x: F.nll_loss(m(x), torch.arange(5) % 2), "linear in the network's outputs"),
        (lambda m, x: m(x).abs().mean(), "linear in the network's outputs"),
        (lambda m, x: m(x).sin().mean(), "not convex in the network's outputs"),
        (lambda m, x: custom_loss(m(x), lambda f: -f.square().mean()), "not convex at these outputs"),
        (lambda m, x: -custom_loss(m(x), lambda f: f.square().mean()), "not convex at these outputs"),
        (
            lambda m, x: custom_loss(m(x), lambda f: (f.square() + m.bias).mean()),
            "nothing with a gradient but the outputs",
        ),
        (lambda m, x: custom_loss(m(x), lambda f: f.square()), "returns a scalar"),
        (
            lambda m, x: F.mse_loss(m(x).detach() + x.clone().requires_grad_()[:, :2], torch.zeros(5, 2)),
            "does not depend on any",
        ),
        (lambda m, x: -regress(m, x), "counts some samples negatively"),
        (lambda m, x: regress(m, x).detach(), "does not depend on any trainable parameter"),
        (lambda m, x: F.mse_loss(m(x), torch.zeros(5, 2), reduction="none"), r"tensor of shape \(5, 2\)"),
        (lambda m, x: None, "returned NoneType"),
        (lambda m, x: regress(m, x) * math.nan, "loss on the probe batch is nan"),
    ],
)
def test_losses_without_gauss_newton_matrix_are_refused(loss_fn: object, message: str) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises((UnsupportedModelError, ValueError), match=message):
        ggn_spectrum(nn.Linear(3, 2), x, loss_fn)  # type: ignore[arg-type]


def test_gradient_hook_on_outputs_counts_as_in_training() -> None:
    def loss_fn(model: nn.Module, x: Tensor, factor: float) -> Tensor:
        outputs = model(x)
        outputs.register_hook(lambda gradient: factor * gradient)
        return F.cross_entropy(outputs, torch.zeros(len(x), dtype=torch.long))

    model, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    plain, doubled = (gram(model, x, lambda m, x, f=f: loss_fn(m, x, f)).residual for f in (1.0, 2.0))  # type: ignore[misc]
    assert torch.allclose(2 * plain, doubled, rtol=1e-12)


def test_sparse_buffer_is_restored() -> None:
    """A loss that changes a sparse buffer in place leaves no trace."""
    model = nn.Linear(3, 2)
    model.register_buffer("adjacency", torch.eye(5).to_sparse())

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        model.adjacency.mul_(2)
        return regress(model, torch.sparse.mm(model.adjacency, x))

    ggn_spectrum(model, torch.randn(5, 3), loss_fn)
    assert torch.equal(model.adjacency.to_dense(), torch.eye(5))


def test_unsuitable_models_are_refused() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"float64 or|model.float\(\)"):
        ggn_spectrum(nn.Linear(3, 2).bfloat16(), x, regress)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ggn_spectrum(nn.Linear(3, 2).requires_grad_(False), x, regress)
    with pytest.raises(ValueError, match="not initialised"):
        ggn_spectrum(nn.LazyLinear(2), x, regress)
    with pytest.raises(
        TooManyRowsError, match="has 10 outputs on this batch and the Gram matrix a row for each, more than max_rows=9"
    ):
        ggn_spectrum(nn.Linear(3, 2), x, regress, max_rows=9, method="gram")


def test_model_and_generator_are_restored() -> None:
    """Parameters, buffers, gradients, modes and the random state are unchanged, also after an error."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    model[0].weight.grad = torch.ones(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def failing(model: nn.Module, x: Tensor) -> Tensor:
        torch.rand(1)
        model[1].running_mean += 1
        raise RuntimeError("the user's own")

    ggn_spectrum(model, torch.randn(5, 3, generator=torch.Generator()), regress)
    with torch.no_grad(), pytest.raises(RuntimeError, match="the user's own"):
        ggn_spectrum(model, torch.randn(5, 3, generator=torch.Generator()), failing)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "0.weight")


@pytest.mark.parametrize("recurrent", [True, False])
def test_recurrent_layers_run_without_cudnn(recurrent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrent layers of cuDNN have no backward pass in evaluation mode."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    cudnn_enabled = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        cudnn_enabled.append(torch.backends.cudnn.enabled)
        return regress(model, x)

    model = nn.ModuleList([nn.GRU(3, 2)]) if recurrent else nn.ModuleList([nn.Linear(3, 2)])
    ggn_spectrum(model, torch.randn(5, 3), lambda m, x: loss_fn(lambda x: m[0](x)[0] if recurrent else m[0](x), x))
    assert cudnn_enabled == [not recurrent]
    assert torch.backends.cudnn.enabled


def test_no_grad_and_autocast_have_no_effect() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    plain = ggn_spectrum(model, x, regress)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = ggn_spectrum(model, x, regress)
    assert torch.equal(plain.eigenvalues, inside.eigenvalues)
