"""Train modules of other packages without and with the callback. Run: python -m benchmarks.real_modules.

The packages are installed into an environment of their own (``--env``), beside the torch of constraints.txt. The
callback comes from the checkout that this file lies in. Each module of ``benchmarks.package_modules`` and
``benchmarks.small_modules`` learns two tasks of a few dozen steps, each a fit with its own Trainer, on one thread of
the CPU, in a process of its own: without the callback, and with ``SpectralCollapseCallback()``. The table shows:

``runs``: whether the module trains with the callback as it is, and both tasks are measured.
``identical``: whether the trained weights and buffers are the same bits without and with the callback.
``steps``: the time in the callback's hooks in each task, divided by the median time of a training step in the same run;
process CPU time.
``samples``: ``probe_samples`` of each task.
``remarks``: the error, or else what the callback said and which diagnostics it left out; ``--json`` has all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import math
import os
import resource
import statistics
import subprocess
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from benchmarks.training import Case
    from lightning_plasticity.reports import TaskReport

ROOT = Path(__file__).resolve().parent.parent

# The key of what lightning_plasticity depends on. The package itself is not installed but imported from this checkout.
DEPENDENCIES = "dependencies of lightning-plasticity"

# What pip installs for each package.
PACKAGES: dict[str, tuple[str, ...]] = {
    DEPENDENCIES: (
        *("torch", "lightning", "pytorch-lightning", "lightning-utilities", "numpy", "typing-extensions"),
        *("torchmetrics", "pyhessian", "tensorboard", "matplotlib"),
    ),
    "own": (),
    "lightning": (),
    "pytorch-forecasting": ("pytorch-forecasting",),
    "neuralforecast": ("neuralforecast",),
    "transformers": ("transformers",),
    "peft": ("peft",),
    "torch-geometric": ("torch-geometric",),
    "chemprop": ("chemprop",),
    "scvi-tools": ("scvi-tools",),
    "timm": ("huggingface-hub", "safetensors", "pyyaml", "pillow"),
    "lightly": ("aenum", "lightly-utils", "pydantic", "python-dateutil", "requests", "tqdm", "urllib3", "pillow"),
    "segmentation-models-pytorch": ("huggingface-hub", "safetensors", "pyyaml", "pillow", "tqdm"),
}

# What is installed without its dependencies: they include torchvision, which would pull in a torch with CUDA. Release
# 0.28 belongs to the torch of constraints.txt.
WITHOUT_DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "timm": ("timm", "torchvision==0.28.*"),
    "lightly": ("lightly", "torchvision==0.28.*"),
    "segmentation-models-pytorch": ("segmentation-models-pytorch", "timm", "torchvision==0.28.*"),
}

# No module may take the memory of the whole machine.
MEMORY = 10 * 2**30

# No thread pools, no GPU and no network: weights are random.
ENVIRONMENT = {
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": str(ROOT),
}


@dataclass
class Row:
    """The result of one module."""

    module: str
    package: str
    runs: bool = False
    identical: bool | None = None
    steps: list[float] = field(default_factory=list)
    samples: list[float | None] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    skipped: bool = False
    milliseconds_per_step: float = math.nan
    metrics: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        """Return a row of the table, with the remarks cut to a line."""
        runs = "skipped" if self.skipped else "yes" if self.runs else "no"
        identical = "–" if self.identical is None else "yes" if self.identical else "no"
        steps = " / ".join(f"{each:.0f}" for each in self.steps) or "–"
        samples = " / ".join("–" if each is None else f"{each:.0f}" for each in self.samples) or "–"
        remarks = " ".join("; ".join(self.remarks).split()).replace("|", "\\|")
        shown = remarks if len(remarks) <= 160 else f"{remarks[:159]}…"
        return f"| {self.package}: {self.module} | {runs} | {identical} | {steps} | {samples} | {shown} |"


HEADER = "| module | runs | identical | steps | samples | remarks |\n|---|---|---|---|---|---|"


class Clock:
    """Sums up the time in the hooks of a callback in each fit, and collects the times of the training steps.

    A training step lasts from the end of ``on_train_batch_start`` to the beginning of ``on_train_batch_end``.
    """

    def __init__(self, callback: Callback) -> None:
        self.in_hooks: list[float] = []
        self.steps: list[float] = []
        self._step_began = math.nan
        for name in dir(callback):
            if name in ("setup", "teardown") or name.startswith("on_"):
                setattr(callback, name, self._timed(name, getattr(callback, name)))

    def _timed(self, name: str, hook: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: Any, **options: Any) -> object:
            if name == "setup":
                self.in_hooks.append(0.0)
            began = time.process_time()
            if name == "on_train_batch_end":
                self.steps.append(began - self._step_began)
            try:
                return hook(*arguments, **options)
            finally:
                ended = time.process_time()
                self.in_hooks[-1] += ended - began
                if name == "on_train_batch_start":
                    self._step_began = ended

        return timed


@functools.cache
def declare_operators() -> None:
    """Declare the operators that ``import torchvision`` expects: its binary does not load with a torch for CPUs.

    Torch allows each declaration once in a process, so that only the first call declares them.
    """
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def cases() -> dict[str, Case]:
    """Return all modules by name. Importing them imports Lightning, which imports torchvision where there is one."""
    from benchmarks import package_modules, small_modules

    return {str(case): case for case in [*package_modules.CASES, *small_modules.CASES]}


def measure(case: Case) -> Row:
    """Train a module without and with the callback."""
    from lightning_plasticity import SpectralCollapseCallback

    row = Row(case.module, case.package)
    try:
        without = trained_weights(case, [])
    except Exception as error:
        row.skipped = True
        row.remarks.append(f"does not train without the callback either: {type(error).__name__}: {error}")
        return row
    callback = SpectralCollapseCallback()
    clock = Clock(callback)
    # A collection of garbage walks through all objects of the imported packages, whoever triggers it.
    gc.collect()
    gc.freeze()
    with recorded_messages() as messages:
        try:
            weights = trained_weights(case, [callback])
        except Exception as error:
            row.remarks.append(f"{type(error).__name__}: {error}")
        else:
            row.runs = len(callback.history) == 2 and all(report.metrics for report in callback.history)
            row.identical = same_bits(without, weights)
            if not row.identical and not same_bits(without, trained_weights(case, [])):
                row.remarks.append("training is not reproducible without the callback either")
    reports = list(callback.history)
    if clock.steps:
        row.milliseconds_per_step = 1e3 * statistics.median(clock.steps)
        row.steps = [1e3 * seconds / row.milliseconds_per_step for seconds in clock.in_hooks]
    row.samples = [report.metrics.get("probe_samples") for report in reports]
    row.metrics = [report.metrics for report in reports]
    row.remarks += list(dict.fromkeys([*messages, *left_out(reports)]))
    return row


def trained_weights(case: Case, callbacks: list[Callback]) -> dict[str, Tensor]:
    """Train a module from the same random state as every other time, and return copies of its weights and buffers."""
    from lightning.pytorch import seed_everything

    seed_everything(0, verbose=False)
    module = case.train(callbacks)
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether all tensors are equal, where two NaNs are."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) or torch.equal(value.view(torch.uint8), other[name].view(torch.uint8))
        for name, value in one.items()
    )


@contextlib.contextmanager
def recorded_messages() -> Iterator[list[str]]:
    """Yield a list, to which the warnings and log lines of lightning_plasticity are added."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning_plasticity")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            logger.removeHandler(handler)
            messages += [str(each.message) for each in caught if each.category.__name__ == "PlasticityWarning"]


def left_out(reports: list[TaskReport]) -> list[str]:
    """Return the errors in the reports, and the names of the diagnostics that a measured task lacks."""
    from lightning_plasticity.diagnostics import diagnostics_of

    errors = [f"{where}: {error}" for report in reports for where, error in report.errors.items()]
    names = [diagnostic.name for diagnostic in diagnostics_of(["ggn", "features"])]
    missing = [
        name
        for name in names
        if any(report.metrics and math.isnan(report.metrics.get(name, math.nan)) for report in reports)
    ]
    return errors + ([f"without {', '.join(missing)}"] if missing else [])


def python_of(env: Path) -> Path:
    """Return the interpreter of an environment."""
    return env / "bin" / "python"


def install(env: Path, packages: list[str]) -> dict[str, str]:
    """Install packages into an environment, which is created if there is none.

    Returns:
        The reason by package, for those that could not be installed. What was tried once is not tried again, until the
        environment is removed.
    """
    record = env / "packages.json"
    reasons: dict[str, str | None] = json.loads(record.read_text()) if record.exists() else {}
    if not python_of(env).exists():
        print(f"Installing into {env}; the first time takes minutes ...", flush=True)
        venv.create(env, with_pip=True)
    for package in [DEPENDENCIES, *packages]:
        if package not in reasons:
            reason = pip_install(env, PACKAGES[package])
            bare = WITHOUT_DEPENDENCIES.get(package, ())
            reasons[package] = reason or pip_install(env, ("--no-deps", *bare) if bare else ())
            record.write_text(json.dumps(reasons, indent=1))
    return {package: reason for package, reason in reasons.items() if reason is not None}


def pip_install(env: Path, arguments: tuple[str, ...]) -> str | None:
    """Install with the releases of constraints.txt, and return the reason if that is not possible."""
    if not arguments:
        return None
    command = [str(python_of(env)), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    constrained = ["-c", "constraints.txt", *arguments]
    done = subprocess.run([*command, *constrained], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return None if done.returncode == 0 else (errors or ["pip failed"])[0]


def run_process(case: Case, env: Path, limit: float) -> Row:
    """Measure a module in a process of its own, which may crash or take too long."""
    row = Row(case.module, case.package)
    with tempfile.TemporaryDirectory() as folder:
        # Modules write into their working directory, so it is an empty one.
        command = [str(python_of(env.resolve())), "-m", "benchmarks.real_modules", "--measure", str(case)]
        try:
            done = subprocess.run(
                command, cwd=folder, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            row.remarks.append(f"not finished after {limit:.0f} s")
            return row
        result = Path(folder) / "row.json"
        if result.exists():
            return Row(**json.loads(result.read_text()))
    row.remarks.append(f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return row


def summary(rows: list[Row]) -> str:
    """Return how many modules run unmodified, how many are bit-identical, and the largest cost."""
    tried = [row for row in rows if not row.skipped]
    compared = [row.identical for row in tried if row.identical is not None]
    costs = [(max(row.steps), f"{row.package}: {row.module}") for row in tried if row.runs and row.steps]
    dearest = "; at most {:.0f} steps a task ({})".format(*max(costs)) if costs else ""
    return (
        f"{sum(row.runs for row in tried)} of {len(tried)} run unmodified; "
        f"{sum(compared)} of {len(compared)} bit-identical{dearest}"
    )


def compare(env: Path, names: list[str], limit: float, output: Path | None) -> None:
    """Print the table, a row at a time."""
    known = cases()
    chosen = [case for name, case in known.items() if not names or any(each.lower() in name.lower() for each in names)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(names)}: choose from\n" + "\n".join(known))
    reasons = install(env, list(dict.fromkeys(package for case in chosen for package in case.needs)))
    rows = []
    print(HEADER, flush=True)
    for case in chosen:
        missing = [f"{name} not installed: {reason}" for name, reason in reasons.items() if name in case.needs]
        if missing:
            row = Row(case.module, case.package, skipped=True, remarks=missing)
        else:
            row = run_process(case, env, limit)
        rows.append(row)
        print(row, flush=True)
        if output is not None:
            output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print()
    for title, is_own in (("modules of packages", False), ("our own modules", True)):
        group = [row for row in rows if (row.package == "own") is is_own]
        if group:
            print(f"{title}: {summary(group)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-real", help="environment of the packages")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="modules whose names contain one of these"
    )
    parser.add_argument("--json", type=Path, help="file to write all results to")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each module")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    declare_operators()
    if options.measure is None:
        compare(options.env, options.only, options.limit, options.json)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        torch.set_num_threads(1)
        Path("row.json").write_text(json.dumps(asdict(measure(cases()[options.measure]))))
