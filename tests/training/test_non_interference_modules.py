"""Test that modules and batches which are hard to copy train as without the callback."""

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, default_collate

from lightning_plasticity import HessianProbe, SpectralCollapseCallback
from tests.helpers.modules import NEVER, Classifier, loader, trainer
from tests.helpers.training_runs import NewTaskAtSecondBatch, check_identical, train
from tests.helpers.usages import StatefulClassifier, Usage, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*was measured on . samples")


class SelfThroughTrainer(StatefulClassifier):
    """Changes its state through ``self.trainer`` instead of ``self``."""

    def record_step(self, *step: Tensor) -> None:
        super().record_step(*step)
        self.trainer.lightning_module.steps_seen += 1
        self.trainer.model.noise.append(0.0)


class Rehearsal(StatefulClassifier):
    """Draws rehearsal samples from its own loaders, which have their own generators."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        past = TensorDataset(torch.randn(9, 1, 6, 6), torch.randint(3, (9,)))
        generator = torch.Generator().manual_seed(7)
        self.memory = {"past": DataLoader(past, batch_size=4, shuffle=True, generator=generator)}
        sampler = RandomSampler(past, generator=torch.Generator().manual_seed(8))
        self.more = DataLoader(past, batch_sampler=BatchSampler(sampler, 4, drop_last=False))

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        loaders = (self.memory["past"], self.more)
        x, y = zip(batch, *(next(iter(each)) for each in loaders), strict=True)
        return torch.cat(x), torch.cat(y)


class SharedLinear(nn.Linear):
    """A layer that ``deepcopy`` returns unchanged."""

    def __deepcopy__(self, memo: Any) -> "SharedLinear":
        return self


class SharedTeacher(StatefulClassifier):
    """Has a teacher that is updated in training, and that all copies of the module share."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.teacher = SharedLinear(36, 3).requires_grad_(False)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + self.teacher(x.flatten(1))

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            self.teacher.weight += 0.1


class UnusualBuffers(StatefulClassifier):
    """Has an expanded, a sparse and an inference-mode buffer, which ordinary comparisons and writes reject."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("scale", torch.ones(1, 3).expand(8, 3), persistent=False)
        self.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=False)
        with torch.inference_mode():
            self.register_buffer("constant", torch.ones(6), persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x * self.constant)
        return torch.sparse.mm(self.adjacency, (logits * self.scale[: len(x)]).T).T


class MergedLowRank(nn.Module):
    """A frozen matrix plus a trained one of rank 1, merged in evaluation mode as loralib does."""

    merged = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 36) / 6, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(1, 36) / 6), nn.Parameter(torch.randn(3, 1))

    def train(self, mode: bool = True) -> "MergedLowRank":
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T if self.merged else x @ (self.weight + self.b @ self.a).T


class LowRankAdapter(StatefulClassifier):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), MergedLowRank()))


@pytest.mark.parametrize("probe", ["ggn", HessianProbe(num_probes=2, num_steps=3)], ids=["ggn", "hessian"])
@pytest.mark.parametrize("module", [SelfThroughTrainer, Rehearsal, SharedTeacher, UnusualBuffers, LowRankAdapter])
def test_special_modules_train_unchanged(module: type[StatefulClassifier], probe: Any) -> None:
    usage, callback = Usage("special", module=module), SpectralCollapseCallback(probe, collapse=NEVER)
    without = train(usage=usage, make_net=mlp)
    with_callback = train(callback, NewTaskAtSecondBatch(callback), usage=usage, make_net=mlp)
    check_identical(with_callback, without, callback)


class LossHistoryLR(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler whose state is a deque, and a list inside a dict."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.window: deque[float] = deque(maxlen=3)
        self.record: dict[str, list[float]] = {"losses": []}
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [0.1 / (1 + len(self.window) + 0.1 * len(self.record["losses"])) for _ in self.base_lrs]

    def append(self, loss: float) -> None:
        self.window.append(loss)
        self.record["losses"].append(loss)
        self.step()


class ScheduledByLosses(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().append(loss.item())  # type: ignore[union-attr]
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": LossHistoryLR(optimizer), "frequency": 1000}]


TASK = object()
HEADS = {TASK: 1.0}


def collate_with_task(samples: list[Any]) -> dict[str, Any]:
    x, y = default_collate(samples)
    return {"x": x, "y": y, "task": TASK}


def loader_with_task() -> DataLoader[Any]:
    return DataLoader(loader().dataset, batch_size=4, collate_fn=collate_with_task)


def function_loss(a: Tensor, b: Tensor, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return scale * nn.functional.cross_entropy(a, b).to(dtype)


def closure_loss(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: scale * nn.functional.cross_entropy(a, b)


class IdentityKeys(Classifier):
    """Looks up objects of the batch and of the module by identity, so that their copies are not found."""

    loss = staticmethod(closure_loss(2.0))

    def __init__(self) -> None:
        super().__init__()
        self.weights = {IdentityKeys.loss: 2.0, function_loss: 1.0}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch["x"])
        terms = [self.weights[loss] * loss(output, batch["y"]) for loss in (IdentityKeys.loss, function_loss)]
        return HEADS[batch["task"]] * sum(terms)


class Centering(nn.Module):
    """Subtracts a frozen mean in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).to(x.dtype) + torch.zeros(4)


class FrozenFloat64(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Centering(), self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.zeros(len(batch[0]), 4)
        return nn.functional.cross_entropy(self.net(batch[0] + noise), batch[1])


class BufferView(Classifier):
    """Reads a buffer through a view, and changes it in place after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))
        self.view = self.scale.view(1, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0] * self.view), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        self.scale.mul_(1.5)


# A scheduler stepped in training_step runs before the optimizer, with or without the callback.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("module_class", "make_loader"),
    [
        (ScheduledByLosses, loader),
        (IdentityKeys, loader_with_task),
        (FrozenFloat64, loader),
        (BufferView, loader),
    ],
)
def test_unusual_state_trains_unchanged_without_errors(
    module_class: type[Classifier], make_loader: Callable[[], DataLoader[Any]]
) -> None:
    states, callback = [], SpectralCollapseCallback(collapse=NEVER)
    for callbacks in ([], [callback]):
        torch.manual_seed(0)
        module = module_class()
        for _ in range(2):
            trainer(*callbacks, max_epochs=1).fit(module, make_loader())
        states.append(module.state_dict())
    for without, with_callback in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(without, with_callback)
    assert [report.errors for report in callback.history] == [{}, {}]


def test_initial_weights_reach_views_of_buffers() -> None:
    """The initial weights and buffers are probed on the second task, where a view must show the initial buffer."""
    callback = SpectralCollapseCallback(collapse=NEVER, monitor=False)
    torch.manual_seed(0)
    module, data = BufferView(), DataLoader(loader().dataset, batch_size=12)
    for _ in range(2):
        trainer(callback, max_epochs=2).fit(module, data)
    initial = [report.metrics["ggn_trace"] / report.metrics["ggn_trace_vs_initial"] for report in callback.history]
    assert initial[1] == pytest.approx(initial[0], rel=1e-5)
