"""Detect modules compiled by torch.compile or TorchScript, which cannot be observed, and run them uncompiled."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


def without_wrappers(path: str) -> str:
    """Return the path of a module without the parts that ``torch.compile`` adds.

    Example:
        >>> without_wrappers("encoder._orig_mod.fc")
        'encoder.fc'
    """
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def compiled_modules(network: nn.Module) -> list[str]:
    """Return the compiled modules of a network, as text for an error message.

    Raises:
        RuntimeError: If one is a TorchScript module.
    """
    compiled: dict[str, None] = {}
    for path, module in network.named_modules():
        name = repr(without_wrappers(path)) if without_wrappers(path) else "the network itself"
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(f"PlasticityMonitor cannot observe TorchScript ({name}): attach it before scripting")
        # The Trainer unwraps a compiled LightningModule and keeps its compiled methods, which torch marks.
        has_compiled_method = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        if in_place or has_compiled_method or isinstance(module, _optimized_module()):
            compiled[name] = None
    return list(compiled)


def compiler_is_loaded() -> bool:
    """Return whether anything can have been compiled, without importing the compiler."""
    return "torch._dynamo" in sys.modules


_uncompiled = contextlib.ExitStack()
_users = 0


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code uncompiled until the last of all users has left, in any order."""
    global _users
    if not _users:
        # The stance is set when it is constructed.
        _uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            _uncompiled.close()


def _optimized_module() -> tuple[type, ...]:
    return (sys.modules["torch._dynamo"].OptimizedModule,) if compiler_is_loaded() else ()
