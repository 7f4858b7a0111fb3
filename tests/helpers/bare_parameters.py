"""Define small models that use parameters outside of layers: sums, products, class tokens, transformers by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bare(nn.Module):
    """A function of hidden states, shape ``(n, 3, 4)``, and of bare parameters, between two layers.

    Args:
        function: The function; it returns a tensor whose first dimension is ``n``.
        shapes: Shapes of its parameters.
    """

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.embed = nn.Linear(4, 4)
        self.bare = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        with torch.no_grad():
            width = self.function(torch.randn(5, 3, 4), *self.bare).flatten(1).shape[1]
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.function(self.embed(x), *self.bare)).flatten(1))


def _added_in_place(x: Tensor, p: Tensor) -> Tensor:
    y = x.square()
    y += p
    return y


def _multiplied_in_place(x: Tensor, p: Tensor) -> Tensor:
    y = x.square()
    y *= p
    return y.sub_(p)


def _time_first(x: Tensor, p: Tensor) -> Tensor:
    return (x.transpose(0, 1) + p).transpose(0, 1)


def _flattened(x: Tensor, p: Tensor) -> Tensor:
    return (x.reshape(-1, 4) @ p).view(len(x), 3, -1)


def _flattened_time_first(x: Tensor, p: Tensor, b: Tensor) -> Tensor:
    h = torch.addmm(b, x.transpose(0, 1).reshape(-1, 4), p, alpha=0.5, beta=2)
    return h.view(3, len(x), -1).transpose(0, 1)


def _attention_bias(x: Tensor, p: Tensor) -> Tensor:
    q = x.unflatten(2, (2, 2)).transpose(1, 2)
    scores = q @ q.mT + p[(torch.arange(3)[:, None] - torch.arange(3)) + 2].permute(2, 0, 1)
    return scores.softmax(-1) @ q


def _attention_mask(x: Tensor, p: Tensor) -> Tensor:
    q = x.unflatten(2, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=p)


def _by_data(x: Tensor, p: Tensor) -> Tensor:
    return x + p[(x.detach()[..., 0] > 0).long() - 1]


def shifted_by_data(x: Tensor, p: Tensor) -> Tensor:
    """Add a tensor that is computed from a parameter, then changed in place by the data, and add it again."""
    shift = p + 1
    y = x + shift
    # Signs have no derivative, with detach or without.
    shift.add_(x[0, 0].detach().sign())
    return torch.cat([y, x + shift], 1)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "added": (lambda x, p: x + p, ((4,),)),
    "added first": (lambda x, p: p + x, ((1, 4),)),
    "subtracted": (lambda x, p, s: (x - p) - (s - x.square()), ((3, 4), ())),
    "added with a factor": (lambda x, p: torch.add(x, p, alpha=2), ((1, 3, 4),)),
    "added in place": (_added_in_place, ((3, 1),)),
    "multiplied in place": (_multiplied_in_place, ((4,),)),
    "added to slices": (lambda x, p: x[:, :2] + p[:, 1:3], ((1, 3, 4),)),
    "added per channel": (lambda x, p: x.unflatten(2, (2, 2)).square() + p, ((3, 1, 1),)),
    "added, time first": (_time_first, ((3, 1, 4),)),
    "multiplied": (lambda x, p, q: q * (x * p), ((4,), (3, 1))),
    "multiplied by a scalar": (lambda x, p, q: q * torch.tanh(x * p), ((), (1,))),
    "divided": (lambda x, p, q: p / (x / q + 9).square(), ((4,), ())),
    "power of a positive number": (lambda x, p: (x.square() + 1) ** p.exp(), ((4,),)),
    "where": (lambda x, p: torch.where(x > 0, x, p), ((3, 4),)),
    "class token expanded": (lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1), ((1, 1, 4),)),
    "class token expanded as": (lambda x, p: torch.cat([p.expand_as(x[:, :1]), x], 1), ((4,),)),
    "class token repeated": (lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x], 1), ((1, 1, 4),)),
    "class token stacked": (lambda x, p: torch.cat([torch.stack([p] * len(x)), x], 1), ((2, 4),)),
    "class token plus zero": (lambda x, p: torch.cat([(p + 0).expand(len(x), -1, -1), x], 1), ((1, 1, 4),)),
    "class token of zeros and a parameter": (
        lambda x, p: torch.cat([torch.zeros(len(x), 1, 4, dtype=x.dtype) + p, x], 1),
        ((4,),),
    ),
    "prompts by a layer": (lambda x, p, w: torch.cat([F.linear(p, w).expand(len(x), 2, 4), x], 1), ((2, 3), (4, 3))),
    "matmul": (lambda x, p: x @ p, ((4, 3),)),
    "matmul with a transposed matrix": (lambda x, p, q: (x @ p.t()) @ q.mT, ((2, 4), (3, 2))),
    "matmul from the left": (lambda x, p: p @ x, ((2, 3),)),
    "matmul per head": (lambda x, p: torch.matmul(x[:, None], p), ((2, 4, 3),)),
    "matmul with a vector": (lambda x, p, q: (x @ p) + (q @ x).sum(1, keepdim=True), ((4,), (3,))),
    "mm of flattened tokens": (_flattened, ((4, 2),)),
    "addmm of flattened tokens, time first": (_flattened_time_first, ((4, 2), (2,))),
    "bmm per token": (lambda x, p: torch.bmm(x.transpose(0, 1), p).transpose(0, 1), ((3, 4, 2),)),
    "einsum": (lambda x, p: torch.einsum("ntd,hdk->nhtk", x, p), ((2, 4, 2),)),
    "einsum with an ellipsis": (lambda x, p: torch.einsum("...d, dk -> ...k", x, p), ((4, 2),)),
    "einsum without a result": (lambda x, p: torch.einsum("btd,dk", x, p), ((4, 2),)),
    "einsum of two parameters": (lambda x, p, q: torch.einsum("ntd,dr,ro->nto", x, p, q), ((4, 2), (2, 3))),
    "einsum that sums a parameter": (lambda x, p: torch.einsum("ntd,dr->nt", x, p), ((4, 2),)),
    "bilinear": (lambda x, p, q: F.bilinear(x, x.square(), p, q), ((2, 4, 4), (2,))),
    "prelu": (lambda x, p, q: F.prelu(F.prelu(x, p), q), ((3,), (1,))),
    "table indexed by data": (_by_data, ((2, 4),)),
    "table selected": (lambda x, p: x + p.index_select(0, torch.arange(3) % 2), ((2, 4),)),
    "attention bias": (_attention_bias, ((5, 2),)),
    "attention mask": (_attention_mask, ((2, 3, 3),)),
    "gate": (lambda x, p: x * torch.sigmoid(p) + x.square() * (1 - torch.sigmoid(p)), ((4,),)),
    "two slices of a matrix": (lambda x, p: F.linear(x, p[:2]) * F.linear(x, p.narrow(0, 2, 2)), ((4, 4),)),
}
"""Functions of ``(n, 3, 4)`` hidden states and parameters, with the shapes of the parameters."""


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with a transposed matrix and an explicit ``addmm``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 2), nn.Parameter(torch.randn(outputs) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class GPTBlock(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = Conv1D(width, 3 * width), Conv1D(width, width)
        self.up, self.down = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (h.unflatten(-1, (2, -1)).transpose(1, 2) for h in self.attention(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model like GPT-2: learned positions, tied embeddings, logits of all tokens, flattened."""

    def __init__(self, *, words: int, width: int, layers: int, positions: int, flat: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(GPTBlock(width) for _ in range(layers))
        self.norm, self.head, self.flat = nn.LayerNorm(width), nn.Linear(width, words, bias=False), flat
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.wte(tokens) + self.wpe(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits[:, :-1].flatten(0, 1) if self.flat else logits[:, -1]


class ViT(nn.Module):
    """A vision transformer with class token, position embedding and layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, 2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 9, 4))
        self.attention, self.norm1 = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.mlp, self.norm2 = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), nn.LayerNorm(4)
        self.scale1, self.scale2 = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1)
        h = h + self.positions[:, : h.shape[1]]
        y = self.norm1(h)
        h = h + self.scale1 * self.attention(y, y, y, need_weights=False)[0]
        h = h + self.mlp(self.norm2(h)) * self.scale2
        return self.head(h[:, 0])


class Windows(nn.Module):
    """Attention within windows of an image, with a table of relative positions, like Swin."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("index", (torch.arange(2)[:, None] - torch.arange(2)) + 1)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.embed(x).reshape(-1, 2, 4)
        q, k, v = self.qkv(windows).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(2, 2, -1).permute(2, 0, 1).contiguous()
        h = (q @ k.mT + bias.unsqueeze(0)).softmax(-1) @ v
        return self.head(h.transpose(1, 2).reshape(len(x), -1, 4).mean(1))
