"""Test that training with the callback is bit-identical to training without it, in all ways to use Lightning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plasticity import HessianProbe, PyHessianProbe, SpectralCollapseCallback
from tests.helpers.modules import NEVER, Classifier, loader, trainer
from tests.helpers.training_runs import NewTaskAtSecondBatch, check_identical, check_usage, train
from tests.helpers.usages import NETS, USAGES, Usage, convolutional, gru, mlp, transformer

pytestmark = pytest.mark.filterwarnings("ignore:.*was measured on . samples")


@pytest.mark.filterwarnings("ignore:.*gradient_clip_val.*")
# torch.compile reads .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
@pytest.mark.parametrize("make_net", NETS)
def test_training_is_bit_identical_with_callback(usage: Usage, make_net: Callable[[], nn.Module]) -> None:
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
@pytest.mark.parametrize("probe_class", [HessianProbe, PyHessianProbe])
def test_training_is_bit_identical_with_hessian_probes(
    probe_class: type[HessianProbe], make_net: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    callback = SpectralCollapseCallback(probe_class(num_probes=2, num_steps=3), collapse=NEVER)
    without = train(make_net=make_net, fits=3, **options)
    with_callback = train(callback, NewTaskAtSecondBatch(callback), make_net=make_net, fits=3, **options)
    assert len(callback.history) == 9
    check_identical(with_callback, without, callback)


def test_comparison_detects_one_extra_random_number() -> None:
    class Disturbing(SpectralCollapseCallback):
        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            torch.rand(1)

    without, disturbed = train(), train(Disturbing(collapse=NEVER))
    assert without["losses"] != disturbed["losses"]


class HookLogging(Callback):
    """Logs from a forward hook on the network."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.logger = trainer.logger
        self.handle = module.net.register_forward_hook(self.log_mean)

    def log_mean(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logger.log_metrics({"mean": output.mean().item()}, step=0)

    def on_fit_end(self, *_: Any) -> None:
        self.handle.remove()


def test_copied_forward_hook_opens_no_second_event_file(tmp_path: Path) -> None:
    """A hook refers to its callback, and through it to the logger: the probe's copy of the module must not log."""
    options: dict[str, Any] = {"logger": TensorBoardLogger(tmp_path)}
    trainer(HookLogging(), SpectralCollapseCallback(), **options).fit(Classifier(), loader())
    assert len(list(tmp_path.rglob("events.out.*"))) == 1


def test_probe_passes_logger_paths_to_training_step(tmp_path: Path) -> None:
    """The silent loggers of the probe have the name, version and directories of the real ones."""

    class PathReading(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            paths.append([getattr(logger, name) for logger in (self.logger, self.loggers[1]) for name in names])
            return super().training_step(batch, batch_idx)

    names, paths = ("name", "version", "save_dir", "root_dir", "log_dir"), []
    loggers = [CSVLogger(tmp_path / "one", version=3), CSVLogger(tmp_path / "other", "twice")]
    expected = [getattr(logger, name) for logger in loggers for name in names]
    trainer(SpectralCollapseCallback(), logger=loggers).fit(PathReading(), loader(batches=1))
    assert len(paths) > 1
    assert all(path == expected for path in paths)


@pytest.mark.parametrize("usage", [usage for usage in USAGES if "compiled" in usage.name], ids=lambda usage: usage.name)
def test_monitoring_compiled_modules_needs_eager_option(usage: Usage) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"monitor_every_n_steps: .*PlasticityMonitor\(compiled='eager'\)"
    ):
        train(SpectralCollapseCallback(collapse=NEVER, monitor_every_n_steps=1), usage=usage, make_net=mlp)
