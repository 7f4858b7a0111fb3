"""Check repairs on small networks, and on those of torchvision, timm, transformers and others where installed."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.units import CASES, Case
from lightning_plasticity.interventions import Reset, ShrinkPerturb
from lightning_plasticity.layers import norm_parameters
from tests.helpers import unit_models


def _vision(name: str) -> nn.Module:
    model: nn.Module = getattr(pytest.importorskip("torchvision").models, name)()
    return model


def _timm(name: str) -> nn.Module:
    model: nn.Module = pytest.importorskip("timm").create_model(name)
    return model


def _transformers(kind: str, **config: Any) -> nn.Module:
    pytest.importorskip("transformers")
    package = importlib.import_module("transformers")
    model: nn.Module = getattr(package, f"{kind}Model")(getattr(package, f"{kind}Config")(vocab_size=500, **config))
    return model


def _of_case(case: Case) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if case.package:
            pytest.importorskip(case.package, reason=f"{case.package} is not installed")
        return case.build()[0]

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: _vision("resnet18"),
    "ConvNeXt": lambda: _vision("convnext_tiny"),
    "EfficientNet": lambda: _vision("efficientnet_b0"),
    "Swin": lambda: _vision("swin_t"),
    "ViT": lambda: _timm("vit_tiny_patch16_224"),
    "BERT": lambda: _transformers("Bert", hidden_size=96, num_hidden_layers=2, num_attention_heads=4),
    "GPT-2": lambda: _transformers("GPT2", n_embd=96, n_layer=2, n_head=4),
    "Llama": lambda: _transformers("Llama", hidden_size=96, num_hidden_layers=2, num_attention_heads=4),
    "T5": lambda: _transformers("T5", d_model=96, d_kv=24, num_layers=2, num_heads=4),
    **{case.name: _of_case(case) for case in CASES if case.name in ("U-Net, ResNet-18", "LSTM", "MPNN")},
    **{case.name: case.build for case in unit_models.MODELS if case.name != "norm alone"},
}


def stds(model: nn.Module) -> dict[str, float]:
    return {name: p.detach().double().std(correction=0).item() for name, p in model.named_parameters() if p.numel()}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_perturbation_keeps_the_scale_of_every_tensor(make: Callable[[], nn.Module]) -> None:
    model = make()
    initial, at_start = copy.deepcopy(model.state_dict()), stds(model)
    with torch.no_grad():
        # Frozen ones stay as they are.
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.mul_(3).add_(torch.randn_like(parameter))
    before = stds(model)
    ShrinkPerturb(s=1e-9).repair(model, initial=initial)
    assert stds(model) == pytest.approx(before, rel=1e-6, abs=1e-12)
    norms = norm_parameters(model)
    drawn = {name for name, parameter in model.named_parameters() if parameter not in norms}
    ShrinkPerturb(s=1).repair(model, initial=initial)
    after = stds(model)
    assert {n: after[n] for n in drawn} == pytest.approx({n: at_start[n] for n in drawn}, rel=1e-6, abs=1e-9)
    Reset().repair(model, initial=initial)
    assert stds(model) == pytest.approx(at_start, rel=1e-6, abs=1e-9)
