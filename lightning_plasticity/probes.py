"""How is curvature measured at the start of a task? On the first samples of a batch, as one matrix or another."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_plasticity._validation import check_seed, is_int
from lightning_plasticity.curvature import Spectrum, TooManyRowsError, UnsupportedModelError, hessian_spectrum
from lightning_plasticity.curvature.double_backward import (
    DoubleBackwardError,
    check_double_backward,
    composed_weight_norm,
)
from lightning_plasticity.curvature.double_backward_causes import REENTRANT
from lightning_plasticity.curvature.exact.gram import gram
from lightning_plasticity.curvature.problem import HALF, Progress, full_precision
from lightning_plasticity.diagnostics import Matrix
from lightning_plasticity.distributed.agreement import format_error
from lightning_plasticity.isolation.batches import batch_size, slice_batch
from lightning_plasticity.isolation.state import probe_mode
from lightning_plasticity.training.sandbox import LossFunction

MakeCopy = Callable[[], LightningModule]
"""Makes a copy of the module that may be used up."""

_SAMPLES_TO_CHECK = 8
"""Second derivatives are wrong for every sample or for none; these few cost next to nothing."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe saw on one batch.

    Args:
        spectra: The spectrum of each matrix that the probe measures.
        loss: The loss on the probe's samples.
    """

    spectra: dict[Matrix, Spectrum]
    loss: float


class Probe(ABC):
    """How curvature is measured at the start of a task: a :class:`GGNProbe` or a :class:`HessianProbe`."""

    samples: int
    """How many samples of the batch it takes, the first ones."""

    @property
    @abstractmethod
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices that it measures, the one that it is named after first."""

    def check(self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction) -> str | None:
        """Whether what it measures would be right. To be asked before the first measurement of a fit.

        Args:
            make_copy: Makes a copy of the module that may be used up.
            batch: The batch, on the module's device. It is not changed.
            loss_fn: The loss of a module on a batch.

        Returns:
            What to warn of, if anything.

        Raises:
            MisconfigurationException: If it would be wrong.
        """
        return None

    @abstractmethod
    def measure(
        self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction, progress: Progress | None = None
    ) -> ProbeResult:
        """Probes a module on a batch.

        Args:
            make_copy: Makes a copy of the module that may be used up.
            batch: The batch, on the module's device. It is not changed.
            loss_fn: The loss of a module on a batch.
            progress: Called with the number of products with the matrix done, and the number of all of them.
        """


@dataclass(frozen=True)
class GGNProbe(Probe):
    """The exact spectra of the Gauss-Newton matrix and of the tangent kernel on the first samples of a batch.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        max_rows: Bound on the rows of the Gram matrix (samples times outputs a sample). Time grows with its cube,
            memory with its square. Where it is exceeded, fewer samples are taken.

    Raises:
        ValueError: If an argument is not a positive whole number.

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback
        >>> callback = SpectralCollapseCallback(probe=GGNProbe(samples=32))
    """

    samples: int = 64
    max_rows: int = 2048

    def __post_init__(self) -> None:
        _check_whole_numbers(self, "samples", "max_rows")

    @property
    @override
    def matrices(self) -> tuple[Matrix, ...]:
        return ("ggn",)

    @override
    def measure(
        self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction, progress: Progress | None = None
    ) -> ProbeResult:
        """Probes a module on a batch.

        Raises:
            MisconfigurationException: If one sample alone has more outputs than ``max_rows``.
        """
        available = batch_size(batch)
        if available == 0:
            raise ValueError("the batch holds no samples to probe on")
        samples = self.samples if available is None else min(self.samples, available)
        advice = f"GGNProbe(samples={available})"
        while True:
            try:
                known = None if available is None else samples
                module, some = _in_full_precision(make_copy(), slice_batch(batch, samples))
                with _asking_for_whole_batches(advice, make_copy, batch, samples, loss_fn):
                    result = gram(module, some, loss_fn, samples=known, max_rows=self.max_rows)
                return ProbeResult({"ggn": result.spectrum()}, result.loss)
            except TooManyRowsError as error:
                advice = f"GGNProbe(samples={available}, max_rows={error.rows // samples * (available or 1)})"
                fewer = min(samples - 1, samples * self.max_rows // error.rows)
                if available is None or fewer < 1:
                    raise MisconfigurationException(
                        f"one sample has {error.rows // samples} outputs, more than "
                        f"GGNProbe(max_rows={self.max_rows}): raise max_rows, or pass a loss_fn on fewer outputs"
                    ) from error
                samples = fewer


@dataclass(frozen=True)
class HessianProbe(Probe):
    r"""The spectrum of the Hessian, negative curvature included, by stochastic Lanczos quadrature.

    It knows no closed forms and takes any model and loss that can be differentiated twice. Before the first
    measurement of a fit, the second derivatives of a few samples are compared with finite differences in float64: some
    that torch offers are wrong. A measurement takes ``num_probes * num_steps`` products with the Hessian, each about
    1.4 to 2 gradients of the samples. The start vectors are the same at every task.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each. The more, the smaller the eigenvalues that are resolved.
        seed: Seed of the start vectors.
        ggn: Measures the Gauss-Newton matrix and the tangent kernel beside it, which ``learnable_fraction`` needs.
            ``None`` leaves them out: for losses and sizes that it cannot deal with.

    Raises:
        ValueError: If a number is not a positive whole number (``seed``: or zero), or ``ggn`` something else.

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
        _check_whole_numbers(self, "samples", "num_probes", "num_steps")
        _check_whole_numbers(self, "seed", at_least=0)
        check_seed(self.seed)
        if self.ggn is not None and not isinstance(self.ggn, GGNProbe):
            raise ValueError(f"{type(self).__name__}(ggn={self.ggn!r}) must be a GGNProbe or None")

    @property
    @override
    def matrices(self) -> tuple[Matrix, ...]:
        return ("hessian",) if self.ggn is None else ("hessian", "ggn")

    @override
    def check(self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction) -> str | None:
        try:
            self._check_second_derivatives(make_copy, batch, loss_fn)
        except DoubleBackwardError as error:
            advice = "" if REENTRANT in str(error) else ". Or use GGNProbe(), which needs first derivatives only"
            raise MisconfigurationException(
                f"{type(self).__name__} needs second derivatives of the loss. {error}{advice}"
            ) from error
        except ValueError as error:
            cause = error.__cause__
            if not isinstance(cause, RuntimeError) or isinstance(cause, torch.OutOfMemoryError):
                raise
            # The loss cannot be computed in float64: that is no fault of the Hessian, which is taken in float32.
            return f"second derivatives could not be checked, so the Hessian's numbers are on trust: {error}"
        return None

    @override
    def measure(
        self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction, progress: Progress | None = None
    ) -> ProbeResult:
        """Probes a module on a batch.

        Raises:
            MisconfigurationException: If the Gauss-Newton matrix cannot be measured beside the Hessian.
            ValueError: If the Hessian is not finite, or the loss is not of the module that ``loss_fn`` was given.
        """
        beside = {} if self.ggn is None else self._measure_ggn(self.ggn, make_copy, batch, loss_fn)
        loss = float("nan")

        def observed(module: LightningModule, batch: Any) -> Tensor:
            nonlocal loss
            value = loss_fn(module, batch)
            loss = value.item() if isinstance(value, Tensor) and value.numel() == 1 else loss
            return value

        module, some = _in_full_precision(make_copy(), slice_batch(batch, self.samples))
        with self._asking_for_whole_batches(make_copy, batch, loss_fn):
            spectrum = hessian_spectrum(
                module,
                some,
                observed,
                num_probes=self.num_probes,
                num_steps=self.num_steps,
                seed=self.seed,
                backend=self._backend,
                progress=progress,
                distributed=False,  # all processes have the same samples
            )
        return ProbeResult({"hessian": spectrum, **beside}, loss)

    def _check_second_derivatives(self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction) -> None:
        def check(samples: int) -> None:
            with composed_weight_norm():  # as hessian_spectrum does
                check_double_backward(make_copy(), slice_batch(batch, samples), loss_fn, copy=False)

        try:
            check(_SAMPLES_TO_CHECK)
        except Exception:
            if not _needs_whole(make_copy, batch, _SAMPLES_TO_CHECK, loss_fn):
                raise
            with self._asking_for_whole_batches(make_copy, batch, loss_fn):
                check(self.samples)

    def _asking_for_whole_batches(
        self, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction
    ) -> contextlib.AbstractContextManager[None]:
        advice = f"{type(self).__name__}(samples={batch_size(batch)})"
        return _asking_for_whole_batches(advice, make_copy, batch, self.samples, loss_fn)

    def _measure_ggn(
        self, ggn: GGNProbe, make_copy: MakeCopy, batch: Any, loss_fn: LossFunction
    ) -> dict[Matrix, Spectrum]:
        try:
            return ggn.measure(make_copy, batch, loss_fn).spectra
        except (UnsupportedModelError, MisconfigurationException) as error:
            name = type(self).__name__
            raise MisconfigurationException(
                f"{name} measures the Gauss-Newton matrix too, which failed: {error}. To measure the Hessian alone, "
                f"write {name}(ggn=None) and let Collapse watch one of its numbers"
            ) from error


@dataclass(frozen=True)
class PyHessianProbe(HessianProbe):
    """The spectrum of the Hessian by PyHessian's algorithms: for comparison with what was measured with it before.

    It is slower than :class:`HessianProbe` and wrong for losses whose curvature is far below one, which collapsed
    networks have: see :func:`~lightning_plasticity.curvature.pyhessian.pyhessian_spectrum`.

    Args:
        samples: Number of samples, the first ones of the batch; a smaller batch is used whole.
        num_probes: Number of start vectors: with more than one, the estimates have standard errors.
        num_steps: Lanczos steps for each. The more, the smaller the eigenvalues that are resolved.
        seed: Seed of the start vectors.
        ggn: Measures the Gauss-Newton matrix and the tangent kernel beside it, as of :class:`HessianProbe`.

    Raises:
        ValueError: As of :class:`HessianProbe`.

    References:
        Yao, Gholami, Keutzer and Mahoney 2020, arXiv 1912.07145 (PyHessian).

    Example:
        >>> from lightning_plasticity import SpectralCollapseCallback
        >>> callback = SpectralCollapseCallback(probe=PyHessianProbe(num_probes=1))
    """

    _backend: ClassVar[Literal["native", "pyhessian"]] = "pyhessian"


@contextlib.contextmanager
def _asking_for_whole_batches(
    advice: str, make_copy: MakeCopy, batch: Any, samples: int, loss_fn: LossFunction
) -> Iterator[None]:
    """Says what to write where something has failed since the loss needs the whole batch.

    Args:
        advice: What to write.
        make_copy: Makes a copy of the module that may be used up.
        batch: The batch.
        samples: How many samples of it were taken.
        loss_fn: The loss of a module on a batch.

    Raises:
        MisconfigurationException: In place of the error, which is its cause. Other errors pass.
    """
    try:
        yield
    except TooManyRowsError:
        raise
    except Exception as error:
        if not _needs_whole(make_copy, batch, samples, loss_fn):
            raise
        raise MisconfigurationException(
            f"{format_error(error)}. The loss can be computed on all {batch_size(batch)} samples of the batch, and not "
            f"on the first {samples} alone: write {advice}"
        ) from error


def _needs_whole(make_copy: MakeCopy, batch: Any, samples: int, loss_fn: LossFunction) -> bool:
    """Whether the loss can be computed on the batch, and not on its first samples alone."""

    def works(batch: Any) -> bool:
        module, batch = _in_full_precision(make_copy(), batch)
        try:
            with probe_mode(module), full_precision():
                loss_fn(module, batch)
        except Exception:
            return False
        return True

    return samples < (batch_size(batch) or 0) and not works(slice_batch(batch, samples)) and works(batch)


def _check_whole_numbers(probe: Probe, *names: str, at_least: int = 1) -> None:
    for name in names:
        value = getattr(probe, name)
        if not is_int(value) or value < at_least:
            raise ValueError(f"{type(probe).__name__}({name}={value!r}) must be a whole number, {at_least} or larger")


def _in_full_precision(module: LightningModule, batch: Any) -> tuple[LightningModule, Any]:
    """Half precision, in which curvature drowns in rounding errors, as float32; the module is changed."""
    if any(p.dtype in HALF for p in module.parameters()):
        module = module.float()
        batch = apply_to_collection(batch, Tensor, lambda t: t.float() if t.is_floating_point() else t)
    return module, batch
