"""What importing does, and does not do."""

import subprocess
import sys

import pytest

import lightning_plasticity


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("room", ["curvature", "curvature.pyhessian", "functional", "interventions", "isolation"])
def test_the_mathematics_imports_without_lightning(room: str) -> None:
    loaded = run(
        f"import sys, lightning_plasticity.{room}; "
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'torchmetrics')])"
    )
    assert loaded == "[]"


def test_metrics_import_without_lightning() -> None:
    loaded = run(
        "import sys, lightning_plasticity.metrics; "
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    assert loaded == "[]"


def test_importing_everything_changes_nothing_global() -> None:
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


def test_every_public_name_is_there() -> None:
    for name in lightning_plasticity.__all__:
        assert getattr(lightning_plasticity, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        lightning_plasticity.Nothing  # noqa: B018
