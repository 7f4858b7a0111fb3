"""Restore modes, buffers, random number generators and the default dtype after a probe."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the state of every global random number generator on exit."""
    # NumPy's legacy generator is the global one, so it is the one to restore.
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Reading the state of CUDA's generators would initialise CUDA.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def repeatable_rng() -> Iterator[None]:
    """Draw the same random numbers from every global generator each time, and restore their states on exit."""
    with isolated_rng():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        # torch.manual_seed takes ten times as long: it prepares to seed devices that are never used.
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        yield


@contextlib.contextmanager
def _force_eager() -> Iterator[None]:
    """Run compiled modules uncompiled, since hooks do not run in compiled code."""
    # Without this check, set_stance would import the compiler for models that are not compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    # set_stance takes effect when it is called, so the call must not be moved out of the with statement.
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore the modes and buffers of all modules on exit.

    The attribute ``training`` is set directly, because some modules override ``train`` and ``eval`` to do more, such as
    to merge weights.
    """
    with preserve_buffers(model):
        for module in model.modules():
            module.training = False
        yield


@contextlib.contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the modes and buffers of all modules on exit."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    tensors = [buffer for module_buffers in buffers for buffer in module_buffers.values() if buffer is not None]
    # The forward pass of an embedding with max_norm renormalises its weight in place.
    tensors += [m.weight for m in modules if isinstance(m, nn.Embedding) and m.max_norm is not None]
    # Inference tensors cannot be changed in place.
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]
    saved = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    try:
        yield
    finally:
        for module, training, module_buffers in zip(modules, modes, buffers, strict=True):
            module.training = training
            # The buffers of a scripted module cannot be replaced.
            if not isinstance(module, torch.jit.ScriptModule):
                module._buffers.update(module_buffers)
        with torch.no_grad():
            for tensor, (value, version) in zip(tensors, saved, strict=True):
                if _has_changed(tensor, value, version):
                    tensor.copy_(value)


def _has_changed(tensor: Tensor, before: Tensor, version: int) -> bool:
    if tensor.layout is torch.strided:
        return not torch.equal(tensor, before)
    # torch.equal does not support all sparse layouts.
    return tensor._version != version


@contextlib.contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers without cuDNN, which has no backward pass in evaluation mode and no double backward."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors in float64 if the dtype is float64, as a Trainer with ``precision="64-true"`` does."""
    before = torch.get_default_dtype()
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of a model; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


_probe_depth: ContextVar[int] = ContextVar("probe_depth", default=0)


def probe_depth() -> int:
    """Return the number of :func:`probe_mode` blocks around the caller.

    Monitors compare it with the depth at which they were started, so that they do not record the runs of a probe.
    """
    return _probe_depth.get()


@contextlib.contextmanager
def probe_mode(model: nn.Module) -> Iterator[None]:
    """Enter the state that all probes run in, and restore the previous one on exit.

    It consists of evaluation mode, isolated random numbers, enabled gradients, and no inference mode, autocast,
    compiled code or cuDNN recurrence.

    Raises:
        ValueError: If the model is on the meta device.
    """
    with isolated(model), eval_mode(model), differentiable_recurrence(model):
        yield


@contextlib.contextmanager
def training_trial(model: nn.Module) -> Iterator[None]:
    """Enter the state in which copies of a model are trained, and restore the previous one on exit, but for parameters.

    It is that of :func:`probe_mode`, in the modes that the modules are in.
    """
    with isolated(model), preserve_buffers(model):
        yield


@contextlib.contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Enter the state in which a copy of a model is trained for good, and restore the previous one on exit.

    It is that of :func:`training_trial`, but buffers and modes of the copy stay as training leaves them.

    Raises:
        ValueError: If the model is on the meta device.
    """
    device = device_of(model).type
    if device == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device, where weights have no values: load them first")
    with (
        isolated_rng(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
        _force_eager(),
    ):
        token = _probe_depth.set(_probe_depth.get() + 1)
        try:
            yield
        finally:
            _probe_depth.reset(token)
