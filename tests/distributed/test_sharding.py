"""Two processes that shard weights (FSDP2): what is measured and added is what one process with whole weights has."""

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

from lightning_plasticity import Collapse, GGNProbe, HessianProbe, SpectralCollapseCallback
from lightning_plasticity._compat import has_full_weights, is_model_parallel
from lightning_plasticity.curvature import ggn_spectrum
from lightning_plasticity.distributed import sharded_weights as sharding_module
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
from lightning_plasticity.probes import Probe
from tests.distributed.test_failing_ranks import failing
from tests.helpers.modules import MemoryLogger, trainer
from tests.helpers.processes import in_two_processes, skip_without_fsdp_on_the_cpu

STEPS = 4
SANITY_STEPS = 2  # by default, before the first training step
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


def clipped_terms() -> list[Regularizer]:
    return [SpectralRegularizer(0.1, exact=True), Parseval(0.1), L2Init(0.3), WassersteinInit(0.3)]


class Hooked(L2Init):
    """Notes what happens in hooks that it puts on a layer, and removes one that somebody else has put there."""

    def __init__(self) -> None:
        super().__init__(0.3)
        self.happened: list[str] = []
        self.handles: list[Any] = []
        self.removes: Any = None

    def start(self, model: nn.Module, **options: Any) -> None:
        super().start(model, **options)
        if not self.handles:

            def noting(what: str) -> Callable[..., None]:
                return lambda layer, *_: self.happened.append(f"{what} {'sharded' if is_sharded(layer) else 'whole'}")

            self.handles = [
                model.net[0].register_forward_pre_hook(noting("before")),
                model.net[0].register_forward_pre_hook(noting("first"), prepend=True),
                model.net[0].register_forward_hook(noting("after")),
                model.net[0].register_forward_hook(noting("behind"), prepend=True),
            ]
            self.removes.remove()

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


class Whole(LightningModule):
    """In float64, so that sums in another order do not show; every epoch is a task."""

    def __init__(self, terms: Sequence[Regularizer] = (), dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        self.own_dtype = dtype
        self.terms = terms
        self.seen: list[Any] = []
        for term in terms:
            term.start(self)

    @property
    def task_id(self) -> int:
        return self.current_epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0].to(self.own_dtype)), batch[1])
        return loss + self.term()

    def term(self) -> Tensor:
        return sum((term.penalty(self) for term in self.terms), torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0].to(self.own_dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Sharded(Whole):
    """After a validation, FSDP leaves the root of the network gathered."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"], mp_policy=self.precision())

    def precision(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy()


class WithNoise(Sharded):
    """Of its buffers and random numbers a trace could be seen."""

    def __init__(self) -> None:
        super().__init__(**FLOAT32)
        self.net.insert(1, nn.BatchNorm1d(7))
        self.net.insert(3, nn.Dropout(0.2))


class LearningFromTerms(Whole):
    """In float32, and of the loss it learns nothing: what is rounded in the forward pass is not to be seen."""

    def __init__(self, terms: Sequence[Regularizer] = ()) -> None:
        super().__init__(terms, **FLOAT32)
        self.ran_in: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.net(batch[0].float())
        self.ran_in.append(str(output.dtype))
        share = 0 if self.training else 1  # a probe is no training
        return share * F.cross_entropy(output.float(), batch[1]) + self.term()


class InHalfPrecision(Sharded, LearningFromTerms):
    def precision(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * STEPS, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (8 * STEPS,), generator=generator))


def loader(rank: int | None) -> DataLoader[Any]:
    """All samples, eight at a time; or every other one, four at a time."""
    sampler = None if rank is None else DistributedSampler(data(), 2, rank, shuffle=False)
    return DataLoader(data(), batch_size=8 if rank is None else 4, sampler=sampler)


def callback_with(
    interventions: Sequence[Any] = (),
    probe: Probe = GGNProbe(SAMPLES),  # noqa: B008  (immutable)
) -> SpectralCollapseCallback:
    return SpectralCollapseCallback(
        probe, collapse=Collapse(below=1e-9), interventions=interventions, monitor_every_n_steps=3
    )


def sharding(rank: int | None, **options: Any) -> dict[str, Any]:
    """Options of a Trainer; none in the only process."""
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
    """In this process alone, or in one of two."""
    logger = MemoryLogger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"max_epochs": 2, "logger": logger, **sharding(rank), **options}
        fitted = trainer(*[callback] if callback else [], **given)
        fitted.fit(module, loader(rank), loader(rank))
    return {
        "weights": flat(module),
        "optimizer": [full(value) for state in fitted.optimizers[0].state.values() for value in state.values()],
        "buffers": [*module.buffers()],
        "noise": torch.rand(3),
        "history": [report.to_dict() for report in callback.history] if callback else [],
        "logged": [row for row in logger.rows if any("plasticity" in name for name in row)],
        "seen": module.seen,
    }


def is_sharded(layer: Any) -> bool:
    return hasattr(layer.weight, "full_tensor")


def full(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def flat(module: nn.Module) -> Tensor:
    for part in module.modules():  # gathered by the validation, in the precision that it ran in
        if hasattr(part, "reshard"):
            part.reshard()
    return torch.cat([full(parameter.detach()).flatten() for parameter in module.parameters()])


def made(make: Callable[..., LightningModule], *arguments: Any) -> LightningModule:
    torch.manual_seed(0)
    return make(*arguments)


def resumed(rank: int, *, save_distributed_checkpoint: bool) -> list[dict[str, Any]]:
    """Three epochs at once, and in two parts."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)

    def train(name: str, epochs: int, **options: Any) -> dict[str, Any]:
        callback, saving = callback_with([L2Init(0.3)]), ModelCheckpoint(Path(folder[0], name), filename="{epoch}")
        given = sharding(rank, save_distributed_checkpoint=save_distributed_checkpoint)
        module = made(Sharded)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = trainer(callback, saving, max_epochs=epochs, enable_checkpointing=True, **given)
            fitted.fit(module, loader(rank), **options)
        return {"weights": flat(module), "history": [report.to_dict() for report in callback.history]}

    whole = train("whole", 3)
    train("first", 2)
    return [whole, train("second", 3, ckpt_path=str(Path(folder[0], "first", "epoch=1.ckpt")))]


class PartlySharded(Whole):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class ShardedByOneProcess(Whole):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["tensor_parallel"])


class ParallelByHand(Whole):
    """A layer is split between the processes, and FSDP does not know of it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = self.device_mesh["data_parallel"]
        parallelize_module(self.net[2], mesh, ColwiseParallel())
        for layer in (self.net[0], self.net[4]):
            fully_shard(layer, mesh=mesh)


def refused(rank: int) -> dict[str, str]:
    """What is said to trainings that cannot be."""
    two = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    cases: dict[str, tuple[Callable[[], Whole], Any, dict[str, int]]] = {
        "tensor parallelism": (Sharded, (), two),
        "tensor parallelism by hand": (ParallelByHand, (), {}),
        "sharded in part": (PartlySharded, (), {}),
        "sharded by one process": (ShardedByOneProcess, (), {}),
        "a repair": (Sharded, [ShrinkPerturb(), L2Init()], {}),
        "a running remedy": (Sharded, [SelfNormalizedReset(), L2ER()], {}),
    }
    messages = {}
    for name, (make, interventions, sizes) in cases.items():
        module = made(make)
        try:
            fit(rank, module, callback_with(interventions), **sharding(rank, **sizes))
        except MisconfigurationException as error:
            messages[name] = str(error)
        assert not module.seen, "it was trained on"
    return messages


def hooked(rank: int) -> dict[str, Any]:
    """A regularizer's own hooks are on the sharded module, as long as it wants them there."""
    module, regularizer, others = made(Sharded), Hooked(), []
    regularizer.removes = module.net[0].register_forward_hook(lambda *_: others.append(1))
    result = fit(rank, module, callback_with([regularizer]), max_epochs=1)
    during = len(regularizer.happened)
    module.net(torch.ones(2, 4, dtype=torch.float64))
    return {
        "weights": result["weights"],
        "order": regularizer.happened[:8],
        "during": during,
        "after": len(regularizer.happened) - during,
        "of others": len(others),
    }


def failed(rank: int, name: str, number: int) -> dict[str, Any]:
    """What is left of a training in which a call of a function of ours has failed in the second process."""
    with failing(sharding_module, name, number):
        return fit(rank, made(Sharded), callback_with([L2Init(0.3)]))


FAILED = {
    "memory for the first task": ("_gather", 1),
    "memory for a step": ("_gather", 3),
    "memory for a later task": ("_gather", 2 + STEPS),
    "a later task half way": ("_unsharded", 7 * (1 + STEPS) + 4),
}


def everything(rank: int) -> dict[str, Any]:
    results = {
        "plain": fit(rank, made(WithNoise), None),
        "watched": fit(rank, made(WithNoise), callback_with()),
        "probed": fit(rank, made(Sharded), callback_with()),
        "hessian": fit(rank, made(Sharded), callback_with(probe=HESSIAN), max_epochs=1),
        "half": fit(rank, half := made(InHalfPrecision), callback_with(clipped_terms())),
        "half_ran_in": half.ran_in,
    }
    results |= {
        name: fit(rank, made(Sharded), callback_with([regularizer()])) for name, regularizer in REGULARIZERS.items()
    }
    results |= {
        name: fit(rank, made(Sharded), callback_with(clipped_terms()), **options) for name, options in CLIPPED.items()
    }
    results["hooked"] = hooked(rank)
    for what, (name, number) in FAILED.items():
        try:
            results[what] = failed(rank, name, number)
        except (MemoryError, PeerFailedError) as error:
            results[what] = f"{type(error).__name__}: {error}"
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
def alone() -> dict[str, Any]:
    return fit(None, made(Whole), callback_with())


def same_numbers(numbers: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=rel, abs=rel), name


def test_training_is_bit_identical_with_and_without_the_callback(runs: Runs) -> None:
    assert len(runs["watched"][0]["history"]) == 2
    assert any("plasticity_training/dormant_fraction" in row for row in runs["watched"][0]["logged"])
    for without, with_callback in zip(runs["plain"], runs["watched"], strict=True):
        for name in ("weights", "optimizer", "buffers", "noise"):
            torch.testing.assert_close(with_callback[name], without[name], rtol=0, atol=0, msg=f"{name} differs")


def test_processes_have_the_same_weights_and_reports(runs: Runs) -> None:
    for name in ("watched", "probed", "hessian", "half", *REGULARIZERS, *CLIPPED):
        one, other = runs[name]
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])


def test_the_probe_equals_that_of_one_process_with_whole_weights(runs: Runs, alone: dict[str, Any]) -> None:
    torch.testing.assert_close(runs["probed"][0]["weights"], alone["weights"], rtol=0, atol=1e-14)
    for report, expected in zip(runs["probed"][0]["history"], alone["history"], strict=True):
        assert (report["task"], report["step"]) == (expected["task"], expected["step"])
        same_numbers(report["metrics"], expected["metrics"], rel=1e-9)
        for name in ("eigenvalues", "weights"):
            torch.testing.assert_close(report["spectrum"][name], expected["spectrum"][name], rtol=1e-9, atol=1e-12)


def test_the_probe_sees_samples_of_both(runs: Runs) -> None:
    net = made(Whole).net
    x, y = (torch.cat([run["seen"][0][part][: SAMPLES // 2] for run in runs["probed"]]) for part in (0, 1))
    expected = ggn_spectrum(net, (x, y), lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    report = runs["probed"][0]["history"][0]
    assert report["metrics"]["ggn_trace"] == pytest.approx(float(expected.trace), rel=1e-12)
    assert report["metrics"]["epsilon_rank"] == expected.epsilon_rank(1e-2)


def test_the_hessian_equals_that_of_one_process_with_whole_weights(runs: Runs) -> None:
    expected = fit(None, made(Whole), callback_with(probe=HESSIAN), max_epochs=1)["history"][0]
    report = runs["hessian"][0]["history"][0]
    assert report["matrix"] == "hessian"
    same_numbers(report["metrics"], expected["metrics"], rel=1e-6)  # rounding grows from step to step of Lanczos


def test_what_is_monitored_while_training_equals_that_of_one_process(runs: Runs, alone: dict[str, Any]) -> None:
    expected = [row for row in alone["logged"] if "plasticity_training/effective_rank/net.0" in row]
    assert [row["step"] for row in expected] == [0, 3, 6]
    for run in runs["probed"]:
        rows = [row for row in run["logged"] if "plasticity_training/dormant_fraction" in row]
        for row, other in zip(rows, expected, strict=True):
            same_numbers(row, other, rel=1e-9)


@pytest.mark.parametrize("name", [*REGULARIZERS])
def test_a_regularizer_equals_the_same_term_in_the_loss_of_one_process(
    name: str, runs: Runs, alone: dict[str, Any]
) -> None:
    by_hand = fit(None, made(Whole, [REGULARIZERS[name]()]), None)
    torch.testing.assert_close(runs[name][0]["weights"], by_hand["weights"], rtol=0, atol=1e-13)
    assert (by_hand["weights"] - alone["weights"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*CLIPPED])
def test_regularizers_are_accumulated_and_clipped_like_the_same_terms_in_the_loss(name: str, runs: Runs) -> None:
    by_hand = fit(None, made(Whole, clipped_terms()), None, **CLIPPED[name])
    unclipped = {"accumulate_grad_batches": CLIPPED[name]["accumulate_grad_batches"]}
    without_clipping = fit(None, made(Whole, clipped_terms()), None, **unclipped)
    torch.testing.assert_close(runs[name][0]["weights"], by_hand["weights"], rtol=0, atol=1e-13)
    assert (by_hand["weights"] - without_clipping["weights"]).abs().max() > 1e-2


def test_mixed_precision_is_no_matter_of_the_probe_and_of_regularizers(runs: Runs) -> None:
    assert runs["half_ran_in"][0] == ["torch.bfloat16"] * 2 * STEPS
    by_hand = fit(None, made(LearningFromTerms, clipped_terms()), None)
    torch.testing.assert_close(runs["half"][0]["weights"], by_hand["weights"], rtol=0, atol=1e-6)
    assert (by_hand["weights"] - flat(made(LearningFromTerms))).abs().max() > 1e-2
    expected = fit(None, made(LearningFromTerms), callback_with(clipped_terms()))["history"]
    for report, other in zip(runs["half"][0]["history"], expected, strict=True):
        same_numbers(report["metrics"], other["metrics"], rel=1e-5)


@pytest.mark.parametrize("name", ["resumed", "resumed_distributed"])
def test_a_resumed_training_goes_on_as_if_nothing_had_happened(name: str, runs: Runs) -> None:
    for uninterrupted, resumed in runs[name]:
        assert torch.equal(resumed["weights"], uninterrupted["weights"])
        assert len(resumed["history"]) == 3
        assert str(resumed["history"]) == str(uninterrupted["history"])


def test_hooks_of_a_regularizer_are_where_it_puts_them_and_as_long(runs: Runs) -> None:
    for run in runs["hooked"]:
        assert run["order"] == ["first sharded", "before whole", "behind whole", "after sharded"] * 2
        assert run["during"] == 4 * (STEPS + STEPS), "training and validation"
        assert run["after"] == 0
        assert run["of others"] == SANITY_STEPS, "until it was removed"
    by_hand = fit(None, made(Whole, [L2Init(0.3)]), None, max_epochs=1)
    torch.testing.assert_close(runs["hooked"][0]["weights"], by_hand["weights"], rtol=0, atol=1e-13)


def test_whoever_lacks_the_memory_for_whole_weights_does_not_let_the_others_wait(runs: Runs) -> None:
    words = "in process 1: MemoryError: no more"
    assert runs["memory for the first task"] == [f"PeerFailedError: {words}", "MemoryError: no more"]
    for name, who, task in (
        ("memory for a step", "L2Init", 0),
        ("memory for a later task", "probe", 1),
        ("a later task half way", "probe", 1),
    ):
        one, other = runs[name]
        assert torch.equal(one["weights"], other["weights"])
        assert str(one["history"]) == str(other["history"])
        errors: list[dict[str, str]] = [{}, {}]
        errors[task] = {who: words}
        assert [report["errors"] for report in one["history"]] == errors
        assert [report["spectrum"] is not None for report in one["history"]] == [True, who != "probe"]
    by_hand = fit(None, made(Whole, [L2Init(0.3)]), None)
    torch.testing.assert_close(runs["memory for a later task"][0]["weights"], by_hand["weights"], rtol=0, atol=1e-13)


ONLY_FULLY_SHARD = "shards all trainable parameters by torch.distributed.fsdp.fully_shard over the data-parallel mesh"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensor parallelism", r"does not work with ModelParallelStrategy\(tensor_parallel_size=2\): use"),
        ("tensor parallelism by hand", f"{ONLY_FULLY_SHARD}.*: that is not so of net.2.weight, net.2.bias$"),
        ("sharded in part", f"{ONLY_FULLY_SHARD}.*: that is not so of net.2.weight, .*, net.4.weight and 1 more$"),
        ("sharded by one process", f"{ONLY_FULLY_SHARD}.*: that is not so of net.0.weight, .* and 3 more$"),
        ("a repair", "^ShrinkPerturb cannot change weights that ModelParallelStrategy shards: what works with it is"),
        ("a running remedy", "^SelfNormalizedReset and L2ER cannot change weights that ModelParallelStrategy shards"),
    ],
)
def test_what_does_not_work_is_an_error_before_the_first_step(name: str, message: str, runs: Runs) -> None:
    for run in runs["refused"]:
        assert re.search(message, run[name])


def test_a_module_that_is_not_sharded_at_all_is_refused() -> None:
    class Unsharded(Whole):
        def configure_model(self) -> None:
            pass

    module = made(Unsharded)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    with pytest.raises(MisconfigurationException, match=f"{ONLY_FULLY_SHARD}.*: that is not so of net.0.weight, "):
        trainer(callback_with(), strategy=strategy, devices=1).fit(module, loader(None), loader(None))
    torch.distributed.destroy_process_group()
    assert not module.seen, "it was trained on"


def derived(kind: type[Any]) -> type[Any]:
    return type(f"Own{kind.__name__}", (kind,), {})


NAMES = ["DeepSpeedStrategy", "FSDPStrategy", "SingleDeviceXLAStrategy", "XLAStrategy"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", NAMES)
def test_strategies_that_shard_in_other_ways_are_refused(package: str, name: str) -> None:
    kind = getattr(pytest.importorskip(f"{package}.strategies"), name)
    for strategy in (kind.__new__(kind), derived(kind).__new__(derived(kind))):  # to build it takes hardware or library
        fitted = trainer()
        fitted._accelerator_connector.strategy = strategy
        with pytest.raises(
            MisconfigurationException, match=rf"not with {type(strategy).__name__}: use Trainer\(devices=1\) or"
        ):
            callback_with().setup(fitted, Whole(), "fit")


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_strategies_that_are_derived_from_supported_ones_are_supported(package: str) -> None:
    strategies = pytest.importorskip(f"{package}.strategies")
    for kind in (strategies.SingleDeviceStrategy, strategies.DDPStrategy):
        assert has_full_weights(derived(kind)())
        assert not is_model_parallel(derived(kind)())
    assert is_model_parallel(derived(strategies.ModelParallelStrategy)())
    assert not has_full_weights(derived(strategies.ModelParallelStrategy)())
