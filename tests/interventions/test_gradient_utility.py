"""Check the utility of gradient times activation of ReDo and ContinualBackprop against sums written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plasticity import SpectralCollapseCallback
from lightning_plasticity.interventions import ContinualBackprop, Intervention, ReDo
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.interventions.units.discovery import describe_units
from tests.helpers.interventions_in_training import NEVER, cross_entropy
from tests.helpers.modules import Classifier, loader, trainer
from tests.helpers.unit_models import TwoHeads
from tests.helpers.usages import half_precision


def convolutional() -> nn.Sequential:
    """Build a network with units behind a pooling, and others behind a flatten."""
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).double()


def images() -> Tensor:
    return torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def loss_of(output: Any) -> Tensor:
    outputs = output if isinstance(output, tuple) else (output,)
    return sum(((one - 1).square().mean() for one in outputs), torch.zeros(()).double())


def convolutional_costs(model: nn.Sequential, x: Tensor) -> dict[str, np.ndarray]:
    """Sum |gradient · activation| over samples, positions and columns, with gradients that are retained."""
    pooled = model[:3](x)
    pooled.retain_grad()
    rows = model[3:6](pooled)
    rows.retain_grad()
    loss_of(model[6](rows)).backward()
    by_position = (rows.grad * rows).abs().view(5, 4, 4)
    model.zero_grad()
    return {
        "0": (pooled.grad * pooled).abs().sum((0, 2, 3)).detach().numpy(),
        "3": by_position.sum((0, 2)).detach().numpy(),
    }


def head_costs(model: TwoHeads, x: Tensor) -> dict[str, np.ndarray]:
    """Sum |gradient · activation| over samples and both heads, with the gradients of the heads written out."""
    h = F.relu(model.trunk(x)).detach()
    total = torch.zeros(6).double()
    for head in (model.policy, model.value):
        output = head(h)
        gradient = 2 * (output - 1) / output.numel() @ head.weight
        total += (gradient * h).abs().sum(0).detach()
    return {"trunk": total.numpy()}


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], Callable[..., dict[str, np.ndarray]]]] = {
    "convolutions": (convolutional, images, convolutional_costs),
    "two heads": (lambda: TwoHeads().double(), lambda: images()[:, 0, 0, :4], head_costs),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@EACH
def test_redo_scores_sum_gradient_times_activation(case: Any) -> None:
    make, inputs, costs = case
    model, x = make(), inputs()
    expected = costs(model, x)
    context = InterventionContext(forward=lambda model: model(x), losses=[lambda model: loss_of(model(x))])
    scores = ReDo(utility="gradient").scores(model, describe_units(model, context.forward), context)
    assert scores.keys() == expected.keys()
    for layer, score in scores.items():
        np.testing.assert_allclose(score.numpy(), expected[layer], rtol=1e-11)
    assert all(parameter.grad is None for parameter in model.parameters())


@EACH
def test_continual_backprop_sums_gradient_times_activation(case: Any) -> None:
    make, inputs, costs = case
    model, x = make(), inputs()
    expected = costs(model, x)
    intervention = ContinualBackprop(decay=0, utility="gradient")
    intervention.start(model, forward=lambda model: model(x))
    loss_of(model(x)).backward()
    intervention.after_step(model)
    layers = intervention.state_dict()["layers"]
    assert layers.keys() == expected.keys()
    for layer, cost in expected.items():
        np.testing.assert_allclose(layers[layer]["utility"].numpy(), cost / cost.mean(), rtol=1e-11)


def test_redo_resets_units_whose_reset_costs_little() -> None:
    """The second unit is active, but hardly used; the third is used, but dead."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 9.0, -9.0, 9.0]))
        model[2].weight[:, 1] = 1e-4
    x = torch.rand(16, 4)
    options = {"forward": lambda model: model(x), "loss": lambda model: loss_of(model(x))}
    assert ReDo().repair(copy.deepcopy(model), **options).units["0"].tolist() == [2]
    assert ReDo(utility="gradient").repair(model, **options).units["0"].tolist() == [1, 2]


def utilities(backward: Callable[[nn.Module, Tensor], None], **options: Any) -> Tensor:
    """Return the utilities of a layer after steps whose backward passes are given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    intervention = ContinualBackprop(0, decay=0.5, utility="gradient", **options)
    intervention.start(model, forward=lambda model: model(torch.ones(2, 4).double()))
    for _ in range(3):
        backward(model, torch.randn(6, 4).double())
        intervention.after_step(model)
    intervention.stop()
    return intervention.state_dict()["layers"]["0"]["utility"]


def whole(model: nn.Module, x: Tensor) -> None:
    loss_of(model(x)).backward()


def scaled(model: nn.Module, x: Tensor) -> None:
    (1024 * loss_of(model(x))).backward()


def in_parts(model: nn.Module, x: Tensor) -> None:
    for part in x.split([1, 3, 2]):
        (loss_of(model(part)) * len(part) / len(x)).backward()


def with_overflow(model: nn.Module, x: Tensor) -> None:
    whole(model, x)
    (loss_of(model(torch.ones_like(x))) * torch.inf).backward()


def with_other_passes(model: nn.Module, x: Tensor) -> None:
    """Run the model for other purposes between the passes of training."""
    model(x)
    with torch.no_grad():
        model(x)
    whole(model.eval(), x)
    whole(model.train(), x)


@pytest.mark.parametrize("backward", [scaled, in_parts, with_overflow, with_other_passes])
@pytest.mark.parametrize("transfer_bias", [False, True])
def test_utility_is_that_of_one_whole_batch(backward: Callable[[nn.Module, Tensor], None], transfer_bias: bool) -> None:
    expected = utilities(whole)
    assert expected.unique().numel() == 6
    torch.testing.assert_close(utilities(backward, transfer_bias=transfer_bias), expected, rtol=1e-11, atol=0)


def test_layers_without_backward_pass_do_not_age() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    intervention = ContinualBackprop(0, utility="gradient")
    intervention.start(model, forward=lambda model: model(torch.ones(2, 4)))
    model(torch.ones(2, 4))
    intervention.after_step(model)
    assert not intervention.state_dict()["layers"]["0"]["age"].any()
    intervention.stop()


def test_gradients_of_training_are_unchanged() -> None:
    gradients = []
    for utility in (None, "contribution", "gradient"):
        model, x = convolutional(), images()
        if utility is not None:
            intervention = ContinualBackprop(0, utility=utility)
            intervention.start(model, forward=lambda model, x=x: model(x))
        whole(model, x)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("options", [{}, half_precision()], ids=["float32", "fp16 with a scaler"])
@pytest.mark.parametrize(
    "intervention",
    [
        ContinualBackprop(0.3, 1, utility="gradient"),
        ReDo(0.5, when=2, utility="gradient"),
    ],
    ids=["ContinualBackprop", "ReDo"],
)
def test_callback_runs_gradient_utilities(intervention: Intervention, options: dict[str, Any]) -> None:
    callback = SpectralCollapseCallback(collapse=NEVER, interventions=[intervention.duplicate()], loss_fn=cross_entropy)
    module = Classifier()
    trainer(callback, max_epochs=2, **options).fit(module, loader())
    assert not any(report.errors for report in callback.history)
    if isinstance(intervention, ReDo):
        assert callback.history[0].repairs
    else:
        assert callback.interventions[0].state_dict()["layers"]["net.0"]["age"].max() > 0


@pytest.mark.parametrize("kind", [ReDo, ContinualBackprop])
def test_unknown_utility_is_named(kind: Callable[..., Intervention]) -> None:
    with pytest.raises(ValueError, match=r"\(utility='weights'\) must be '(activation|contribution)' or 'gradient'"):
        kind(utility="weights")


def test_redo_by_gradient_needs_a_loss() -> None:
    with pytest.raises(ValueError, match="ReDo needs gradients: repair"):
        ReDo(utility="gradient").repair(convolutional(), forward=lambda model: model(images()))
