"""Tests that modules read no private names of others, and only ``_compat`` those of Lightning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# The documented packages of Lightning, which all modules may import from.
PUBLIC = {
    "lightning",
    "lightning.pytorch",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.cli",
    "lightning.pytorch.demos",
    "lightning.pytorch.demos.boring_classes",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins.precision",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer.states",
    "lightning.pytorch.tuner",
    "lightning.pytorch.utilities",
    "lightning.pytorch.utilities.exceptions",
    "lightning.pytorch.utilities.rank_zero",
}

# Names with an underscore that modules of the package may read from other objects than self. None is Lightning's.
ALLOWED = {
    # torch.nn.Module: its contents, which no public name can write to, and how it is loaded and moved
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_pre_hooks",
    "_apply",
    "_load_from_state_dict",
    # torch: base classes of layers, and functions without a public name
    "_ConvNd",
    "_ConvTransposeNd",
    "_NormBase",
    "_weight_norm",
    # torch: one operation on a list of tensors, as the optimizers of torch use
    "_foreach_add_",
    "_foreach_mul",
    "_foreach_norm",
    # torch: the base of a view, the number of in-place changes, and what a node of the graph has saved and takes
    "_base",
    "_is_view",
    "_version",
    "_saved_dim",
    "_input_metadata",
    # torch: the workers that a data loader keeps for the next epoch
    "_iterator",
    # torch: the lists of weights in recurrent layers
    "_flat_weights",
    "_flat_weight_refs",
    # torch: whether a module is compiled, and whether code runs within torch.func or a backward pass
    "_C",
    "_compiled_call_impl",
    "_current_graph_task_id",
    "_functorch",
    "_torchdynamo_orig_callable",
    # torchmetrics: whether compute() synchronises ranks, which sync_on_compute sets only in the constructor
    "_to_sync",
    # this package: another object of the same class, and methods of a base class
    "_sync_shapes",
    "_network",
}

# Names without an underscore that Lightning does not document, or whose contents it does not document.
UNDOCUMENTED = {"fit_loop", "lr_scheduler_configs", "scaler", "train_progress_bar", "train_progress_bar_id"}

ROOT = Path(__file__).parents[2]


def forbidden_reads(source: str) -> list[str]:
    """Return the private names that a module reads from other objects although they are not allowed."""
    return [f"line {line}: {name}" for line, name in private_reads(ast.parse(source)) if name not in ALLOWED]


def private_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the private names that are read from other objects than ``self`` and ``cls``, also as strings."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, name
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                if is_private(name):
                    yield node.lineno, name
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="__dict__")), args=[ast.Constant(value=name), *_]
            ):
                if is_private(name):
                    yield node.lineno, name


def private_imports(source: str) -> list[str]:
    """Return what a module imports from Lightning that is not public."""
    private = []
    for node in ast.walk(ast.parse(source)):
        modules: dict[str, list[str]] = {}
        if isinstance(node, ast.Import):
            modules = {alias.name: [] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules = {node.module: [alias.name for alias in node.names]}
        for module, names in modules.items():
            if module.split(".")[0] in ("lightning", "pytorch_lightning"):
                if module not in PUBLIC:
                    private.append(module)
                private += [f"{module}.{name}" for name in names if is_private(name)]
    return private


def is_private(name: object) -> bool:
    return isinstance(name, str) and (name in UNDOCUMENTED or (name.startswith("_") and not name.startswith("__")))


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.name != "_compat.py"]


def test_only_compat_imports_private_names_of_lightning() -> None:
    forbidden = {
        str(path.relative_to(ROOT)): private_imports(path.read_text())
        for path in files("lightning_plasticity", "tests", "examples", "benchmarks")
    }
    assert not {path: names for path, names in forbidden.items() if names}


def test_only_compat_reads_private_names_of_others() -> None:
    forbidden = {
        str(path.relative_to(ROOT)): forbidden_reads(path.read_text()) for path in files("lightning_plasticity")
    }
    assert not {path: names for path, names in forbidden.items() if names}


def test_every_allowed_name_is_read() -> None:
    names = {name for path in files("lightning_plasticity") for _, name in private_reads(ast.parse(path.read_text()))}
    assert names >= ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "trainer._logger_connector.should_update_logs",
        "trainer.lr_scheduler_configs[0]",
        "part._trainer = None",
        "getattr(module, '_compiler_ctx', None)",
        "module.__dict__.get('_compiler_ctx')",
        "self._trainer._results",
    ],
)
def test_private_reads_are_detected(source: str) -> None:
    assert len(forbidden_reads(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector",
        "from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature",
        "from lightning.pytorch.utilities import _something",
        "import lightning.pytorch.loops",
        "def later():\n    from pytorch_lightning.loops import _FitLoop",
    ],
)
def test_private_imports_are_detected(source: str) -> None:
    assert private_imports(source)
