"""Estimate what a measurement costs, in training steps, before it is made.

The estimate is computed from counts, not from a clock: the same model is measured in the same way in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

_SECONDS_PER_FLOP = {"cpu": 5e-11, "cuda": 1e-13}
"""Time of a floating point operation of a matrix product, by type of device; that of a GPU for any other."""

_SECONDS_PER_FLOP_OF_EIGENVALUES = {"cpu": 1e-10, "cuda": 1e-12}
"""The same for eigenvalues."""

_SECONDS_PER_PAIR_OF_ROWS = {"cpu": 8e-8, "cuda": 1e-10}
"""Time of all else for each entry of the Gram matrix: to add up its terms, and to multiply vectors by it."""

_SECONDS_PER_CALL = 8e-6
"""Time to call an operation, whatever its size."""

_SECONDS_PER_LANCZOS_STEP = 1.5e-3
"""Time of a step of Lanczos outside of the product, whatever the size."""

_SECONDS_PER_LANCZOS_ROW = 3e-8
"""Time of a step of Lanczos for each entry of its vectors."""

_SECONDS_PER_HESSIAN_PRODUCT = 5e-4
"""Time of a product with the Hessian of the loss, whose graph is short."""

_SECONDS_PER_LOOP = 3e-4
"""Time of a training step outside of a Trainer and of its passes."""

_SECONDS_PER_STEP = 1e-3
"""Time of a training step of a Trainer outside of forward and backward passes."""


class ForwardCounter(TorchDispatchMode):
    """A mode that counts the operations of a forward pass.

    Example:
        >>> with ForwardCounter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.flops
        48
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.calls = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        elif "rnn" in str(func):
            # torch does not count recurrent layers that are one operation: each matrix multiplies each position.
            positions = args[0].numel() // args[0].shape[-1]
            weights = args[1] if isinstance(args[1], list | tuple) else args[1:3]
            self.flops += 2 * positions * sum(weight.numel() for weight in weights if weight.dim() == 2)
        return result


class TooCostlyError(RuntimeError):
    """Raised when a measurement would cost more than its budget.

    Args:
        steps: The estimated cost in training steps.
        budget: The budget.
        affordable: The share of the samples that the same measurement could afford, as far as it is known.
    """

    def __init__(self, steps: float, budget: Budget, affordable: float = 0.0) -> None:
        super().__init__(f"it would cost {steps:.0f} training steps, more than {budget.steps:.0f}")
        self.affordable = affordable


@dataclass(frozen=True)
class Budget:
    """The largest cost of a measurement, in training steps.

    Args:
        steps: Number of training steps.
        samples_per_step: Number of samples of a training step, as a multiple of those of the measurement.
    """

    steps: float
    samples_per_step: float = 1.0


@dataclass(frozen=True)
class Cost:
    """The estimated time of the passes of a measurement.

    Args:
        flops: Floating point operations of the forward pass of the measurement.
        calls: Number of operations of that pass.
        device: The device.
        num_parameters: Number of trainable parameters.
    """

    flops: int
    calls: int
    device: torch.device
    num_parameters: int

    @property
    def backward_pass(self) -> float:
        """Seconds of a backward pass from the outputs: two products for each of the forward pass."""
        return self._matrix_products(2 * self.flops) + 2 * self.calls * _SECONDS_PER_CALL

    def kernel_product(self, rows: int) -> float:
        """Return the seconds of a product with the tangent kernel: a backward pass, one through its graph, and Lanczos.

        Args:
            rows: Number of outputs of the batch.
        """
        return 3.3 * self.backward_pass + _SECONDS_PER_LANCZOS_STEP + rows * _SECONDS_PER_LANCZOS_ROW

    def hessian_products(self, count: int) -> float:
        """Return the seconds of products with the Hessian of the loss with respect to the outputs."""
        return count * _SECONDS_PER_HESSIAN_PRODUCT

    def training_steps(self, samples_per_step: float) -> float:
        """Return the cost of a training step outside of a Trainer on these samples, in training steps of the Trainer.

        Args:
            samples_per_step: Number of samples of a training step of the Trainer, as a multiple of these.
        """
        seconds = self._matrix_products(3 * self.flops + 50 * self.num_parameters) + _SECONDS_PER_LOOP
        seconds += 3 * self.calls * _SECONDS_PER_CALL
        return self.in_steps(seconds, Budget(1, samples_per_step))

    def in_steps(self, seconds: float, budget: Budget) -> float:
        """Convert seconds to training steps."""
        passes = self._matrix_products(budget.samples_per_step * 3 * self.flops) + 3 * self.calls * _SECONDS_PER_CALL
        # An optimizer like Adam reads and writes each parameter and its moments.
        step = passes + self._matrix_products(50 * self.num_parameters) + _SECONDS_PER_STEP
        return seconds / step

    def exact(self, rows: int, rows_per_sample: int, shared_parameters: int) -> float:
        """Return the seconds of the exact spectra.

        Args:
            rows: Number of outputs :math:`m` of the batch.
            rows_per_sample: Number of outputs of a sample, each of which takes a backward pass.
            shared_parameters: Number of parameters that are used at many positions of a sample, and so need a Jacobian.
        """
        eigenvalues = 2 * rows**3 * _rate(_SECONDS_PER_FLOP_OF_EIGENVALUES, self.device)
        entries = rows**2 * _rate(_SECONDS_PER_PAIR_OF_ROWS, self.device)
        # The lower half of J Jᵀ alone is computed.
        jacobians = rows_per_sample * self.backward_pass + self._matrix_products(rows**2 * shared_parameters)
        return jacobians + entries + eigenvalues

    def _matrix_products(self, flops: float) -> float:
        return flops * _rate(_SECONDS_PER_FLOP, self.device)


def _rate(rates: dict[str, float], device: torch.device) -> float:
    return rates.get(device.type, rates["cuda"])
