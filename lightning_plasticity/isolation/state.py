"""Probing leaves no trace: modes, buffers, random numbers and precision are put back as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores the state of every global random number generator, also after an exception."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global generator is what must be kept)
    # CUDA is left alone as long as nobody has initialised it: asking for its state would.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Runs compiled modules uncompiled: their calls cannot be watched, and their hooks may be dead."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and asking would import the compiler
        yield
        return
    with torch.compiler.set_stance("force_eager"):  # acts when it is built, not when it is entered
        yield


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode; restores each one's mode and buffers, also after an exception.

    Modules do not hear of it: some do more in their ``train`` and ``eval``, such as to merge weights.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    tensors = [buffer for own in buffers for buffer in own.values() if buffer is not None]
    tensors += [m.weight for m in modules if isinstance(m, nn.Embedding) and m.max_norm is not None]  # renormalised
    tensors = [tensor for tensor in tensors if not tensor.is_inference()]  # which nobody can change in place
    values = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training, own in zip(modules, modes, buffers, strict=True):
            module.training = training
            if not isinstance(module, torch.jit.ScriptModule):  # whose buffers nobody can replace
                module._buffers.update(own)
        with torch.no_grad():
            for tensor, (value, version) in zip(tensors, values, strict=True):
                if _has_changed(tensor, value, version):
                    tensor.copy_(value)


def _has_changed(tensor: Tensor, before: Tensor, version: int) -> bool:
    if tensor.layout is torch.strided:
        return not torch.equal(tensor, before)
    return tensor._version != version  # torch does not compare the values of sparse tensors


@contextlib.contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers without cuDNN: its own have no backward pass in evaluation mode, and no second one at all."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors in float64 where that is what weights are, as a Trainer with ``precision="64-true"`` has it."""
    before = torch.get_default_dtype()
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def probe_mode(model: nn.Module) -> Iterator[None]:
    """What every probe runs in: evaluation mode, random numbers of its own, gradients, no autocast, no compiler."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if device == "meta":
        raise ValueError(f"{type(model).__name__} is on the meta device, where weights have no values: load them first")
    with (
        isolated_rng(),
        eval_mode(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
        _eager(),
        differentiable_recurrence(model),
    ):
        yield
