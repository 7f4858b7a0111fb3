"""Test that batches which the training step changes in place are changed once, and not by the probe too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_plasticity import HessianProbe, SpectralCollapseCallback
from lightning_plasticity.interventions import DASH, ContinualBackprop, EffectiveRankRegularizer, ReDo, Reset
from tests.helpers.modules import NEVER
from tests.helpers.training_runs import NewTaskAtSecondBatch, check_identical, train
from tests.helpers.usages import StatefulClassifier, Usage, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*was measured on . samples")


class InPlaceTensor(StatefulClassifier):
    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch[0].mul_(0.5)
        return super().inputs_and_labels(batch)


class GraphBatch:
    """A batch that is an object, as those of PyTorch Geometric are."""

    def __init__(self, samples: list[Any]) -> None:
        self.tensors = dict(zip("xy", default_collate(samples), strict=True))

    def to(self, *_: Any, **__: Any) -> "GraphBatch":
        return self


class SlottedGraphBatch(GraphBatch):
    """The same with the tensors in a slot, outside ``__dict__``."""

    __slots__ = ("tensors",)


class GraphAssignment(StatefulClassifier):
    """Assigns a computed tensor, with its graph, to the batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.scale = nn.Parameter(torch.ones(()))

    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch.tensors["x"] = self.scale * batch.tensors["x"] * 0.5
        return batch.tensors["x"], batch.tensors["y"]


class InPlaceArray(StatefulClassifier):
    def inputs_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        batch[0][:] *= 0.5
        return torch.from_numpy(batch[0]), batch[1]


def loader_with(collate: Callable[[list[Any]], Any]) -> Callable[[TensorDataset], Any]:
    return lambda data: DataLoader(data, batch_size=8, shuffle=True, collate_fn=collate)


def numpy_collate(samples: list[Any]) -> tuple[Any, Tensor]:
    x, y = default_collate(samples)
    return x.numpy(), y


IN_PLACE_USAGES = (
    Usage("tensor", module=InPlaceTensor),
    Usage("object", module=GraphAssignment, loader=loader_with(GraphBatch)),
    Usage("object with slots", module=GraphAssignment, loader=loader_with(SlottedGraphBatch)),
    Usage("array", module=InPlaceArray, loader=loader_with(numpy_collate)),
)


# Second derivatives are checked in float64, to which tensors in objects and arrays are not converted.
@pytest.mark.filterwarnings("ignore:second derivatives could not be checked")
@pytest.mark.parametrize("usage", IN_PLACE_USAGES, ids=lambda usage: usage.name)
@pytest.mark.parametrize("probe", ["ggn", HessianProbe(num_probes=2, num_steps=3)], ids=["ggn", "hessian"])
def test_in_place_batch_changes_happen_once(probe: Any, usage: Usage) -> None:
    idle = [ReDo(), Reset(last=1), DASH(), ContinualBackprop(0.0), EffectiveRankRegularizer(0.0)]
    callback = SpectralCollapseCallback(probe, collapse=NEVER, interventions=idle)
    without = train(usage=usage, make_net=mlp)
    with_callback = train(callback, NewTaskAtSecondBatch(callback), usage=usage, make_net=mlp)
    assert all(report.errors == {} for report in callback.history)
    check_identical(with_callback, without, callback)
