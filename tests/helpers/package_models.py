"""Networks of transformers in small configurations, each with the units that it must have, for tests of repairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.units import Case, Network, language


@dataclass(frozen=True)
class PackageModel:
    """A small network of a package.

    Args:
        case: How to build it.
        units: How many layers have units to reset, by their number of units.
    """

    case: Case
    units: dict[int, int]


def require(case: Case) -> None:
    """Skip the test if the package of a case is not installed."""
    if case.package:
        pytest.importorskip(case.package, reason=f"{case.package} is not installed")


def _pictures(name: str, **sizes: Any) -> Callable[[], Network]:
    def build() -> Network:
        import transformers

        x = torch.randn(2, 3, 32, 32)
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}ForImageClassification")(config), lambda model: model(x).logits

    return build


def _model(name: str, build: Callable[[], Network], units: dict[int, int]) -> PackageModel:
    return PackageModel(Case(name, "transformers", build, ()), units)


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

# Attention has its heads as units, and an MLP its hidden units.
PACKAGE_MODELS = [
    _model(
        "ResNet",
        _pictures("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        {8: 1, 16: 1},
    ),
    _model("ConvNeXt", _pictures("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), {32: 1, 64: 1}),
    _model(
        "EfficientNet",
        _pictures(
            "EfficientNet",
            width_coefficient=0.25,
            depth_coefficient=1.0,
            kernel_sizes=[3, 5],
            in_channels=[32, 32],
            out_channels=[32, 64],
            strides=[2, 1],
            num_block_repeats=[1, 2],
            expand_ratios=[1, 4],
            hidden_dim=320,
        ),
        # The stem and the first block's projection; the squeezes of the gates; the expansions; the last convolution.
        {8: 2, 2: 2, 4: 1, 32: 1, 64: 1, 320: 1},
    ),
    _model("ViT", _pictures("ViT", image_size=32, patch_size=8, **_SIZES), {4: 2, 48: 2}),
    _model(
        "Swin",
        _pictures("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4),
        {2: 2, 64: 2, 4: 1, 128: 1},
    ),
    _model("BERT", language("Bert", "BertModel", "last_hidden_state", **_SIZES), {4: 2, 48: 2}),
    _model("GPT-2", language("GPT2", "GPT2LMHeadModel", "logits", n_embd=32, n_layer=2, n_head=4), {4: 2, 128: 2}),
    # Two heads of queries share each of the two heads of keys and values.
    _model("Llama", language("Llama", "LlamaForCausalLM", "logits", num_key_value_heads=2, **_SIZES), {2: 2, 48: 2}),
    # Two layers of the encoder, and two of the decoder with two attentions each.
    _model(
        "T5",
        language("T5", "T5ForConditionalGeneration", "logits", d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4),
        {4: 6, 48: 4},
    ),
]
