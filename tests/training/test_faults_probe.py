"""Test that training goes on as without the callback when the probe fails, and that the report holds the error."""

import math
import resource
import warnings
from pathlib import Path

import pytest
import torch

from lightning_plasticity import GGNProbe, PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import ContinualBackprop, EffectiveRankRegularizer, ReDo, SpectralRegularizer
from lightning_plasticity.reports import TaskReport
from tests.helpers.faults import FailingLoss, NaNLossClassifier
from tests.helpers.modules import NEVER, Classifier, MemoryLogger, loader, trainer, weights
from tests.helpers.processes import in_another_process


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OutOfMemoryError: CUDA out of"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RuntimeError: DefaultCPUAllocator: can't"),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_oom_in_probe_leaves_training_unchanged(error: Exception, reason: str, tmp_path: Path) -> None:
    trained_weights = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module, loss_fn, logger = Classifier(), FailingLoss(error), MemoryLogger()
        callback = SpectralCollapseCallback(collapse=NEVER, loss_fn=loss_fn, log="all")
        for fit in range(3):
            loss_fn.fails = fit == 1
            pl_trainer = trainer(*[callback] * with_callback, logger=logger)
            if with_callback and fit == 1:
                with pytest.warns(PlasticityWarning, match=f"task 1: plasticity could not be measured.*{reason}"):
                    pl_trainer.fit(module, loader(seed=fit))
            else:
                pl_trainer.fit(module, loader(seed=fit))
        trained_weights.append(weights(module))
    assert torch.equal(*trained_weights)
    assert [report.spectrum is None for report in callback.history] == [False, True, False]
    assert [list(report.errors) for report in callback.history] == [[], ["probe"], []]
    assert callback.history[1].errors["probe"].startswith(reason)
    assert logger.values("plasticity_details/probe_failed") == {0: 0, 3: 1, 6: 0}
    pl_trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["SpectralCollapseCallback"]
    saved = [TaskReport.from_dict(report) for report in state["history"]]
    assert [report.errors for report in saved] == [report.errors for report in callback.history]


def train_short_of_memory() -> tuple[list[tuple[bool, dict[str, str]]], bool]:
    """Limit the memory of this process so that the probe of the second of three tasks exceeds it.

    Returns:
        For each task whether the probe failed, and its errors; and whether the second fit changed the weights.
    """
    warnings.simplefilter("ignore")
    # Within max_steps, the probe would take fewer samples.
    probe = GGNProbe(samples=2048, max_rows=2**14, max_steps=1e9)
    callback, module = SpectralCollapseCallback(probe, collapse=NEVER), Classifier()
    trainer(callback).fit(module, loader())
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # The limit leaves 100 MiB, and a Gram matrix of 6144 rows takes 300 MB.
    limit = pages * resource.getpagesize() + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = weights(module)
    trainer(callback).fit(module, loader(batches=3, size=2048))
    changed = not torch.equal(weights(module), before)
    trainer(callback).fit(module, loader())
    return [(report.spectrum is None, report.errors) for report in callback.history], changed


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_process_short_of_memory_keeps_training() -> None:
    history, changed = in_another_process(train_short_of_memory)
    assert [failed for failed, _ in history] == [False, True, False]
    assert "can't allocate memory" in history[1][1]["probe"]
    assert changed


@pytest.mark.filterwarnings("ignore:ContinualBackprop. '.*' is skipped, values are not finite:UserWarning")
def test_nan_loss_is_reported_and_training_goes_on() -> None:
    logger, module = MemoryLogger(), NaNLossClassifier()
    callback = SpectralCollapseCallback(
        collapse=NEVER,
        log="all",
        monitor_every_n_steps=1,
        interventions=[
            ReDo(when=4),
            ContinualBackprop(0.5, 0),
            SpectralRegularizer(),
            EffectiveRankRegularizer(0.1, 4),
        ],
    )
    trainers = [trainer(callback, logger=logger) for _ in range(2)]
    with pytest.warns(PlasticityWarning):
        trainers[0].fit(module, loader(batches=6))
    with pytest.warns(PlasticityWarning) as caught:
        trainers[1].fit(module, loader(batches=6))
    assert [pl_trainer.global_step for pl_trainer in trainers] == [6, 6]
    assert bool(weights(module).isnan().any()), "the NaN loss reached the weights"
    first, second = callback.history
    reasons = {
        "ReDo": "ValueError: ReDo: the units of 'net.0' give values that are not finite",
        "SpectralRegularizer": "ValueError: a gradient is not finite",
        "EffectiveRankRegularizer": "ValueError: the features of 'net.0' hold NaN or infinite numbers",
    }
    assert first.errors.keys() == reasons.keys()
    assert all(first.errors[name].startswith(reason) for name, reason in reasons.items())
    assert second.spectrum is None
    assert "the loss on the probe batch is nan" in second.errors["probe"]
    assert not second.collapsed
    assert logger.values("plasticity_details/probe_failed") == {0: 0, 6: 1}
    assert math.isnan(logger.values("plasticity_training/feature_norm")[5]), "NaN is logged, not averaged away"
    assert sum("task 1: plasticity could not be measured" in str(warning.message) for warning in caught) == 1
