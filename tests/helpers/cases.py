"""Define small models with a batch and a loss, and compute their dense float64 matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from lightning_plasticity.curvature import custom_loss
from tests.helpers.bare_parameters import FUNCTIONS, GPT, Bare, ViT, Windows, shifted_by_data

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, its batch, and the loss as a function of the model's output.

    Args:
        name: Name of the case.
        make: Makes the model, its inputs and its targets.
        loss: Computes the loss from outputs and targets.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batch]:
        torch.manual_seed(0)
        model, inputs, targets = self.make()
        norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
        # Fresh norm layers are the identity, which would hide errors; those of a trained network are not.
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
            if isinstance(module, norms) and module.weight is not None:
                nn.init.normal_(module.weight, 1, 0.3)
                if getattr(module, "bias", None) is not None:
                    nn.init.normal_(module.bias, 0, 0.3)
        return model.to(dtype), (_to(inputs, dtype), _to(targets, dtype))

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(model(batch[0]), batch[1])


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Dense:
    """The dense matrices of a case, from its full Jacobian, float64."""

    ggn: Tensor
    tangent_kernel: Tensor
    residual: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.ggn).flip(0)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def dense(case: Case) -> Dense:
    """Compute the Gauss-Newton matrix, the tangent kernel and the residual from the full Jacobian."""
    model, (inputs, targets) = case.build()
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (inputs,))

    out = outputs(parameters).detach()
    jacobian = torch.cat(
        [j.reshape(out.numel(), -1) for j in jacrev(outputs, chunk_size=1)(parameters).values()], dim=1
    )

    def loss(flat: Tensor) -> Tensor:
        return case.loss(flat.reshape(out.shape), targets)

    curvature = hessian(loss)(out.flatten())
    return Dense(
        ggn=jacobian.T @ curvature @ jacobian,
        tangent_kernel=jacobian @ jacobian.T / (out.shape[0] if targets.dim() else 1),
        residual=torch.func.grad(loss)(out.flatten()),
    )


def dense_hessian(case: Case) -> Tensor:
    """Compute the Hessian row by row by differentiating twice, in evaluation mode, shape ``(P, P)``."""
    model, batch = case.build()
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.loss_fn(model, batch)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)

    def row(entry: Tensor) -> Tensor:
        if not entry.requires_grad:
            return torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        parts = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    return torch.stack([row(entry) for gradient in gradients for entry in gradient.flatten()])


def finite_difference_hessian(case: Case) -> Tensor:
    """Compute the Hessian by central differences of gradients, without autograd's second derivatives."""
    model, batch = case.build()
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = nn.utils.parameters_to_vector(parameters).detach()
    columns, step = [], 1e-5

    def gradient(point: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, parameters)
        gradients = torch.autograd.grad(
            case.loss_fn(model, batch), parameters, allow_unused=True, materialize_grads=True
        )
        return nn.utils.parameters_to_vector([g.contiguous() for g in gradients])

    for index in range(len(flat)):
        offset = torch.zeros_like(flat)
        offset[index] = step
        columns.append((gradient(flat + offset) - gradient(flat - offset)) / (2 * step))
    hessian = torch.stack(columns)
    return (hessian + hessian.T) / 2


class Tied(nn.Module):
    """An embedding that shares its table with the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.middle(self.table(x))).mean(1))


class Repeated(nn.Module):
    """A layer that is called twice, in a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.block(x))
        return self.head(x + torch.relu(self.block(x)))


class HandAttention(nn.Module):
    """Attention written with linear layers: one matrix for many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out((torch.softmax(q @ k.mT, -1) @ v).mean(1))


class Scaled(nn.Module):
    """A bare parameter, used outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor([1.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class BareMatrix(nn.Module):
    """Parameters used as matrices without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", torch.tanh(x @ self.first), self.second)


class Transposed(nn.Linear):
    """A layer whose matrix is not the parameter itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t().t())


class UsedTwice(nn.Module):
    """A matrix that is used in a layer and outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) @ self.layer.weight)


class SquareTimes(torch.autograd.Function):
    """The function x² w, which is not a layer."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x**2 * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * x * w * gradient, (x**2 * gradient).sum(0)


class Custom(nn.Module):
    """A parameter in a custom autograd.Function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.w, self.head = nn.Linear(5, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(SquareTimes.apply(self.linear(x), self.w))


class LowRank(nn.Module):
    """A low-rank adapter of a frozen layer."""

    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(5, 3).requires_grad_(False), merged
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Positional(nn.Module):
    """A vision transformer: class token and position embedding are bare parameters."""

    def __init__(self, *, tokens: int, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, tokens + 1, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        if not self.batch_first:
            h = h.transpose(0, 1)
        h = self.block(h)
        return self.head(h[:, 0] if self.batch_first else h[0])


class Recurrent(nn.Module):
    """A recurrent network that classifies by its last state."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attending(nn.Module):
    """Attention across positions, to the same sequence or to one of another width."""

    def __init__(self, attention: nn.MultiheadAttention, *, need_weights: bool = True) -> None:
        super().__init__()
        self.attention, self.need_weights = attention, need_weights
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if not self.attention.batch_first:
            h = h.transpose(0, 1)
        memory = h if self.attention._qkv_same_embed_dim else torch.cat([h, h.square()], -1)
        out = self.attention(h, memory, memory, need_weights=self.need_weights)[0]
        return self.head(out.mean(1 if self.attention.batch_first else 0))


class TimeFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Mean(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


class Positions(nn.Module):
    """A position embedding without a batch dimension."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.linear, self.place = nn.Linear(3, 2), nn.Embedding(positions, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(self.place.num_embeddings))
        return torch.tanh(self.linear(x[:, None] * places)).mean(1)


def classes(n: int, c: int = 3) -> Tensor:
    return torch.arange(n) % c


def mlp(n: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(n, 5), classes(n)


def frozen() -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = mlp()
    model[0].requires_grad_(False)
    return model, x, y


def conv(*layers: nn.Module, shape: tuple[int, ...]) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        x = torch.randn(4, *shape)
        body = nn.Sequential(*copy.deepcopy(layers), nn.Flatten())
        for module in body.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                module.reset_parameters()
        return nn.Sequential(*body, nn.Linear(body.eval()(x).shape[1], 3)).train(), x, classes(4)

    return make


def smoothed(f: Tensor, y: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=f.dtype)
    return F.cross_entropy(f, y.where(y != 1, -100), weight=weight, label_smoothing=0.1)


def soft(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, F.softmax(y, 1), weight=torch.tensor([1.0, 0.5, 2.0], dtype=f.dtype))


def masked(f: Tensor, y: Tensor) -> Tensor:
    return (F.cross_entropy(f, y, reduction="none") * torch.linspace(0.1, 1, len(y), dtype=f.dtype)).sum() / len(y)


def mixup(f: Tensor, y: Tensor) -> Tensor:
    return 0.7 * F.cross_entropy(f, y) + 0.3 * F.cross_entropy(f, y.flip(0)) + 0.1 * F.mse_loss(f, torch.zeros_like(f))


def weighted_bce(f: Tensor, y: Tensor) -> Tensor:
    positive = torch.tensor([2.0, 1.0, 0.5], dtype=f.dtype)
    return F.binary_cross_entropy_with_logits(f, y, weight=positive.flip(0), pos_weight=positive)


def regression(out: int, n: int = 6) -> Callable[[], tuple[nn.Module, Tensor, Tensor]]:
    return lambda: (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, out)), torch.randn(n, 5), torch.rand(n, out))


class Squeezed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


def sequence() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    return nn.Sequential(model, Transpose()), torch.randint(7, (4, 5)), torch.randint(3, (4, 5))


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


CLOSED_FORM_CASES = [
    Case("mlp", mlp),
    Case("one sample", lambda: mlp(1)),
    Case("one sample without a batch dimension", lambda: (mlp()[0], torch.randn(5), torch.tensor(1))),
    Case("more rows than parameters", lambda: (nn.Linear(2, 3), torch.randn(9, 2), classes(9))),
    Case("frozen layer", frozen),
    Case("relu in place", lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU(True), nn.Linear(8, 3)), *mlp()[1:])),
    Case(
        "layer norm and dropout",
        lambda: (
            nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3)),
            *mlp()[1:],
        ),
    ),
    Case(
        "layer norm over two dimensions",
        lambda: (
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3)), nn.Flatten(), nn.Linear(6, 3)),
            torch.randn(5, 6),
            classes(5),
        ),
    ),
    Case(
        "batch norm of features",
        lambda: (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), *mlp()[1:]),
    ),
    Case("conv1d", conv(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(), shape=(2, 9))),
    Case(
        "conv2d with batch norm",
        conv(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), shape=(2, 6, 6)),
    ),
    Case(
        "conv2d grouped, dilated, strided",
        conv(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
            nn.Tanh(),
            shape=(4, 5, 6),
        ),
    ),
    Case("conv2d depthwise, same", conv(nn.Conv2d(3, 6, 4, padding="same", groups=3), nn.Tanh(), shape=(3, 4, 5))),
    Case("conv2d reflected", conv(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Tanh(), shape=(2, 4, 4))),
    Case("conv3d", conv(nn.Conv3d(1, 2, 2), nn.Tanh(), shape=(1, 3, 4, 3))),
    Case(
        "embedding with padding",
        lambda: (
            nn.Sequential(nn.Embedding(7, 4, padding_idx=-2), nn.Flatten(), nn.Linear(20, 3)),
            torch.randint(7, (6, 5)),
            classes(6),
        ),
    ),
    Case("tied embedding", lambda: (Tied(), torch.randint(7, (6, 5)), classes(6, 7))),
    Case("layer called twice", lambda: (Repeated(), torch.randn(6, 5), classes(6))),
    Case("attention by hand", lambda: (HandAttention(), torch.randn(5, 6, 4), classes(5))),
    Case("class weights, smoothing, ignored labels", mlp, smoothed),
    Case("soft labels", lambda: (*mlp()[:2], torch.randn(6, 3)), soft),
    Case("loss per sample, weighted", mlp, masked),
    Case("mixup and a penalty on the outputs", mlp, mixup),
    Case("sequence of labels", sequence),
    Case("squared error", regression(2), F.mse_loss),
    Case("squared error, summed", regression(2), lambda f, y: F.mse_loss(f, y, reduction="sum") / 7),
    Case("binary labels", regression(3), weighted_bce),
    Case(
        "binary labels, sigmoid first",
        regression(3),
        lambda f, y: F.binary_cross_entropy(f.sigmoid(), y, reduction="sum"),
    ),
    Case("log-softmax of a sequence", sequence, lambda f, y: F.nll_loss(f.log_softmax(1), y, ignore_index=2)),
    Case("Huber loss", regression(2), lambda f, y: F.huber_loss(f, 2 * y, delta=0.7)),
    Case("smooth L1 loss", regression(2), lambda f, y: F.smooth_l1_loss(f, 2 * y, reduction="sum", beta=0.5)),
    Case(
        "custom loss",
        mlp,
        lambda f, y: custom_loss(f, lambda f: f.gather(1, y[:, None]).neg().exp().mean() + f.pow(4).mean()),
    ),
    Case(
        "custom loss, with another", mlp, lambda f, y: F.cross_entropy(f, y) + custom_loss(f, lambda f: f.cosh().mean())
    ),
    Case(
        "custom loss that couples samples",
        mlp,
        lambda f, y: custom_loss(f, lambda f: f.mean(0).exp().sum() + f.square().sum()),
    ),
    Case(
        "custom loss that is linear", regression(2), lambda f, y: F.mse_loss(f, y) + custom_loss(f, lambda f: f.sum())
    ),
    Case(
        "one output, no dimension for it",
        lambda: (Squeezed(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 5), classes(6, 2).float()),
        F.binary_cross_entropy_with_logits,
    ),
    Case("adapter of low rank", lambda: (LowRank(merged=False), *mlp()[1:])),
    *[
        Case(
            f"attention{first * ', batch first'}{weights * ', weights'}",
            lambda first=first, weights=weights: (
                Attending(nn.MultiheadAttention(4, 2, batch_first=first), need_weights=weights),
                torch.randn(4, 6, 4),
                classes(4),
            ),
        )
        for first in (False, True)
        for weights in (False, True)
    ],
    Case(
        "encoder layers, time first",
        lambda: (
            nn.Sequential(TimeFirst(), nn.TransformerEncoderLayer(4, 2, 6), Mean(0), nn.Linear(4, 3)),
            torch.randn(6, 4, 4),
            classes(6),
        ),
    ),
    Case("conv transpose 1d", conv(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), shape=(2, 5))),
    Case(
        "conv transpose 2d, grouped, dilated, strided",
        conv(
            nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 3), (1, 2), groups=2, dilation=(1, 2)),
            nn.Tanh(),
            shape=(4, 3, 4),
        ),
    ),
    Case("conv transpose 2d, cut", conv(nn.ConvTranspose2d(2, 3, 1, padding=1), nn.Tanh(), shape=(2, 4, 4))),
    Case("conv transpose 3d", conv(nn.ConvTranspose3d(1, 2, 2, bias=False), nn.Tanh(), shape=(1, 2, 3, 2))),
    Case("group norm", conv(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), shape=(2, 4, 5))),
    Case(
        "instance norm",
        conv(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh(), shape=(2, 4, 4)),
    ),
    Case(
        "instance norm with running statistics",
        conv(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), shape=(2, 5)),
    ),
    Case(
        "rms norm",
        lambda: (nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 3)), *mlp()[1:]),
    ),
    Case("bare parameter", lambda: (Scaled(), torch.randn(5, 3), torch.zeros(5, 2)), F.mse_loss),
    Case("bare matrices", lambda: (BareMatrix(), *mlp()[1:])),
    Case("weight of a view", lambda: (Transposed(5, 3), *mlp()[1:])),
    Case("used in a layer and elsewhere", lambda: (UsedTwice(), *mlp()[1:])),
    Case("prelu", lambda: (nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)), *mlp()[1:])),
    Case("adapter of low rank, merged", lambda: (LowRank(merged=True), *mlp()[1:])),
    Case(
        "weight norm",
        lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)), *mlp()[1:]),
    ),
    Case(
        "spectral norm",
        lambda: (nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3)), *mlp()[1:]),
    ),
    Case("positions as many as samples", lambda: (Positions(5), torch.randn(5, 3), torch.zeros(5, 2)), F.mse_loss),
    Case("positions as many as half of the samples", lambda: (Positions(3), torch.randn(6, 3), classes(6, 2))),
    *[
        Case(
            f"transformer with a class token{first * ', batch first'}, {tokens} tokens",
            lambda first=first, tokens=tokens: (
                Positional(tokens=tokens, batch_first=first),
                torch.randn(4, tokens, 4),
                classes(4),
            ),
        )
        for first in (False, True)
        for tokens in (3, 4)
    ],
    Case(
        "attention to another width",
        lambda: (
            Attending(nn.MultiheadAttention(4, 2, kdim=8, vdim=8, add_bias_kv=True)),
            torch.randn(4, 6, 4),
            classes(4),
        ),
    ),
    *[
        Case(
            f"language model, {n} sequences{flat * ', flattened'}",
            lambda n=n, flat=flat: (
                GPT(words=5, width=4, layers=1, positions=6, flat=flat),
                torch.randint(5, (n, 4)),
                classes(3 * n if flat else n, 5),
            ),
        )
        for n in (3, 4)
        for flat in (False, True)
    ],
    Case("vision transformer", lambda: (ViT(), torch.randn(4, 1, 4, 6), classes(4))),
    Case("windows", lambda: (Windows(), torch.randn(4, 6, 3), classes(4))),
]
"""Cases with a closed form for every parameter."""

ROW_BY_ROW_CASES = [
    Case(
        "batch norm with statistics of the batch",
        lambda: (
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
            *mlp()[1:],
        ),
    ),
    Case(
        "computed from a parameter and the data",
        lambda: (Bare(shifted_by_data, (4,)), torch.randn(5, 3, 4), classes(5)),
    ),
    Case("gru", lambda: (Recurrent(nn.GRU(4, 5, batch_first=True)), torch.randn(4, 6, 4), classes(4))),
    Case("lstm", lambda: (Recurrent(nn.LSTM(4, 5, 2, batch_first=True)), torch.randn(4, 6, 4), classes(4))),
    Case("a function of the user's own", lambda: (Custom(), *mlp()[1:])),
]
"""Cases with parameters without a closed form, whose Jacobian is computed row by row."""

CASES = [*CLOSED_FORM_CASES, *ROW_BY_ROW_CASES]

BARE_PARAMETER_CASES = [
    *[
        Case(name, lambda function=function, shapes=shapes: (Bare(function, *shapes), torch.randn(5, 3, 4), classes(5)))
        for name, (function, shapes) in FUNCTIONS.items()
    ],
    *[
        Case(
            f"as many samples as tokens, {name}",
            lambda name=name: (Bare(FUNCTIONS[name][0], *FUNCTIONS[name][1]), torch.randn(3, 3, 4), classes(3)),
        )
        for name in ("added to slices", "added, time first", "class token expanded", "attention bias")
    ],
]
"""Cases with closed forms for bare parameters, each used by one function."""
