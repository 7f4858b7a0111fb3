"""Detect and repair loss of plasticity in PyTorch Lightning training.

A network that keeps learning new tasks slowly loses the ability to learn. Add one callback to a Trainer: it measures at
the start of every task whether the network can still learn, and repairs it on request.

==============================  ========================================================================================
``SpectralCollapseCallback``    the callback: probes curvature and activations, warns, logs and runs interventions
``TaskDetector``                the rules by which new tasks start
``GGNProbe``                    the exact spectrum of the Gauss-Newton matrix; the default
``HessianProbe``                an estimate of the spectrum of the Hessian, negative curvature included
``PyHessianProbe``              the same by PyHessian's algorithms
``FitTest``                     the test whether the network learns the task as fast as its initial weights
``PlasticityMonitor``           a metric: dormant units, ranks and norms of the hidden layers of any module
``Collapse``                    the rule for an alarm
``TaskReport``                  the measurements, repairs and errors of one task
``PlasticityWarning``           the category of all warnings
==============================  ========================================================================================

The packages below need no Lightning:

==============================  ========================================================================================
``curvature``                   spectra of a module, a batch and a loss
``functional``                  diagnostics of activations, weights and gradients
``interventions``               repairs, step interventions and regularizers
``metrics``                     the diagnostics as metrics of torchmetrics
==============================  ========================================================================================
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_plasticity.callback import SpectralCollapseCallback as SpectralCollapseCallback
    from lightning_plasticity.collapse import Collapse as Collapse
    from lightning_plasticity.fit_test import FitTest as FitTest
    from lightning_plasticity.messages import PlasticityWarning as PlasticityWarning
    from lightning_plasticity.metrics import PlasticityMonitor as PlasticityMonitor
    from lightning_plasticity.probes import GGNProbe as GGNProbe
    from lightning_plasticity.probes import HessianProbe as HessianProbe
    from lightning_plasticity.probes import PyHessianProbe as PyHessianProbe
    from lightning_plasticity.reports import TaskReport as TaskReport
    from lightning_plasticity.tasks import TaskDetector as TaskDetector

__version__ = "0.1.0"

_MODULES = {
    "Collapse": "collapse",
    "FitTest": "fit_test",
    "GGNProbe": "probes",
    "HessianProbe": "probes",
    "PlasticityMonitor": "metrics",
    "PlasticityWarning": "messages",
    "PyHessianProbe": "probes",
    "SpectralCollapseCallback": "callback",
    "TaskDetector": "tasks",
    "TaskReport": "reports",
}

__all__ = [*_MODULES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``curvature`` must not import Lightning."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names and the packages, for tab completion."""
    return sorted([*__all__, "curvature", "functional", "interventions", "metrics"])


if not {"lightning", "pytorch_lightning"}.isdisjoint(sys.modules):
    # LightningCLI finds short class names, such as `class_path: ReDo`, only of classes that are already imported.
    import_module(f"{__name__}.callback")
