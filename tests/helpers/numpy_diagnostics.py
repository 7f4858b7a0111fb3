"""Compute the diagnostics of features with NumPy, straight from their formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def features(shape: tuple[int, ...], unit_axis: int, seed: int = 0) -> Tensor:
    """Return features of very different magnitudes, with dead, dormant, cloned and negative units."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 0.0, 3.0, 0.001, 0.5, 0.0, 2.0])
    values = torch.randn(shape, generator=generator)
    # Correlated by about 0.98.
    values.select(unit_axis, 4).mul_(0.2).add_(values.select(unit_axis, 2))
    return values * scale.reshape([-1 if axis == unit_axis else 1 for axis in range(len(shape))])


def to_matrix(array: Array, axis: int) -> Array:
    """Return the array as a matrix in float64 with one column per entry of the axis."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]).astype(np.float64)


def numpy_dormant(f: Array, threshold: float = 0.025) -> float:
    means = np.array([np.mean(np.abs(f[:, unit])) for unit in range(f.shape[1])])
    layer = means.mean()
    return float(np.mean([(m / layer if layer else 0.0) <= threshold for m in means]))


def numpy_dead(f: Array) -> float:
    return float(np.mean([not np.any(f[:, unit]) for unit in range(f.shape[1])]))


def numpy_cloned(f: Array, threshold: float = 0.95) -> float:
    units = [f[:, unit] for unit in range(f.shape[1])]
    varying = [unit.std() > 1e-5 * np.sqrt((unit**2).mean()) for unit in units]
    clones = set()
    for i, j in itertools.combinations(range(len(units)), 2):
        if varying[i] and varying[j] and np.corrcoef(units[i], units[j])[0, 1] > threshold:
            clones.add(i)
    return len(clones) / len(units)


def numpy_effective_rank(f: Array) -> float:
    sigma = np.linalg.svd(f, compute_uv=False)
    p = sigma / sigma.sum()
    return math.exp(-sum(x * math.log(x) for x in p if x > 0))


def numpy_stable_rank(f: Array) -> float:
    return float(np.linalg.norm(f, "fro") ** 2 / np.linalg.norm(f, 2) ** 2)


def numpy_srank(f: Array, delta: float = 0.01) -> int:
    sigma = np.linalg.svd(f, compute_uv=False)
    for k in range(1, len(sigma) + 1):
        if sigma[:k].sum() >= (1 - delta) * sigma.sum():
            return k
    raise AssertionError


def numpy_feature_norm(f: Array) -> float:
    return float(np.mean([math.sqrt((row**2).sum()) for row in f]))
