"""The picture of a spectrum."""

import numpy as np
import torch
from matplotlib.figure import Figure

from lightning_plasticity.curvature import Spectrum, hessian_spectrum
from lightning_plasticity.curvature.plotting import LOG_EIGENVALUE_EDGES

VALUES = np.array([-2.0, -1e-3, 0.0, 1e-12, 2e-3, 0.5, 0.55, 40.0, 1e7])


def spectrum() -> Spectrum:
    return Spectrum(torch.tensor(VALUES), torch.full((len(VALUES),), 1 / 9, dtype=torch.float64), 9, exact=True)


def test_bars_count_eigenvalues() -> None:
    _, ax = spectrum().plot()
    edges = LOG_EIGENVALUE_EDGES.numpy()
    shown = {patch.get_label(): patch.get_data().values for patch in ax.patches}
    # The largest is counted in the last bin.
    positive = np.minimum(np.log10(VALUES[VALUES > 1e-8]), edges[-1])
    np.testing.assert_allclose(shown["positive"], np.histogram(positive, edges)[0])
    negative = np.log10(-VALUES[VALUES < -1e-8])
    np.testing.assert_allclose(shown["negative, by their size"], np.histogram(negative, edges)[0])
    assert ax.get_title(loc="left") == "2 of 9 eigenvalues are zero, not shown"
    assert ax.get_yscale() == "linear"


def test_spectrum_draws_into_given_axes() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert spectrum().plot(ax=right) == (figure, right)
    assert right.patches
    assert not left.patches


def test_estimate_has_logarithmic_counts() -> None:
    model, batch = torch.nn.Linear(4, 3), torch.randn(8, 4)
    estimate = hessian_spectrum(model, batch, lambda model, x: model(x).square().mean(), num_probes=2, num_steps=5)
    figure, ax = estimate.plot()
    figure.canvas.draw()
    assert ax.get_yscale() == "symlog"
    assert ax.get_title(loc="left").startswith("about ")


def test_zero_matrix_has_no_bars() -> None:
    figure, ax = Spectrum(torch.zeros(3), torch.full((3,), 1 / 3), 3, exact=True).plot()
    figure.canvas.draw()
    assert not ax.patches
    assert ax.get_title(loc="left") == "3 of 3 eigenvalues are zero, not shown"
