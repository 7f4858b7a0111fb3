"""Test that second derivatives are made possible, checked, and refused where they are wrong."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.curvature import double_backward, finite_differences
from lightning_plasticity.curvature.double_backward import (
    DoubleBackwardError,
    check_double_backward,
    composed_weight_norm,
    double_backward_ready,
    explained_errors,
)
from tests.helpers.cases import CASES, Case, classes, dense_hessian, finite_difference_hessian, mlp


class Once(torch.autograd.Function):
    """A once-differentiable function, which autograd.grad does not refuse for a part of the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Detached(torch.autograd.Function):
    """A function that saves its input outside of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.x.tanh() ** 2)


class Proper(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.use_reentrant)


class CheckpointedFirst(Checkpointed):
    """A model whose first module is checkpointed: autograd.grad never reaches it and raises no error."""

    def forward(self, x: Tensor) -> Tensor:
        block = nn.Sequential(self.first, self.block)
        return checkpoint(block, x.clone().requires_grad_(), use_reentrant=self.use_reentrant)


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        # The older weight_norm is deprecated but still used.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def around(*layers: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, 3))
    return model, torch.randn(6, 5), classes(6)


def normed(weight_norm: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Sequential(weight_norm(nn.Linear(8, 3)))
    )
    return model, torch.randn(6, 5), classes(6)


def normed_conv() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(2, 4, 3), dim=None),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Conv1d(4, 3, 3), dim=2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return model, torch.randn(6, 2, 8), classes(6)


WRONG = [
    (Case("weight_norm", lambda: normed(parametrizations.weight_norm)), r"weight_norm of '0\.weight', '2\.0\.weight'"),
    (Case("old weight_norm", lambda: normed(old_weight_norm)), r"weight_norm of '0\.weight', '2\.0\.weight'"),
    (Case("once differentiable", lambda: around(Apply(Once))), r"custom autograd\.Function Once"),
    (Case("detached", lambda: around(Apply(Detached))), r"custom autograd\.Function Detached"),
    (
        Case("reentrant checkpoint", lambda: (nn.Sequential(Checkpointed(use_reentrant=True)), *around()[1:])),
        "use_reentrant=False",
    ),
    (
        Case("reentrant checkpoint first", lambda: (CheckpointedFirst(use_reentrant=True), *around()[1:])),
        "use_reentrant=False",
    ),
]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class MeanOverPositions(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def transformer() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return MeanOverPositions(layer, nn.Linear(4, 3)), torch.randn(5, 6, 4), classes(5)


HEALTHY = [
    *[case for case in CASES if case.name != "weight norm"],
    Case("proper function", lambda: around(Apply(Proper))),
    Case("checkpoint", lambda: (nn.Sequential(Checkpointed(use_reentrant=False)), *around()[1:])),
    Case("lstm", lambda: (Recurrent(nn.LSTM), torch.randn(5, 6, 4), classes(5))),
    Case("gru", lambda: (Recurrent(nn.GRU), torch.randn(5, 6, 4), classes(5))),
    Case("transformer layer", transformer),
    Case("group norm", lambda: around(nn.GroupNorm(2, 8), nn.SiLU())),
    Case("spectral norm", lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Mish())),
    Case("wide relu", lambda: (nn.Sequential(nn.Linear(5, 512), nn.ReLU(), nn.Linear(512, 3)), *mlp(8)[1:])),
    Case("linear loss", lambda: (nn.Linear(5, 3), *mlp()[1:]), lambda f, y: f.sum()),
]

every_healthy_case = pytest.mark.parametrize("case", HEALTHY, ids=[case.name for case in HEALTHY])


@every_healthy_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_healthy_models_pass(case: Case, dtype: torch.dtype) -> None:
    check_double_backward(*case.build(dtype), case.loss_fn)


@pytest.mark.parametrize(("case", "cause"), WRONG, ids=[case.name for case, _ in WRONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_are_refused_with_cause(case: Case, cause: str, dtype: torch.dtype) -> None:
    with pytest.raises(DoubleBackwardError, match=cause):
        check_double_backward(*case.build(dtype), case.loss_fn)


def test_unknown_cause_is_reported_as_unknown() -> None:
    model, x, y = mlp()
    calls = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return len(calls) * F.cross_entropy(model(x), y)

    with pytest.raises(DoubleBackwardError, match=r"Likely cause: unknown.*does the loss change from call to call"):
        check_double_backward(model, x, loss_fn)


def test_units_exactly_on_their_kink_pass() -> None:
    """Inputs of zero without a bias, as at the border of an image, have no second derivative at these parameters."""
    model, x, y = mlp(8)
    model[1] = nn.ReLU()
    nn.init.zeros_(model[0].bias)
    x[::2] = 0
    check_double_backward(model, x, lambda m, x: F.cross_entropy(m(x), y))


def test_steps_across_a_kink_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 3))
    x, y = torch.randn(64, 20), classes(64)
    check_double_backward(model, x, lambda m, x: F.cross_entropy(m(x), y))


def snapshot(model: nn.Module, batch: Any) -> Any:
    tensors = {name: (id(t), t.detach().clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    gradients = {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()}
    modes = [(sorted(module.__dict__), module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    return tensors, gradients, modes, torch.get_rng_state(), copy.deepcopy(batch)


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


class InterruptedProbeError(Exception):
    pass


@pytest.mark.parametrize("case", [HEALTHY[0], HEALTHY[8], WRONG[0][0], WRONG[1][0], WRONG[4][0]], ids=lambda c: c.name)
@pytest.mark.parametrize("interrupted", [False, True])
def test_model_batch_and_globals_are_unchanged(case: Case, interrupted: bool) -> None:
    model, batch = case.build(torch.float32)
    model.train()
    model[0].training = False
    case.loss_fn(model, batch).backward()
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if interrupted and calls == 2:
            raise InterruptedProbeError
        return case.loss_fn(model, batch)

    before = snapshot(model, batch)
    with contextlib.suppress(DoubleBackwardError, InterruptedProbeError), composed_weight_norm():
        check_double_backward(model, batch, loss_fn)
    assert calls
    after = snapshot(model, batch)
    assert_same(after[0:2] + after[3:], before[0:2] + before[3:])
    assert after[2] == before[2]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_nested_batches_are_converted_to_float64() -> None:
    model = nn.Linear(3, 2)
    batch = {"x": torch.randn(4, 3), "more": [torch.tensor([0, 1, 0, 1]), "name"]}
    seen = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch["x"].dtype, batch["more"][0].dtype, batch["more"][1]))
        return F.cross_entropy(model(batch["x"]), batch["more"][0])

    check_double_backward(model, batch, loss_fn)
    assert set(seen) == {(torch.float64, torch.int64, "name")}


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, x: m(x), r"a tensor of shape \(5, 2\)"),
        (lambda m, x: m(x).sum().detach(), "does not depend"),
        (lambda m, x: m(x.float()).sum(), "float64 copy of the model and the batch"),
    ],
)
def test_invalid_losses_are_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_double_backward(nn.Linear(3, 2), torch.randn(5, 3), loss_fn)


def test_loss_of_another_model_is_refused() -> None:
    """The other model is not changed."""
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"parameter of shape \(\d.*not of the model that the loss function was given"):
        check_double_backward(model, torch.randn(5, 3), lambda _, x: model(x.float()).square().mean())
    assert model.weight.grad is None


# Composed weight norm


WEIGHT_NORMS = [WRONG[0][0], WRONG[1][0], Case("convolutions along other dimensions", normed_conv)]


@pytest.mark.parametrize("case", WEIGHT_NORMS, ids=lambda case: case.name)
def test_composed_weight_norm_gives_the_right_hessian(case: Case) -> None:
    expected = finite_difference_hessian(case)
    with composed_weight_norm():
        actual = dense_hessian(case)
    assert (actual - expected).norm() <= 1e-8 * expected.norm()
    uncomposed = dense_hessian(case)
    assert (uncomposed - expected).norm() >= 1e-2 * expected.norm(), "torch is fixed: composed_weight_norm can go"


@pytest.mark.parametrize("case", WEIGHT_NORMS, ids=lambda case: case.name)
def test_composed_weight_norm_keeps_loss_and_gradient(case: Case) -> None:
    """With it the check passes; without it the check fails."""
    model, batch = case.build()
    parameters = list(model.parameters())
    plain = case.loss_fn(model, batch)
    with composed_weight_norm():
        composed = case.loss_fn(model, batch)
        check_double_backward(model, batch, case.loss_fn)
    torch.testing.assert_close(composed, plain)
    torch.testing.assert_close(torch.autograd.grad(composed, parameters), torch.autograd.grad(plain, parameters))
    with pytest.raises(DoubleBackwardError):
        check_double_backward(model, batch, case.loss_fn)


# Operations without second derivatives


@pytest.mark.parametrize("training", [False, True])
def test_attention_can_be_differentiated_twice(training: bool) -> None:
    case = Case("transformer", transformer)
    model, batch = case.build(torch.float32)
    model.train(training)
    with double_backward_ready(model):
        loss = case.loss_fn(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in gradients), list(model.parameters()))
    assert torch.backends.cuda.flash_sdp_enabled()


def differentiate_twice(loss: Tensor, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x)


def test_operation_without_second_derivative_is_named() -> None:
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with (
        pytest.raises(DoubleBackwardError, match=r"flash_attention.*double_backward_ready") as raised,
        explained_errors(),
    ):
        differentiate_twice(F.scaled_dot_product_attention(x, x, x).sum(), x)
    assert isinstance(raised.value.__cause__, RuntimeError)
    bag = nn.EmbeddingBag(7, 4)
    model = nn.Sequential(bag, nn.Linear(4, 3))
    with pytest.raises(DoubleBackwardError, match=r"no second derivative of '_embedding_bag"):
        check_double_backward(model, torch.randint(7, (5, 3)), lambda m, x: F.cross_entropy(m(x), classes(5)))


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("derivative for aten::_cudnn_rnn_backward is not implemented", "'_cudnn_rnn_backward': .*unfused"),
        ("the derivative for '_cudnn_rnn_backward' is not implemented.", "'_cudnn_rnn_backward': .*unfused"),
        ("derivative for aten::_ctc_loss_backward is not implemented", "Gauss-Newton"),
        ("trying to differentiate twice a function that was marked with @once_differentiable", "differentiable oper"),
        ("torch.compile with aot_autograd does not currently support double backward", "force_eager"),
    ],
)
def test_errors_name_the_remedy(message: str, advice: str) -> None:
    with pytest.raises(DoubleBackwardError, match=advice), explained_errors():
        raise RuntimeError(message)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^another$") as raised, explained_errors():
        raise RuntimeError("another")
    assert raised.type is RuntimeError


@pytest.mark.parametrize(("model", "during"), [(nn.LSTM(2, 2), False), (nn.Linear(2, 2), True)])
def test_cudnn_is_off_for_recurrent_layers_only(
    model: nn.Module, during: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    with double_backward_ready(model):
        assert torch.backends.cudnn.enabled == during
    assert torch.backends.cudnn.enabled


def test_thresholds_have_a_margin_on_both_sides() -> None:
    """Healthy models stay below a tenth of the limits, wrong ones above a thousand times."""
    measured = []
    original = double_backward.measure_hessian_errors

    def recorded(*args: Any) -> Any:
        measured.append(original(*args))
        return measured[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(double_backward, "measure_hessian_errors", recorded)
        for case in HEALTHY:
            check_double_backward(*case.build(torch.float32), case.loss_fn)
        healthy, measured[:] = measured[:], []
        for case, _ in WRONG:
            with pytest.raises(DoubleBackwardError):
                check_double_backward(*case.build(torch.float32), case.loss_fn)
    assert max(m.asymmetry for m in healthy) <= finite_differences.MAX_ASYMMETRY / 10
    assert max(m.difference for m in healthy) <= finite_differences.MAX_DIFFERENCE / 10
    assert min(m.difference for m in measured) >= finite_differences.MAX_DIFFERENCE * 1000


@pytest.mark.parametrize("where", ["logits", "norm", "softmax"])
def test_float32_inside_the_model_loosens_the_limits(where: str) -> None:
    """Models that cast to float32 themselves are checked up to the rounding error of float32."""

    class Float(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if where == "norm":
                wide = x.to(torch.float32)
                return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            return x.softmax(-1, dtype=torch.float32).to(x.dtype) if where == "softmax" else x.float()

    batch = (torch.randn(6, 5), torch.randint(8, (6,)))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    check_double_backward(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), Float()), batch, loss_fn)
    wrong = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 8), Float())
    with pytest.raises(DoubleBackwardError, match="weight_norm"):
        check_double_backward(wrong, batch, loss_fn)
