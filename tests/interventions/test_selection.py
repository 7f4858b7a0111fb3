"""Check what interventions act on: names, trained parameters, target networks, weights computed from others."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import (
    DASH,
    FIRE,
    UPGD,
    ChurnRegularizer,
    ContinualBackprop,
    EffectiveRankRegularizer,
    HareTortoise,
    Intervention,
    L2Init,
    NormalizeAndProject,
    Parseval,
    ReDo,
    Regularizer,
    Repair,
    Reset,
    ShrinkPerturb,
    SpectralRegularizer,
    StepIntervention,
    WeightClipping,
)
from tests.helpers.interventions import INTERVENTIONS, Row, for_each, select
from tests.helpers.modules import WITHOUT_FIT_TEST, Classifier, MemoryLogger, loader, trainer

X = torch.ones(6, 4)


class Agent(nn.Module):
    """An online network, and a copy of it that no optimizer trains although it requires gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        self.target = copy.deepcopy(self.online)
        with torch.no_grad():
            # Dead units, large weights: all interventions have something to do.
            for part in (self.online, self.target):
                part[0].bias[0] = -100
                part[2].weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.online(x) + self.target(x).detach()
        return output


def forward(model: nn.Module) -> Tensor:
    output: Tensor = model(X)
    return output


def loss(model: nn.Module) -> Tensor:
    return forward(model).square().mean()


def run(intervention: Intervention, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> None:
    """Train for a few steps with an intervention."""
    intervention.start(model, forward=forward, optimizers=[optimizer])
    for _ in range(steps):
        optimizer.zero_grad()
        term = intervention.penalty(model) if isinstance(intervention, Regularizer) else 0
        (loss(model) + term).backward()
        optimizer.step()
        if isinstance(intervention, StepIntervention):
            intervention.after_step(model, [optimizer], forward=forward)
    if isinstance(intervention, Repair):
        intervention.repair(model, optimizers=[optimizer], forward=forward, loss=loss)
    intervention.stop()


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def without_last(row: Row) -> Any:
    """Build an intervention on the whole network, where ``last`` would count the layers of the target."""
    return Reset() if row.kind is Reset else row.make()


IDLE = (Reset, UPGD, NormalizeAndProject, HareTortoise, EffectiveRankRegularizer)
"""Interventions that have nothing to do where no weight moves, all samples are equal, or the last layer is excluded."""
ACTIVE = [row for row in INTERVENTIONS if not issubclass(row.kind, Regularizer)]


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant")
@for_each(ACTIVE)
def test_target_networks_stay_as_they_are(row: Row) -> None:
    model = Agent()
    before = copy.deepcopy(model.state_dict())
    # Without training, everything that changes is the intervention's work.
    run(without_last(row), model, torch.optim.SGD(model.online.parameters(), lr=1e-3))
    assert {name.partition(".")[0] for name in changed(model, before)} == {"online"}


@for_each(select(Regularizer))
def test_penalties_count_no_target_network(row: Row) -> None:
    model = Agent()
    for regularizer, one in ((row.make(), model), (row.make(), model.online)):
        regularizer.start(one, forward=forward, optimizers=[torch.optim.SGD(model.online.parameters())])
        with torch.no_grad():
            penalty = regularizer.penalty(one)
        if one is model:
            expected = penalty
    torch.testing.assert_close(penalty, expected)


@for_each(select(EffectiveRankRegularizer))
def test_ranks_of_target_networks_do_not_count(row: Row) -> None:
    torch.manual_seed(0)
    agent, x = Agent(), torch.randn(12, 4)
    alone = copy.deepcopy(agent.online)
    for model, online in ((agent, agent.online), (alone, alone)):
        intervention, optimizer = row.make(), torch.optim.SGD(online.parameters())
        intervention.start(model, forward=lambda model: model(x), optimizers=[optimizer])
        intervention.after_step(model, [optimizer], forward=lambda model: model(x))
    torch.testing.assert_close(agent.online.state_dict(), alone.state_dict())
    assert changed(alone, agent.target.state_dict())


@pytest.mark.filterwarnings("ignore:.* all units of .* are dormant", "ignore:Reset rests")
@for_each(ACTIVE)
def test_excluded_layers_stay_as_they_are(row: Row) -> None:
    model = Agent()
    intervention = row.make(exclude=["target", "online.[24]"])
    before = copy.deepcopy(model.state_dict())
    run(intervention, model, torch.optim.SGD(model.parameters(), lr=0.0))
    own = {"online.0.weight", "online.0.bias"}
    # The outgoing weights of a unit are part of its reset.
    allowed = own | {"online.2.weight"} if row.on_units else own
    if row.kind not in IDLE:
        assert changed(model, before) & own
    assert changed(model, before) <= allowed


@for_each(select(Regularizer))
def test_penalty_of_included_layers_alone(row: Row) -> None:
    model = Agent()
    regularizer = row.make(include=["online"], **({"exclude": ["online.4"]} if row.kind is Parseval else {}))
    regularizer.start(model, forward=forward)
    if isinstance(regularizer, ChurnRegularizer):
        for _ in range(2):
            regularizer.after_step(model, forward=forward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    regularizer.penalty(model).backward()
    with_gradient = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"online"}


@for_each(INTERVENTIONS)
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_without_match_is_an_error(row: Row, argument: str) -> None:
    model = Agent()
    intervention = row.make(**{argument: ["onlin.0"]})
    before = copy.deepcopy(model.state_dict())
    message = rf"{row.name}\({argument}=...\): 'onlin.0' matches no module or parameter of Agent; .*\['online.0'"
    with pytest.raises(ValueError, match=message):
        run(intervention, model, torch.optim.SGD(model.parameters(), lr=0.0), steps=3)
    assert not changed(model, before)


@for_each(INTERVENTIONS)
def test_patterns_are_lists(row: Row) -> None:
    with pytest.raises(ValueError, match=rf"{row.name}\(exclude='head'\) must be a list of names"):
        row.make(exclude="head")


def test_any_name_of_a_tied_tensor_counts() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    model["head"].weight = model["embedding"].weight
    before = copy.deepcopy(model.state_dict())
    reason = "ModuleDict has nothing that it acts on: 'embedding', 'head': left out by include= or exclude="
    with pytest.warns(PlasticityWarning, match=f"ShrinkPerturb rests, since {reason}"):
        ShrinkPerturb(exclude=["head"]).repair(model)
    assert not changed(model, before)
    ShrinkPerturb(include=["head.weight"]).repair(model)
    assert changed(model, before) == {"embedding.weight", "head.weight"}


def test_parameters_that_share_memory_get_the_same_values() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5))
    model[1].weight.data = model[0].weight.data
    initial = copy.deepcopy(model.state_dict())
    ShrinkPerturb(s=1).repair(model, initial=initial)
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()
    assert torch.equal(model[0].weight.flatten().sort().values, initial["0.weight"].flatten().sort().values)


def computed() -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    return nn.Sequential(
        old,
        parametrizations.orthogonal(nn.Linear(4, 4)),
        prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5),
        nn.Linear(4, 4),
    )


@pytest.mark.parametrize("intervention", [FIRE(), DASH(), WeightClipping(0.01), NormalizeAndProject()], ids=str)
def test_layers_with_computed_weights_are_left_out_by_name(intervention: Intervention) -> None:
    """A new value of such a weight would be lost, and only the biases would change."""
    model = computed()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match=rf"{intervention.name} leaves out \['0', '1', '2'\], whose") as record:
        run(intervention, model, optimizer)
    assert len(record) == 1
    assert {name[0] for name in changed(model, before)} <= {"3"}


@for_each(select(Repair))
def test_followers_are_copies_after_a_repair(row: Row) -> None:
    model = Agent()
    with torch.no_grad():
        model.target[0].weight.fill_(7)
    repair = Reset(also={"target": "online"}) if row.kind is Reset else row.make(also={"target": "online"})
    run(repair, model, torch.optim.SGD(model.online.parameters(), lr=1e-3))
    torch.testing.assert_close(model.target.state_dict(), model.online.state_dict(), rtol=0, atol=0)


def test_followers_stay_where_nothing_is_repaired() -> None:
    model = Agent()
    model.online[0].bias.data.fill_(5)
    before = copy.deepcopy(model.state_dict())
    repair = ReDo(threshold=0, include=["online.0"], also={"target": "online"})
    repair.repair(model, optimizers=[torch.optim.SGD(model.online.parameters())], forward=forward)
    assert not changed(model, before)


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({"targe": "online"}, r"ShrinkPerturb\(also=...\): 'targe' matches no module of Agent; .*'target'"),
        ({"target": "online.0"}, "a Sequential cannot follow a Linear"),
    ],
)
def test_followers_that_do_not_fit_are_refused(also: dict[str, str], message: str) -> None:
    model = Agent()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        ShrinkPerturb(also=also).repair(model)
    assert not changed(model, before)
    with pytest.raises(ValueError, match=r"ShrinkPerturb\(also=\['target'\]\) must be a dict"):
        ShrinkPerturb(also=["target"])  # type: ignore[arg-type]


def test_units_of_a_layer_that_is_excluded_are_listed() -> None:
    model = Agent().online
    with pytest.warns(PlasticityWarning, match="'0', '2': it is excluded, or no optimizer trains it"):
        ContinualBackprop(exclude=["*"]).start(model, forward=forward)


class WithTarget(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize("also", [None, {"target": "net"}], ids=["alone", "followed"])
def test_callback_draws_from_the_initial_weights(also: dict[str, str] | None) -> None:
    """The initialisation by hand keeps its scale, and the target network stays or follows."""
    torch.manual_seed(0)
    module = WithTarget()
    nn.init.normal_(module.net[0].weight, std=9)
    initial, target = copy.deepcopy(module.net.state_dict()), copy.deepcopy(module.target.state_dict())
    callback = SpectralCollapseCallback(interventions=[ShrinkPerturb(s=1, when=3, also=also)])
    trainer(callback, max_steps=3).fit(module, loader())
    assert callback.history[0].errors == {}
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value.flatten().sort().values, initial[name].flatten().sort().values, rtol=0, atol=0)
    torch.testing.assert_close(module.target.state_dict(), target if also is None else module.net.state_dict())


class Uncopied(Classifier):
    """A module of which deepcopy returns the module itself, in part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Itself(*self.net)


class Itself(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Itself:
        return self


@pytest.mark.parametrize(
    "arguments", [{}, {**WITHOUT_FIT_TEST, "interventions": [ShrinkPerturb()]}], ids=["fit test", "repair"]
)
def test_networks_that_copies_share_are_refused(arguments: dict[str, Any]) -> None:
    """The copy that is trained, or on which a repair is tried, would be the network itself."""
    module = Uncopied()
    before = copy.deepcopy({name: value.clone() for name, value in module.state_dict().items()})
    callback = SpectralCollapseCallback(**arguments)
    with pytest.raises(MisconfigurationException, match=r"shares the parameter 'net.0.weight' with the original"):
        trainer(callback, max_steps=3).fit(module, loader())
    assert not changed(module, before)


class Bootstrapped(WithTarget):
    """Runs its target network in each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            goal = self.target(batch[0])
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - goal).square().mean()


@pytest.mark.parametrize("trains_target", [False, True])
def test_target_networks_are_not_monitored(trains_target: bool) -> None:
    class Module(Bootstrapped):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters() if trains_target else self.net.parameters(), lr=0.1)

    callback, logger = SpectralCollapseCallback(monitor_every_n_steps=1), MemoryLogger()
    trainer(callback, max_steps=2, logger=logger).fit(Module(), loader())
    for names in (callback.history[0].metrics, {name for row in logger.rows for name in row}):
        monitored = {name.partition("/")[2] for name in names if "dormant_fraction/" in name}
        assert any("target.0" in name for name in monitored) == trains_target
        assert any("net.0" in name for name in monitored)


class WithoutTarget(Classifier):
    """Computes the outputs of the target network by NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.goal_weights = [parameter.detach().numpy().copy() for parameter in self.net.parameters()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        weight, bias, head_weight, head_bias = self.goal_weights
        goal = (batch[0].numpy() @ weight.T + bias).clip(min=0) @ head_weight.T + head_bias
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net(batch[0]) - torch.from_numpy(goal)).square().mean()


def test_target_networks_change_no_measured_number() -> None:
    """Ranks of the tangent kernel, spectra, fits, features and dormant units are those of the online network alone."""
    metrics = []
    for kind in (Bootstrapped, WithoutTarget):
        torch.manual_seed(0)
        module, callback = kind(), SpectralCollapseCallback(interventions=[SpectralRegularizer(), Parseval(), L2Init()])
        for _ in range(2):
            trainer(callback, max_steps=3).fit(module, loader())
        assert not callback.history[1].errors
        metrics += [[report.metrics for report in callback.history]]
    assert len(metrics[0]) == 2
    assert any("rank" in name for name in metrics[0][1])
    assert any("dormant" in name for name in metrics[0][1])
    torch.testing.assert_close(metrics[0], metrics[1], equal_nan=True)
