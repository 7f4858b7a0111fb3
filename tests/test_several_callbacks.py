"""Several callbacks in one Trainer, distinguished by their names."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_plasticity import PlasticityWarning, SpectralCollapseCallback
from lightning_plasticity.interventions import ReDo, SpectralRegularizer
from tests.helpers.modules import Classifier, MemoryLogger, loader, trainer, weights


class ActorCritic(Classifier):
    """An actor and a critic that share a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return actor_loss(self, batch) + critic_loss(self, batch)


def actor_loss(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def critic_loss(module: Any, batch: Any) -> Tensor:
    return F.mse_loss(module.critic(batch[0])[:, 0], batch[1].float())


def two_callbacks(**arguments: Any) -> tuple[SpectralCollapseCallback, SpectralCollapseCallback]:
    return (
        SpectralCollapseCallback(loss_fn=actor_loss, name="actor", **arguments),
        SpectralCollapseCallback(loss_fn=critic_loss, name="critic", **arguments),
    )


def fit(module: ActorCritic, *callbacks: SpectralCollapseCallback, **settings: Any) -> Trainer:
    one = trainer(*callbacks, **settings)
    one.fit(module, loader())
    return one


def fit_seeded(*callbacks: SpectralCollapseCallback, **settings: Any) -> ActorCritic:
    torch.manual_seed(1)
    module = ActorCritic()
    fit(module, *callbacks, **settings)
    return module


@pytest.mark.parametrize("every_n_steps", [None, 1])
def test_each_measures_what_it_measures_alone(every_n_steps: int | None) -> None:
    together, loggers = two_callbacks(monitor_every_n_steps=every_n_steps), [MemoryLogger(), MemoryLogger()]
    fit_seeded(*together, logger=loggers[0])
    for callback, loss_fn in zip(together, (actor_loss, critic_loss), strict=True):
        alone = SpectralCollapseCallback(loss_fn=loss_fn, name=callback.name, monitor_every_n_steps=every_n_steps)
        fit_seeded(alone, logger=loggers[1])
        assert callback.history[0].metrics == alone.history[0].metrics
        own = [row for row in loggers[1].rows if any(f"_{callback.name}_training/" in name for name in row)]
        assert bool(own) == (every_n_steps is not None)
        assert all(row in loggers[0].rows for row in own)


def test_training_is_bit_identical_to_training_without_them() -> None:
    assert torch.equal(weights(fit_seeded()), weights(fit_seeded(*two_callbacks(monitor_every_n_steps=1))))


def test_names_are_in_logged_names() -> None:
    logger = MemoryLogger()
    fit(ActorCritic(), *two_callbacks(monitor_every_n_steps=1), logger=logger)
    groups = {name.partition("/")[0] for row in logger.rows for name in row if "plasticity" in name}
    assert groups == {
        f"plasticity_{name}{kind}"
        for name in ("actor", "critic")
        for kind in ("", "_by_task", "_fresh_network", "_training")
    }


def test_each_resumes_its_own_state(tmp_path: Path) -> None:
    module, callbacks = ActorCritic(), two_callbacks(interventions=[SpectralRegularizer()])
    first = fit(module, *callbacks)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = two_callbacks(interventions=[SpectralRegularizer()])
    trainer(*resumed, max_epochs=2).fit(ActorCritic(), loader(), ckpt_path=tmp_path / "last.ckpt")
    for before, after in zip(callbacks, resumed, strict=True):
        assert before.state_key != SpectralCollapseCallback().state_key
        assert after.history[0].metrics == before.history[0].metrics


def test_two_without_names_are_refused_by_lightning() -> None:
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(SpectralCollapseCallback(), SpectralCollapseCallback())


def test_warnings_begin_with_the_name() -> None:
    class Failing(MemoryLogger):
        def log_metrics(self, *_: Any, **__: Any) -> None:
            raise OSError("disk full")

    callback = SpectralCollapseCallback(loss_fn=actor_loss, name="actor")
    with pytest.warns(PlasticityWarning, match="^actor: Failing could not log"):
        fit(ActorCritic(), callback, logger=Failing())


def test_each_repairs_the_units_that_its_loss_reaches() -> None:
    actor = SpectralCollapseCallback(loss_fn=actor_loss, name="actor", interventions=[ReDo(0.9, when=2)])
    critic = SpectralCollapseCallback(loss_fn=critic_loss, name="critic", interventions=[ReDo(0.9, when=2)])
    fit(ActorCritic(), actor, critic)
    assert {layer for repair in actor.history[0].repairs for layer in repair.units} == {"net.0"}
    assert {layer for repair in critic.history[0].repairs for layer in repair.units} == {"critic.0"}


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_unusable_names_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name=.* must be a string without '/'"):
        SpectralCollapseCallback(name=name)
