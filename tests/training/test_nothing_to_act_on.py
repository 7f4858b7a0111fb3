"""Test every intervention on networks in which it finds little or nothing to act on: it says so once, and rests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import L2ER, Repair
from tests.helpers.interventions import INTERVENTIONS, Row, for_each
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, loader, trainer


class Tokens(nn.Module):
    """An embedding and a norm: no layer multiplies by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.embed((x.abs() * 2).long().clamp(max=5))).sum(1)
        return output


def hooked(hook: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Return a constructor of a network whose only layer has a weight that a hook computes."""

    def build() -> nn.Module:
        with warnings.catch_warnings():
            # torch advises parametrizations instead.
            warnings.simplefilter("ignore")
            return nn.Sequential(hook(nn.Linear(4, 3)))

    return build


def frozen_but_a_bias() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net.requires_grad_(False)
    net[0].bias.requires_grad_(True)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "embedding and norm": Tokens,
    "weight_norm": hooked(nn.utils.weight_norm),
    "spectral_norm": hooked(nn.utils.spectral_norm),
    "pruned": hooked(lambda layer: prune.random_unstructured(layer, "weight", amount=0.5)),
    "frozen but a bias": frozen_but_a_bias,
    "included is frozen": frozen_but_a_bias,
}
MATRICES = {"NormalizeAndProject", "WeightClipping", "FIRE", "DASH", "Parseval"}
UNITS = {"ReDo", "ReGraMa", "ContinualBackprop", "SelfNormalizedReset"}
FEATURES = {"EffectiveRankRegularizer", "L2ER"}
RESTS = {
    "embedding and norm": MATRICES | UNITS | FEATURES,
    "weight_norm": MATRICES | UNITS | FEATURES,
    "spectral_norm": MATRICES | UNITS | FEATURES,
    "pruned": MATRICES | UNITS | FEATURES,
    "frozen but a bias": MATRICES - {"WeightClipping", "DASH"} | UNITS | {"Reset"},
    "included is frozen": {row.name for row in INTERVENTIONS},
}
"""The interventions that have nothing to act on in a network."""


class Module(Classifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def train(make_net: Callable[[], nn.Module], *callbacks: Any) -> dict[str, Tensor]:
    """Train on two tasks."""
    torch.manual_seed(0)
    module = Module(make_net())
    for _ in range(2):
        trainer(*callbacks).fit(module, loader())
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(INTERVENTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_to_act_on_warns_and_rests(network: str, row: Row) -> None:
    """Training is bit-identical then, apart from the L2 penalty of L2ER; otherwise the intervention acts."""
    arguments: dict[str, Any] = {"include": ["net.0.weight", "net.2"]} if network == "included is frozen" else {}
    if issubclass(row.kind, Repair):
        arguments["when"] = "task"
    callback = SpectralCollapseCallback(interventions=[row.make(**arguments)], **WITHOUT_FIT_TEST)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = train(NETWORKS[network], callback)
    said = [str(warning.message) for warning in caught if row.name in str(warning.message)]
    rests = row.name in RESTS[network]
    assert len(said) == rests, said
    if rests and row.name not in FEATURES:
        assert "'net." in said[0].partition("acts on: ")[2], "a reason by layer"
        assert all(warning.category is PlasticityWarning for warning in caught if row.name in str(warning.message))
    for report in callback.history:
        assert report.errors == {}
        assert [remark for remark in report.remarks if row.name in remark] == said
    without = train(NETWORKS[network])
    still_penalizes = row.kind is L2ER and network in ("embedding and norm", "weight_norm", "spectral_norm", "pruned")
    same = all(torch.equal(value, without[name]) for name, value in state.items())
    assert same == (rests and not still_penalizes)
