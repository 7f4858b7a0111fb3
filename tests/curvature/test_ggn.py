"""Test the Gauss-Newton spectrum: exact or estimated, of all parameters or a block, of all outputs or a sketch."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_plasticity.curvature import (
    Spectrum,
    TooManyRowsError,
    UnsupportedModelError,
    ggn_spectrum,
    hessian_spectrum,
)
from lightning_plasticity.curvature.double_backward import DoubleBackwardError
from lightning_plasticity.curvature.exact.gram import gram
from lightning_plasticity.curvature.exact.hessian_factors import (
    DenseFactor,
    DiagonalFactor,
    HessianFactor,
    SoftmaxFactor,
)
from lightning_plasticity.curvature.exact.loss_derivatives import LossDerivatives
from lightning_plasticity.curvature.exact.recording import Recording
from tests.helpers.cases import CASES, Case, SquareTimes, case_named, classes, dense

each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@each_case
def test_parameters_select_a_block_of_the_matrix(case: Case) -> None:
    model, batch = case.build()
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    ggn = dense(case).ggn
    for name, end in {(next(iter(sizes)), ends[0]), (list(sizes)[-1], ends[-1])}:
        block = ggn[end - sizes[name] : end, end - sizes[name] : end]
        expected = torch.linalg.eigvalsh(block).flip(0)
        spectrum = ggn_spectrum(model, batch, case.loss_fn, parameters=name, method="gram")
        assert spectrum.num_parameters == sizes[name]
        actual = spectrum.eigenvalues.repeat_interleave((spectrum.weights * sizes[name]).round().long())
        assert (actual - expected).abs().max() <= 1e-10 * max(expected[0].item(), 1e-3 * ggn.diagonal().max().item())


def test_layer_traces_sum_to_the_trace() -> None:
    case = case_named("mlp")
    layers = [ggn_spectrum(*case.build(), case.loss_fn, parameters=f"{layer}.*").trace for layer in (0, 2)]
    assert sum(layers) == pytest.approx(ggn_spectrum(*case.build(), case.loss_fn).trace, rel=1e-12)
    with pytest.raises(ValueError, match=r"parameters='head.\*' matches none of the trainable parameters \['0.weight'"):
        ggn_spectrum(*case.build(), case.loss_fn, parameters="head.*")


def test_unselected_parameters_are_constants() -> None:
    """The blocks of the parameters sum to the matrix, also beside a layer without a closed form."""
    model = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 3), nn.Linear(3, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)

    def loss_fn(model: nn.Sequential, x: Tensor) -> Tensor:
        hidden, _ = model[1](model[0](x)[:, None].transpose(0, 1))
        return F.mse_loss(model[2](hidden[0]), torch.zeros(5, 2, dtype=torch.float64))

    whole = gram(model, x, loss_fn).loss_weighted
    blocks = [gram(model, x, loss_fn, parameters=pattern).loss_weighted for pattern in ("0.*", "1.*", "2.*")]
    assert (sum(blocks) - whole).abs().max() <= 1e-12 * whole.abs().max()  # type: ignore[union-attr]


def is_from_lanczos(spectrum: Spectrum) -> bool:
    return bool(spectrum.quadratures) and not spectrum.exact and spectrum.kernel is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"micro_batch_size": 2}, "micro_batch_size=2, and the exact matrix needs all samples at once"),
        ({"max_rows": 17}, "18 outputs on this batch and the Gram matrix a row for each, more than max_rows=17"),
        (
            {"num_probes": 1, "num_steps": 2},
            r"90 backward passes for the row-by-row Jacobian of 'scale' \(used by",
        ),
    ],
)
def test_auto_falls_back_to_lanczos_and_logs_the_reason(
    options: dict[str, int], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 6)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            return SquareTimes.apply(super().forward(x), self.scale)

    model, batch = (nn.Linear(4, 3), (torch.randn(6, 4), classes(6)))
    if "num_steps" in options:
        model, batch = Scaled(), (torch.randn(15, 3), classes(15, 6))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with caplog.at_level("INFO", "lightning_plasticity"):
        spectrum = ggn_spectrum(model, batch, loss_fn, **options)  # type: ignore[arg-type]
    assert is_from_lanczos(spectrum)
    assert len(caplog.messages) == 1
    assert re.search(reason, caplog.text)
    exact = ggn_spectrum(model, batch, loss_fn, method="gram")
    assert exact.exact
    bound = 3 * spectrum.trace.standard_error
    assert math.isnan(bound) or abs(spectrum.trace - exact.trace) <= bound
    assert spectrum.lambda_max <= exact.lambda_max * (1 + 1e-5)


def test_auto_falls_back_if_the_jacobian_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("gru")
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_rows._HELD_ELEMENTS", 10)
    spectrum = ggn_spectrum(*case.build(), case.loss_fn, num_steps=500)
    assert is_from_lanczos(spectrum)
    assert spectrum.lambda_max == pytest.approx(dense(case).eigenvalues[0].item(), rel=1e-9)


def test_grouped_cotangents_give_the_same_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cotangents that exceed the memory limit are computed in groups."""
    case = case_named("conv2d depthwise, same")
    whole = gram(*case.build(), case.loss_fn)
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_closed_form._COTANGENT_ELEMENTS", 1)
    monkeypatch.setattr("lightning_plasticity.curvature.exact.jacobian_closed_form._CHUNK_ELEMENTS", 1)
    grouped = gram(*case.build(), case.loss_fn)
    assert (grouped.loss_weighted - whole.loss_weighted).abs().max() <= 1e-13 * whole.loss_weighted.abs().max()


@each_case
def test_sketch_is_unbiased(case: Case) -> None:
    """The mean trace over many sketches is within its sampling error of the exact trace."""
    exact = ggn_spectrum(*case.build(), case.loss_fn, method="gram").trace
    sketches = [gram(*case.build(), case.loss_fn, sketch=1, seed=seed) for seed in range(40)]
    traces = torch.tensor([sketch.loss_weighted.trace() for sketch in sketches])
    assert abs(traces.mean() - exact) <= 4 * traces.std() / math.sqrt(len(traces)) + 1e-10 * exact


def test_sketch_reports_only_the_error_of_its_trace() -> None:
    """The standard error of the trace matches the observed one; all other errors are unknown."""
    case = case_named("mlp")
    exact = ggn_spectrum(*case.build(), case.loss_fn)
    within, errors = 0, []
    for seed in range(100):
        sketch = ggn_spectrum(*case.build(), case.loss_fn, sketch=16, seed=seed)
        assert not sketch.exact
        assert sketch.kernel is None
        assert len(sketch.eigenvalues) <= 16 * 6 + 1
        within += abs(sketch.trace - exact.trace) <= 3 * sketch.trace.standard_error
        errors.append((sketch.trace - exact.trace, sketch.trace.standard_error))
    actual, stated = (torch.tensor(column).square().mean().sqrt().item() for column in zip(*errors, strict=True))
    assert within >= 95
    assert 0.7 <= actual / stated <= 1.4
    assert not sketch.epsilon_rank(1e-2).resolved
    assert math.isnan(sketch.effective_rank.standard_error)
    restored = Spectrum.from_dict(sketch.to_dict())
    assert restored.trace.standard_error == sketch.trace.standard_error


def test_sketch_and_products_never_form_dense_softmax_hessian() -> None:
    """The Hessian of one sample would have 20 000² entries."""
    model, x = nn.Linear(2, 20_000), torch.randn(3, 2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), torch.tensor([0, 1, 2]))

    seen: list[int] = []
    original = torch.diag_embed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "diag_embed", lambda *args: seen.append(1) or original(*args))
        sketch = ggn_spectrum(model, x, loss_fn, sketch=4)
        products = ggn_spectrum(model, x, loss_fn, method="lanczos", num_probes=4, num_steps=10)
    assert not seen
    scale = abs(sketch.trace - products.trace)
    assert scale <= 4 * (sketch.trace.standard_error + products.trace.standard_error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "method='exact' must be 'auto', 'gram' or 'lanczos'"),
        ({"method": "lanczos", "sketch": 2}, "sketch=2 is a way to make the exact matrix smaller"),
        ({"method": "gram", "micro_batch_size": 2}, "micro_batch_size=2 is for 'lanczos'"),
        ({"sketch": 0}, "sketch=0 must be a whole number, at least 1"),
        ({"max_rows": 1.5}, r"max_rows=1.5 must be a whole number, at least 1"),
        ({"samples": -3}, "samples=-3 must be a whole number, at least 1"),
        ({"method": "lanczos", "num_steps": 0}, "num_steps=0 must be a whole number, at least 1"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    case = case_named("mlp")
    with pytest.raises(ValueError, match=message):
        ggn_spectrum(*case.build(), case.loss_fn, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_probes": 0}, "num_probes=0 must be a whole number, at least 1"),
        ({"num_probes": "x"}, "num_probes='x' must be a whole number, at least 1"),
        ({"num_steps": -3}, "num_steps=-3 must be a whole number, at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be a whole number, at least 1"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"seed": 2**70}, f"seed={2**70} must be a whole number"),
        ({"reorthogonalization": "x"}, "reorthogonalization='x' must be 'full', 'partial' or 'none'"),
        ({"parameters": 2}, "parameters=2 must be a pattern"),
    ],
)
@pytest.mark.parametrize("spectrum", [ggn_spectrum, hessian_spectrum])
def test_options_are_validated_before_the_loss_is_called(
    spectrum: Callable[..., Spectrum], option: dict[str, object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError("it was called")

    with caplog.at_level("INFO", "lightning_plasticity"), pytest.raises(ValueError, match=re.escape(message)):
        spectrum(nn.Linear(2, 1), torch.ones(3, 2), loss_fn, **option)
    assert not caplog.messages


def test_gram_refuses_too_many_rows() -> None:
    case = case_named("mlp")
    with pytest.raises(TooManyRowsError, match="max_rows=3"):
        ggn_spectrum(*case.build(), case.loss_fn, method="gram", max_rows=3)


@given(seed=st.integers(0, 2**16), blocks=st.integers(1, 4), size=st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_hessian_factor_products_equal_dense_products(seed: int, blocks: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    probabilities = random(blocks, size).softmax(1)
    strength = random(blocks, 1)
    softmax = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    factors: list[tuple[HessianFactor, Tensor]] = [
        (SoftmaxFactor(strength, probabilities), strength[..., None] * softmax),
        (DiagonalFactor(strength), strength[..., None].square()),
    ]
    matrices = random(blocks, size, size)
    factors.append((DenseFactor(matrices), matrices @ matrices.mT))
    for factor, hessian in factors:
        matrix = factor.dense()
        assert matrix.shape == (factor.shape[0], factor.shape[1], factor.shape[1])
        torch.testing.assert_close(matrix @ matrix.mT, hessian, rtol=1e-12, atol=1e-14)
        vectors = random(*factor.shape)
        torch.testing.assert_close(factor.matvec(vectors), (matrix @ vectors[..., None])[..., 0])
        torch.testing.assert_close(factor.rmatvec(vectors), (matrix.mT @ vectors[..., None])[..., 0])


@each_case
def test_output_hessian_product_equals_autograd(case: Case) -> None:
    model, batch = case.build()
    model.eval()
    recording = Recording(model, {})
    with recording:
        loss = case.loss_fn(model, batch)
    derivatives = LossDerivatives(loss, recording, {}, None)
    (outputs,) = derivatives.outputs
    logits = model(batch[0]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(case.loss(logits, batch[1]), logits, create_graph=True)
    vector = torch.randn_like(logits)
    (expected,) = torch.autograd.grad(gradient, logits, vector, materialize_grads=True)
    (actual,) = derivatives.hessian.matvec([vector.reshape(outputs.shape)])
    actual = actual.reshape(expected.shape)
    assert (actual - expected).norm() <= 1e-9 * max(expected.norm().item(), vector.norm().item())


class Tanh(torch.autograd.Function):
    """A custom kernel: its backward is right but has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


def test_once_differentiable_function_needs_gram() -> None:
    """A backward pass without a derivative is right for the exact matrix, and an error for products."""

    class Custom(nn.Module):
        def __init__(self, tanh: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.tanh = nn.Linear(5, 8), nn.Linear(8, 3), tanh

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.tanh(self.first(x)))

    batch = (torch.randn(6, 5), classes(6))
    custom, plain = Custom(Tanh.apply), Custom(torch.tanh)
    expected = ggn_spectrum(plain, batch, cross_entropy).eigenvalues
    torch.testing.assert_close(ggn_spectrum(custom, batch, cross_entropy).eigenvalues, expected)
    for options in ({"method": "lanczos"}, {"max_rows": 10}):
        with pytest.raises(DoubleBackwardError, match="once_differentiable"):
            ggn_spectrum(custom, batch, cross_entropy, **options)  # type: ignore[arg-type]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast_has_no_effect(where: str) -> None:
    class Autocast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=where == "inside"):
                return super().forward(x)

    model, batch = Autocast(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), (torch.randn(6, 5), classes(6))
    plain = nn.Sequential(*model)
    options: dict[str, Any] = {"num_probes": 3, "num_steps": 20}
    for spectrum_of in (
        ggn_spectrum,
        partial(ggn_spectrum, method="lanczos", **options),
        partial(hessian_spectrum, **options),
        partial(hessian_spectrum, reorthogonalization="none", **options),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            actual = spectrum_of(model, batch, cross_entropy)
        assert torch.equal(actual.eigenvalues, spectrum_of(plain, batch, cross_entropy).eigenvalues)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_to_half_precision_have_no_effect(dtype: torch.dtype) -> None:
    batch = (torch.randn(6, 5, dtype=dtype), torch.randn(6, 3, dtype=dtype))

    def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    def cast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]).bfloat16().half(), batch[1].to("cpu", torch.bfloat16))

    model = nn.Linear(5, 3, dtype=dtype)
    for spectrum_of in (ggn_spectrum, hessian_spectrum, partial(ggn_spectrum, method="lanczos")):
        assert torch.equal(spectrum_of(model, batch, cast).eigenvalues, spectrum_of(model, batch, plain).eigenvalues)


def test_half_precision_of_another_tensor_is_refused() -> None:
    half = torch.zeros(1, dtype=torch.bfloat16)
    for spectrum_of in (ggn_spectrum, hessian_spectrum, partial(ggn_spectrum, method="lanczos")):
        with pytest.raises(ValueError, match=r"computes 'type_as' in torch.bfloat16, in which curvature drowns"):
            spectrum_of(nn.Linear(5, 3), torch.randn(6, 5), lambda m, x: m(x).type_as(half).square().mean().float())


@pytest.mark.parametrize("kind", ["mse", "soft labels"])
def test_loss_weights_by_a_network_have_no_gauss_newton_matrix(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output, self.weight = nn.Linear(5, 6), nn.Linear(5, 6)

    batch = (torch.randn(6, 5), torch.randn(6, 6).softmax(1))

    def loss_fn(model: Two, batch: tuple[Tensor, Tensor]) -> Tensor:
        weight = F.softplus(model.weight(batch[0]))
        if kind == "mse":
            return F.mse_loss(model.output(batch[0]), batch[1], weight=weight)
        return F.cross_entropy(model.output(batch[0]), batch[1], weight=weight[0])

    with pytest.raises(UnsupportedModelError, match="the loss is not convex in the network's outputs"):
        ggn_spectrum(Two(), batch, loss_fn)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_convolution_positions_as_loss_samples(dimensions: int) -> None:
    """The loss averages over the positions of a convolution."""
    layer = (nn.Conv1d, nn.Conv2d)[dimensions - 1]

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(2, 3, 3, padding=1), layer(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x))).movedim(1, -1).reshape(-1, 4)

    shape = (3, 4)[:dimensions]
    case = Case("positions", lambda: (Positions(), torch.randn(3, 2, *shape), classes(3 * math.prod(shape), 4)))
    spectrum = ggn_spectrum(*case.build(), case.loss_fn)
    expected = dense(case).eigenvalues
    actual = spectrum.eigenvalues.repeat_interleave((spectrum.weights * len(expected)).round().long())
    assert (actual - expected).abs().max() <= 1e-10 * expected[0]


def test_tied_parameter_matches_each_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    batch = (torch.randn(6, 4), classes(6, 4))
    by_name = [ggn_spectrum(model, batch, cross_entropy, parameters=f"{n}.weight").eigenvalues for n in (0, 2)]
    assert torch.equal(*by_name)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 0.95), small=st.floats(1e-6, 1), factor=st.floats(1, 1e3))
def test_trace_is_linear_and_rank_falls_with_threshold(seed: int, share: float, small: float, factor: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(6, 4, dtype=torch.float64), classes(6))

    def both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(batch[0])
        return share * F.cross_entropy(outputs, batch[1]) + (1 - share) * F.mse_loss(
            outputs, torch.zeros(6, 3).double()
        )

    def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), torch.zeros(6, 3).double())

    one, other, total = (ggn_spectrum(model, batch, loss_fn) for loss_fn in (cross_entropy, squared, both))
    assert total.trace == pytest.approx(share * one.trace + (1 - share) * other.trace, rel=1e-10)
    assert total.epsilon_rank(small * factor) <= total.epsilon_rank(small)
    estimate = hessian_spectrum(model, batch, both, num_probes=3, num_steps=5, deflate=False)
    assert estimate.epsilon_rank(small * factor).hi <= estimate.epsilon_rank(small).hi + 1e-9
