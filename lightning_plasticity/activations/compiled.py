"""Finding code that nobody can look into while it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


def without_wrappers(path: str) -> str:
    """The path of a module as its author knows it."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def compiled_modules(network: nn.Module) -> list[str]:
    """The compiled modules of a network, as text.

    Raises:
        RuntimeError: If there is a scripted one.
    """
    compiled: dict[str, None] = {}
    for path, module in network.named_modules():
        name = repr(without_wrappers(path)) if without_wrappers(path) else "the network itself"
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError(f"PlasticityMonitor cannot look into TorchScript ({name}): attach it before scripting")
        # Of a compiled LightningModule the Trainer keeps but the methods: torch marks them.
        method = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        in_place = getattr(module, "_compiled_call_impl", None) is not None
        if in_place or method or isinstance(module, _optimized_module()):
            compiled[name] = None
    return list(compiled)


def compiler_is_loaded() -> bool:
    """Whether anything can have been compiled; to ask the compiler itself would import it."""
    return "torch._dynamo" in sys.modules


_uncompiled = contextlib.ExitStack()
_users = 0


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Runs compiled code uncompiled, until the last of all who want it has left: in any order."""
    global _users
    if not _users:
        _uncompiled.enter_context(torch.compiler.set_stance("force_eager"))  # acts when it is built
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
            _uncompiled.close()


def _optimized_module() -> tuple[type, ...]:
    return (sys.modules["torch._dynamo"].OptimizedModule,) if compiler_is_loaded() else ()
