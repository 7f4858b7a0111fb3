"""Plot a spectrum, and prepare eigenvalues and axes for plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_plasticity.curvature.spectrum import Spectrum

LOG_EIGENVALUE_EDGES = torch.linspace(-8.0, 4.0, 61, dtype=torch.float64)
"""Bin edges for log10 of an eigenvalue. Larger ones are counted in the last bin; smaller ones are zero for float32."""

# Okabe and Ito (2008): colours that can be told apart with any colour vision.
POSITIVE, NEGATIVE = "#0072B2", "#E69F00"
"""Colours of positive and of negative eigenvalues."""


def log_eigenvalues(spectrum: Spectrum, *, negative: bool = False) -> tuple[Tensor, Tensor]:
    """Return log10 of the magnitudes of the eigenvalues above 1e-8, at most 4, and their multiplicities.

    Smaller ones are zero but for rounding: they would all be in one bin, and dwarf the others.

    Args:
        spectrum: The spectrum.
        negative: Select the negative eigenvalues instead of the others.

    Returns:
        Logarithms and multiplicities, both of shape ``(k,)``.
    """
    values, weights = spectrum.undeflated
    low, high = LOG_EIGENVALUE_EDGES[0].item(), LOG_EIGENVALUE_EDGES[-1].item()
    selected = ((values < 0) == negative) & (values.abs() > 10.0**low)
    return values[selected].abs().log10().clamp(low, high), spectrum.num_parameters * weights[selected]


def eigenvalues_by_bin(values: Tensor, counts: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return how many eigenvalues are in each bin of :data:`LOG_EIGENVALUE_EDGES`.

    Args:
        values: Logarithms of eigenvalues, of shape ``(k,)``.
        counts: Their multiplicities.

    Returns:
        The numbers, of shape ``(bins,)``.
    """
    numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = torch.histogram(
        values.double(), LOG_EIGENVALUE_EDGES, weight=counts.double()
    ).hist.numpy()
    return numbers


def plot_spectrum(spectrum: Spectrum, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot a histogram of the logarithms of the eigenvalues; see :meth:`Spectrum.plot`."""
    figure, ax = new_axes(ax, (4.2, 3.0), left=0.14, bottom=0.5, top=0.3)
    edges = LOG_EIGENVALUE_EDGES.tolist()
    shown = 0.0
    for negative, color, label in (
        (False, POSITIVE, "positive"),
        (True, NEGATIVE, "negative, by their size"),
    ):
        counts = eigenvalues_by_bin(*log_eigenvalues(spectrum, negative=negative))
        if counts.any():
            ax.stairs(counts, edges, fill=True, alpha=0.6, color=color, label=label)
            shown += counts.sum()
    if not spectrum.exact:
        # Nearly all eigenvalues are in the bulk, which would dwarf the others.
        ax.set_yscale("symlog", linthresh=1)
    ax.set(xlabel="log10 eigenvalue", ylabel="number of eigenvalues")
    zeros = round(spectrum.num_parameters - shown)
    about = "" if spectrum.exact else "about "
    ax.set_title(
        f"{about}{zeros} of {spectrum.num_parameters} eigenvalues are zero, not shown", fontsize=11, loc="left"
    )
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    return figure, ax


def new_axes(
    ax: Axes | None, size: tuple[float, float], *, left: float, bottom: float, top: float
) -> tuple[Figure, Axes]:
    """Return axes and their figure; those of a new figure, which pyplot does not know, if there are none yet.

    Args:
        ax: The axes, if there are any.
        size: Width and height of a new figure in inches.
        left: Share of its width at the left of the axes.
        bottom: Inches below the axes.
        top: Inches above the axes.
    """
    if ax is not None:
        # A subfigure is a part of a figure.
        return ax.figure.figure, ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=100)
    figure.subplots_adjust(left=left, right=0.97, bottom=bottom / size[1], top=1 - top / size[1])
    return figure, figure.subplots()
