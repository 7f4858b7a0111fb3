"""What the loss surface looks like: the spectrum of its curvature, without Lightning.

:func:`ggn_spectrum` answers it for a module, a batch and a loss; :class:`Spectrum` holds the answer.
"""

from lightning_plasticity.curvature.estimates import Estimate, Quadrature
from lightning_plasticity.curvature.exact.custom_losses import custom_loss
from lightning_plasticity.curvature.exact.gram import TooManyRowsError
from lightning_plasticity.curvature.exact.outputs import UnsupportedModelError
from lightning_plasticity.curvature.ggn import ggn_spectrum
from lightning_plasticity.curvature.hessian import hessian_spectrum
from lightning_plasticity.curvature.kernel import TangentKernel
from lightning_plasticity.curvature.spectrum import Spectrum

__all__ = [
    "Estimate",
    "Quadrature",
    "Spectrum",
    "TangentKernel",
    "TooManyRowsError",
    "UnsupportedModelError",
    "custom_loss",
    "ggn_spectrum",
    "hessian_spectrum",
]
