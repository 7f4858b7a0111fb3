"""Measure the curvature of a loss: the spectrum of its Gauss-Newton matrix or Hessian, without Lightning.

The folder:

* :mod:`.ggn`, :mod:`.hessian`: the two front functions, :func:`ggn_spectrum` and :func:`hessian_spectrum`.
* :mod:`.ntk`: :func:`tangent_kernel`, for any loss and any number of outputs, within a budget by :mod:`.cost`.
* :mod:`.eigenvectors`: :func:`top_eigenvectors`, the eigenvectors that belong to the largest eigenvalues.
* :mod:`.pyhessian`: the same Hessian by PyHessian, on :mod:`.pyhessian_adapter`.
* :mod:`.spectrum`, :mod:`.estimates`, :mod:`.kernel`: the results, :class:`Spectrum`, :class:`Estimate` and
  :class:`TangentKernel`.
* :mod:`.plotting`: the picture of a spectrum.
* :mod:`.problem`: the model, batch and loss, validated.
* :mod:`.double_backward`: second derivatives by differentiating twice, checked by :mod:`.finite_differences`.
* :mod:`.autograd_graph`: vector-Jacobian products and walks through the autograd graph.
* :mod:`.exact`: exact spectra from the Gram matrix of the batch.
* :mod:`.matrix_free`: estimated spectra from matrix-vector products.
"""

from lightning_plasticity.curvature.eigenvectors import Eigenpairs, top_eigenvectors
from lightning_plasticity.curvature.estimates import Estimate, Quadrature
from lightning_plasticity.curvature.exact.custom_losses import custom_loss
from lightning_plasticity.curvature.exact.gram import TooManyRowsError
from lightning_plasticity.curvature.exact.outputs import UnsupportedModelError
from lightning_plasticity.curvature.ggn import ggn_spectrum
from lightning_plasticity.curvature.hessian import hessian_spectrum
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.ntk import tangent_kernel
from lightning_plasticity.curvature.spectrum import Spectrum

__all__ = [
    "Eigenpairs",
    "Estimate",
    "Quadrature",
    "Spectrum",
    "TangentKernel",
    "TooManyRowsError",
    "UnsupportedModelError",
    "custom_loss",
    "ggn_spectrum",
    "hessian_spectrum",
    "tangent_kernel",
    "top_eigenvectors",
]
