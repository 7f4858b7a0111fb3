"""Check repairs on small networks, and on those of transformers and other packages where installed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.units import CASES, Case
from lightning_plasticity.interventions import Reset, ShrinkPerturb
from lightning_plasticity.layers import norm_parameters
from tests.helpers import unit_models
from tests.helpers.package_models import PACKAGE_MODELS, require


def _of_case(case: Case) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        require(case)
        return case.build()[0]

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{model.case.name: _of_case(model.case) for model in PACKAGE_MODELS},
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
