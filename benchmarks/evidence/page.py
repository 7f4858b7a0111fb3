"""Write docs/evidence.md from the results of the evidence runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.evidence.results import LIMITS, TaskOfRun
from benchmarks.evidence.table import (
    MOST_NUMBERS,
    by_stream,
    decimal,
    first_tenth,
    last_tenth,
    methods_by_lack,
    numbers_by_auc,
    table_by_stream,
    table_of_goals,
    table_of_hessian,
    table_of_intervals,
    table_of_live,
    table_of_methods,
    table_of_numbers,
    table_of_verdicts,
    trained,
    verdicts,
)

INTRODUCTION = """# Evidence

Does a number at the start of a task tell that a network has lost its plasticity? This page holds every number that the
callback logs against one definition: *a fresh network learns the task better*. It is written by
`python -m benchmarks.plasticity --page DIR docs/evidence.md` from the files of `make evidence-small` or
`make evidence`, so nothing below "Results" is typed by hand.

## How it is measured

Each run is a stream of tasks that a network learns in a real Trainer, with `SpectralCollapseCallback()` at its
defaults. Beside every task, a copy of the initial weights learns the same batches in the same order, with a new
optimizer of the same settings: that is the fresh network. Both are judged by their online accuracy, the mean over the
batches before each step; regressions by the online loss. Where a repair ran at the start of the task, a copy that was
not repaired learns it too, and the verdict is held against that copy.

- **bad**: the fresh network is better by more than 5 points of accuracy, or its loss is lower by more than 20 %.
- **healthy**: it is better by less than 2 points, or its loss is not lower. Tasks between the two count for neither.
- **AUC**: the probability that the number ranks a bad task before a healthy one; 0.5 is a coin.
- **found at 5 %**: the share of bad tasks that ring if the threshold lets 5 % of the healthy ones ring.
- **lead**: tasks from the first alarm to the first bad task of a run.

| stream | what changes from task to task |
|---|---|
| random-labels | new random labels for the same 640 digits, memorised over 40 epochs |
| permuted-digits | a new permutation of the pixels, Adam with a high learning rate |
| permuted-mnist | a new permutation of the pixels, each of 5000 images seen once |
| class-pairs | two other classes for a convolutional network, whose head is kept |
| class-pairs-new-head, class-pairs-zero-head | the same; the head is drawn anew, or set to zero, at each task |
| bit-flipping | one bit of the input of a regression |
| drifting-regression | a slow drift of the target of a regression |
| label-swap | two labels are exchanged |
| same-digits, slow-drift | nothing, or little: no alarm is right |
| warm-start | a tenth of the data first, then all |
| class-incremental | more classes, and a head that grows |
| texts | documentation, names, source code, tables: the next character, by a small Transformer |
| pendulum | gravity, friction, and strength and sign of the torque: swing-up by PPO, judged by the mean reward |

## How the rule was chosen

The handicap is the ratio of the fit losses of the network and of the fresh one, divided by the power 0.3 of the share
that is left of the rank of the tangent kernel, but not more than 1 plus the fit gap. It was chosen in two steps.

First on other code, plain loops without the callback: random labels, permuted digits, permuted MNIST, bit-flipping and
alike tasks, each without a repair and with ReDo or shrink-perturb, one seed, 432 tasks, 128 of them bad. The ratio and
the rank, with 20 steps on up to four batches of 16 samples and a threshold of 1.25 beyond the standard error over the
batches, had an AUC of 0.965 there and found 80 % of the bad tasks at 3 % false alarms. What was tried and left:

| instead | AUC | found at 3 % |
|---|---|---|
| no kernel rank: the fit test alone | 0.946 | 65 % |
| the square root of the learnable fraction at 1000 steps for the rank | 0.952 | 74 % |
| one batch of 64 samples | 0.955 | 72 % |
| two batches of 32 samples | 0.958 | 73 % |
| 10 steps | 0.956 | 80 % |
| 40 steps | 0.966 | 81 % |
| the mean over this task and the one before | 0.950 | 69 % |
| the smaller of this task and the one before | 0.925 | 63 % |

Then on this code, on runs of random-labels, permuted-digits, permuted-mnist, class-pairs, bit-flipping and label-swap
without a repair, with ReDo or with shrink-perturb: the alarm rang at 8 % of the healthy tasks, nearly always on
permuted MNIST, where a fresh network soon has so little loss that a small lag multiplies it. Hence the limit by the
gap, and 12 steps, which cost less. A threshold of 1.15 was tried then on every stream below: 4.9 % of the healthy tasks
rang, and 90 % of the bad ones, so the threshold stayed at 1.25.

So no stream is untouched by the choice of the threshold; class-pairs-new-head, class-pairs-zero-head, texts and
pendulum served for nothing else. Seeds 3 and 4 were run after the rule was fixed: they have a column of their own.
"""

PUBLISHED = """| permuted MNIST, mean online accuracy | tasks | none | L2 | L2-ER | spectral | continual backprop |
|---|---|---|---|---|---|---|
| arXiv 2509.22335 (read off its figure) | 800 | .903 (.944 to .877) | .930 | .951 | .942 | .938 |"""


def page(tasks: Sequence[TaskOfRun]) -> str:
    """Return the page as Markdown."""
    plain, every = verdicts(tasks, repaired=False), verdicts(tasks)
    numbers = numbers_by_auc(every)
    best = dict(list(numbers.items())[:MOST_NUMBERS])
    rest = {name: each for name, each in numbers.items() if name not in best}
    bad, healthy = sum(task.bad for task in every), sum(task.healthy for task in every)
    live = [task for task in tasks if task.method == "live"]
    measured = ", ".join(dict.fromkeys(task.method for task in every))
    hessian = [task for task in tasks if task.method == "hessian"]
    return f"""{INTRODUCTION}
## Results

{inventory(tasks)}

{table_of_goals(tasks)}

![Online accuracy of the network and of the fresh one, with alarms](images/evidence-courses.png)

### Alarms of the default verdict, without an intervention

Of the bad tasks, of the healthy ones, and of those between. The lead is the median of the runs that have a bad task.

{table_of_verdicts(plain)}

{early_alarms(plain)}

### Which number tells

{len(every)} tasks of {measured}: {bad} bad and {healthy} healthy ones. The interval holds 95 % of a bootstrap over the
seeds of each stream; the rank correlation is the mean over the streams.

{table_of_numbers(best)}

![AUC of the best numbers](images/evidence-numbers.png)

By stream: AUC and rank correlation; there is no AUC where all tasks are of one kind.

{table_by_stream(numbers)}

The handicap without an intervention:

{table_of_intervals(plain, "handicap")}

<details><summary>All other numbers</summary>

{table_of_numbers(rest)}

</details>

### The live fit test

`FitTest(live=True)` on the first fifth of each task. The alarm is that by accuracy; in regressions, and where an agent
makes its own data, that by the loss.

{table_of_live(live)}

### Interventions

Lack in the last tenth of the tasks, above 0 if a fresh network is better: difference of the online accuracy, in
regressions logarithm of the ratio of the losses. In brackets the change of the network's own performance from the first
tenth to the last. The best methods, beside none on the same streams, come first. The last column is the time in the
callback a task, in seconds of one CPU core: for {measured} with all measurements at their defaults, for the others
without. All settings are the defaults, with `when="task"` for repairs and every 100 steps for ReDo and ReGraMa.
Settings can be compared by `python -m benchmarks.evidence.tuning`; no runs with chosen settings are here yet.

![Lack at the end of each stream](images/evidence-methods.png)

{table_of_methods(trained(tasks))}

{remaining_losses(trained(tasks))}

### Beside published numbers

No stream here has a published protocol: tasks are smaller and fewer, so that a run takes seconds. The nearest one:

{PUBLISHED}
{mnist_row(trained(tasks))}

### Does the rank of the Hessian fall first?

The claim of arXiv 2509.22335 is that loss of plasticity is preceded by a collapse of the Hessian's spectrum at the
start of a task. Its ε is chosen afterwards, between 0.01 and 1, for the best fit. Here the ranks are those of the
Hessian on 256 samples by Lanczos (two start vectors of 200 steps), at both ends and in the middle of that range.

{table_of_hessian(hessian) if hessian else "There are no such runs here yet (`--methods hessian`)."}
"""


def inventory(tasks: Sequence[TaskOfRun]) -> str:
    """Return which runs there are."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for task in tasks:
        seeds.setdefault((task.stream, task.method), set()).add(task.seed)
    streams = list(by_stream(tasks))
    lines = [
        "| stream | tasks of a run | methods | seeds without an intervention | seeds of the others |",
        "|---" * 5 + "|",
    ]
    for stream in streams:
        of_stream = {method: len(each) for (name, method), each in seeds.items() if name == stream}
        others = [count for method, count in of_stream.items() if method != "none"]
        count = max(task.task for task in tasks if task.stream == stream) + 1
        spread = "–" if not others else f"{min(others)} to {max(others)}"
        lines.append(f"| {stream} | {count} | {len(of_stream)} | {of_stream.get('none', 0)} | {spread} |")
    return "\n".join(lines)


def early_alarms(tasks: Sequence[TaskOfRun]) -> str:
    """Return a sentence about the alarms on healthy tasks."""
    false = [task for task in tasks if task.healthy and task.collapsed]
    if not false:
        return "No healthy task rings."
    streams = by_stream(false)
    shown = ", ".join(f"{len(group)} on {stream}" for stream, group in streams.items())
    better = sum(task.lack > 0 for task in false)
    return (
        f"{len(false)} healthy tasks ring: {shown}. At {better} of them the fresh network is better, but by less than "
        "the limit."
    )


def remaining_losses(tasks: Sequence[TaskOfRun]) -> str:
    """Return what does not hold: on each stream with a loss, the methods that leave more than half of it."""
    methods, streams, lacks = methods_by_lack(tasks)
    lines = ["What does not hold: methods that leave more than half of the lack on streams with a lack above .05.", ""]
    for stream in streams:
        plain = lacks.get(("none", stream), math.nan)
        if not plain > LIMITS[0]:
            continue
        failed = [method for method in methods if method != "none" and lacks.get((method, stream), 0.0) > plain / 2]
        shown = ", ".join(f"{method} {decimal(lacks[method, stream])}" for method in failed) or "none"
        lines.append(f"- {stream} ({decimal(plain)} without an intervention): {shown}")
    return "\n".join(lines)


def mnist_row(tasks: Sequence[TaskOfRun]) -> str:
    """Return the accuracies on permuted MNIST in the columns of the published ones."""
    cells = []
    for method in ("none", "l2", "l2-er", "spectral", "continual-backprop"):
        group = [task for task in tasks if task.stream == "permuted-mnist" and task.method == method]
        shown = "–"
        if group:
            mean, first, last = (
                float(np.mean([task.accuracy for task in part]))
                for part in (group, first_tenth(group), last_tenth(group))
            )
            shown = f"{mean:.3f} ({first:.3f} to {last:.3f}; {max(task.task for task in group) + 1} tasks)"
        cells.append(shown)
    return f"| here, 5000 images a task, Adam | | {' | '.join(cells)} |"
