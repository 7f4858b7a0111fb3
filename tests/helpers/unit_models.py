"""Models for tests of units, each with the shape of its inputs and the expected units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Args:
        name: Name in the ids of tests.
        build: Builds the module.
        shape: Shape of its input.
        groups: Number of resettable units and names of their consumers, by name of the layer.
        excluded: A part of the reason why a layer has no such units, by its name.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, tuple[int, tuple[str, ...]]]
    excluded: dict[str, str]


class Functional(nn.Module):
    """Registers its layers in another order than it calls them, and uses functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.first = nn.Linear(6, 3), nn.Linear(5, 6), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(F.relu(self.first(x)))))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.trunk(x))
        return self.policy(h), self.value(h)


class DetachedHead(TwoHeads):
    """Detaches the second head from the graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.trunk(x))
        return self.policy(h), self.value(h.detach())


class Residual(nn.Module):
    """Adds its input, which has no graph, to the units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + F.relu(self.first(x)))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A narrow ResNet-18 for small images."""

    def __init__(self, width: int = 4, blocks: tuple[int, ...] = (2, 2, 2, 2), classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for block in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed((x.abs() * 5).long() % 11)).mean(1))


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.gru = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True)
        self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.gru(F.relu(self.inputs(x)))[0][:, -1])))


class BothWays(nn.Module):
    """Starts with a bidirectional recurrent layer, which concatenates its directions itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(10, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.lstm(x)[0][:, -1])))


class SharedActivation(nn.Module):
    """Has one PReLU, with one slope, after layers of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.activation = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.second(self.activation(self.first(x)))))


class SharedNorm(nn.Module):
    """Has one norm after two layers."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.second(F.relu(self.norm(self.first(x)))))))


class NormOfWeights(nn.Module):
    """Returns a number that measures its input, in spite of its name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


class ScaledOutputs(nn.Module):
    """Multiplies its outputs by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.head = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(6, 3)
        self.size = NormOfWeights()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x))) * self.size(self.side(x))


class Experts(nn.Module):
    """Sends each sample to one of two layers, and only if a gate of that sample is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 6), nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        is_left = self.gate(x)[:, 0] > 0
        hidden = torch.zeros(len(x), 6).masked_scatter(is_left[:, None], self.left(x[is_left]))
        return self.head(F.relu(hidden.masked_scatter(~is_left[:, None], self.right(x[~is_left]))))


class Shared(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shared(F.relu(self.shared(F.relu(self.first(x)))))))


class Tied(nn.Module):
    """Uses one weight as embedding and for logits, without the call of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.mid = nn.Linear(4, 5, bias=False), nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mid(F.relu(self.hidden(self.embed(x))))) @ self.embed.weight


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedGated(nn.Module):
    """Computes gate and values in one layer, behind an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.RMSNorm(6)
        self.both, self.down, self.head = nn.Linear(6, 10), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        gate, up = self.both(self.norm(h)).chunk(2, -1)
        return self.head(h + self.down(F.silu(gate) * up))


class Conv1D(nn.Module):
    """A linear layer with a weight of shape ``(in, out)``, as in GPT-2 of transformers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.3)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class FusedAttention(nn.Module):
    """A block with queries, keys and values from one ``Conv1D``, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.qkv, self.out = nn.Linear(4, 6), nn.LayerNorm(6), Conv1D(18, 6), Conv1D(6, 6)
        self.norm2, self.up, self.down, self.head = nn.LayerNorm(6), Conv1D(7, 6), Conv1D(6, 7), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        heads = self.qkv(self.norm(h)).unflatten(-1, (3, 3, 2)).movedim(-3, 0).transpose(-2, -3)
        h = h + self.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(-2, -3).flatten(-2))
        return self.head(h + self.down(F.gelu(self.up(self.norm2(h)))))


class RotaryAttention(nn.Module):
    """Rotates queries and keys, and shares each head of keys and values between two heads of queries, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 8), nn.RMSNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.head = nn.Linear(16, 8), nn.Linear(8, 2)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / torch.tensor([1.0, 100.0])
        left, right = x.chunk(2, -1)
        return x * angles.cos().repeat(1, 2) + torch.cat([-right, left], -1) * angles.sin().repeat(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (part(self.norm(h)).unflatten(-1, (-1, 4)).transpose(-2, -3) for part in (self.q, self.k, self.v))
        k, v = self.rotate(k).repeat_interleave(2, -3), v.repeat_interleave(2, -3)
        scores = (self.rotate(q) @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.head(h + self.out((scores @ v).transpose(-2, -3).flatten(-2)))


class SqueezeExcite(nn.Module):
    """Scales channels by a gate that is computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.squeeze, self.excite, self.project = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        gate = self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
        return self.project(h * gate)


class UNet(nn.Module):
    """Concatenates what it computes at full resolution with what it computes at half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm, self.middle = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 3, padding=1),
        )
        self.up, self.merge, self.head = (
            nn.ConvTranspose2d(6, 4, 2, 2),
            nn.Conv2d(8, 5, 3, padding=1),
            nn.Conv2d(5, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        full = F.relu(self.norm(self.down(x)))
        half = F.relu(self.middle(F.max_pool2d(full, 2)))
        return self.head(F.relu(self.merge(torch.cat([full, F.relu(self.up(half))], 1))))


class MessagePassing(nn.Module):
    """Sends messages around a ring, by a matrix computed from each edge (Gilmer et al. 2017, arXiv 1704.01212)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.edge = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 9))
        self.updates = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.readout = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.arange(len(x))
        source, target = torch.cat([nodes, nodes]), torch.cat([nodes.roll(1), nodes.roll(-1)])
        matrices = self.edge(x[source] - x[target]).unflatten(-1, (3, 3))
        h = self.embed(x)
        for update in self.updates:
            messages = (matrices @ h[source][..., None]).squeeze(-1)
            h = h + F.relu(update(torch.zeros_like(h).index_add(0, target, messages)))
        return self.readout(h)


class CalledTwice(nn.Module):
    """Calls the same network on two views, as contrastive methods do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x.flip(0) * 2)


class Concatenated(nn.Module):
    """Concatenates two layers for a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1))


class ChannelsLast(nn.Module):
    """Flattens with channels varying fastest, as Flax does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


class Softmaxed(nn.Module):
    """Couples its units by a functional softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).softmax(-1))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return model


RESNET_GROUPS = {f"layers.{i}.conv1": (4 * 2 ** (i // 2), (f"layers.{i}.conv2",)) for i in range(8)}

MODELS = [
    Model(
        "mlp",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        (8, 4),
        {"0": (6, ("2",)), "2": (5, ("4",))},
        {"4": "logits"},
    ),
    Model("functional", Functional, (8, 4), {"first": (5, ("second",)), "second": (6, ("head",))}, {"head": "logits"}),
    Model(
        "batch norm",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.PReLU(6), nn.Dropout(0.3), nn.Linear(6, 3)),
        (8, 4),
        {"0": (6, ("4",))},
        {"4": "logits"},
    ),
    Model(
        "layer norm",
        lambda: nn.Sequential(
            *(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU()),
            *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6), nn.RMSNorm(6), nn.ReLU(), nn.Linear(6, 3)),
        ),
        (8, 4),
        {"3": (5, ("5",))},
        {"0": "LayerNorm '1' mixes", "5": "RMSNorm '6' mixes", "8": "logits"},
    ),
    Model(
        "conv, flatten",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3)),
        ),
        (4, 1, 10, 10),
        {"0": (6, ("4",)), "4": (4, ("7",)), "7": (5, ("9",))},
        {"9": "logits"},
    ),
    Model(
        "depthwise",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU()),
            *(nn.Conv2d(4, 3, 1), nn.GroupNorm(1, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU()),
            *(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        ),
        (3, 1, 6, 6),
        {"0": (4, ("5",)), "8": (2, ("10",)), "10": (3, ("12",))},
        {"3": "depthwise", "5": "GroupNorm '6' mixes", "12": "logits"},
    ),
    Model("two heads", TwoHeads, (8, 4), {"trunk": (6, ("policy", "value"))}, {"policy": "logits", "value": "logits"}),
    Model("detached head", DetachedHead, (8, 4), {}, {"trunk": "by other ways than 'policy'", "policy": "logits"}),
    Model("residual", Residual, (8, 4), {}, {"first": "more than its units", "second": "logits"}),
    Model(
        "resnet",
        ResNet,
        (2, 3, 8, 8),
        RESNET_GROUPS,
        {"conv1": "residual stream", "layers.0.conv2": "residual stream", "layers.2.downsample.0": "residual stream"},
    ),
    Model(
        "transformer",
        Encoder,
        (3, 5),
        {f"encoder.layers.{i}.linear1": (12, (f"encoder.layers.{i}.linear2",)) for i in (0, 1)},
        {
            "embed": "embedding",
            "encoder.layers.0.self_attn": "attention",
            "encoder.layers.0.linear2": "residual stream",
            "head": "logits",
        },
    ),
    Model(
        "gru",
        Gru,
        (3, 5, 4),
        {"hidden": (7, ("head",))},
        {"inputs": "recurrent layer 'gru' reads it", "gru": "recurrent", "head": "logits"},
    ),
    Model("lstm", BothWays, (3, 5, 4), {"hidden": (7, ("head",))}, {"lstm": "recurrent", "head": "logits"}),
    Model(
        "shared",
        Shared,
        (8, 4),
        {},
        {"first": "joined with the units of 'shared'", "shared": "joined with the units of 'first'"},
    ),
    Model(
        "tied", Tied, (8, 4), {"hidden": (6, ("mid",))}, {"embed": "'embed.weight' is used 2 times", "mid": "logits"}
    ),
    Model("gated", Gated, (8, 4), {"gate": (6, ("down",))}, {"up": "part of the units of 'gate'", "down": "logits"}),
    Model(
        "fused gate",
        FusedGated,
        (8, 4),
        {"both": (5, ("down",))},
        {"embed": "joined with the units of 'down'", "down": "joined with the units of 'embed'"},
    ),
    Model(
        "attention, Conv1D",
        FusedAttention,
        (3, 5, 4),
        {"qkv": (3, ("out",)), "up": (7, ("down",))},
        {"embed": "residual stream", "out": "residual stream", "down": "residual stream"},
    ),
    Model(
        "rotary attention",
        RotaryAttention,
        (3, 5, 4),
        {"v": (2, ("out",))},
        {"q": "part of the units of 'v'", "k": "part of the units of 'v'", "embed": "residual stream"},
    ),
    Model(
        "squeeze-excite",
        SqueezeExcite,
        (3, 2, 5, 5),
        {"conv": (6, ("squeeze", "project")), "squeeze": (3, ("excite",))},
        {"excite": "part of the units of 'conv'", "project": "logits"},
    ),
    Model(
        "pixel shuffle",
        lambda: nn.Sequential(nn.Conv2d(2, 12, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1)),
        (3, 2, 5, 5),
        {"0": (3, ("3",))},
        {"3": "logits"},
    ),
    Model(
        "group norm",
        lambda: nn.Sequential(nn.Conv2d(2, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 2, 1)),
        (3, 2, 5, 5),
        {"0": (4, ("3",))},
        {"3": "logits"},
    ),
    Model(
        "norm at the end",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)),
        (8, 4),
        {"0": (6, ("2",))},
        {"2": "logits"},
    ),
    Model("norm alone", lambda: nn.Sequential(nn.BatchNorm1d(4)), (8, 4), {}, {}),
    Model(
        "shared activation",
        SharedActivation,
        (8, 4),
        {"first": (6, ("second",)), "second": (5, ("head",))},
        {"head": "logits"},
    ),
    Model(
        "shared norm",
        SharedNorm,
        (8, 4),
        {},
        {"first": "'norm' also follows 'second'", "second": "'norm' also follows 'first'", "head": "logits"},
    ),
    Model(
        "shared norm, not affine",
        lambda: SharedNorm(affine=False),
        (8, 4),
        {},
        {"first": "'norm' also follows 'second'", "second": "'norm' also follows 'first'", "head": "logits"},
    ),
    Model(
        "norm of no width",
        ScaledOutputs,
        (8, 4),
        {"first": (6, ("head",))},
        {"side": "no layer reads it", "head": "logits"},
    ),
    Model(
        "experts",
        Experts,
        (8, 4),
        {},
        {"gate": "has no gradient", "left": "depends on", "right": "depends on", "head": "logits"},
    ),
    Model(
        "u-net",
        UNet,
        (2, 2, 6, 6),
        {"down": (4, ("middle", "merge")), "middle": (6, ("up",)), "up": (4, ("merge",)), "merge": (5, ("head",))},
        {"head": "logits"},
    ),
    Model(
        "message passing",
        MessagePassing,
        (8, 4),
        {"edge.0": (7, ("edge.2",)), "readout.0": (6, ("readout.2",))},
        {
            **dict.fromkeys(("embed", "edge.2", "updates.0", "updates.1"), "residual stream"),
            "readout.2": "logits",
        },
    ),
    Model("called twice", CalledTwice, (8, 4), {"net.0": (6, ("net.2",))}, {"net.2": "logits"}),
    Model("concatenated", Concatenated, (8, 4), {"left": (3, ("head",)), "right": (5, ("head",))}, {"head": "logits"}),
    Model("channels last", ChannelsLast, (4, 1, 6, 6), {"conv": (4, ("head",))}, {"head": "logits"}),
    Model("softmax", Softmaxed, (8, 4), {}, {"first": "mixed", "second": "logits"}),
    Model("frozen", frozen, (8, 4), {"2": (5, ("4",))}, {"0": "'0.weight' is frozen", "4": "logits"}),
]
