"""Training with the callback is bit-identical to training without it, in every way to use Lightning."""

import random
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, default_collate

from lightning_plasticity import Collapse, HessianProbe, PlasticityMonitor, PyHessianProbe, SpectralCollapseCallback
from lightning_plasticity.interventions import DASH, ContinualBackprop, EffectiveRankRegularizer, ReDo, Reset
from tests.helpers.modules import Classifier, loader, trainer
from tests.helpers.usages import NETS, PLAIN, USAGES, Busy, Usage, convolutional, gru, mlp, transformer

NEVER = Collapse(below=1e-9)


class InTheMiddle(Callback):
    """Has a task begin at the second batch of every epoch too: between the batches of one accumulated gradient."""

    def __init__(self, callback: SpectralCollapseCallback) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.callback.new_task()


def run(
    *callbacks: Callback, usage: Usage = PLAIN, make_net: Callable[[], nn.Module] = convolutional, **options: Any
) -> dict[str, Any]:
    """Everything that training leaves behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = usage.module(make_net())
    trainers, logger = usage.fit(module, *callbacks, **options)
    return {
        "weights and buffers": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizer": [optimizer.state_dict() for one in trainers for optimizer in one.optimizers],
        "losses": [loss.item() for loss in module.outputs],
        "steps": [(module.steps_seen, one.extra, one.global_step, one.current_epoch) for one in trainers],
        "noise": module.noise,
        "logged": [row for row in logger.rows if not any("plasticity" in key for key in row)],
        "metrics": [{name: value.item() for name, value in one.callback_metrics.items()} for one in trainers],
        "metric state": {name: getattr(module.tally, name).clone() for name in module.tally._defaults},
        "random numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "modes": [part.training for part in module.modules()],
        "flags": (
            torch.is_grad_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.mkldnn.enabled,
            torch.get_num_threads(),
            torch.get_default_dtype().itemsize,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()),
    }


def check_identical(with_callback: dict[str, Any], without: dict[str, Any], callback: SpectralCollapseCallback) -> None:
    assert all(report.spectrum is not None for report in callback.history)
    assert without["logged"], "an empty list is like any other"
    assert all(bool(state.any()) for state in without["metric state"].values()), "and so is a metric that was reset"
    for key, value in without.items():
        torch.testing.assert_close(with_callback[key], value, rtol=0, atol=0, msg=f"{key} differs", equal_nan=True)


def check_usage(usage: Usage, make_net: Callable[[], nn.Module]) -> None:
    """That nobody notices the callback, probing and monitoring at every step."""
    callback = SpectralCollapseCallback(
        collapse=NEVER, loss_fn=usage.loss_fn, monitor=PlasticityMonitor(compiled="eager"), monitor_every_n_steps=1
    )
    without = run(usage=usage, make_net=make_net)
    with_callback = run(callback, usage=usage, make_net=make_net)
    assert len(callback.history) == 2
    assert "dormant_fraction" in callback.history[0].metrics
    check_identical(with_callback, without, callback)


@pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by the compiler
@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
@pytest.mark.parametrize("make_net", NETS)
def test_training_is_bit_identical_with_and_without_the_callback(
    usage: Usage, make_net: Callable[[], nn.Module]
) -> None:
    check_usage(usage, make_net)


@pytest.mark.parametrize(
    ("make_net", "options"),
    [
        (mlp, {}),
        (convolutional, {}),
        (transformer, {}),
        (gru, {}),
        (convolutional, {"accumulate_grad_batches": 2}),
        (transformer, {"precision": "bf16-mixed"}),
    ],
    ids=["mlp", "conv", "transformer", "gru", "conv accumulated", "transformer bf16"],
)
@pytest.mark.parametrize("kind", [HessianProbe, PyHessianProbe])
def test_so_is_training_with_a_probe_of_the_hessian(
    kind: type[HessianProbe], make_net: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    callback = SpectralCollapseCallback(kind(num_probes=2, num_steps=3), collapse=NEVER)
    without = run(make_net=make_net, fits=3, **options)
    with_callback = run(callback, InTheMiddle(callback), make_net=make_net, fits=3, **options)
    assert len(callback.history) == 9
    check_identical(with_callback, without, callback)


def test_the_comparison_would_notice_a_disturbance() -> None:
    class Disturbing(SpectralCollapseCallback):
        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            torch.rand(1)

    disturbing = Disturbing(collapse=NEVER)
    without, disturbed = run(), run(disturbing)
    assert without["losses"] != disturbed["losses"]


class WarmUp(torch.optim.lr_scheduler.LRScheduler):
    """Hands over to another scheduler, which is in its state, and with that the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: torch.optim.lr_scheduler.LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        if self.last_epoch <= 2:
            return [rate * (self.last_epoch + 1) / 3 for rate in self.base_lrs]
        self.after.step()
        return [group["lr"] for group in self.optimizer.param_groups]


class WarmingUp(Busy):
    steps_itself = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.steps_itself:
            self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = WarmUp(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        return [optimizer], [{"scheduler": schedule, "interval": "epoch" if self.steps_itself else "step"}]


class WarmingUpItself(WarmingUp):
    steps_itself = True


class Halving:
    """A factor that is taken from the Trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __call__(self, step: int) -> float:
        return 0.5**self.trainer.current_epoch


class ByTheTrainer(Busy):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Halving(self.trainer))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ByLoss(torch.optim.lr_scheduler.LRScheduler):
    """Shares an object with the module, has a lock, and tells less of itself than it knows."""

    def __init__(self, optimizer: torch.optim.Optimizer, seen: SimpleNamespace) -> None:
        self.seen, self.phase, self.lock = seen, 1, threading.Lock()
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [rate * self.seen.loss / self.phase for rate in self.base_lrs]

    def step(self, *_: Any) -> None:
        super().step()
        self.phase = 1 + self.last_epoch // 2

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_epoch, self.phase = state["last_epoch"], 1


class FollowingLoss(Busy):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.seen = SimpleNamespace(loss=1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.seen.loss = output["loss"].item()
        return output

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": ByLoss(optimizer, self.seen), "interval": "step"}]


class DecayingTensorItself(WarmingUpItself):
    """Has a learning rate that is changed in place."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1))
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("module", [WarmingUp, WarmingUpItself, ByTheTrainer, FollowingLoss, DecayingTensorItself])
def test_a_schedule_goes_on_as_before(module: type[Busy]) -> None:
    usage, callback = Usage("scheduled", module=module), SpectralCollapseCallback(collapse=NEVER)
    rates = []

    class Listening(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    without = run(Listening(), usage=usage, make_net=mlp)
    with_callback = run(callback, InTheMiddle(callback), Listening(), usage=usage, make_net=mlp)
    check_identical(with_callback, without, callback)
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]
    assert len(set(rates)) > 1, "the schedule has its say"


class InPlace(Busy):
    """Changes the batch that it is given."""

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch[0].mul_(0.5)
        return super().inputs_and_labels(batch)


class Graph:
    """A batch that is an object, as those of PyTorch Geometric."""

    def __init__(self, samples: list[Any]) -> None:
        self.parts = dict(zip("xy", default_collate(samples), strict=True))

    def to(self, *_: Any, **__: Any) -> "Graph":
        return self


class Slotted(Graph):
    """The same without a dict of its own for the parts."""

    __slots__ = ("parts",)


class OfGraphs(Busy):
    """Puts what it computes into the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.scale = nn.Parameter(torch.ones(()))

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch.parts["x"] = self.scale * batch.parts["x"] * 0.5
        return batch.parts["x"], batch.parts["y"]


class OfArrays(Busy):
    """Changes a numpy array."""

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch[0][:] *= 0.5
        return torch.from_numpy(batch[0]), batch[1]


def collated_by(collate: Callable[[list[Any]], Any]) -> Callable[[TensorDataset], Any]:
    return lambda data: DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)


def arrays(samples: list[Any]) -> tuple[Any, Tensor]:
    x, y = default_collate(samples)
    return x.numpy(), y


CHANGED = (
    Usage("tensor", module=InPlace),
    Usage("object", module=OfGraphs, loader=collated_by(Graph)),
    Usage("object with slots", module=OfGraphs, loader=collated_by(Slotted)),
    Usage("array", module=OfArrays, loader=collated_by(arrays)),
)


# Tensors in objects and arrays are not taken to float64.
@pytest.mark.filterwarnings("ignore:second derivatives could not be checked")
@pytest.mark.parametrize("usage", CHANGED, ids=lambda usage: usage.name)
@pytest.mark.parametrize("probe", [None, HessianProbe(num_probes=2, num_steps=3)], ids=["ggn", "hessian"])
def test_a_batch_that_training_changes_in_place_is_changed_once(probe: HessianProbe | None, usage: Usage) -> None:
    waiting = [ReDo(), Reset(last=1), DASH(), ContinualBackprop(0.0), EffectiveRankRegularizer(0.0)]
    callback = SpectralCollapseCallback(probe, collapse=NEVER, interventions=waiting)
    without = run(usage=usage, make_net=mlp)
    with_callback = run(callback, InTheMiddle(callback), usage=usage, make_net=mlp)
    assert all(report.errors == {} for report in callback.history)
    check_identical(with_callback, without, callback)


class ThroughTheTrainer(Busy):
    """Knows itself by another way than ``self``."""

    def take_notes(self, *noted: Tensor) -> None:
        super().take_notes(*noted)
        self.trainer.lightning_module.steps_seen += 1
        self.trainer.model.noise.append(0.0)


class Rehearsing(Busy):
    """Draws samples to rehearse from loaders of its own, with random numbers of their own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        past = TensorDataset(torch.randn(9, 1, 6, 6), torch.randint(3, (9,)))
        own = torch.Generator().manual_seed(7)
        self.memory = {"past": DataLoader(past, batch_size=4, shuffle=True, generator=own)}
        sampler = RandomSampler(past, generator=torch.Generator().manual_seed(8))
        self.more = DataLoader(past, batch_sampler=BatchSampler(sampler, 4, drop_last=False))

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        loaders = (self.memory["past"], self.more)
        x, y = zip(batch, *(next(iter(one)) for one in loaders), strict=True)
        return torch.cat(x), torch.cat(y)


class Teacher(nn.Linear):
    """There is one of it."""

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self


class Taught(Busy):
    """Has a teacher that changes while it learns, and that its copies share."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.teacher = Teacher(36, 3).requires_grad_(False)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.teacher(x.flatten(1))

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight += 0.1


class Shaped(Busy):
    """Has buffers that are neither compared nor written to like others."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("scale", torch.ones(1, 3).expand(8, 3), persistent=False)
        self.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
        with torch.inference_mode():
            self.register_buffer("constant", torch.ones(6), persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x * self.constant)
        return torch.sparse.mm(self.adjacency, (logits * self.scale[: len(x)]).T).T


class LowRank(nn.Module):
    """A frozen matrix and a trained one of rank 1, which is merged into it in evaluation mode, as loralib does."""

    merged = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 36) / 6, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(1, 36) / 6), nn.Parameter(torch.randn(3, 1))

    def train(self, mode: bool = True) -> "LowRank":
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.merged else x @ (self.weight + self.b @ self.a).T


class Merging(Busy):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), LowRank()))


@pytest.mark.parametrize("probe", [None, HessianProbe(num_probes=2, num_steps=3)], ids=["ggn", "hessian"])
@pytest.mark.parametrize("module", [ThroughTheTrainer, Rehearsing, Taught, Shaped, Merging])
def test_modules_that_are_special_are_not_disturbed(module: type[Busy], probe: HessianProbe | None) -> None:
    usage, callback = Usage("special", module=module), SpectralCollapseCallback(probe, collapse=NEVER)
    without = run(usage=usage, make_net=mlp)
    with_callback = run(callback, InTheMiddle(callback), usage=usage, make_net=mlp)
    check_identical(with_callback, without, callback)


class Recording(Callback):
    """Logs by itself whenever a layer runs."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.logger = trainer.logger
        self.handle = module.net.register_forward_hook(self.record)

    def record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logger.log_metrics({"mean": output.mean().item()}, step=0)

    def on_fit_end(self, *_: Any) -> None:
        self.handle.remove()


def test_a_helper_with_a_hook_on_the_network_has_no_copy_that_logs(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logger": TensorBoardLogger(tmp_path)}
    trainer(Recording(), SpectralCollapseCallback(), **options).fit(Classifier(), loader())
    assert len(list(tmp_path.rglob("events.out.*"))) == 1


def test_a_training_step_learns_where_its_logger_writes(tmp_path: Path) -> None:
    class Drawing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            places.append([getattr(logger, name) for logger in (self.logger, self.loggers[1]) for name in names])
            return super().training_step(batch, batch_idx)

    names, places = ("name", "version", "save_dir", "root_dir", "log_dir"), []
    loggers = [CSVLogger(tmp_path / "one", version=3), CSVLogger(tmp_path / "other", "twice")]
    expected = [getattr(logger, name) for logger in loggers for name in names]
    trainer(SpectralCollapseCallback(), logger=loggers).fit(Drawing(), loader(batches=1))
    assert len(places) > 1
    assert all(place == expected for place in places)


@pytest.mark.parametrize("usage", [usage for usage in USAGES if "compiled" in usage.name], ids=lambda usage: usage.name)
def test_compiled_code_is_not_watched_in_flight_unless_it_was_asked_for(usage: Usage) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"monitor_every_n_steps: .*PlasticityMonitor\(compiled='eager'\)"
    ):
        run(SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1), usage=usage, make_net=mlp)


class Smoothing(torch.optim.lr_scheduler.LRScheduler):
    """Remembers in a deque and in a list within a dict."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.window: deque[float] = deque(maxlen=3)
        self.seen: dict[str, list[float]] = {"losses": []}
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [0.1 / (1 + len(self.window) + 0.1 * len(self.seen["losses"])) for _ in self.base_lrs]

    def remember(self, loss: float) -> None:
        self.window.append(loss)
        self.seen["losses"].append(loss)
        self.step()


class SmoothedByHand(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().remember(loss.item())  # type: ignore[union-attr]
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": Smoothing(optimizer), "frequency": 1000}]


def labelled(items: list[Any]) -> dict[str, Any]:
    x, y = default_collate(items)
    return {"x": x, "y": y, "task": TASK}


TASK = object()
HEADS = {TASK: 1.0}


def plainly(a: Tensor, b: Tensor, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return scale * nn.functional.cross_entropy(a, b).to(dtype)


def scaled(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: scale * nn.functional.cross_entropy(a, b)


class KnownByIdentity(Classifier):
    """What a batch or the module holds is looked up by what it is."""

    loss = staticmethod(scaled(2.0))

    def __init__(self) -> None:
        super().__init__()
        self.weights = {KnownByIdentity.loss: 2.0, plainly: 1.0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch["x"])
        terms = [self.weights[loss] * loss(output, batch["y"]) for loss in (KnownByIdentity.loss, plainly)]
        return HEADS[batch["task"]] * sum(terms)


class FrozenInFloat64(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Centred(), self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.zeros(len(batch[0]), 4)
        return nn.functional.cross_entropy(self.net(batch[0] + noise), batch[1])


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).to(x.dtype) + torch.zeros(4)


class ViewOfABuffer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.view = self.scale.view(1, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0] * self.view), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.scale.mul_(1.5)


def labelled_loader() -> DataLoader[Any]:
    return DataLoader(loader().dataset, batch_size=4, collate_fn=labelled)


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step"
)  # within training_step, without the callback too
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (SmoothedByHand, loader),
        (KnownByIdentity, labelled_loader),
        (FrozenInFloat64, loader),
        (ViewOfABuffer, loader),
    ],
)
def test_what_is_unusual_in_a_module_or_batch_trains_as_without_the_callback(
    kind: type[Classifier], data: Callable[[], DataLoader[Any]]
) -> None:
    ends = []
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9))
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = kind()
        for _ in range(2):
            trainer(*callbacks, max_epochs=1).fit(module, data())
        ends.append(module.state_dict())
    for one, other in zip(*(end.values() for end in ends), strict=True):
        assert torch.equal(one, other)
    assert [report.errors for report in callback.history] == [{}, {}]


def test_initial_weights_are_seen_through_views_of_buffers() -> None:
    callback = SpectralCollapseCallback(collapse=Collapse(below=1e-9), monitor=False)
    torch.manual_seed(0)
    module, data = ViewOfABuffer(), DataLoader(loader().dataset, batch_size=12)
    for _ in range(2):
        trainer(callback, max_epochs=2).fit(module, data)
    initial = [report.metrics["ggn_trace"] / report.metrics["ggn_trace_vs_initial"] for report in callback.history]
    assert initial[1] == pytest.approx(initial[0], rel=1e-5)
