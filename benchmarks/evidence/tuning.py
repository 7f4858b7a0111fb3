"""Choose a setting of every intervention. Run: python -m benchmarks.evidence.tuning.

Each of three settings of a method (``CANDIDATES``) learns the first tasks of two streams, with a seed that no other run
has. The best one has the highest online accuracy over the last quarter of them, in the mean of both streams.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.evidence.methods import CANDIDATES, Method
from benchmarks.evidence.streams import STREAMS
from benchmarks.plasticity import prepare_process

# Streams, and numbers of tasks.
TUNING_STREAMS, SEED = {"random-labels": 12, "permuted-digits": 20}, 100


def final_accuracy(name: str, method: Method) -> float:
    """Return the mean online accuracy of the last quarter of the tasks of a stream."""
    # Only in the processes, since Lightning takes seconds to import.
    from benchmarks.evidence.run import Learner, Outcomes, Tasks, callback_of, fit

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    stream, tasks = STREAMS[name], TUNING_STREAMS[name]
    torch.manual_seed(SEED)
    module, outcomes = Learner(stream, method.weight_decay, SEED), Outcomes()
    callback = callback_of(method, stream, SEED, module)
    fit(module, Tasks(module, stream.draw(SEED)), tasks, [outcomes, callback])
    last = outcomes.rows[-(tasks // 4) :]
    return statistics.fmean(row["network"]["accuracy"] for row in last)


def accuracy_of(name: str, method: str, setting: int) -> float:
    """Return the final accuracy of one setting."""
    return final_accuracy(name, CANDIDATES[method][setting])


def main(jobs: int) -> None:
    """Print the final accuracies of all settings, the mean first."""
    every = [(method, setting) for method in CANDIDATES for setting in range(len(CANDIDATES[method]))]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), prepare_process) as pool:
        runs = {each: [pool.submit(accuracy_of, name, *each) for name in TUNING_STREAMS] for each in every}
        for (method, setting), of_streams in runs.items():
            accuracies = [run.result() for run in of_streams]
            shown = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
            print(f"{method} {setting}: {statistics.fmean(accuracies):.3f} ({shown})", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
