"""Any loss of the network's outputs gives the numbers of a dense Jacobian, or says which numbers it has not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from lightning_plasticity.curvature import custom_loss
from lightning_plasticity.curvature.exact.gram import Gram, gram

Outputs = tuple[Tensor, ...]
LossOf = Callable[[Outputs, nn.Module], Tensor]


class Heads(nn.Module):
    """A body and linear heads, with learned numbers that only losses use."""

    def __init__(self, *widths: int, outputs: Callable[[Tensor, nn.ModuleList], Outputs] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, width) for width in widths)
        self.log_vars = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.register_buffer("anchor", torch.randn(6, 5))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Outputs:
        h = self.body(x)
        return self.outputs(h, self.heads) if self.outputs else tuple(head(h) for head in self.heads)


class Autoencoder(nn.Module):
    """A variational autoencoder: two outputs are computed on the way to the third."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Outputs:
        encoded = self.encoder(x)
        mean, log_var = encoded.chunk(2, -1)
        noise = torch.linspace(-1, 1, mean.numel(), dtype=x.dtype).reshape(mean.shape)
        return encoded, self.decoder(mean + noise * torch.exp(log_var / 2))


class Standardised(Heads):
    """A network whose errors are divided by a learned standard deviation."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Outputs:
        return ((super().forward(x)[0] - Y) / torch.exp(self.log_vars[0]),)


class Squashed(Heads):
    """A network whose last layer is followed by an activation."""

    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Outputs:
        return (super().forward(x)[0].sigmoid(),)


class Towers(Heads):
    """Two towers, whose outputs are multiplied."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x: Tensor) -> Outputs:
        user, item = super().forward(x)
        return ((user * item).sum(1),)


class Image(nn.Module):
    """A network whose last layer is a convolution, before global average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)

    def forward(self, x: Tensor) -> Outputs:
        return (self.conv(x.reshape(len(x), 1, 1, -1).expand(-1, -1, 2, -1)).mean((2, 3)),)


N = 6
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS = torch.arange(N) % 3


@dataclass(frozen=True)
class LossCase:
    """A network, and a loss of its outputs.

    Args:
        name: Name of the case.
        loss: The loss.
        model: Makes the network.
        couples: Whether the loss of a sample depends on the outputs of another.
        held_constant: Names of the parameters that only the loss uses.
        terms: Terms of the loss that depend on weights alone.
    """

    name: str
    loss: LossOf
    model: Callable[[], nn.Module] = lambda: Heads(3)
    couples: bool = False
    held_constant: tuple[str, ...] = ()
    terms: Callable[[nn.Module], Tensor | float] = lambda model: 0.0


def _contrastive(f: Outputs, model: nn.Module) -> Tensor:
    z = F.normalize(f[0], dim=1)
    similarity = (z @ z.T / 0.5).masked_fill(torch.eye(N, dtype=torch.bool), -1e9)
    return F.cross_entropy(similarity, torch.arange(N).flip(0))


def _triplet(f: Outputs, model: nn.Module) -> Tensor:
    distance = (f[0][:, None] - f[0][None]).square().sum(-1)
    same = LABELS[:, None] == LABELS[None]
    farthest = distance.masked_fill(~same, -math.inf).max(1).values
    nearest = distance.masked_fill(same, math.inf).min(1).values
    return F.softplus(farthest - nearest).mean()


def _clipped_ratio(f: Outputs, model: nn.Module) -> Tensor:
    log_probability = f[0].log_softmax(1)[torch.arange(N), LABELS]
    ratio = torch.exp(log_probability - log_probability.detach() + 0.1 * Y[:, 0])
    policy = -torch.min(ratio * Y[:, 1], ratio.clamp(0.9, 1.1) * Y[:, 1]).mean()
    entropy = torch.distributions.Categorical(logits=f[0]).entropy().mean()
    return policy + 0.5 * (f[1].squeeze(1) - Y[:, 2]).square().mean() - 0.01 * entropy


def _ctc(f: Outputs, model: nn.Module) -> Tensor:
    steps = f[0].reshape(N, 4, 3).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(steps, LABELS[:, None] % 2 + 1, torch.full((N,), 4), torch.ones(N, dtype=torch.long))


def _focal(f: Outputs, model: nn.Module) -> Tensor:
    log_probability = -F.cross_entropy(f[0], LABELS, reduction="none")
    return -((1 - log_probability.exp()) ** 2 * log_probability).mean()


def _vae(f: Outputs, model: nn.Module) -> Tensor:
    mean, log_var = f[0].chunk(2, -1)
    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
    return F.mse_loss(f[1], X) + 0.1 * divergence


def _learned_weights(f: Outputs, model: nn.Module) -> Tensor:
    s = model.log_vars
    return torch.exp(-s[0]) * F.mse_loss(f[0], Y) + s[0] + torch.exp(-s[1]) * F.cross_entropy(f[1], LABELS) + s[1]


def _global_variance(f: Outputs, model: nn.Module) -> Tensor:
    return (0.5 * f[0] ** 2 + model.log_vars[0]).mean()


def _squares(f: Outputs, model: nn.Module) -> Tensor:
    return ((f[0] - Y) ** 2).mean()


def _penalty(model: nn.Module) -> Tensor:
    weight = model.body[0].weight
    ridge = 0.1 * sum(p.square().sum() for p in model.parameters() if p.dim() > 1)
    orthogonal = (weight @ weight.T - torch.eye(len(weight), dtype=weight.dtype)).square().sum()
    return ridge + 0.01 * orthogonal + 0.3 * (model.anchor * (weight - 1).square()).mean()


PENALISED = ("body.0.weight", "heads.0.weight")

CASES = [
    LossCase("squares by hand", _squares),
    LossCase("root mean square", lambda f, m: F.mse_loss(f[0], Y).sqrt(), couples=True),
    LossCase("absolute error", lambda f, m: F.l1_loss(f[0], Y)),
    LossCase("absolute error by hand", lambda f, m: (f[0] - Y).abs().mean()),
    LossCase("quantiles", lambda f, m: torch.max(0.9 * (Y - f[0]), -0.1 * (Y - f[0])).mean()),
    LossCase("smape", lambda f, m: ((f[0] - Y).abs() / (f[0].abs() + Y.abs())).mean()),
    LossCase("log cosh", lambda f, m: torch.log(torch.cosh(f[0] - Y)).mean()),
    LossCase("masked", lambda f, m: ((f[0] - Y).square() * (Y > 0)).sum() / (Y > 0).sum()),
    LossCase("log softmax by hand", lambda f, m: -f[0].log_softmax(1)[torch.arange(N), LABELS].mean()),
    LossCase(
        "likelihood of a view",
        lambda f, m: F.nll_loss(f[0].reshape(N, 2, 3).log_softmax(-1).view(-1, 3), torch.arange(2 * N) % 3),
        lambda: Heads(6),
    ),
    LossCase(
        "likelihood of the normal distribution", lambda f, m: -torch.distributions.Normal(f[0], 2.0).log_prob(Y).mean()
    ),
    LossCase(
        "logistic by hand",
        lambda f, m: -(torch.sigmoid(f[0]).log() * (Y > 0) + torch.sigmoid(-f[0]).log() * (Y <= 0)).mean(),
    ),
    LossCase("cosine", lambda f, m: (1 - F.cosine_similarity(f[0], Y)).mean()),
    LossCase(
        "cosine embedding",
        lambda f, m: F.cosine_embedding_loss(f[0], Y, torch.ones(N, dtype=torch.float64)),
    ),
    LossCase("divergence", lambda f, m: F.kl_div(f[0].log_softmax(1), Y.softmax(1), reduction="batchmean")),
    LossCase("poisson", lambda f, m: F.poisson_nll_loss(f[0], Y.abs())),
    LossCase("focal", _focal),
    LossCase(
        "normal distribution with a variance head",
        lambda f, m: F.gaussian_nll_loss(f[0], Y, F.softplus(f[1])),
        lambda: Heads(3, 3),
    ),
    LossCase("variational autoencoder", _vae, Autoencoder),
    LossCase("clipped ratio", _clipped_ratio, lambda: Heads(3, 1)),
    LossCase("connectionist temporal classification", _ctc, lambda: Heads(12)),
    LossCase("contrastive", _contrastive, couples=True),
    LossCase("triplets", _triplet, couples=True),
    LossCase(
        "batch statistics in the loss",
        lambda f, m: (F.batch_norm(f[0], None, None, training=True) - Y).square().mean(),
        couples=True,
    ),
    LossCase("learned weights", _learned_weights, lambda: Heads(3, 3), held_constant=("log_vars",)),
    LossCase("learned variance", _global_variance, Standardised, held_constant=("log_vars",)),
    LossCase("penalty", _squares, terms=_penalty, held_constant=PENALISED),
    LossCase("penalty on a known loss", lambda f, m: F.mse_loss(f[0], Y), terms=_penalty, held_constant=PENALISED),
    LossCase(
        "mean over pixels",
        lambda f, m: (f[0] - Y).square().mean(),
        Image,
    ),
    LossCase("product of two heads", lambda f, m: (f[0] * f[1]).square().mean(), lambda: Heads(3, 3)),
    LossCase("squares of a sigmoid", lambda f, m: F.mse_loss(f[0], Y), Squashed),
    LossCase(
        "logistic loss of scores of two towers",
        lambda f, m: F.binary_cross_entropy_with_logits(f[0], Y[:, 0].round().clamp(0, 1)),
        Towers,
    ),
    LossCase("sum of known and unknown", lambda f, m: F.mse_loss(f[0], Y) + f[0].exp().mean()),
    LossCase(
        "errors and error of the mean",
        lambda f, m: F.mse_loss(f[0], Y) + F.mse_loss(f[0].mean(0), Y.mean(0)),
        couples=True,
    ),
    LossCase(
        "absolute errors and error of the mean",
        lambda f, m: F.l1_loss(f[0], Y) + F.mse_loss(f[0].mean(0), Y.mean(0)),
        couples=True,
    ),
    LossCase("outputs counted twice", lambda f, m: F.mse_loss(f[0], Y) + F.mse_loss(f[0][:, -1], Y[:, -1])),
    LossCase("outputs and their transpose", lambda f, m: F.cross_entropy(f[0], LABELS) + F.mse_loss(f[0].t(), Y.t())),
    LossCase(
        "pairs of samples",
        lambda f, m: F.binary_cross_entropy_with_logits(f[0][::2] - f[0][1::2], torch.ones_like(Y[::2])),
        couples=True,
    ),
    LossCase("linear in the outputs", lambda f, m: -(f[0] * Y).mean()),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def measure(case: LossCase) -> tuple[Gram, Tensor, Tensor, Tensor, Tensor]:
    """Return the measurement, and the dense kernel, residual, Gauss-Newton matrix and loss Hessian."""
    torch.manual_seed(0)
    model = case.model().double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    outputs = model(X)
    shapes = [output.shape for output in outputs]
    sizes = [output.numel() for output in outputs]

    def flat(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([output.flatten() for output in functional_call(model, values, (X,))])

    def loss(outputs: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(outputs.split(sizes), shapes, strict=True)]
        return case.loss(tuple(parts), model)

    jacobian = torch.cat([j.flatten(1) for j in jacrev(flat)(parameters).values()], dim=1)
    point = flat(parameters)
    residual = grad(loss)(point)
    if case.name == "connectionist temporal classification":
        curvature = torch.zeros(len(point), len(point), dtype=torch.float64)
    else:
        curvature = hessian(loss)(point)
    result = gram(model, X, lambda model, x: case.loss(model(x), model) + case.terms(model))
    return result, jacobian @ jacobian.T / N, residual, jacobian.T @ curvature @ jacobian, curvature


@each_case
def test_kernel_and_residual_are_the_dense_ones(case: LossCase) -> None:
    result, kernel, residual, *_ = measure(case)
    assert result.tangent_kernel is not None
    assert result.residual is not None
    # The measurement may number the outputs in another order.
    expected, actual = torch.linalg.eigvalsh(kernel), torch.linalg.eigvalsh(result.tangent_kernel)
    assert (expected - actual).abs().max() <= 1e-10 * expected.max()
    for power in range(3):
        one = residual @ torch.linalg.matrix_power(kernel, power) @ residual
        other = result.residual @ torch.linalg.matrix_power(result.tangent_kernel, power) @ result.residual
        assert other.item() == pytest.approx(one.item(), rel=1e-9)


@each_case
def test_gauss_newton_matrix_is_the_dense_one_or_left_out(case: LossCase) -> None:
    result, _, _, ggn, curvature = measure(case)
    values = torch.linalg.eigvalsh(curvature)
    if values.min() < -1e-6 * values.max() or not curvature.any():
        assert result.loss_weighted is None
        assert result.no_gauss_newton is not None
        return
    expected = torch.linalg.eigvalsh(ggn).flip(0)
    actual = result.spectrum().eigenvalues
    count = min(len(expected), len(actual))
    assert (expected[:count] - actual[:count]).abs().max() <= 1e-9 * expected[0]


@each_case
def test_what_the_loss_uses_besides_the_outputs_is_named(case: LossCase) -> None:
    result, *_ = measure(case)
    assert result.held_constant == sorted(case.held_constant)
    assert result.couples_samples == case.couples


def test_reasons_for_leaving_out_the_gauss_newton_matrix() -> None:
    reasons = {case.name: measure(case)[0].no_gauss_newton or "" for case in CASES}
    assert "linear in the network's outputs" in reasons["absolute error"]
    assert "not convex in the network's outputs" in reasons["cosine"]
    assert "cannot be differentiated twice" in reasons["connectionist temporal classification"]


def test_derivatives_inside_of_the_loss_are_outputs() -> None:
    """A physics-informed loss depends on the network and on its derivative with respect to the inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = X[:, :2]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) + u.squeeze(1)).square().mean()

    def outputs(values: dict[str, Tensor]) -> Tensor:
        def u(x: Tensor) -> Tensor:
            return functional_call(model, values, (x,)).sum()

        return torch.cat([functional_call(model, values, (x,)).flatten(), grad(u)(x).sum(1)])

    jacobian = torch.cat([j.flatten(1) for j in jacrev(outputs)(parameters).values()], dim=1)
    result = gram(model, x, loss_fn)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T / N)
    assert (torch.linalg.eigvalsh(result.tangent_kernel) - expected).abs().max() <= 1e-10 * expected.max()


def test_class_dimension_after_permuted_time_is_separate_by_sample() -> None:
    """Entries of a loss are numbered as it received them, also where another dimension has as many as the batch."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(3, (2, 5))
    received = gram(model, x, lambda model, x: F.cross_entropy(model(x).permute(1, 2, 0), y)).spectrum()
    by_hand = gram(model, x, lambda model, x: -model(x).log_softmax(-1).gather(2, y.T[..., None]).mean()).spectrum()
    assert float(received.trace) == pytest.approx(float(by_hand.trace), rel=1e-10)


def test_custom_loss_chooses_the_outputs() -> None:
    """With an activation inside the function or outside, the outputs are its input or its result."""
    model = Heads(3).double()
    inside = gram(model, X, lambda model, x: custom_loss(model(x)[0], lambda f: (f.sigmoid() - 0.5).square().mean()))
    outside = gram(model, X, lambda model, x: custom_loss(model(x)[0].sigmoid(), lambda p: (p - 0.5).square().mean()))
    assert inside.tangent_kernel is not None
    assert outside.tangent_kernel is not None
    slope = (p := model(X)[0].sigmoid().detach().flatten()) * (1 - p)
    expected = slope[:, None] * inside.tangent_kernel * slope
    assert (outside.tangent_kernel - expected).norm() <= 1e-10 * expected.norm()
