"""Test the numbers of parts of a network, and that parameters which no optimizer trains do not count."""

import copy
import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from lightning_plasticity import GGNProbe, HessianProbe, PyHessianProbe, SpectralCollapseCallback, TaskDetector
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.curvature.exact.gram import gram
from lightning_plasticity.distributed.sharded_weights import gather_full_parameters
from tests.helpers.modules import NEVER, Classifier, loader, trainer
from tests.helpers.processes import in_two_processes, skip_without_fsdp_on_the_cpu

PARTS: dict[str, Any] = {"actor": "actor.*", "critic": "critic.*"}


class ActorCritic(LightningModule):
    """An actor, a critic and a target critic, whose parameters require gradients and are in no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.target = copy.deepcopy(self.critic)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.actor(x), self.critic(x)], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        value = F.mse_loss(self.critic(x), 1 + 0.9 * self.target(x))
        return F.cross_entropy(self.actor(x), y) + value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([*self.actor.parameters(), *self.critic.parameters()], lr=0.05)


def loss_of_step(module: LightningModule, batch: Any) -> Tensor:
    return module.training_step(batch, 0)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3


def context(module: LightningModule, data: Any, loss: Any = loss_of_step) -> ProbeContext:
    return ProbeContext(module, data, loss, [module.configure_optimizers()])


class Dense:
    """The dense matrices of an :class:`ActorCritic` with respect to the parameters of one or both networks."""

    def __init__(self, module: ActorCritic, data: Any, *networks: str) -> None:
        x, y = data
        module = copy.deepcopy(module)
        parameters = {n: p.detach() for n, p in module.named_parameters() if n.split(".")[0] in networks}
        out = module(x).detach()
        goal = 1 + 0.9 * module.target(x).detach()

        def loss(flat: Tensor) -> Tensor:
            f = flat.reshape(out.shape)
            return F.cross_entropy(f[:, :3], y) + F.mse_loss(f[:, 3:], goal)

        jacobians = jacrev(lambda values: functional_call(module, values, (x,)))(parameters)
        jacobian = torch.cat([j.reshape(out.numel(), -1) for j in jacobians.values()], 1)
        self.num_parameters = jacobian.shape[1]
        self.ggn = torch.linalg.eigvalsh(jacobian.T @ hessian(loss)(out.flatten()) @ jacobian).flip(0)
        self.kernel = jacobian @ jacobian.T / len(x)
        self.residual = grad(loss)(out.flatten())

    @property
    def learnable_fraction(self) -> float:
        values, vectors = torch.linalg.eigh(self.kernel)
        shares = (vectors.T @ self.residual).square() / self.residual.square().sum()
        return (shares * (1 - torch.exp(-200 * values / values.max()))).sum().item()


@pytest.mark.parametrize("networks", [("actor",), ("critic",), ("actor", "critic")])
def test_part_equals_dense_block(networks: tuple[str, ...]) -> None:
    module, data = ActorCritic().double(), batch()
    probe = GGNProbe(parts={"part": [f"{name}.*" for name in networks]})
    part = probe.measure(context(module, data)).parts["part"]
    dense = Dense(module, data, *networks)
    assert part.spectra["ggn"].num_parameters == dense.num_parameters
    torch.testing.assert_close(part.kernel.eigenvalues, torch.linalg.eigvalsh(dense.kernel).flip(0), atol=1e-9, rtol=0)
    top = min(len(dense.ggn), 40)
    torch.testing.assert_close(part.spectra["ggn"].top(top), dense.ggn[:top], atol=1e-9, rtol=0)
    assert part.kernel.learnable_fraction() == pytest.approx(dense.learnable_fraction, abs=1e-8)


def test_whole_excludes_what_no_optimizer_trains() -> None:
    """The target network's outputs are no outputs either, although the loss has a graph through them."""
    module, data = ActorCritic().double(), batch()
    result = GGNProbe().measure(context(module, data))
    dense = Dense(module, data, "actor", "critic")
    assert result.outputs == 4
    assert result.spectra["ggn"].num_parameters == dense.num_parameters
    assert result.kernel is not None
    torch.testing.assert_close(
        result.kernel.eigenvalues, torch.linalg.eigvalsh(dense.kernel).flip(0), atol=1e-9, rtol=0
    )
    assert result.kernel.learnable_fraction() == pytest.approx(dense.learnable_fraction, abs=1e-8)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_brackets_of_parts_contain_dense_fractions() -> None:
    module, data = ActorCritic().double(), batch()
    result = GGNProbe(max_rows=1, parts=PARTS).measure(context(module, data))
    assert not result.spectra
    for name, part in result.parts.items():
        fraction = part.kernel.learnable_fraction()
        assert fraction.lo - 1e-9 <= Dense(module, data, name).learnable_fraction <= fraction.hi + 1e-9
        assert not part.spectra


def test_kernels_of_parts_sum_to_the_whole() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), batch()

    def kernel(parameters: Any) -> Tensor:
        matrix = gram(model, (x, y), lambda m, b: F.cross_entropy(m(b[0]), b[1]), parameters=parameters).tangent_kernel
        assert matrix is not None
        return matrix

    parts = kernel(["0.*", "2.bias"]) + kernel({"2.weight"})
    torch.testing.assert_close(parts, kernel(None), atol=1e-12, rtol=0)


@pytest.mark.parametrize("probe_class", [HessianProbe, PyHessianProbe])
def test_hessian_probe_leaves_out_target_and_passes_parts(probe_class: type[HessianProbe]) -> None:
    module, data = ActorCritic().double(), batch()
    probe = probe_class(num_probes=2, num_steps=4, ggn=GGNProbe(parts=PARTS))
    assert probe.check(context(module, data)) is None
    result = probe.measure(context(module, data))
    assert result.spectra["hessian"].num_parameters == Dense(module, data, "actor", "critic").num_parameters
    assert result.parts.keys() == PARTS.keys()


def test_parts_are_reported_and_logged(tmp_path: Path) -> None:
    callback, module = SpectralCollapseCallback(GGNProbe(parts=PARTS), collapse=NEVER, log="all"), ActorCritic()
    csv_logger, tensorboard = CSVLogger(tmp_path / "csv", version=0), TensorBoardLogger(tmp_path / "tb", version=0)
    for seed in range(2):
        trainer(callback, logger=[csv_logger, tensorboard]).fit(module, loader(seed=seed))
    first, second = (report.metrics for report in callback.history)
    names = [f"{name}/{part}" for name in ("learnable_fraction", "ggn_trace") for part in PARTS]
    ratios = [f"{name}_vs_initial/{part}" for name in ("learnable_fraction", "ggn_trace") for part in PARTS]
    assert {*names, *ratios} <= first.keys()
    assert all(first[name] == 1 for name in ratios)
    assert all(second[name] != 1 for name in ratios)
    with (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        columns = set(csv.DictReader(file).fieldnames or ())
    lead, details = names[: len(PARTS)], names[len(PARTS) :]
    assert {f"plasticity_parts/{name}" for name in lead} <= columns
    assert {f"plasticity_details/{name}" for name in [*details, *ratios[: len(PARTS)]]} <= columns
    events = EventAccumulator(str(tmp_path / "tb" / "lightning_logs" / "version_0")).Reload()
    for name in lead:
        shown = sorted(events.Scalars(f"plasticity_parts/{name}"), key=lambda event: event.step)
        assert [event.value for event in shown] == pytest.approx([first[name], second[name]], rel=1e-6)


def test_ratio_of_a_part_is_to_its_initial_weights() -> None:
    callback, module = SpectralCollapseCallback(GGNProbe(parts=PARTS), collapse=NEVER), ActorCritic().double()
    initial, data = copy.deepcopy(module), loader(batches=1)
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    states = []

    class Recorder(SpectralCollapseCallback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            states.append((copy.deepcopy(pl_module.state_dict()), batch))

    for _ in range(2):
        trainer(Recorder(name="recorder"), callback).fit(module, data)
    state, seen = states[1]
    now = ActorCritic().double()
    now.load_state_dict(state)
    metrics = callback.history[1].metrics
    for part in PARTS:
        fraction = Dense(now, seen, part).learnable_fraction
        assert metrics[f"learnable_fraction/{part}"] == pytest.approx(fraction, abs=1e-8)
        expected = fraction / Dense(initial, seen, part).learnable_fraction
        assert metrics[f"learnable_fraction_vs_initial/{part}"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_keeps_numbers_of_parts(tmp_path: Path) -> None:
    checkpointing = ModelCheckpoint(tmp_path)
    first, resumed = (SpectralCollapseCallback(GGNProbe(parts=PARTS), collapse=NEVER) for _ in range(2))
    trainer(first, checkpointing, enable_checkpointing=True).fit(ActorCritic(), loader())
    path = checkpointing.best_model_path
    trainer(resumed, checkpointing, max_epochs=2, enable_checkpointing=True).fit(
        ActorCritic(), loader(), ckpt_path=path
    )
    assert "learnable_fraction/actor" in first.history[0].metrics
    assert resumed.history[0].metrics == first.history[0].metrics
    assert resumed.history[0].trained_parameters == first.history[0].trained_parameters


def test_modules_are_the_first_ones_of_several() -> None:
    data = batch()
    assert list(GGNProbe(parts="modules").measure(context(ActorCritic().double(), data)).parts) == ["actor", "critic"]
    single, (x, y) = Classifier().double(), data
    parts = GGNProbe(parts="modules").measure(context(single, data)).parts
    assert list(parts) == ["net.0", "net.2"]
    for name, part in parts.items():
        expected = ggn_spectrum(single, (x, y), loss_of_step, parameters=f"{name}.*")
        assert part.spectra["ggn"].trace == pytest.approx(expected.trace)


def test_tied_parameter_is_part_of_both_modules() -> None:
    class Tied(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.net[2].weight = self.net[0].weight

    module = Tied().double()
    parts = GGNProbe(parts={"first": "net.0.*", "last": "net.2.*"}).measure(context(module, batch())).parts
    assert [part.spectra["ggn"].num_parameters for part in parts.values()] == [20, 20]


def test_all_count_without_an_optimizer_of_the_model() -> None:
    module, data = ActorCritic().double(), batch()
    foreign = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=1.0)
    for optimizers in ([], [foreign]):
        result = GGNProbe().measure(ProbeContext(module, data, loss_of_step, optimizers))
        assert result.spectra["ggn"].num_parameters == sum(p.numel() for p in module.parameters())


def trained_of_sharded(rank: int) -> list[list[str]]:
    """Return the names of the trained parameters of a sharded module, after a forward pass that left it gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module: Any = ActorCritic()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    known = context(module, torch.zeros(2, 4))
    with torch.no_grad():
        module(torch.zeros(2, 4))
    with gather_full_parameters(module) as full_parameters:
        gathered = known.with_full_parameters(full_parameters).with_batch(torch.zeros(4, 4))
        return [
            sorted(gathered.trained_parameters),
            [str(tuple(p.shape)) for p in gathered.trained_parameters.values()],
        ]


def test_optimizers_of_sharded_parameters_are_known() -> None:
    skip_without_fsdp_on_the_cpu()
    module = ActorCritic()
    expected = context(module, None).trained_parameters
    assert {name.split(".")[0] for name in expected} == {"actor", "critic"}
    shapes = [str(tuple(p.shape)) for p in expected.values()]
    assert in_two_processes(trained_of_sharded) == [[sorted(expected), shapes]] * 2


def test_frozen_part_is_measured_once_it_is_trained() -> None:
    class Finetuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(4, 8)
            self.head = nn.Linear(8, 3)
            self.net = nn.Sequential()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.backbone(batch[0]).tanh()), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    callback = SpectralCollapseCallback(
        GGNProbe(parts={"backbone": "backbone.*", "head": "head.*"}),
        task_detector=TaskDetector(every_n_epochs=1),
        collapse=NEVER,
    )
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer(callback, finetuning, max_epochs=2).fit(Finetuned(), loader())
    first, second = callback.history
    assert "learnable_fraction/head" in first.metrics
    assert "learnable_fraction/backbone" not in first.metrics
    assert "the numbers of the parameters of 'backbone' are left out: no optimizer trains them" in first.remarks
    assert {"learnable_fraction/backbone", "learnable_fraction/head"} <= second.metrics.keys()
    assert second.differences(first) == ["other parameters that are trained"]


def test_part_that_the_loss_does_not_depend_on_is_left_out() -> None:
    def actor_loss(module: ActorCritic, batch: Any) -> Tensor:
        return F.cross_entropy(module.actor(batch[0]), batch[1])

    result = GGNProbe(parts=PARTS).measure(context(ActorCritic().double(), batch(), actor_loss))
    assert list(result.parts) == ["actor"]
    assert result.remarks == (
        "the numbers of the parameters of 'critic' are left out: the loss does not depend on them",
    )


@pytest.mark.parametrize("parts", [{"actor": "actr.*"}, {"actor": "actor.*", "target": "target.*"}])
def test_pattern_of_nothing_trained_is_refused(parts: Any) -> None:
    callback, module = SpectralCollapseCallback(GGNProbe(parts=parts)), ActorCritic()
    before = copy.deepcopy(module.state_dict())
    message = r"matches no parameter that is trained: the modules with trained parameters are \['actor', 'critic'\]"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callback).fit(module, loader())
    torch.testing.assert_close(dict(module.state_dict()), dict(before), atol=0, rtol=0)


def test_loss_of_nothing_trained_is_refused() -> None:
    def target_loss(module: ActorCritic, batch: Any) -> Tensor:
        return module.target(batch[0]).square().mean()

    with pytest.raises(ValueError, match="computed by a network that no optimizer trains"):
        GGNProbe().measure(context(ActorCritic(), (torch.randn(12, 4),), target_loss))


@pytest.mark.parametrize("parts", ["actor.*", {}, {"actor": []}, {"actor": 3}, {3: "actor.*"}, ["actor.*"]])
def test_bad_parts_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match=r"GGNProbe\(parts=.*must be 'modules', None, or patterns"):
        GGNProbe(parts=parts)


def test_progress_covers_all_parts() -> None:
    for max_rows in (2048, 1):
        calls: list[tuple[int, int]] = []
        probe = GGNProbe(max_rows=max_rows, parts=PARTS)
        probe.measure(context(ActorCritic().double(), batch()), lambda *call, calls=calls: calls.append(call))
        done, totals = zip(*calls, strict=True)
        assert sorted(set(done)) == list(done)
        assert len(set(totals)) == 1
        assert done[-1] <= totals[0]
        assert len(calls) >= 2


def test_probes_with_parts_can_be_hashed_and_compared() -> None:
    assert len({GGNProbe(parts=PARTS), GGNProbe(parts=dict(PARTS)), GGNProbe()}) == 2


@pytest.mark.parametrize("parts", [{"actor": "net.0.*", "rest": ["net.2.weight", "net.2.bias"]}, "modules"])
def test_lightning_cli_builds_parts(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    probe = {"class_path": "lightning_plasticity.GGNProbe", "init_args": {"parts": parts}}
    config = {"class_path": "lightning_plasticity.SpectralCollapseCallback", "init_args": {"probe": probe}}

    def build(args: Any) -> Any:
        cli = LightningCLI(Classifier, args=args, run=False, save_config_callback=None, seed_everything_default=False)
        (tmp_path / "saved.yaml").write_text(cli.parser.dump(cli.config))
        return next(c.probe for c in cli.trainer.callbacks if isinstance(c, SpectralCollapseCallback))

    assert build({"trainer": {"callbacks": [config]}}) == GGNProbe(parts=parts)
    assert build(["--config", str(tmp_path / "saved.yaml")]) == GGNProbe(parts=parts)
