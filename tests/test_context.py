"""The context of a model in training, without a Trainer."""

import torch
from torch import Tensor, nn

from lightning_plasticity.context import ProbeContext


class Counting(nn.Linear):
    """A layer that counts its calls in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.calls = 0
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.inputs.append(x)
        return super().forward(x) * len(self.inputs)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.mul_(2)).square().mean()


def test_loss_is_the_same_however_often_it_is_computed() -> None:
    context = ProbeContext(Counting(), torch.ones(4, 2), loss_fn)
    model = context.copy()
    assert torch.equal(context.loss(model), context.loss(model))
    assert torch.equal(context.batch, torch.ones(4, 2))
    assert model.calls == 0
    assert model.inputs == []


def test_samples_are_cut_out_once() -> None:
    context = ProbeContext(nn.Linear(2, 1), torch.arange(8.0).view(4, 2), loss_fn)
    assert context.samples(3) is context.samples(3)
    assert torch.equal(context.samples(3), context.batch[:3])
    assert context.batch_size == 4


def test_one_rank_gathers_nothing() -> None:
    context = ProbeContext(nn.Linear(2, 1), torch.ones(4, 2), loss_fn)
    assert context.gather(2) is context


def test_weights_to_measure_share_the_slices_and_the_copy() -> None:
    context = ProbeContext(nn.Linear(2, 1), torch.ones(4, 2), loss_fn)
    samples, copy = context.samples(3), context.copy_to_measure()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in context.model.state_dict().items()}
    other = context.with_weights(zeros)
    assert other.samples(3) is samples
    assert other.copy_to_measure() is copy
    assert not copy.weight.any()
    assert torch.equal(context.copy_to_measure().weight, context.model.weight)
