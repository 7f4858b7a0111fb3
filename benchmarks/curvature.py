"""Compare the cost of curvature with PyHessian and curvlinops. Run: make bench.

Times are medians of process CPU time with one thread; the contenders alternate in one process. PyHessian is the release
on the package index, with a replacement for the one call that current torch no longer has. curvlinops is skipped if it
is not installed: `make bench` installs it into a separate environment.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import alternate
from lightning_plasticity.curvature import Estimate, ggn_spectrum, hessian_spectrum
from lightning_plasticity.curvature.matrix_free.lanczos import lanczos
from lightning_plasticity.curvature.matrix_free.linear_operators import HessianLinearOperator
from lightning_plasticity.curvature.matrix_free.stochastic_lanczos import LanczosOptions, lanczos_spectrum
from lightning_plasticity.curvature.pyhessian import pyhessian_spectrum
from lightning_plasticity.curvature.spectrum import Spectrum

Batch = tuple[Tensor, Tensor]


class Language(nn.Module):
    """A two-layer Transformer over 256 symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(128, 256)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next symbol, one row for each position."""
        return self.out(self.body(self.embed(x))).flatten(0, 1)


def mlp(samples: int, width: int = 256) -> tuple[nn.Module, Batch]:
    """Build an MLP 784-256-256-10, or of another width, and a batch."""
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model, (torch.randn(samples, 784), torch.randint(10, (samples,)))


def conv(samples: int) -> tuple[nn.Module, Batch]:
    """Build three convolutions with BatchNorm on 32×32×3, and a batch."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    return model, (torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,)))


def language(samples: int) -> tuple[nn.Module, Batch]:
    """Build the Transformer and a batch of sequences of 64 symbols."""
    return Language().eval(), (torch.randint(256, (samples, 64)), torch.randint(256, (samples * 64,)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def row(work: str, ours: float, theirs: float, bar: str) -> None:
    """Print one line of the table."""
    print(f"{work:<64}{1e3 * ours:>11.1f} ms{1e3 * theirs:>11.1f} ms{theirs / ours:>9.2f}×   bar {bar}", flush=True)


def exact_rank() -> None:
    """Compare the exact Gauss-Newton spectrum with PyHessian's Hessian density."""
    for name, (model, batch), bar in (("MLP", mlp(64), "≥ 50×"), ("conv net", conv(64), "≥ 20×")):
        medians = alternate(
            {
                "ours": lambda m=model, b=batch: ggn_spectrum(m, b, loss_fn).epsilon_rank(1e-2),
                "theirs": lambda m=model, b=batch: pyhessian_spectrum(m, b, loss_fn, num_probes=1, num_steps=100),
            },
            rounds=3,
        )
        row(f"ε-rank, {name}, n = 64: exact GGN / PyHessian density 1×100", medians["ours"], medians["theirs"], bar)


def products() -> None:
    """Compare the cost of one Hessian-vector product."""
    from pyhessian.utils import hessian_vector_product

    for name, (model, batch) in (("MLP, n = 256", mlp(256)), ("conv net, n = 128", conv(128))):
        parameters = list(model.parameters())
        product = HessianLinearOperator(loss_fn(model, batch), parameters)
        vector = torch.randn(product.dimension)
        pieces = [torch.randn_like(parameter) for parameter in parameters]
        gradients = torch.autograd.grad(loss_fn(model, batch), parameters, create_graph=True)
        contenders: dict[str, Callable[[], object]] = {
            "ours": lambda p=product, v=vector: p(v),
            "pyhessian": lambda g=gradients, p=parameters, v=pieces: hessian_vector_product(g, p, v),
        }
        operator = curvlinops_hessian(model, batch)
        if operator is not None:
            contenders["curvlinops"] = lambda o=operator, v=vector: o @ v
        medians = alternate(contenders, rounds=21, warmup=3)
        row(f"one HVP, {name}: ours / PyHessian", medians["ours"], medians["pyhessian"], "≥ 0.91×")
        if operator is not None:
            row(f"one HVP, {name}: ours / curvlinops", medians["ours"], medians["curvlinops"], "≥ 1.67×")


def densities(rounds: int) -> None:
    """Compare Hessian densities from ten start vectors."""
    problems: list[tuple[str, tuple[nn.Module, Batch], int, str]] = [
        ("MLP, n = 256", mlp(256), 80, "≥ 1.8×"),
        ("MLP, n = 1024", mlp(1024), 80, "≥ 1.2×"),
        ("conv net, n = 128", conv(128), 50, "≥ 1.2×"),
        ("Transformer, n = 16", language(16), 50, "≥ 1.2×"),
    ]
    for name, (model, batch), steps, bar in problems:
        arguments: dict[str, Any] = {"num_probes": 10, "num_steps": steps}
        contenders: dict[str, Callable[[], object]] = {
            "ours": lambda m=model, b=batch, a=arguments: hessian_spectrum(m, b, loss_fn, **a),
            "pyhessian": lambda m=model, b=batch, a=arguments: pyhessian_spectrum(m, b, loss_fn, **a),
        }
        operator = curvlinops_hessian(model, batch)
        if operator is not None:
            contenders["curvlinops"] = lambda o=operator, s=steps: curvlinops_density(o, s)
        ranks: dict[str, Estimate] = {}

        def ranked(name: str, contender: Callable[[], object], ranks: dict[str, Estimate] = ranks) -> object:
            result = contender()
            if isinstance(result, Spectrum):
                ranks[name] = result.relative_epsilon_rank(0.1)
            return result

        medians = alternate(
            {name: partial(ranked, name, work) for name, work in contenders.items()}, rounds=rounds, warmup=0
        )
        print(f"  ε-rank at 0.1 λmax, ± standard error: {ranks}", flush=True)
        row(f"Hessian density 10×{steps}, {name}: ours / PyHessian", medians["ours"], medians["pyhessian"], bar)
        if operator is not None:
            row(
                f"Hessian density 10×{steps}, {name}: ours / curvlinops",
                medians["ours"],
                medians["curvlinops"],
                "≥ 1.7×",
            )


def sharpness() -> None:
    """Count the products until the residual bound of λmax is below 10⁻³ of it."""
    for name, (model, batch) in (("MLP, n = 256", mlp(256)), ("conv net, n = 128", conv(128))):
        product = HessianLinearOperator(loss_fn(model, batch), list(model.parameters()))
        start = torch.randn(product.dimension)
        for steps in range(2, 200):
            run = lanczos(product, start, steps)
            if run.residuals[-1] <= 1e-3 * run.nodes[-1]:
                break
        print(f"{f'λmax to 10⁻³ with a bound, {name}':<64}{steps:>6} products   bar ≤ 25", flush=True)


def deflation() -> None:
    """Count the products until the ε-rank of a known Hessian is within 5 %, and measure the memory of a run."""
    for name, (model, batch) in {"94 % dead": dead(), "after 5 tasks": after_tasks(), "at init": small()}.items():
        product = HessianLinearOperator(loss_fn(model, batch), list(model.parameters()))
        identity = torch.eye(product.dimension)
        values = torch.linalg.eigvalsh(torch.stack([product(row) for row in identity]).double())
        spectra = {
            steps: lanczos_spectrum(product, LanczosOptions(num_probes=60, num_steps=steps, seed=0))
            for steps in (10, 15, 20, 30, 40, 50, 60, 80, 120)
        }
        for relative in (0.3, 0.1, 0.03, 0.01):
            epsilon = relative * values.abs().max().item()
            exact = (values.abs() > epsilon).sum().item()
            needed = {steps: products_needed(spectrum, epsilon, exact, steps) for steps, spectrum in spectra.items()}
            plain, deflated = (min(each, default=math.inf) for each in zip(*needed.values(), strict=True))
            theirs, ours = min(needed.values(), key=lambda each: each[1])
            print(
                f"{f'ε-rank {exact} to 5 %, {name}, ε = {relative:g} λmax: deflated / plain':<64}{deflated:>5.0f} / "
                f"{plain:.0f} products: {deflated / plain:.2f}, {ours / theirs:.2f} at as many steps   bar ≤ 0.33",
                flush=True,
            )
    model, batch = mlp(64)
    product = HessianLinearOperator(loss_fn(model, batch), list(model.parameters()))
    steps, vector = 20, torch.randn(product.dimension)
    options = LanczosOptions(num_probes=3, num_steps=steps, seed=0)
    run = peak_memory(lambda: lanczos_spectrum(product, options)) / product.dimension
    within = peak_memory(lambda: product(vector)) / product.dimension
    print(
        f"{f'peak memory of {steps} deflated steps':<64}{run:>6.1f} P, {within:.1f} P of it the product's"
        f"   bar ≤ {steps + 6} P",
        flush=True,
    )


def small() -> tuple[nn.Module, Batch]:
    """Build an MLP 64-32-32-10, small enough for a dense Hessian, and a batch."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    return model, (torch.randn(128, 64), torch.randint(10, (128,)))


def dead() -> tuple[nn.Module, Batch]:
    """Build the small MLP with two live units in each layer."""
    model, batch = small()
    with torch.no_grad():
        for layer in (model[0], model[2]):  # type: ignore[index]
            layer.bias[2:] = -100
    return model, batch


def after_tasks() -> tuple[nn.Module, Batch]:
    """Train the small MLP on five tasks of random labels, and return it with the last one."""
    model, batch = small()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        batch = small()[1]
        for _ in range(200):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return model, batch


def products_needed(spectrum: Spectrum, epsilon: float, exact: int, steps: int) -> tuple[float, float]:
    """Compute the products until the mean is within 5 %, plain and deflated, from the bias and spread of single runs.

    Deflation needs three runs. Where one or two plain runs are enough, they count for both.
    """
    needed = []
    for measures in ([(q.nodes, q.weights) for q in spectrum.quadratures], [q.measure for q in spectrum.quadratures]):
        ranks = [spectrum.num_parameters * weights[nodes.abs() > epsilon].sum().item() for nodes, weights in measures]
        error = torch.tensor(ranks, dtype=torch.float64) / exact - 1
        # The squared bias, without the sampling error of the mean.
        bias = max(error.mean().item() ** 2 - error.var().item() / len(error), 0.0)
        needed.append(math.ceil(error.var().item() / (0.05**2 - bias)) if bias < 0.05**2 else math.inf)
    plain, deflated = needed
    return steps * max(plain, 1), steps * (max(plain, 1) if plain <= 2 else max(deflated, 3))


def peak_memory(work: Callable[[], object]) -> float:
    """Return the peak of the memory that the work allocates, in float32 numbers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)) / 4


def growth() -> None:
    """Measure how time and memory of the exact probe grow with the width of the network and the size of the batch."""
    for dimension, sizes in (("width", (256, 512, 1024, 2048)), ("samples", (32, 64, 128, 256))):
        figures = []
        for size in sizes:
            model, batch = mlp(64, size) if dimension == "width" else mlp(size)

            def probe(model: nn.Module = model, batch: Batch = batch) -> object:
                return ggn_spectrum(model, batch, loss_fn, method="gram")

            figures.append((1e3 * alternate({"ours": probe}, rounds=3)["ours"], 4 * peak_memory(probe) / 2**20))
        for unit, values in zip(("ms", "MiB"), zip(*figures, strict=True), strict=True):
            logs = torch.tensor(sizes).log(), torch.tensor(values).log()
            slope = torch.linalg.lstsq(torch.stack([logs[0], torch.ones(len(sizes))], 1), logs[1]).solution[0].item()
            shown = ", ".join(f"{size}: {value:.0f} {unit}" for size, value in zip(sizes, values, strict=True))
            print(f"exact probe by {dimension}: {shown}; grows as {dimension}^{slope:.1f}", flush=True)


def curvlinops_hessian(model: nn.Module, batch: Batch) -> Any:
    """Build curvlinops' operator, or return ``None`` if it is not installed or does not support the model."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    try:
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), [batch], check_deterministic=False
        )
        with sdpa_kernel(SDPBackend.MATH):
            operator @ torch.randn(operator.shape[1])
        return operator
    except Exception as error:
        print(f"curvlinops cannot: {str(error).splitlines()[0][:100]}")
        return None


def curvlinops_density(operator: Any, steps: int) -> object:
    """Estimate the spectral density by curvlinops, with given ends of the spectrum."""
    from curvlinops import lanczos_approximate_spectrum

    with sdpa_kernel(SDPBackend.MATH):
        return lanczos_approximate_spectrum(operator, steps, num_points=1024, num_repeats=10, boundaries=(-5.0, 5.0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the long ones")
    parser.add_argument(
        "--only", nargs="*", default=["exact_rank", "products", "sharpness", "deflation", "growth", "densities"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts: dict[str, Callable[[], None]] = {
        "exact_rank": exact_rank,
        "products": products,
        "sharpness": sharpness,
        "deflation": deflation,
        "growth": growth,
        "densities": lambda: densities(options.rounds),
    }
    print(f"{'work: ours / theirs':<64}{'ours':>14}{'theirs':>14}{'faster':>10}")
    for part in options.only:
        parts[part]()
