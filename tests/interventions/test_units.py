"""Test that units are found on any architecture, and that a reset of dead units does not change the outputs."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_plasticity.interventions import ReDo, Units, describe_units
from lightning_plasticity.interventions.units import partition
from lightning_plasticity.interventions.units.cut_network import CutNetwork
from lightning_plasticity.interventions.units.groups import unit_indices, unit_mask
from lightning_plasticity.interventions.units.unit_reset import plan_reset
from lightning_plasticity.interventions.weights.updates import apply_update
from tests.helpers.unit_models import MODELS, Encoder, Model, ResNet

EVERY = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
WITH_GROUPS = pytest.mark.parametrize("case", [case for case in MODELS if case.groups], ids=lambda case: case.name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(case: Model, seed: int = 0) -> Tensor:
    return torch.randn(case.shape, generator=generator(seed))


def trained(case: Model) -> nn.Module:
    """Train a few steps, so that running statistics, biases and norms differ from those of a new network."""
    model = case.build()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    for seed in range(3):
        optimizer.zero_grad()
        sum(output.square().mean() for output in outputs(model, inputs(case, seed))).backward()  # type: ignore[union-attr]
        optimizer.step()
    optimizer.zero_grad()
    return model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    result = model(x)
    return list(result) if isinstance(result, tuple) else [result]


def eval_outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return outputs(model, x)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def silence(model: nn.Module, units: Units, chosen: dict[str, Tensor]) -> None:
    """Make units dead for any activation function: set all their incoming entries to zero."""
    state = model.state_dict()
    for layer, indices in chosen.items():
        for name, unit_index in units.groups[layer].incoming.items():
            value = 1.0 if name.endswith("running_var") else 0.0
            state[name][unit_mask(unit_index, indices, state[name].shape)] = value


def some_units(case: Model, seed: int = 0) -> dict[str, Tensor]:
    return {
        layer: torch.randperm(count, generator=generator(seed))[: max(1, count // 3)].sort().values
        for layer, (count, _) in case.groups.items()
    }


@EVERY
def test_describe_units_finds_groups_and_gives_reasons(case: Model) -> None:
    x = inputs(case)
    model = case.build()
    units = describe_units(model, lambda model: model(x))
    assert {name: (group.num_units, tuple(group.consumers)) for name, group in units.groups.items()} == case.groups
    for layer, reason in case.excluded.items():
        assert reason in units.excluded[layer]
    layers = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.modules.conv._ConvNd)}
    assert layers <= set(units.groups) | set(units.excluded), "every layer is listed"
    for layer in [*units.groups, *units.excluded]:
        assert any(line.startswith(f"{layer} ") for line in str(units).splitlines())


@EVERY
def test_describe_units_leaves_the_model_unchanged(case: Model) -> None:
    x = inputs(case)
    model = trained(case).train()
    next(part for part in model.modules() if not list(part.children())).eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    tensors = [*model.parameters(), *model.buffers()]

    def state() -> list[object]:
        return [
            *((id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in tensors),
            *(id(tensor) for tensor in [*model.parameters(), *model.buffers()]),
            *((p.grad is not None and p.grad.data_ptr(), p._version) for p in model.parameters()),
            *((part.training, len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()),
            *(sorted(part.__dict__) for part in model.modules()),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        ]

    before, weights = state(), values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        describe_units(model, lambda model: model(x))
    assert state() == before
    torch.testing.assert_close(values(model), weights, rtol=0, atol=0)
    assert all(bool((parameter.grad == 2).all()) for parameter in model.parameters() if parameter.grad is not None)


def test_describe_units_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    describe_units(Encoder(), lambda model: model(torch.randn(2, 5)))
    assert capfd.readouterr() == ("", "")


def test_model_is_restored_after_a_failing_forward() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = values(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        describe_units(model, lambda model: model(torch.ones(2, 5)))
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


@WITH_GROUPS
@pytest.mark.parametrize("seed", range(3))
def test_reset_of_dead_units_keeps_outputs_bit_equal(case: Model, seed: int) -> None:
    model, x = trained(case), inputs(case, seed)
    units = describe_units(model, lambda model: model(x))
    dead = some_units(case, seed)
    silence(model, units, dead)
    before = eval_outputs(model, x)
    report = ReDo(threshold=0).repair(model, forward=lambda model: model(x), generator=generator(seed))
    for layer, indices in dead.items():
        assert set(indices.tolist()) <= set(report.units[layer].tolist())
    for layer, group in units.groups.items():
        weight = model.get_parameter(f"{layer}.weight")
        for unit in dead[layer]:
            row = (group.incoming[f"{layer}.weight"] == unit).expand_as(weight)
            assert bool((weight[row] != 0).any()), "it has new incoming weights"
    assert all(map(torch.equal, before, eval_outputs(model, x)))


@WITH_GROUPS
def test_reset_changes_only_the_entries_of_its_units(case: Model) -> None:
    model, x = trained(case), inputs(case)
    units = describe_units(model, lambda model: model(x))
    for layer, indices in some_units(case).items():
        group, network = units.groups[layer], copy.deepcopy(model)
        old = values(network)
        report = apply_update("test", plan_reset(network, units, {layer: indices}, generator()), [])
        assert {name: chosen.tolist() for name, chosen in report.units.items()} == {layer: indices.tolist()}
        changed = 0
        for name, new in network.state_dict().items():
            unit_index = group.incoming.get(name, group.outgoing.get(name, torch.tensor(-1)))
            mask = unit_mask(unit_index, indices, new.shape)
            assert torch.equal(new[~mask], old[name][~mask]), name
            if name in group.outgoing:
                assert bool((new[mask] == 0).all())
            changed += int((new != old[name]).sum()) if name in dict(network.named_parameters()) else 0
        assert report.num_parameters_changed == changed > 0


@WITH_GROUPS
def test_reset_has_the_output_of_a_network_without_the_units(case: Model) -> None:
    model, x = trained(case), inputs(case)
    units = describe_units(model, lambda model: model(x))
    chosen = some_units(case)
    layer, indices = next(iter(chosen.items()))
    without = copy.deepcopy(model)
    for name, unit_index in units.groups[layer].outgoing.items():
        weight = without.state_dict()[name]
        weight[unit_mask(unit_index, indices, weight.shape)] = 0
    apply_update("test", plan_reset(model, units, {layer: indices}, generator()), [])
    assert all(map(torch.equal, eval_outputs(model, x), eval_outputs(without, x)))


def test_flattened_channel_is_a_block_of_columns() -> None:
    """The channel is the slowest index. Public code zeroes one column per channel, or the wrong columns."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    units = describe_units(model, lambda model: model(torch.randn(2, 1, 6, 6)))
    assert units.groups["0"].outgoing["3.weight"].tolist() == [[channel for channel in range(3) for _ in range(16)]]
    apply_update("test", plan_reset(model, units, {"0": torch.tensor([1])}, generator()), [])
    assert (model[3].weight == 0).all(dim=0).nonzero().flatten().tolist() == list(range(16, 32))


def test_grouped_convolution_loses_columns_of_one_group() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2))
    units = describe_units(model, lambda model: model(torch.randn(2, 1, 3, 3)))
    apply_update("test", plan_reset(model, units, {"0": torch.tensor([3])}, generator()), [])
    assert (model[2].weight == 0).nonzero()[:, :2].tolist() == [[3, 1], [4, 1], [5, 1]]


def test_reset_restores_batch_norm_entries() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor.fill_(5)
    model[1].num_batches_tracked.fill_(9)
    units = describe_units(model, lambda model: model(torch.randn(8, 4)))
    apply_update("test", plan_reset(model, units, {"0": torch.tensor([1])}, generator()), [])
    assert model[1].weight.tolist() == model[1].running_var.tolist() == [5, 1, 5]
    assert model[1].bias.tolist() == model[1].running_mean.tolist() == [5, 0, 5]
    assert model[1].num_batches_tracked == 9


def test_consumers_follow_the_data_not_the_registration_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.second, self.first = nn.Linear(3, 2), nn.Linear(5, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.first(x).relu()).relu())

    x = torch.randn(6, 4)
    units = describe_units(Backwards(), lambda model: model(x))
    assert {layer: list(group.consumers) for layer, group in units.groups.items()} == {
        "second": ["out"],
        "first": ["second"],
    }


def test_zeros_win_where_units_of_adjacent_layers_cross() -> None:
    """Public code resets layer by layer, and fresh rows overwrite the zero columns of the layer before."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    units = describe_units(model, lambda model: model(torch.randn(8, 4)))
    apply_update("test", plan_reset(model, units, {"0": torch.tensor([2]), "2": torch.tensor([1, 4])}, generator()), [])
    assert (model[2].weight[:, 2] == 0).all()
    assert (model[2].weight[[1, 4]] != 0).sum() == 2 * 4


def test_dependency_outside_the_graph_excludes_the_units() -> None:
    """Random weights show dependencies that a trained network hides: here by a closed gate and by dead units."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.gate = nn.Linear(4, 5), nn.Linear(5, 2), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.second(h) + self.gate * h.detach().sum(1, keepdim=True)

    model = Hidden()
    with torch.no_grad():
        model.first.bias.fill_(-100)
    assert "other ways" in describe_units(model, lambda model: model(torch.randn(8, 4))).excluded["first"]


def test_units_of_returned_features_are_excluded() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = torch.relu(self.first(x))
            return {"logits": self.second(features), "features": features}

    units = describe_units(Features(), lambda model: model(torch.randn(8, 4)))
    assert not units.groups
    assert set(units.excluded) == {"first", "second"}


def test_forward_may_return_nothing_or_a_loss() -> None:
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    def nothing(model: nn.Module) -> None:
        model(x)

    forwards: list[Callable[[nn.Module], object]] = [nothing, lambda model: model(x).square().mean()]
    for forward in forwards:
        assert list(describe_units(model, forward).groups) == ["0"]


def test_forward_without_a_graph_raises() -> None:
    with pytest.raises(ValueError, match=r"forward\(model\) must run the model with gradients, and return its outputs"):
        describe_units(nn.Linear(4, 2), lambda model: 3)


def test_forward_error_passes_through_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        describe_units(nn.Linear(4, 2), lambda model: model(torch.randn(2, 5)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_are_excluded(
    kind: type[nn.RNNBase], num_layers: int, bidirectional: bool, packed: bool
) -> None:
    recurrent = kind(4, 6, num_layers=num_layers, bidirectional=bidirectional, batch_first=True)
    model = nn.ModuleDict(
        {"before": nn.Linear(3, 4), "recurrent": recurrent, "hidden": nn.Linear(6, 5), "head": nn.Linear(5, 2)}
    )

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([7, 4]), batch_first=True)  # type: ignore[assignment]
        state = model["recurrent"](x)[1]  # type: ignore[index]
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return model["head"](model["hidden"](last).relu())  # type: ignore[index]

    x = torch.randn(2, 7, 3)
    for start in (lambda model: model["before"](x), lambda model: torch.randn(2, 7, 4)):
        units = describe_units(model, lambda model, start=start: forward(model, start(model)))  # type: ignore[misc]
        assert list(units.groups) == ["hidden"]
        assert units.excluded["recurrent"] == "recurrent: its units feed themselves"


def test_lazy_layers_raise() -> None:
    with pytest.raises(ValueError, match="lazy layers that were never called"):
        describe_units(nn.Sequential(nn.LazyLinear(2)), lambda model: model(torch.ones(1, 3)))


def test_meta_device_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.ReLU(), nn.Linear(4, 2, device="meta"))
    with pytest.raises(ValueError, match="Sequential is on the meta device, where weights have no values"):
        describe_units(model, lambda model: model(torch.ones(1, 3, device="meta")))


def test_computed_weights_are_excluded() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    units = describe_units(model, lambda model: model(torch.randn(8, 4)))
    assert list(units.groups) == ["2"]
    assert units.excluded["0"] == "its weight is computed from other parameters"


@pytest.mark.parametrize("computed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_units_read_by_computed_weights_are_excluded(computed: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), computed(nn.Linear(5, 2)))
    units = describe_units(model, lambda model: model(torch.randn(8, 4)))
    assert list(units.groups) == ["0"]
    assert units.excluded["2"] == "the weight of '4', which belongs to its units, is computed from other parameters"


def test_units_before_computed_depthwise_weights_are_excluded() -> None:
    depthwise = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, groups=4))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), depthwise, nn.ReLU(), nn.Conv2d(4, 2, 1))
    units = describe_units(model, lambda model: model(torch.randn(3, 2, 6, 6)))
    assert not units.groups
    assert units.excluded["0"] == "the weight of '1', which belongs to its units, is computed from other parameters"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"4": torch.tensor([0])}, "units of '4' cannot be reset: logits: no layer reads it"),
        ({"7": torch.tensor([0])}, "units of '7' cannot be reset: the model has no layer of this name with units"),
        ({"0": torch.tensor([6])}, r"units \[6\] of '0' must be in 0 ... 5"),
    ],
)
def test_plan_reset_refuses_unknown_units(chosen: dict[str, Tensor], message: str) -> None:
    model, x = MODELS[0].build(), inputs(MODELS[0])
    units = describe_units(model, lambda model: model(x))
    with pytest.raises(ValueError, match=message):
        plan_reset(model, units, chosen, generator())


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_full_width_resnet_has_eight_groups() -> None:
    model, x = ResNet(64, classes=10), torch.randn(2, 3, 16, 16)
    assert list(describe_units(model, lambda model: model(x)).groups) == [f"layers.{i}.conv1" for i in range(8)]


@EVERY
def test_unit_indices_match_unit_mask(case: Model) -> None:
    model = case.build()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in describe_units(model, lambda model: model(torch.rand(case.shape))).groups.values():
        for indices in (torch.tensor([0]), torch.arange(group.num_units), torch.tensor([], dtype=torch.long)):
            for name, unit_index in {**group.incoming, **group.outgoing}.items():
                shape = tensors[name].shape
                expected = unit_mask(unit_index, indices, shape).flatten().nonzero().flatten()
                assert torch.equal(unit_indices(unit_index, indices, shape).sort().values, expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_units_read_by_an_lstm_with_projections_are_excluded() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = nn.Linear(6, 8)
            self.rnn = nn.LSTM(8, 10, proj_size=5, batch_first=True)
            self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            _, (state, _) = self.rnn(torch.relu(self.inputs(x))[:, None].expand(-1, 4, -1))
            logits: Tensor = self.head(torch.relu(self.hidden(state[-1])))
            return logits

    model, x = Projected(), torch.randn(16, 6)
    assert list(describe_units(model, forward=lambda model: model(x)).groups) == ["hidden"]


def test_units_inside_an_activation_checkpoint_are_found() -> None:
    """A checkpoint calls its layers a second time, in the backward pass."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            logits: Tensor = self.head(h + checkpoint(self.block, h, use_reentrant=False))
            return logits

    x = torch.randn(8, 4)
    units = describe_units(Checkpointed(), lambda model: model(x))
    assert {layer: list(group.consumers) for layer, group in units.groups.items()} == {"block.1": ["block.3"]}


def test_number_of_passes_grows_with_the_logarithm_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    targets = CutNetwork.targets

    def counted(self: CutNetwork, channels: Tensor) -> Tensor:
        passes[-1] += 1
        return targets(self, channels)

    monkeypatch.setattr(CutNetwork, "targets", counted)
    for width in (16, 1024):
        passes.append(0)
        model, x = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)), torch.randn(4, 4)
        describe_units(model, lambda model, x=x: model(x))  # type: ignore[misc]
    assert passes[1] - passes[0] == 6


def test_layers_that_take_too_many_passes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "_ROUNDS", 0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    units = describe_units(model, lambda model: model(torch.randn(8, 4)))
    assert units.excluded["0"].startswith("too many units: they could not be told apart")


@pytest.mark.parametrize(
    "case",
    [case for case in MODELS if case.name in ("mlp", "functional", "gated", "tied", "called twice", "pixel shuffle")],
    ids=lambda case: case.name,
)
def test_unbatched_samples_show_the_same_units(case: Model) -> None:
    model, x = case.build(), inputs(case)
    batched = describe_units(model, lambda model: model(x))
    unbatched = describe_units(model, lambda model: model(x[0]))
    assert {name: group.num_units for name, group in batched.groups.items()} == {
        name: group.num_units for name, group in unbatched.groups.items()
    }
    assert unbatched.excluded == batched.excluded


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_entries_are_left_out_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 0), nn.ReLU(), nn.Linear(0, 6), nn.Linear(6, 3))
    units = describe_units(model, lambda model: model(torch.ones(2, 4)))
    assert {name: group.num_units for name, group in units.groups.items()} == {"0": 8}
    empty = "its weight has no entries"
    assert units.excluded == {"2": empty, "4": empty, "5": "logits: no layer reads it"}
    report = ReDo(threshold=0).repair(model, forward=lambda model: model(-torch.ones(2, 4)))
    assert report.skipped == units.excluded
