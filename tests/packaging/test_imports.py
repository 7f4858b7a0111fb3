"""Tests of importing the package."""

import subprocess
import sys

import pytest

import lightning_plasticity


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_libraries(*names: str) -> str:
    """Import all modules of packages, and return which of Lightning and torchmetrics they import.

    One process imports several packages, because importing torch takes seconds.
    """
    return run(
        "import importlib, pkgutil, sys\n"
        f"for name in {names}:\n"
        "    package = importlib.import_module(f'lightning_plasticity.{name}')\n"
        "    for module in pkgutil.walk_packages(getattr(package, '__path__', []), f'{package.__name__}.'):\n"
        "        importlib.import_module(module.name)\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'torchmetrics'} & sys.modules.keys()))"
    )


def test_mathematics_imports_without_lightning_and_torchmetrics() -> None:
    names = ("curvature", "distributed", "functional", "interventions", "isolation", "layers", "messages", "context")
    assert imported_libraries(*names) == "[]"


def test_curvature_imports_without_matplotlib() -> None:
    assert run("import sys, lightning_plasticity.curvature; print('matplotlib' in sys.modules)") == "False"


def test_engine_imports_without_lightning() -> None:
    names = ("metrics", "activations", "engine", "collapse", "diagnostics", "probes", "reports")
    assert imported_libraries(*names) == "['torchmetrics']"


def test_imports_change_no_global_state() -> None:
    code = (
        "import sys, random, torch, lightning, numpy as np\n"
        "random.seed(0); np.random.seed(0); torch.manual_seed(0)\n"
        "def state(): return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),\n"
        "    torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), sys.path[:])\n"
        "before = state()\n"
        "import lightning_plasticity.callback\n"
        "print(state() == before)"
    )
    assert run(code) == "True"


def test_every_public_name_can_be_imported() -> None:
    for name in lightning_plasticity.__all__:
        assert getattr(lightning_plasticity, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        lightning_plasticity.Nothing  # noqa: B018
