"""Find the units of known networks, and reset dead ones: ``python -m benchmarks.units`` prints the table of the docs.

The networks are those of torchvision, transformers, timm, segmentation-models-pytorch and PyTorch Geometric, with
random weights; a package that is not installed is left out with a message.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_modules import declare_operators
from lightning_plasticity.interventions import ReDo, Units, describe_units
from lightning_plasticity.interventions.units.groups import unit_mask

Network = tuple[nn.Module, Callable[[nn.Module], Tensor]]
"""A network and its forward pass."""


@dataclass(frozen=True)
class Case:
    """A network to find units in.

    Args:
        name: Its name in the table.
        package: The package that it is of; empty for torch.
        build: Builds the network and its forward pass.
        finds: Parts of the names of layers, one for each kind of units that must be found.
    """

    name: str
    package: str
    build: Callable[[], Network]
    finds: tuple[str, ...]


def _vision(name: str, size: int, **options: int) -> Callable[[], Network]:
    def build() -> Network:
        import torchvision

        x = torch.randn(2, 3, size, size)
        return getattr(torchvision.models, name)(weights=None, **options), lambda model: model(x)

    return build


def _timm(name: str) -> Callable[[], Network]:
    def build() -> Network:
        import timm

        x = torch.randn(2, 3, 224, 224)
        return timm.create_model(name), lambda model: model(x)

    return build


def language(name: str, model: str, output: str, **sizes: int) -> Callable[[], Network]:
    """Return what builds a language model of transformers, which reads two sequences of 32 words.

    Args:
        name: The name of its configuration class, without ``Config``.
        model: The name of its class.
        output: The attribute of its result that is compared.
        sizes: Arguments of the configuration.
    """

    def build() -> Network:
        import transformers

        config = getattr(transformers, f"{name}Config")(vocab_size=1000, bos_token_id=0, eos_token_id=1, **sizes)
        words = torch.randint(1000, (2, 32))
        arguments = {"decoder_input_ids": words} if name == "T5" else {}
        return getattr(transformers, model)(config), lambda model: getattr(model(words, **arguments), output)

    return build


def _unet() -> Network:
    import segmentation_models_pytorch as smp

    x = torch.randn(2, 3, 64, 64)
    return smp.Unet("resnet18", encoder_weights=None, decoder_attention_type="scse"), lambda model: model(x)


def _lstm() -> Network:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Embedding(1000, 128), nn.LSTM(128, 256, 2, batch_first=True)
            self.hidden, self.head = nn.Linear(256, 256), nn.Linear(256, 50)

        def forward(self, words: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.hidden(self.lstm(self.embed(words))[0])))
            return logits

    words = torch.randint(1000, (4, 32))
    return Tagger(), lambda model: model(words)


def _message_passing() -> Network:
    from torch_geometric.nn import NNConv, global_add_pool

    class MPNN(nn.Module):
        """Messages by a network of the edge, three rounds, and a readout (Gilmer et al. 2017, arXiv 1704.01212)."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 32)
            self.convs = nn.ModuleList(
                NNConv(32, 32, nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 32 * 32))) for _ in range(3)
            )
            self.readout = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

        def forward(self, atoms: Tensor, bonds: Tensor, features: Tensor, molecules: Tensor) -> Tensor:
            h = torch.relu(self.embed(atoms))
            for conv in self.convs:
                h = h + torch.relu(conv(h, bonds, features))
            energy: Tensor = self.readout(global_add_pool(h, molecules))
            return energy

    atoms, bonds, features = torch.randn(40, 8), torch.randint(40, (2, 100)), torch.randn(100, 4)
    molecules = torch.arange(40) // 10
    return MPNN(), lambda model: model(atoms, bonds, features, molecules)


CASES = [
    Case("ResNet-18", "torchvision", _vision("resnet18", 224), ("conv1",)),
    Case("ConvNeXt-T", "torchvision", _vision("convnext_tiny", 64), ("block.3",)),
    Case("EfficientNet-B0", "torchvision", _vision("efficientnet_b0", 64), ("block.0.0", "fc1")),
    Case("ViT-B/16", "torchvision", _vision("vit_b_16", 112, image_size=112), ("mlp.0",)),
    Case("ViT-Ti/16", "timm", _timm("vit_tiny_patch16_224"), ("fc1", "qkv")),
    Case("Swin-T", "timm", _timm("swin_tiny_patch4_window7_224"), ("fc1", "qkv")),
    Case(
        "BERT",
        "transformers",
        language("Bert", "BertModel", "last_hidden_state", num_hidden_layers=4),
        ("intermediate.dense", "self.value"),
    ),
    Case("GPT-2", "transformers", language("GPT2", "GPT2LMHeadModel", "logits", n_layer=4), ("c_fc", "c_attn")),
    Case(
        "Llama",
        "transformers",
        language(
            *("Llama", "LlamaForCausalLM", "logits"),
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
        ),
        ("gate_proj", "v_proj"),
    ),
    Case(
        "T5",
        "transformers",
        language("T5", "T5ForConditionalGeneration", "logits", num_layers=4),
        ("wi", "SelfAttention.v", "EncDecAttention.v"),
    ),
    Case("U-Net, ResNet-18", "segmentation_models_pytorch", _unet, ("decoder", "cSE.1", "encoder")),
    Case("LSTM", "", _lstm, ("hidden",)),
    Case("MPNN", "torch_geometric", _message_passing, ("nn.0", "readout.0")),
]


@dataclass
class Row:
    """The result of one network."""

    case: Case
    parameters: int
    seconds: float
    units: Units
    unchanged: bool
    reset: int

    def __str__(self) -> str:
        """Return the row of the table."""
        sizes: dict[str, list[int]] = {}
        for layer, group in self.units.groups.items():
            sizes.setdefault(_kind(layer), []).append(group.num_units)
        layers = ", ".join(f"{len(of)} × `{kind}` ({_range(of)})" for kind, of in sizes.items())
        reasons = Counter(map(_kind_of_reason, self.units.excluded.values()))
        excluded = ", ".join(f"{count} × {reason}" for reason, count in reasons.items())
        name = f"{self.case.name}, {self.case.package}" if self.case.package else self.case.name
        kept = f"{self.reset} units reset, outputs bit-equal" if self.unchanged else "CHANGED"
        return f"| {name} | {self.parameters / 1e6:.1f} M | {self.seconds:.1f} | {layers} | {excluded} | {kept} |"


def _kind(layer: str) -> str:
    """Return the last part of the name of a layer, or the last two if it is a number."""
    parts = layer.split(".")
    return parts[-1] if not parts[-1].isdigit() else ".".join(parts[-2:])


def _range(sizes: list[int]) -> str:
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _kind_of_reason(reason: str) -> str:
    """Return a reason without the names of layers."""
    if "only linear and convolution" in reason:
        return "other module with weights"
    if reason.startswith("part of"):
        return "part of the units of another layer"
    return reason.split(":")[0].split("'")[0].strip()


def measure(case: Case) -> Row:
    """Find the units of a network, make a third of them dead, and reset those that are.

    Raises:
        ImportError: If its package is not installed.
    """
    torch.manual_seed(0)
    model, forward = case.build()
    model.eval()
    began = time.process_time()
    units = describe_units(model, forward)
    seconds = time.process_time() - began
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    silence(model, units)
    with torch.no_grad():
        before = forward(model)
    report = ReDo(threshold=0, initial=initial).repair(model, forward=forward)
    with torch.no_grad():
        unchanged = torch.equal(before, forward(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reset = sum(map(len, report.units.values()))
    return Row(case, parameters, seconds, units, unchanged, reset)


def silence(model: nn.Module, units: Units) -> None:
    """Make every third unit dead, whatever the activation function: set what computes it to zero."""
    state: dict[str, Any] = model.state_dict()
    for group in units.groups.values():
        for name, unit_index in group.incoming.items():
            mask = unit_mask(unit_index, torch.arange(0, group.num_units, 3), state[name].shape)
            state[name][mask] = 1.0 if name.endswith("running_var") else 0.0


def main(cases: Iterable[Case] = CASES) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    declare_operators()
    print("| network | parameters | seconds | layers with units (units of each) | left out | reset of dead units |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        try:
            print(measure(case), flush=True)
        except ImportError as error:
            print(f"{case.name} is left out: {error}")


if __name__ == "__main__":
    main()
