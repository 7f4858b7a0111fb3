"""Public names are easy to find: by tab completion, in the help and in configuration files."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from pathlib import Path

import lightning_plasticity

SCRIPT = """
{imports}
from lightning.pytorch.demos.boring_classes import BoringModel
cli = LightningCLI(BoringModel, run=False, args=["--config", "config.yaml"], save_config_callback=None)
print([type(callback).__name__ for callback in cli.trainer.callbacks][:1], cli.trainer.callbacks[0])
"""

CONFIG = """
trainer:
  logger: false
  callbacks:
    - class_path: SpectralCollapseCallback
      init_args:
        probe: {class_path: HessianProbe, init_args: {num_steps: 8}}
        interventions:
          - class_path: ReDo
          - class_path: ShrinkPerturb
            init_args: {when: task}
"""


def test_dir_lists_the_public_names() -> None:
    assert set(dir(lightning_plasticity)) >= set(lightning_plasticity.__all__)
    assert not [name for name in dir(lightning_plasticity) if name.startswith("_") and name != "__version__"]


def test_help_names_every_public_class_with_a_line() -> None:
    text = pydoc.render_doc(lightning_plasticity, renderer=pydoc.plaintext)
    description = text.partition("PACKAGE CONTENTS")[0]
    for name in lightning_plasticity.__all__:
        if name != "__version__":
            (line,) = [line for line in description.splitlines() if f"``{name}``" in line]
            assert len(line.split(maxsplit=1)[1]) > 20


def test_short_class_names_work_in_configuration_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    imports = "from lightning.pytorch.cli import LightningCLI\nimport lightning_plasticity"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(imports=imports)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "['SpectralCollapseCallback']" in done.stdout
    assert "num_steps=8" in done.stdout
    assert "ReDo(threshold=0.025, when='collapse', utility='activation'), ShrinkPerturb(s=0.8" in done.stdout
