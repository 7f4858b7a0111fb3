"""Measure curvature at the start of a task: the spectra of the Gauss-Newton matrix and of the Hessian."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_plasticity._validation import check_number, check_positive_ints, check_seed, is_str_list
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.curvature import Spectrum, TangentKernel, UnsupportedModelError, hessian_spectrum
from lightning_plasticity.curvature.cost import Budget, TooCostlyError
from lightning_plasticity.curvature.double_backward import (
    DoubleBackwardError,
    check_double_backward,
    composed_weight_norm,
)
from lightning_plasticity.curvature.double_backward_causes import REENTRANT
from lightning_plasticity.curvature.ntk import KernelMeasurement, measure_within_budget
from lightning_plasticity.curvature.problem import Progress, full_precision, parameters_named
from lightning_plasticity.diagnostics import Matrix, Source
from lightning_plasticity.distributed.agreement import format_error
from lightning_plasticity.isolation.precision import in_full_precision
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.messages import MisconfigurationError, SkippedBatchError

_FEWEST_SAMPLES = 8
"""Number of samples that are taken even if they cost more than ``max_steps``."""

_FEWEST_EXACT_SAMPLES = 32
"""Number of samples whose exact spectra say more than products on all samples."""

_SAMPLES_TO_CHECK = 8
"""Number of samples whose second derivatives are checked: they are wrong for every sample or for none."""


@dataclass(frozen=True)
class PartResult:
    """The block of each matrix that belongs to a part of the parameters.

    Args:
        spectra: The spectrum of the block of each matrix that was measured.
        kernel: The term of the tangent kernel that comes from these parameters.
    """

    spectra: dict[Matrix, Spectrum]
    kernel: TangentKernel


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe on one batch.

    Args:
        spectra: The spectrum of each matrix that was measured.
        loss: The loss on the probe's samples.
        samples: Number of samples that were measured; ``None`` if it is not known.
        outputs: Number of outputs of the network for one sample; ``None`` if they were not counted.
        remarks: What was left out or done otherwise than asked, a sentence each, for the report and the log.
        coupled: Whether the loss of a sample depends on others of its batch, so that batches must not be joined.
        limited: Whether there were more samples, which would have taken too long.
        kernel: The tangent kernel, if it was measured.
        parts: What was measured for parts of the network, by name.
        readiness: Optimization readiness of the samples; ``nan`` if it was not measured.
    """

    spectra: dict[Matrix, Spectrum]
    loss: float
    samples: int | None = None
    outputs: int | None = None
    remarks: tuple[str, ...] = ()
    coupled: bool = False
    limited: bool = False
    kernel: TangentKernel | None = None
    parts: dict[str, PartResult] = field(default_factory=dict)
    readiness: float = math.nan


class Probe(ABC):
    """A measurement of curvature at the start of a task: :class:`GGNProbe` or :class:`HessianProbe`."""

    samples: int
    """Number of samples that the probe takes, the first ones of the batch."""

    @property
    @abstractmethod
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices that the probe measures, the one that it is named after first."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """The sources of the diagnostics that the probe measures."""

    def check(self, context: ProbeContext) -> str | None:
        """Check whether the probe would measure correctly, before the first measurement of a fit.

        Args:
            context: The model, the batch and the loss.

        Returns:
            A warning, if there is a reason for one.

        Raises:
            MisconfigurationError: If the result would be wrong.
        """
        return None

    @abstractmethod
    def measure(self, context: ProbeContext, progress: Progress | None = None) -> ProbeResult:
        """Measure the spectra of a model on the first samples of the batch.

        Args:
            context: The model, the batch and the loss. A copy of the model is run for each attempt and each matrix.
            progress: Called after each product with a matrix, with the number of products done and of all of them.
        """


@dataclass(frozen=True)
class GGNProbe(Probe):
    """The tangent kernel on the first samples of a batch, with the Gauss-Newton matrix where that is affordable.

    The cheapest way that is right is taken, the same one at every task: the exact spectra of both matrices, or products
    with the tangent kernel, which give the learnable fraction as a bracket for any number of outputs. The report says
    what was left out. Only parameters that an optimizer holds count, so those of a target network do not.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole. All samples of the batch
            are taken for a loss that couples them, such as a contrastive one, which is another loss on fewer, and for
            a loss that cannot be computed on fewer, such as that of a graph. Coupling is seen by second derivatives: a
            loss without them that couples samples needs ``samples`` as large as the batch.
        max_rows: Largest number of outputs of all samples together for the exact spectra. Memory grows with its square.
        max_steps: Largest cost of a task, for the network and its initial weights together, in training steps, as
            estimated from the operations of a forward pass. Where the samples are too many for it, fewer are taken.
        positions: Largest number of output positions (tokens, pixels) of all samples together, for products. Of more, a
            random subset is taken, the same for the network and its initial weights. By default 4096, or fewer if they
            have more than half a million outputs together.
        seed: Seed of the subset of positions and of a start vector.
        parts: Parts of the network to measure beside the whole, each with a pattern of parameter names (``*`` and ``?``
            are wildcards) or a list of patterns. The numbers of the block of the Gauss-Newton matrix and of the term of
            the tangent kernel that belong to its parameters are logged as ``<name>/<part>``. ``"modules"`` takes each
            child of the module that has trained parameters; if there is one alone, its children, and so on. Each part
            costs about as much again as the whole, which ``max_steps`` does not count.

    Raises:
        ValueError: If an argument is not a positive number, a whole one other than for ``max_steps``, or ``parts`` are
            not given by patterns.

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback
        >>> callback = SpectralCollapseCallback(probe=GGNProbe(samples=32))
        >>> callback = SpectralCollapseCallback(probe=GGNProbe(parts={"actor": "actor.*", "critic": "critic.*"}))
    """

    samples: int = 64
    max_rows: int = 2048
    max_steps: float = 25
    positions: int | None = None
    seed: int = 0
    # Probes can be hashed, dictionaries cannot.
    parts: dict[str, str | list[str]] | Literal["modules"] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive_ints(owner, samples=self.samples, max_rows=self.max_rows)
        check_positive_ints(owner, optional=True, positions=self.positions)
        check_number("(0, inf)", owner, max_steps=self.max_steps)
        check_seed(self.seed, owner, minimum=0)
        if self.parts not in (None, "modules") and not _are_patterns(self.parts):
            raise ValueError(
                f"{owner}(parts={self.parts!r}) must be 'modules', None, or patterns of parameter names by part, such "
                "as {'actor': 'actor.*'}"
            )

    @property
    @override
    def matrices(self) -> tuple[Matrix, ...]:
        return ("ggn",)

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        return ("kernel", "gradients", "ggn")

    @override
    def check(self, context: ProbeContext) -> str | None:
        trained = context.trained_parameters
        for part, patterns in self.parts.items() if isinstance(self.parts, dict) else ():
            matching = parameters_named(context.model, patterns)
            # Frozen parameters may be trained later, as by Lightning's BackboneFinetuning.
            if not any(name in trained or not parameter.requires_grad for name, parameter in matching.items()):
                raise MisconfigurationError(
                    f"{type(self).__name__}(parts={{{part!r}: {patterns!r}}}) matches no parameter that is trained: "
                    f"the modules with trained parameters are {list(_by_module(trained))}"
                )
        return None

    @override
    def measure(self, context: ProbeContext, progress: Progress | None = None) -> ProbeResult:
        """Measure the spectra of a model on the first samples of the batch.

        Raises:
            ValueError: If the batch holds no samples.
        """
        available = context.batch_size
        if available == 0:
            raise ValueError("the batch holds no samples to probe on")
        samples = self.samples if available is None else min(self.samples, available)
        measurement, used, needs_all = None, samples, context.whole_batch and available is not None
        if not needs_all:
            try:
                measurement, used = self._measure(context, min(samples, context.max_samples or samples), progress)
            except Exception:
                if available is None or not _needs_whole_batch(context, min(samples, available - 1)):
                    raise
                needs_all = True
            else:
                needs_all = measurement.couples_samples and used < (available or 0)
        if measurement is None or needs_all:
            measurement, used = self._measure(context, available or samples, progress, whole=True)
        known = None if available is None else used
        reaches_limit = used < samples or used == context.max_samples or measurement.over_budget
        # Up to a few samples are taken whatever they cost.
        limited = not needs_all and used >= _FEWEST_SAMPLES and reaches_limit
        return ProbeResult(
            {} if measurement.spectrum is None else {"ggn": measurement.spectrum},
            measurement.loss,
            known,
            measurement.num_outputs // (known or 1),
            self._remarks(context, measurement, used, samples, limited=limited),
            measurement.couples_samples or needs_all,
            limited,
            measurement.kernel,
            {
                part: PartResult({} if block.spectrum is None else {"ggn": block.spectrum}, block.kernel)
                for part, block in measurement.parts.items()
            },
            measurement.readiness,
        )

    def _measure(
        self, context: ProbeContext, samples: int, progress: Progress | None, *, whole: bool = False
    ) -> tuple[KernelMeasurement, int]:
        """Return the measurement and its number of samples, fewer than asked where the budget is too small.

        Args:
            context: The model, the batch and the loss.
            samples: Number of samples to take.
            progress: Called after each product.
            whole: Whether to keep to the number of samples whatever the cost.
        """
        available = context.batch_size
        while True:
            model = context.copy_to_measure()
            budget = Budget(self.max_steps / 2, (context.samples_per_step or available or samples) / samples)
            with (
                _only_trained(model, context),
                in_full_precision(model, context.samples(samples)) as batch,
            ):
                try:
                    measurement = measure_within_budget(
                        model,
                        batch,
                        context.loss_on,
                        samples=None if available is None else samples,
                        max_rows=self.max_rows,
                        positions=self.positions,
                        budget=budget,
                        fewest_products=samples <= _FEWEST_SAMPLES or whole,
                        fewest_exact=math.inf if whole else _FEWEST_EXACT_SAMPLES,
                        parts=self._parts(context),
                        seed=self.seed,
                        progress=progress,
                    )
                    return measurement, samples
                except TooCostlyError as error:
                    samples = max(_FEWEST_SAMPLES, int(samples * error.affordable))

    def _parts(self, context: ProbeContext) -> dict[str, list[str]]:
        """Return the names of the trained parameters of each part."""
        trained = context.trained_parameters
        if self.parts == "modules":
            return _by_module(trained)
        selected = {part: parameters_named(context.model, patterns) for part, patterns in (self.parts or {}).items()}
        return {part: [name for name in names if name in trained] for part, names in selected.items()}

    def _remarks(
        self, context: ProbeContext, measurement: KernelMeasurement, used: int, wanted: int, *, limited: bool
    ) -> tuple[str, ...]:
        remarks = []
        if limited and used < self.samples:
            remarks.append(
                f"{used} samples were taken instead of {self.samples}, for max_steps={self.max_steps:g}: more would "
                "take too long"
            )
        if used > wanted:
            why = "depends on the others" if measurement.couples_samples else "cannot be computed without the others"
            remarks.append(f"all {used} samples were taken, because the loss of a sample {why}")
        if measurement.no_gauss_newton is not None:
            remarks.append(f"the numbers of the Gauss-Newton matrix are left out: {measurement.no_gauss_newton}")
        if measurement.products:
            remarks.append(
                f"the learnable fraction is a bracket, from {measurement.products} products with the tangent kernel"
            )
        if measurement.positions is not None:
            taken, total = measurement.positions
            remarks.append(f"{taken} of the {total} output positions of a sample were drawn at random")
        if measurement.held_constant:
            names = ", ".join(measurement.held_constant)
            remarks.append(f"terms and factors of the loss that depend on {names} alone are left out")
        for part, parameters in self._parts(context).items():
            if part not in measurement.parts:
                reason = "the loss does not depend on them" if parameters else "no optimizer trains them"
                remarks.append(f"the numbers of the parameters of {part!r} are left out: {reason}")
        return tuple(remarks)


@dataclass(frozen=True)
class HessianProbe(Probe):
    r"""The spectrum of the Hessian, negative curvature included, by stochastic Lanczos quadrature.

    It needs no closed forms: the model and the loss must be twice differentiable. Before the first measurement of a
    fit, the second derivatives of a few samples are compared with finite differences in float64, because torch computes
    some wrongly. A measurement takes ``num_probes * num_steps`` products with the Hessian, each as expensive as 1.4 to
    2 gradients of the samples. The start vectors are the same at every task.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each. More steps resolve smaller eigenvalues.
        seed: Seed of the start vectors.
        ggn: The probe of the Gauss-Newton matrix and the tangent kernel, which ``learnable_fraction`` needs. ``None``
            measures the Hessian alone, for losses and sizes that :class:`GGNProbe` does not support.

    Raises:
        ValueError: If a number is not a positive whole number (``seed``: or zero), or ``ggn`` is no :class:`GGNProbe`.

    References:
        Ghorbani et al. 2019, arXiv 1901.10159.

    Example:
        >>> from lightning_plasticity import Collapse, SpectralCollapseCallback
        >>> callback = SpectralCollapseCallback(probe=HessianProbe(num_steps=32))
        >>> callback = SpectralCollapseCallback(
        ...     probe=HessianProbe(ggn=None), collapse=Collapse("hessian_effective_rank")
        ... )
    """

    samples: int = 256
    num_probes: int = 8
    num_steps: int = 64
    seed: int = 0
    ggn: GGNProbe | None = field(default_factory=GGNProbe)

    _backend: ClassVar[Literal["native", "pyhessian"]] = "native"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive_ints(owner, samples=self.samples, num_probes=self.num_probes, num_steps=self.num_steps)
        check_seed(self.seed, owner, minimum=0)
        if self.ggn is not None and not isinstance(self.ggn, GGNProbe):
            raise ValueError(f"{type(self).__name__}(ggn={self.ggn!r}) must be a GGNProbe or None")

    @property
    @override
    def matrices(self) -> tuple[Matrix, ...]:
        return ("hessian",) if self.ggn is None else ("hessian", "ggn")

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        return ("hessian",) if self.ggn is None else ("hessian", *self.ggn.sources)

    @override
    def check(self, context: ProbeContext) -> str | None:
        if self.ggn is not None:
            self.ggn.check(context)
        try:
            self._check_second_derivatives(context)
        except DoubleBackwardError as error:
            advice = "" if REENTRANT in str(error) else ". Or use GGNProbe(), which needs first derivatives only"
            raise MisconfigurationError(
                f"{type(self).__name__} needs second derivatives of the loss. {error}{advice}"
            ) from error
        except ValueError as error:
            cause = error.__cause__
            if not isinstance(cause, RuntimeError) or isinstance(cause, torch.OutOfMemoryError):
                raise
            # The loss cannot be computed in float64. The Hessian, which is measured in float32, may still be right.
            return f"second derivatives could not be checked, so the Hessian's numbers may be wrong: {error}"
        return None

    @override
    def measure(self, context: ProbeContext, progress: Progress | None = None) -> ProbeResult:
        """Measure the spectra of a model on the first samples of the batch.

        Raises:
            MisconfigurationError: If the Gauss-Newton matrix cannot be measured beside the Hessian.
            ValueError: If the Hessian is not finite, or the loss does not depend on the model that ``loss_fn`` gets.
        """
        ggn = None if self.ggn is None else self._measure_ggn(self.ggn, context)
        model, loss = context.copy_to_measure(), float("nan")

        def recorded_loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal loss
            value = context.loss_on(model, batch)
            loss = value.item() if isinstance(value, Tensor) and value.numel() == 1 else loss
            return value

        with (
            self._advise_whole_batches(context),
            _only_trained(model, context),
            in_full_precision(model, context.samples(self.samples)) as batch,
        ):
            spectrum = hessian_spectrum(
                model,
                batch,
                recorded_loss,
                num_probes=self.num_probes,
                num_steps=self.num_steps,
                seed=self.seed,
                backend=self._backend,
                progress=progress,
                # All ranks have the same samples.
                distributed=False,
            )
        available = context.batch_size
        samples = None if available is None else min(self.samples, available)
        if ggn is None:
            return ProbeResult({"hessian": spectrum}, loss, samples)
        # The Hessian is measured on all samples, whatever that costs.
        return replace(ggn, spectra={"hessian": spectrum, **ggn.spectra}, loss=loss, samples=samples, limited=False)

    def _check_second_derivatives(self, context: ProbeContext) -> None:
        def check(samples: int) -> None:
            # As in hessian_spectrum.
            model = context.copy()
            with composed_weight_norm(), full_precision(), _only_trained(model, context):
                check_double_backward(model, context.samples(samples), context.loss_on, copy=False)

        try:
            check(_SAMPLES_TO_CHECK)
        except Exception:
            if not _needs_whole_batch(context, _SAMPLES_TO_CHECK):
                raise
            with self._advise_whole_batches(context):
                check(self.samples)

    def _advise_whole_batches(self, context: ProbeContext) -> contextlib.AbstractContextManager[None]:
        advice = f"{type(self).__name__}(samples={context.batch_size})"
        return _advise_whole_batches(advice, context, self.samples)

    def _measure_ggn(self, ggn: GGNProbe, context: ProbeContext) -> ProbeResult:
        try:
            return ggn.measure(context)
        except SkippedBatchError:
            raise
        except (UnsupportedModelError, MisconfigurationError) as error:
            name = type(self).__name__
            raise MisconfigurationError(
                f"{name} measures the Gauss-Newton matrix too, which failed: {error}. To measure the Hessian alone, "
                f"write {name}(ggn=None) and let Collapse watch one of its numbers"
            ) from error


@dataclass(frozen=True)
class PyHessianProbe(HessianProbe):
    """The spectrum of the Hessian by PyHessian's algorithms, for comparison with earlier results of PyHessian.

    It is slower than :class:`HessianProbe` and wrong for losses whose curvature is far below one, which collapsed
    networks have: see :func:`~lightning_plasticity.curvature.pyhessian.pyhessian_spectrum`.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each. More steps resolve smaller eigenvalues.
        seed: Seed of the start vectors.
        ggn: The probe of the Gauss-Newton matrix and the tangent kernel, as for :class:`HessianProbe`.

    Raises:
        ValueError: As for :class:`HessianProbe`.

    References:
        Yao, Gholami, Keutzer and Mahoney 2020, arXiv 1912.07145 (PyHessian).

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback
        >>> callback = SpectralCollapseCallback(probe=PyHessianProbe(num_probes=1))
    """

    _backend: ClassVar[Literal["native", "pyhessian"]] = "pyhessian"


@contextlib.contextmanager
def _advise_whole_batches(advice: str, context: ProbeContext, samples: int) -> Iterator[None]:
    """Explain errors of a loss that needs the whole batch.

    Args:
        advice: The probe to write instead.
        context: The model, the batch and the loss.
        samples: Number of samples that were taken.

    Raises:
        MisconfigurationError: In place of an error in the block, which is its cause. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if not _needs_whole_batch(context, samples):
            raise
        raise MisconfigurationError(
            f"{format_error(error)}. The loss can be computed on all {context.batch_size} samples of the batch, and "
            f"not on the first {samples} alone: write {advice}"
        ) from error


def _needs_whole_batch(context: ProbeContext, samples: int) -> bool:
    """Return whether the loss can be computed on the whole batch, and not on its first samples alone."""

    def works(batch: Any) -> bool:
        model = context.copy_to_measure()
        try:
            with in_full_precision(model, batch) as converted, probe_mode(model), full_precision():
                context.loss_on(model, converted)
        except Exception:
            return False
        return True

    return samples > 0 and not works(context.samples(samples)) and works(context.batch)


def _are_patterns(parts: object) -> bool:
    """Return whether parts of a network are given by patterns, a string or several strings for each name."""
    return (
        isinstance(parts, dict)
        and is_str_list(parts)
        and all(isinstance(patterns, str) or is_str_list(patterns) for patterns in parts.values())
    )


def _by_module(names: Collection[str]) -> dict[str, list[str]]:
    """Divide parameters by the first modules of which there are several, and return their names by module.

    Example:
        >>> _by_module(["net.0.weight", "net.0.bias", "net.2.weight"])
        {'net.0': ['net.0.weight', 'net.0.bias'], 'net.2': ['net.2.weight']}
    """
    depth = 0
    parts: dict[str, list[str]] = {}
    while names and len(parts) < 2 and not set(parts) & set(names):
        depth += 1
        parts = {}
        for name in names:
            parts.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    return parts


@contextlib.contextmanager
def _only_trained(model: nn.Module, context: ProbeContext) -> Iterator[None]:
    """Let no parameter of a copy require a gradient but those that are trained, and restore the others on exit.

    The outputs of a target network would count as network outputs otherwise.
    """
    trained = context.trained_parameters
    others = [p for name, p in model.named_parameters() if name not in trained and p.requires_grad]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
