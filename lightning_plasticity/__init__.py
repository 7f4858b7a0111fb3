"""Tells at the start of every task whether a network can still learn it, and repairs it if asked to.

The rooms, in the order in which a batch passes through them: ``tasks`` (is this a new task?), ``training_loss`` (what
is the loss here, without touching the run?), ``probe`` (how is its curvature measured?), ``curvature`` (what does the
loss surface look like?), ``functional`` and ``metrics`` (are units and features alive?), ``diagnostics`` (which numbers
say so?), ``collapse`` (is this a collapse?), ``interventions`` and ``remedies`` (what is done about it, and when?),
``loggers`` and ``plots`` (where do people see it?). ``callback`` conducts; ``curvature``, ``functional``, ``metrics``
and ``interventions`` work without Lightning.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_plasticity.callback import SpectralCollapseCallback as SpectralCollapseCallback
    from lightning_plasticity.collapse import Collapse as Collapse
    from lightning_plasticity.messages import PlasticityWarning as PlasticityWarning
    from lightning_plasticity.metrics import PlasticityMonitor as PlasticityMonitor
    from lightning_plasticity.probes import GGNProbe as GGNProbe
    from lightning_plasticity.probes import HessianProbe as HessianProbe
    from lightning_plasticity.probes import PyHessianProbe as PyHessianProbe
    from lightning_plasticity.reports import TaskReport as TaskReport
    from lightning_plasticity.tasks import TaskDetector as TaskDetector

__version__ = "0.1.0"

_HOMES = {
    "Collapse": "collapse",
    "GGNProbe": "probes",
    "HessianProbe": "probes",
    "PlasticityMonitor": "metrics",
    "PlasticityWarning": "messages",
    "PyHessianProbe": "probes",
    "SpectralCollapseCallback": "callback",
    "TaskDetector": "tasks",
    "TaskReport": "reports",
}

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first asked for: ``curvature`` must not import Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
