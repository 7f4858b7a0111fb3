"""Measure which number tells that a network learns worse than a fresh one. Run: python -m benchmarks.plasticity.

``--small --out DIR`` and ``--full --out DIR`` train every stream of ``benchmarks.evidence.streams`` with every method
of ``benchmarks.evidence.methods``, each run on one thread of the CPU in one of ``--jobs`` processes, and write one JSON
file a run. Runs whose file exists are skipped, so a stopped command goes on where it was; small and full runs need
different directories. ``--table DIR`` prints the tables of ``benchmarks.evidence.table`` from all files of a directory,
and ``--page DIR FILE`` writes them with an explanation, and figures to ``images`` beside the file.

A file holds every number of every ``TaskReport.metrics``, the verdict, and the truth beside each task:
``benchmarks.evidence.run``.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.evidence.figures import draw
from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.page import page
from benchmarks.evidence.results import read_tasks
from benchmarks.evidence.streams import STREAMS
from benchmarks.evidence.table import tables

# The streams that decide about the verdict get more seeds in the full run.
SEEDS, MORE_SEEDS = range(3), range(5)
WITH_MORE_SEEDS = ("random-labels", "permuted-digits", "permuted-mnist")


@dataclass(frozen=True)
class Run:
    """One run: a method on a stream."""

    stream: str
    method: str
    seed: int
    tasks: int

    def __str__(self) -> str:
        """Return the name of its file, without the ending."""
        return f"{self.stream}.{self.method}.{self.seed}"

    def path(self, directory: Path) -> Path:
        """Return its file."""
        return directory / f"{self}.json"

    def write(self, directory: Path) -> float:
        """Train, write the file, and return the seconds that it took."""
        # Only in the processes, since Lightning takes seconds to import.
        from benchmarks.evidence.run import run

        # Lightning sets the level when it is imported.
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        result = run(self.stream, self.method, self.seed, self.tasks, self._known(directory))
        part = self.path(directory).with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(self.path(directory))
        return float(result["seconds"])

    def _known(self, directory: Path) -> list[dict[str, float]] | None:
        """Return the outcomes of the fresh network, if a run without an intervention has trained the same one."""
        path = replace(self, method="none").path(directory)
        if METHODS[self.method].weight_decay or not path.exists():
            return None
        fresh = [task["fresh"] for task in json.loads(path.read_text())["tasks"]]
        return fresh if len(fresh) >= self.tasks else None


def prepare_process() -> None:
    """Use one thread, and keep warnings silent: alarms, remarks and errors are in the files."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def planned(options: argparse.Namespace) -> list[Run]:
    """Return all runs, those of the first seed first."""
    methods = options.methods or [name for name, method in METHODS.items() if method.small or options.full]
    plan = []
    for name in options.streams or STREAMS:
        seeds = [0] if options.small else MORE_SEEDS if name in WITH_MORE_SEEDS else SEEDS
        tasks = STREAMS[name].small if options.small else STREAMS[name].full
        plan += [Run(name, method, seed, tasks) for method in methods for seed in options.seeds or seeds]
    return sorted(plan, key=lambda run: run.seed)


def train_all(plan: Sequence[Run], directory: Path, jobs: int) -> int:
    """Train what has no file yet, print the progress, and return the number of failed runs."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [run for run in plan if not run.path(directory).exists()]
    print(f"{len(plan)} runs, {len(plan) - len(missing)} of them done before", flush=True)
    # Before the processes start, since libraries read it when they are loaded.
    os.environ.update({f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")})
    began, failed = time.monotonic(), 0
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare_process) as pool:
        runs = {pool.submit(run.write, directory): run for run in missing}
        try:
            for number, future in enumerate(as_completed(runs), 1):
                try:
                    outcome = f"{future.result():.0f} s"
                except Exception as error:
                    failed += 1
                    outcome = f"FAILED: {type(error).__name__}: {error}"
                minutes = (time.monotonic() - began) / 60
                left = minutes / number * (len(missing) - number)
                progress = f"{number}/{len(missing)}, {minutes:.0f} min, about {left:.0f} left"
                print(f"[{progress}] {runs[future]}: {outcome}", flush=True)
        except KeyboardInterrupt:
            # Otherwise all runs that have not begun would be waited for.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--small", action="store_true", help="few tasks, four methods, one seed")
    what.add_argument("--full", action="store_true", help="all methods, and three seeds or five")
    what.add_argument("--table", type=Path, metavar="DIR", help="print the tables of the runs in a directory")
    what.add_argument("--page", type=Path, nargs=2, metavar=("DIR", "FILE"), help="write them, explained, with figures")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, metavar="STREAM", help=", ".join(STREAMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    options = parser.parse_args()
    if options.table:
        print(tables(read_tasks(options.table)))
        return 0
    if options.page:
        directory, file = options.page
        tasks = read_tasks(directory)
        file.write_text(page(tasks), encoding="utf-8")
        draw(tasks, file.parent / "images")
        return 0
    if options.out is None:
        parser.error("--out DIR is missing: where the files go")
    return 1 if train_all(planned(options), options.out, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
