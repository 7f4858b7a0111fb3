"""Tests of training with sharded weights (FSDP2) on two ranks.

Reports and penalties equal those of one process with full weights.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_plasticity import FitTest, GGNProbe, HessianProbe, SpectralCollapseCallback
from lightning_plasticity._compat import has_full_weights, is_model_parallel
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.distributed import sharded_weights
from lightning_plasticity.distributed.agreement import PeerFailedError
from lightning_plasticity.interventions import (
    L2ER,
    L2Init,
    Parseval,
    Regularizer,
    SelfNormalizedReset,
    ShrinkPerturb,
    SpectralRegularizer,
    WassersteinInit,
)
from lightning_plasticity.interventions.base import InterventionContext
from lightning_plasticity.probes import Probe
from tests.distributed.test_failing_ranks import failing
from tests.helpers.modules import NEVER, WITHOUT_FIT_TEST, MemoryLogger, trainer
from tests.helpers.processes import in_two_processes, skip_without_fsdp_on_the_cpu

STEPS = 4
SANITY_STEPS = 2
"""Validation steps that the Trainer takes by default before the first training step."""
SAMPLES = 6
HESSIAN = HessianProbe(SAMPLES, num_probes=2, num_steps=9, ggn=GGNProbe(SAMPLES))
FLOAT32 = {"dtype": torch.float32}
REGULARIZERS: dict[str, Callable[[], Regularizer]] = {
    "spectral": lambda: SpectralRegularizer(0.1),
    "parseval": lambda: Parseval(0.1),
    "l2_init": lambda: L2Init(0.3),
    "wasserstein_init": lambda: WassersteinInit(0.3),
}
CLIPPED: dict[str, dict[str, Any]] = {
    "by_norm": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
    "by_value": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
}

Runs = dict[str, list[dict[str, Any]]]


def clipped_regularizers() -> list[Regularizer]:
    return [SpectralRegularizer(0.1, exact=True), Parseval(0.1), L2Init(0.3), WassersteinInit(0.3)]


class WithHooks(L2Init):
    """A regularizer that registers hooks on a layer, and removes a foreign one."""

    def __init__(self, foreign_handle: Any) -> None:
        super().__init__(0.3)
        self.calls: list[str] = []
        self.handles: list[Any] = []
        self.foreign_handle = foreign_handle

    def prepare(self, model: nn.Module, context: InterventionContext) -> None:
        super().prepare(model, context)
        if not self.handles:

            def recorder(hook: str) -> Callable[..., None]:
                return lambda layer, *_: self.calls.append(f"{hook}: {'sharded' if is_sharded(layer) else 'full'}")

            self.handles = [
                model.net[0].register_forward_pre_hook(recorder("pre")),
                model.net[0].register_forward_pre_hook(recorder("first pre"), prepend=True),
                model.net[0].register_forward_hook(recorder("post")),
                model.net[0].register_forward_hook(recorder("first post"), prepend=True),
            ]
            self.foreign_handle.remove()

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


class FullWeights(LightningModule):
    """A classifier with full weights.

    Its weights are float64, so that results do not depend on the order of sums. Every epoch is a task.
    """

    def __init__(self, regularizers: Sequence[Regularizer] = (), dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.input_dtype = dtype
        self.regularizers = regularizers
        self.batches: list[Any] = []
        for regularizer in regularizers:
            regularizer.start(self)

    @property
    def task_id(self) -> int:
        return self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0].to(self.input_dtype)), batch[1])
        return loss + self.penalty()

    def penalty(self) -> Tensor:
        return sum((regularizer.penalty(self) for regularizer in self.regularizers), torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0].to(self.input_dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Sharded(FullWeights):
    """A classifier whose root FSDP leaves gathered after validation."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=self.precision())

    def precision(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy()


class WithBuffersAndNoise(Sharded):
    """A classifier with buffers and dropout, which a probe could disturb."""

    def __init__(self) -> None:
        super().__init__(**FLOAT32)
        self.net.insert(1, nn.BatchNorm1d(7))
        self.net.insert(3, nn.Dropout(0.2))


class LearningFromPenalties(FullWeights):
    """A float32 network that only its penalties train, so that rounding in the forward pass does not matter."""

    def __init__(self, regularizers: Sequence[Regularizer] = ()) -> None:
        super().__init__(regularizers, **FLOAT32)
        self.output_dtypes: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.net(batch[0].float())
        self.output_dtypes.append(str(output.dtype))
        # The probe needs the loss; it runs the module in evaluation mode.
        factor = 0 if self.training else 1
        return factor * F.cross_entropy(output.float(), batch[1]) + self.penalty()


class InHalfPrecision(Sharded, LearningFromPenalties):
    def precision(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (8 * STEPS,), generator=generator))


def loader(rank: int | None) -> DataLoader[Any]:
    """Return all samples in batches of 8; on a rank, every other one in batches of 4."""
    sampler = None if rank is None else DistributedSampler(data(), 2, rank, shuffle=False)
    return DataLoader(data(), batch_size=8 if rank is None else 4, sampler=sampler)


def callback_with(
    interventions: Sequence[Any] = (),
    probe: Probe = GGNProbe(SAMPLES),  # noqa: B008  (immutable)
    **fit_test: Any,
) -> SpectralCollapseCallback:
    # The ranks join their samples in another order, so that the batches of a fit test are others.
    options = {**WITHOUT_FIT_TEST, **fit_test}
    return SpectralCollapseCallback(probe, interventions=interventions, monitor_every_n_steps=3, **options)


def sharding_options(rank: int | None, **options: Any) -> dict[str, Any]:
    """Return the options of a Trainer that shards weights; none without a rank."""
    if rank is None:
        return {}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512", WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank))
    chosen = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False, **options}
    return {"strategy": ModelParallelStrategy(process_group_backend="gloo", **chosen), "devices": 2}


def fit(
    rank: int | None,
    module: LightningModule,
    callback: SpectralCollapseCallback | None,
    **options: Any,
) -> dict[str, Any]:
    """Train on one of two ranks, or on a single process if the rank is ``None``."""
    logger = MemoryLogger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"max_epochs": 2, "logger": logger, **sharding_options(rank), **options}
        fitted = trainer(*[callback] if callback else [], **given)
        fitted.fit(module, loader(rank), loader(rank))
    return {
        "weights": full_weights(module),
        "optimizer": [full(value) for state in fitted.optimizers[0].state.values() for value in state.values()],
        "buffers": [*module.buffers()],
        "noise": torch.rand(3),
        "history": [report.to_dict() for report in callback.history] if callback else [],
        "logged": [row for row in logger.rows if any("plasticity" in name for name in row)],
        "batches": module.batches,
    }


def is_sharded(layer: Any) -> bool:
    return hasattr(layer.weight, "full_tensor")


def full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def full_weights(module: nn.Module) -> Tensor:
    # Validation leaves parameters gathered, in the precision of its forward pass.
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return torch.cat([full(parameter.detach()).flatten() for parameter in module.parameters()])


def seeded(make: Callable[..., LightningModule], *arguments: Any) -> LightningModule:
    torch.manual_seed(0)
    return make(*arguments)


def resumed(rank: int, *, save_distributed_checkpoint: bool) -> list[dict[str, Any]]:
    """Train three epochs without interruption, and again with a resumed fit."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)

    def train(name: str, epochs: int, **options: Any) -> dict[str, Any]:
        callback, saving = callback_with([L2Init(0.3)]), ModelCheckpoint(Path(folder[0], name), filename="{epoch}")
        given = sharding_options(rank, save_distributed_checkpoint=save_distributed_checkpoint)
        module = seeded(Sharded)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = trainer(callback, saving, max_epochs=epochs, enable_checkpointing=True, **given)
            fitted.fit(module, loader(rank), **options)
        history = [report.to_dict() for report in callback.history]
        for report in history:
            # The expected length of the first task depends on max_epochs.
            del report["expected_steps"]
            for kind in ("metrics", "fresh"):
                report[kind] = {name: value for name, value in report[kind].items() if "fast_" not in name}
        return {"weights": full_weights(module), "history": history}

    uninterrupted = train("uninterrupted", 3)
    train("first", 2)
    return [uninterrupted, train("second", 3, ckpt_path=str(Path(folder[0], "first", "epoch=1.ckpt")))]


class PartlySharded(FullWeights):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class ShardedOverOneRank(FullWeights):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["tensor_parallel"])


class ParallelizedLayer(FullWeights):
    """A network with a layer that is split between ranks without FSDP."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = self.device_mesh["data_parallel"]
        parallelize_module(self.net[2], mesh, ColwiseParallel())
        for layer in (self.net[0], self.net[4]):
            fully_shard(layer, mesh=mesh)


def refused(rank: int) -> dict[str, str]:
    """Return the error messages of trainings that are not supported."""
    tensor_parallel = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    cases: dict[str, tuple[Callable[[], FullWeights], Any, dict[str, int]]] = {
        "tensor parallelism": (Sharded, (), tensor_parallel),
        "a parallelized layer": (ParallelizedLayer, (), {}),
        "partly sharded": (PartlySharded, (), {}),
        "sharded over one rank": (ShardedOverOneRank, (), {}),
        "a repair": (Sharded, [ShrinkPerturb(), L2Init()], {}),
        "step interventions": (Sharded, [SelfNormalizedReset(), L2ER()], {}),
    }
    messages = {}
    for name, (make, interventions, sizes) in cases.items():
        module = seeded(make)
        try:
            fit(rank, module, callback_with(interventions), **sharding_options(rank, **sizes))
        except MisconfigurationException as error:
            messages[name] = str(error)
        assert not module.batches, "it was trained on"
    return messages


def with_hooks(rank: int) -> dict[str, Any]:
    """Train with a regularizer that has hooks, and count their calls during and after training."""
    module, foreign_calls = seeded(Sharded), []
    regularizer = WithHooks(module.net[0].register_forward_hook(lambda *_: foreign_calls.append(1)))
    result = fit(rank, module, callback_with([regularizer]), max_epochs=1)
    during = len(regularizer.calls)
    module.net(torch.ones(2, 4, dtype=torch.float64))
    return {
        "weights": result["weights"],
        "order": regularizer.calls[:8],
        "during": during,
        "after": len(regularizer.calls) - during,
        "foreign": len(foreign_calls),
    }


def failed(rank: int, name: str, number: int) -> dict[str, Any]:
    """Train while the ``number``-th call of a function of ``sharded_weights`` fails on rank 1."""
    with failing(sharded_weights, name, number):
        return fit(rank, seeded(Sharded), callback_with([L2Init(0.3)]))


FAILED = {
    "gathering at the first task": ("_gather", 1),
    "gathering at a step": ("_gather", 3),
    "gathering at a later task": ("_gather", 2 + STEPS),
    "halfway through a later task": ("_unsharded_attributes", 7 * (1 + STEPS) + 4),
}


def everything(rank: int) -> dict[str, Any]:
    results = {
        "without_callback": fit(rank, seeded(WithBuffersAndNoise), None),
        "with_callback": fit(
            rank, seeded(WithBuffersAndNoise), callback_with(fit_test=FitTest(steps=3), collapse=NEVER)
        ),
        "probed": fit(rank, seeded(Sharded), callback_with()),
        "hessian": fit(rank, seeded(Sharded), callback_with(probe=HESSIAN), max_epochs=1),
        "half": fit(rank, half := seeded(InHalfPrecision), callback_with(clipped_regularizers())),
        "half_output_dtypes": half.output_dtypes,
    }
    results |= {
        name: fit(rank, seeded(Sharded), callback_with([regularizer()])) for name, regularizer in REGULARIZERS.items()
    }
    results |= {
        name: fit(rank, seeded(Sharded), callback_with(clipped_regularizers()), **options)
        for name, options in CLIPPED.items()
    }
    results["decoupled"] = fit(rank, seeded(Sharded), callback_with([Parseval(0.1, decoupled=True)]))
    results["with_hooks"] = with_hooks(rank)
    for case, (name, number) in FAILED.items():
        try:
            results[case] = failed(rank, name, number)
        except (MemoryError, PeerFailedError) as error:
            results[case] = f"{type(error).__name__}: {error}"
    results["refused"] = refused(rank)
    results["resumed"] = resumed(rank, save_distributed_checkpoint=False)
    results["resumed_distributed"] = resumed(rank, save_distributed_checkpoint=True)
    return results


@pytest.fixture(scope="module")
def runs() -> Runs:
    skip_without_fsdp_on_the_cpu()
    one, other = in_two_processes(everything)
    return {name: [one[name], other[name]] for name in one}


@pytest.fixture(scope="module")
def unsharded() -> dict[str, Any]:
    return fit(None, seeded(FullWeights), callback_with())


def assert_close(numbers: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=rel, abs=rel), name


def test_callback_leaves_training_bit_identical(runs: Runs) -> None:
    assert len(runs["with_callback"][0]["history"]) == 2
    assert any("plasticity_training/dormant_fraction" in row for row in runs["with_callback"][0]["logged"])
    for expected, actual in zip(runs["without_callback"], runs["with_callback"], strict=True):
        for name in ("weights", "optimizer", "buffers", "noise"):
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=f"{name} differs")


def test_ranks_have_the_same_weights_and_reports(runs: Runs) -> None:
    for name in ("with_callback", "probed", "hessian", "half", *REGULARIZERS, *CLIPPED):
        one, other = runs[name]
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])


def test_probe_equals_that_of_full_weights(runs: Runs, unsharded: dict[str, Any]) -> None:
    torch.testing.assert_close(runs["probed"][0]["weights"], unsharded["weights"], rtol=0, atol=1e-14)
    for report, expected in zip(runs["probed"][0]["history"], unsharded["history"], strict=True):
        assert (report["task"], report["step"]) == (expected["task"], expected["step"])
        assert_close(report["metrics"], expected["metrics"], rel=1e-9)
        for name in ("eigenvalues", "weights"):
            torch.testing.assert_close(report["spectrum"][name], expected["spectrum"][name], rtol=1e-9, atol=1e-12)


def test_probe_uses_samples_of_both_ranks(runs: Runs) -> None:
    net = seeded(FullWeights).net
    x, y = (torch.cat([run["batches"][0][part][: SAMPLES // 2] for run in runs["probed"]]) for part in (0, 1))
    expected = ggn_spectrum(net, (x, y), lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    report = runs["probed"][0]["history"][0]
    assert report["metrics"]["ggn_trace"] == pytest.approx(float(expected.trace), rel=1e-12)
    assert report["metrics"]["epsilon_rank"] == expected.epsilon_rank(1e-2)


def test_hessian_equals_that_of_full_weights(runs: Runs) -> None:
    expected = fit(None, seeded(FullWeights), callback_with(probe=HESSIAN), max_epochs=1)["history"][0]
    report = runs["hessian"][0]["history"][0]
    assert report["matrix"] == "hessian"
    # Rounding errors grow with the steps of Lanczos.
    assert_close(report["metrics"], expected["metrics"], rel=1e-6)


def test_monitor_equals_that_of_full_weights(runs: Runs, unsharded: dict[str, Any]) -> None:
    expected = [row for row in unsharded["logged"] if "plasticity_training/effective_rank/net.0" in row]
    assert [row["step"] for row in expected] == [0, 3, 6]
    for run in runs["probed"]:
        rows = [row for row in run["logged"] if "plasticity_training/dormant_fraction" in row]
        for row, other in zip(rows, expected, strict=True):
            assert_close(row, other, rel=1e-9)


@pytest.mark.parametrize("name", [*REGULARIZERS])
def test_regularizer_equals_its_penalty_in_the_loss(name: str, runs: Runs, unsharded: dict[str, Any]) -> None:
    in_loss = fit(None, seeded(FullWeights, [REGULARIZERS[name]()]), None)
    torch.testing.assert_close(runs[name][0]["weights"], in_loss["weights"], rtol=0, atol=1e-13)
    assert (in_loss["weights"] - unsharded["weights"]).abs().max() > 1e-2


def test_decoupled_regularizer_changes_full_weights(runs: Runs, unsharded: dict[str, Any]) -> None:
    expected = fit(None, seeded(FullWeights), callback_with([Parseval(0.1, decoupled=True)]))
    torch.testing.assert_close(runs["decoupled"][0]["weights"], expected["weights"], rtol=0, atol=1e-13)
    assert (expected["weights"] - unsharded["weights"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*CLIPPED])
def test_regularizer_gradients_are_accumulated_and_clipped(name: str, runs: Runs) -> None:
    in_loss = fit(None, seeded(FullWeights, clipped_regularizers()), None, **CLIPPED[name])
    unclipped = {"accumulate_grad_batches": CLIPPED[name]["accumulate_grad_batches"]}
    without_clipping = fit(None, seeded(FullWeights, clipped_regularizers()), None, **unclipped)
    torch.testing.assert_close(runs[name][0]["weights"], in_loss["weights"], rtol=0, atol=1e-13)
    assert (in_loss["weights"] - without_clipping["weights"]).abs().max() > 1e-2


def test_mixed_precision_does_not_affect_probe_and_regularizers(runs: Runs) -> None:
    assert runs["half_output_dtypes"][0] == ["torch.bfloat16"] * 2 * STEPS
    in_loss = fit(None, seeded(LearningFromPenalties, clipped_regularizers()), None)
    torch.testing.assert_close(runs["half"][0]["weights"], in_loss["weights"], rtol=0, atol=1e-6)
    assert (in_loss["weights"] - full_weights(seeded(LearningFromPenalties))).abs().max() > 1e-2
    expected = fit(None, seeded(LearningFromPenalties), callback_with(clipped_regularizers()))["history"]
    for report, other in zip(runs["half"][0]["history"], expected, strict=True):
        assert_close(report["metrics"], other["metrics"], rel=1e-5)


@pytest.mark.parametrize("name", ["resumed", "resumed_distributed"])
def test_resumed_training_equals_an_uninterrupted_one(name: str, runs: Runs) -> None:
    for uninterrupted, resumed in runs[name]:
        assert torch.equal(resumed["weights"], uninterrupted["weights"])
        assert len(resumed["history"]) == 3
        assert str(resumed["history"]) == str(uninterrupted["history"])


def test_hooks_of_a_regularizer_keep_their_order_and_lifetime(runs: Runs) -> None:
    for run in runs["with_hooks"]:
        assert run["order"] == ["first pre: sharded", "pre: full", "first post: full", "post: sharded"] * 2
        assert run["during"] == 4 * (STEPS + STEPS), "training and validation"
        assert run["after"] == 0
        assert run["foreign"] == SANITY_STEPS, "until the regularizer removed it"
    in_loss = fit(None, seeded(FullWeights, [L2Init(0.3)]), None, max_epochs=1)
    torch.testing.assert_close(runs["with_hooks"][0]["weights"], in_loss["weights"], rtol=0, atol=1e-13)


def test_oom_on_one_rank_raises_on_all(runs: Runs) -> None:
    message = "on rank 1: MemoryError: no more"
    assert runs["gathering at the first task"] == [f"PeerFailedError: {message}", "MemoryError: no more"]
    for name, source, task in (
        ("gathering at a step", "L2Init", 0),
        ("gathering at a later task", "probe", 1),
        ("halfway through a later task", "probe", 1),
    ):
        one, other = runs[name]
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])
        errors: list[dict[str, str]] = [{}, {}]
        errors[task] = {source: message}
        assert [report["errors"] for report in one["history"]] == errors
        assert [report["spectrum"] is not None for report in one["history"]] == [True, source != "probe"]
    in_loss = fit(None, seeded(FullWeights, [L2Init(0.3)]), None)
    torch.testing.assert_close(runs["gathering at a later task"][0]["weights"], in_loss["weights"], rtol=0, atol=1e-13)


ONLY_FULLY_SHARD = "shards all trainable parameters by torch.distributed.fsdp.fully_shard over the data-parallel mesh"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensor parallelism", r"does not work with ModelParallelStrategy\(tensor_parallel_size=2\): use"),
        ("a parallelized layer", f"{ONLY_FULLY_SHARD}.*: not satisfied by net.2.weight, net.2.bias$"),
        ("partly sharded", f"{ONLY_FULLY_SHARD}.*: not satisfied by net.2.weight, .*, net.4.weight and 1 more$"),
        ("sharded over one rank", f"{ONLY_FULLY_SHARD}.*: not satisfied by net.0.weight, .* and 3 more$"),
        (
            "a repair",
            "^ShrinkPerturb cannot change weights that ModelParallelStrategy shards: measurements work with it",
        ),
        ("step interventions", "^SelfNormalizedReset and L2ER cannot change weights that ModelParallelStrategy shards"),
    ],
)
def test_unsupported_sharding_is_refused_before_training(name: str, message: str, runs: Runs) -> None:
    for run in runs["refused"]:
        assert re.search(message, run[name])


def test_unsharded_module_is_refused() -> None:
    class Unsharded(FullWeights):
        def configure_model(self) -> None:
            pass

    module = seeded(Unsharded)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(MisconfigurationException, match=f"{ONLY_FULLY_SHARD}.*: not satisfied by net.0.weight, "):
        trainer(callback_with(), strategy=strategy, devices=1).fit(module, loader(None), loader(None))
    torch.distributed.destroy_process_group()
    assert not module.batches, "it was trained on"


def derived(kind: type[Any]) -> type[Any]:
    return type(f"Derived{kind.__name__}", (kind,), {})


NAMES = ["DeepSpeedStrategy", "FSDPStrategy", "SingleDeviceXLAStrategy", "XLAStrategy"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", NAMES)
def test_strategies_that_shard_otherwise_are_refused(package: str, name: str) -> None:
    kind = getattr(pytest.importorskip(f"{package}.strategies"), name)
    # The constructors need hardware or libraries that are missing here.
    for strategy in (kind.__new__(kind), derived(kind).__new__(derived(kind))):
        fitted = trainer()
        fitted._accelerator_connector.strategy = strategy
        with pytest.raises(
            MisconfigurationException, match=rf"not with {type(strategy).__name__}: use Trainer\(devices=1\) or"
        ):
            callback_with().setup(fitted, FullWeights(), "fit")


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_subclasses_of_supported_strategies_are_supported(package: str) -> None:
    strategies = pytest.importorskip(f"{package}.strategies")
    for kind in (strategies.SingleDeviceStrategy, strategies.DDPStrategy):
        assert has_full_weights(derived(kind)())
        assert not is_model_parallel(derived(kind)())
    assert is_model_parallel(derived(strategies.ModelParallelStrategy)())
    assert not has_full_weights(derived(strategies.ModelParallelStrategy)())
