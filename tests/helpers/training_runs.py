"""Train with and without the callback, and compare the results."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_plasticity import PlasticityMonitor, SpectralCollapseCallback
from lightning_plasticity.interventions import Intervention, Repair
from tests.helpers.modules import NEVER
from tests.helpers.usages import PLAIN, Quartic, Usage, convolutional


class NewTaskAtSecondBatch(Callback):
    """Begins a task at the second batch of every epoch too, which is inside an accumulation window of two."""

    def __init__(self, callback: SpectralCollapseCallback) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.callback.new_task()


def train(
    *callbacks: Callback, usage: Usage = PLAIN, make_net: Callable[[], nn.Module] = convolutional, **options: Any
) -> dict[str, Any]:
    """Train from a fixed seed, and return all state that training leaves behind."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    module = usage.module(make_net())
    trainers, logger = usage.fit(module, *callbacks, **options)
    return {
        "weights and buffers": module.state_dict(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "optimizer": [optimizer.state_dict() for each in trainers for optimizer in each.optimizers],
        "losses": [loss.item() for loss in module.outputs],
        "steps": [(module.steps_seen, each.extra, each.global_step, each.current_epoch) for each in trainers],
        "noise": module.noise,
        "logged": [row for row in logger.rows if not any("plasticity" in key for key in row)],
        "metrics": [
            {name: value.item() for name, value in each.callback_metrics.items() if "plasticity" not in name}
            for each in trainers
        ],
        "metric state": {name: getattr(module.tally, name).clone() for name in module.tally._defaults},
        "random numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "modes": [submodule.training for submodule in module.modules()],
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
    """Assert that every probe succeeded and that two results of `train` are equal to the last bit."""
    assert all("learnable_fraction" in report.metrics for report in callback.history)
    assert without["logged"], "two empty lists would be equal"
    assert all(bool(state.any()) for state in without["metric state"].values()), "two reset metrics would be equal"
    for key, value in without.items():
        torch.testing.assert_close(with_callback[key], value, rtol=0, atol=0, msg=f"{key} differs", equal_nan=True)


def check_usage(usage: Usage, make_net: Callable[[], nn.Module]) -> None:
    """Assert that training is bit-identical when the callback probes every fit and monitors every step."""
    callback = SpectralCollapseCallback(
        collapse=NEVER, loss_fn=usage.loss_fn, monitor=PlasticityMonitor(compiled="eager"), monitor_every_n_steps=1
    )
    without = train(usage=usage, make_net=make_net)
    with_callback = train(callback, usage=usage, make_net=make_net)
    assert len(callback.history) == 2
    assert "dormant_fraction" in callback.history[0].metrics
    check_identical(with_callback, without, callback)


def trained_state(
    usage: Usage, make_net: Callable[[], nn.Module], *callbacks: Callback, term: Quartic | None = None
) -> Tensor:
    """Return weights and buffers after training, as one vector in double precision."""
    torch.manual_seed(0)
    module = usage.module(make_net())
    module.term = term
    # Adam divides by the gradient's magnitude, which amplifies rounding errors.
    module.make_optimizer = partial(torch.optim.SGD, momentum=0.9)
    usage.fit(module, *callbacks)
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


def callback_with(usage: Usage, *interventions: Intervention) -> SpectralCollapseCallback:
    return SpectralCollapseCallback(collapse=NEVER, interventions=interventions, loss_fn=usage.loss_fn)


class ManualRepair(Callback):
    """Calls a repair after every other optimizer step, counted over all fits."""

    def __init__(self, repair: Repair) -> None:
        self.repair, self.step, self.repairs = repair, 0, 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.steps_before_fit = self.step
        # The initial weights, which later starts keep.
        self.repair.start(module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        previous, self.step = self.step, self.steps_before_fit + trainer.global_step
        # The pass for BatchNorm after StochasticWeightAveraging does not train.
        if self.step // 2 == previous // 2 or trainer.fit_loop._skip_backward:
            return
        self.repairs += 1
        self.repair.repair(
            module,
            optimizers=trainer.optimizers,
            forward=lambda module: module.net(module.inputs_and_labels(batch)[0]),
            generator=torch.Generator().manual_seed(2**32 + 1000 * self.step),
        )
