"""Attaching to a network and detaching: hooks, modes, copies, arguments and logging."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from lightning_plasticity import PlasticityMonitor
from lightning_plasticity.metrics import EffectiveRank
from tests.helpers.modules import loader, trainer
from tests.helpers.monitored import Block, X, chained, count_hooks, count_modes, measured_layers, mlp


class Logging(LightningModule):
    """Logs a monitor of itself, and one scalar metric, in the ordinary way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(8)
        self.monitor = PlasticityMonitor(self, prefix="plasticity/")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.monitor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log_dict(self.monitor.compute())
        self.monitor.reset()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("layers", [None, ["*"], ["0"]])
def test_detached_monitor_leaves_no_hook_and_no_mode(layers: list[str] | None) -> None:
    model = nn.Sequential(Block(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    before = count_hooks(model), count_modes(), {k: set(vars(m)) for k, m in model.named_modules()}
    monitor = PlasticityMonitor(model, layers)
    assert (count_hooks(model), count_modes()) == before[:2]
    with monitor:
        assert count_hooks(model) > before[0]
        model(X).sum().backward()
    assert (count_hooks(model), count_modes(), {k: set(vars(m)) for k, m in model.named_modules()}) == before


def test_monitor_is_detached_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("broken")

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Broken())
    monitor = PlasticityMonitor(model)
    with pytest.raises(ArithmeticError, match="broken"), monitor:
        model(X)
    assert count_hooks(model) == count_modes() == 0
    # A handled error does not shift the names.
    with monitor:
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                model(X)
        model[2] = nn.Linear(8, 2)
        model(X)
    assert list(monitor.layers) == ["0"]


def test_handled_error_does_not_shift_the_names() -> None:
    class Handling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.out = nn.ModuleDict({"inner": Block(4)}), nn.Linear(4, 2)

        def training_step(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                self.part["inner"](x[:, :3])
            return self.out(F.relu(x))

    model = Handling()
    monitor = PlasticityMonitor(model)
    with monitor:
        model.training_step(X)
    assert list(monitor.layers) == ["relu"]


def test_monitored_training_is_bit_identical() -> None:
    def train(monitored: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), Head())
        optimizer = torch.optim.Adam(model.parameters())
        monitor = PlasticityMonitor(model)
        for _ in range(5):
            if monitored:
                monitor.attach()
            optimizer.zero_grad()
            model(X[:, None]).square().mean().backward()
            optimizer.step()
            monitor.detach()
        assert list(monitor.layers) == (["0", "5.one"] if monitored else [])
        return [*(p.detach() for p in model.parameters()), *model.buffers(), torch.rand(3)]

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    assert all(torch.equal(with_it, without) for with_it, without in zip(train(True), train(False), strict=True))


def test_other_function_modes_and_hooks_still_work() -> None:
    calls: list[str] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model = mlp(8)
    model[1].register_forward_hook(lambda module, args, output: output * 0)
    monitor = PlasticityMonitor(model)
    with Log(), monitor:
        model(X)
    assert "relu" in calls
    with monitor, Log():
        model(X)
    assert monitor.layers["0"].samples == 2 * len(X)


def test_several_monitors_do_not_see_each_other() -> None:
    model = mlp(8, last=nn.Sigmoid())
    outer, inner = PlasticityMonitor(model), PlasticityMonitor(model)
    with outer, inner:
        model(X)
    assert list(outer.layers) == list(inner.layers) == ["0"]
    assert outer.compute() == inner.compute()


@pytest.mark.parametrize("compiled", ["raise", "eager"])
def test_monitors_may_be_detached_in_any_order(compiled: Any) -> None:
    model, stance = mlp(8), torch._dynamo.eval_frame._stance.stance
    first, second, third = (PlasticityMonitor(model, compiled=compiled) for _ in range(3))
    for monitor in (first, second, third):
        monitor.attach()
    model(X)
    first.detach()
    model(X)
    third.detach()
    model(X)
    # Another mode is on top of the monitor's.
    with torch.device("cpu"):
        second.detach()
        model(X)
        assert count_modes() == 1
    samples = [monitor.layers["0"].samples for monitor in (first, second, third)]
    assert samples == [len(X), 3 * len(X), 2 * len(X)]
    assert count_hooks(model) == count_modes() == 0
    assert torch._dynamo.eval_frame._stance.stance == stance == "default"


def test_copies_of_a_monitored_network_are_not_monitored() -> None:
    model = mlp(8)
    with PlasticityMonitor(model) as monitor:
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model(X)
    seen_so_far = monitor.compute()
    for other in copies:
        assert torch.equal(other(X), model(X))
        hooks_left = [*other[0]._forward_hooks.values(), *other[0]._forward_pre_hooks.values()]
        assert not any(vars(hook) for hook in hooks_left), "they know of no monitor"
        assert measured_layers(other, X) == ["0"]
    assert monitor.compute() == seen_so_far
    assert len(pickle.dumps(copies[0])) < 2 * len(pickle.dumps(model))


def test_network_is_no_part_of_the_metric() -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    assert list(monitor.modules()) == [monitor]
    assert monitor.state_dict() == {}
    with monitor:
        model(X)
        assert monitor.state_dict() == {}
        attached_copy = copy.deepcopy(monitor)
        again = pickle.loads(pickle.dumps(monitor))
    for other in (attached_copy, again):
        assert other.layers.keys() == monitor.layers.keys()
    assert len(pickle.dumps(PlasticityMonitor(mlp(1000)))) < 10_000
    with pytest.raises(RuntimeError, match=r"no network to measure: PlasticityMonitor\(module\), or attach\(module\)"):
        again.attach()
    # A clone measures the same network.
    with attached_copy:
        model(X)
    assert attached_copy.layers["0"].samples == 2 * len(X)
    assert count_hooks(model) == 0


def test_module_is_copied_with_its_own_monitor() -> None:
    model = mlp(8)
    model.monitor = PlasticityMonitor(model)
    keys = set(mlp(8).state_dict())
    assert set(model.state_dict()) == keys
    other = copy.deepcopy(model)
    assert other.monitor._network[0] is other
    other.monitor._network[0].__class__.forward = nn.Sequential.forward
    del other._modules["monitor"], model._modules["monitor"]


def test_networks_in_metrics_are_not_measured() -> None:
    class Inception(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(5)

        def update(self, x: Tensor) -> None:
            self.net(x)

        def compute(self) -> Tensor:
            return torch.zeros(())

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.metric = mlp(8), Inception()

        def forward(self, x: Tensor) -> Tensor:
            self.metric.update(x)
            return self.net(x)

    model = Model()
    assert measured_layers(model, X) == ["net.0"]
    # No warning about the layers of the metric.
    model.net = nn.Linear(4, 2)
    assert measured_layers(model, X) == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode: Callable[[], Any]) -> None:
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with mode(), monitor:
        model(X)
    with monitor:
        model(X)
    assert monitor.layers["0"].samples == 2 * len(X)
    assert monitor.clone().compute() == monitor.compute()


def test_functional_transforms_still_work() -> None:
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(4, 8)
    expected = torch.func.jacrev(net)(x[0]), torch.func.jvp(net, (x,), (x,))[1]
    with PlasticityMonitor(net) as monitor:
        assert torch.equal(torch.func.jacrev(net)(x[0]), expected[0])
        assert torch.equal(torch.func.jvp(net, (x,), (x,))[1], expected[1])
        net(x)
    assert monitor.layers["0"].samples == 4


def test_functional_transforms_and_checkpoints_keep_units() -> None:
    model = chained(nn.Linear(4, 6), lambda x: x.unflatten(-1, (2, 3)).mT.flatten(-2), nn.ReLU(), nn.Linear(6, 2))
    expected = torch.func.vmap(model)(X), torch.func.jacrev(model)(X[0])
    with PlasticityMonitor(model) as monitor:
        assert torch.equal(torch.func.vmap(model)(X), expected[0])
        assert torch.equal(torch.func.jacrev(model)(X[0]), expected[1])
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert (monitor.layers["0"].units, monitor.layers["0"].samples) == (6, len(X))


def test_nested_and_sparse_tensors_do_not_raise() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.two(torch.relu(adjacency).t() @ torch.tanh(self.one(x)))

    model = Graph()
    with PlasticityMonitor(model) as monitor:
        model(X, torch.eye(len(X)).to_sparse())
    assert {name: layer.units for name, layer in monitor.layers.items()} == {"one": 6}
    sequences = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    monitor = PlasticityMonitor(mlp(8)).attach()
    monitor._network[0](sequences)
    with pytest.warns(UserWarning, match="found no hidden layer"):
        monitor.detach()


def test_ddp_wrapper_is_unwrapped() -> None:
    model = mlp(8)
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    # Only the wrapper's structure matters here, so that no process group is needed.
    nn.Module.__init__(wrapper)
    wrapper.module = model
    monitor = PlasticityMonitor(wrapper)
    with monitor:
        model(X)
    assert list(monitor.layers) == ["0"]


def test_meta_device_is_refused() -> None:
    model = mlp(8).to("meta")
    with pytest.raises(RuntimeError, match="the network is on the meta device, where there are no numbers"):
        PlasticityMonitor(model).attach()
    with pytest.raises(ValueError, match=r"a tensor of shape \(32, 4\) on the meta device holds no numbers to measure"):
        PlasticityMonitor().update({"a": X.to("meta")})
    with pytest.raises(ValueError, match="on the meta device"):
        EffectiveRank().update(X.to("meta"))


def test_wrong_arguments_and_misuse_raise() -> None:
    with pytest.raises(TypeError, match=r"layers='encoder.\*' must be a list of names: \['encoder.\*'\]"):
        PlasticityMonitor(layers="encoder.*")
    for misused in (lambda: PlasticityMonitor("x"), lambda: PlasticityMonitor().attach("x")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"module=.x. must be a torch\.nn\.Module"):
            misused()
    with pytest.raises(TypeError, match="prefix=3 must be a string"):
        PlasticityMonitor(prefix=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measures=\['rank'\] must be some of \['dormant_fraction'"):
        PlasticityMonitor(measures=["rank"])
    with pytest.raises(ValueError, match="compiled='no' must be 'raise' or 'eager'"):
        PlasticityMonitor(compiled="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_samples=0 must be a whole number, at least 1"):
        PlasticityMonitor(max_samples=0)
    with pytest.raises(ValueError, match=r"threshold=-1 must be in \[0, 1\]"):
        PlasticityMonitor(dormant_threshold=-1)
    model = mlp(8)
    monitor = PlasticityMonitor(model)
    with monitor, pytest.raises(RuntimeError, match=r"attached already: detach\(\) it first"):
        monitor.attach()
    monitor.detach()


def test_tensorboard_shows_one_group(tmp_path: Path) -> None:
    model = Logging()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(logger=logger)
    run.fit(model, loader())
    assert count_hooks(model) == count_modes() == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in ("epoch", "hp_metric")]
    assert {tag.partition("/")[0] for tag in tags} == {"plasticity"}
    assert set(tags) == {f"plasticity/{m}{layer}" for m in model.monitor.measures for layer in ("", "/net.0")}
    assert len(events.Scalars("plasticity/dormant_fraction")) == 3
    assert "plasticity/effective_rank" in run.callback_metrics


def test_probes_of_a_watched_network_are_not_tracked() -> None:
    from lightning_plasticity.curvature import ggn_spectrum

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 4)

    def mse_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(x), torch.ones(len(x), 2))

    monitor = PlasticityMonitor(model)
    with monitor:
        ggn_spectrum(model, x[:5], mse_loss)
        model(x)
    assert monitor.layers["0"].samples == len(x)
