"""What is remembered of each task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_plasticity.curvature import Spectrum
from lightning_plasticity.diagnostics import Matrix
from lightning_plasticity.interventions import RepairReport


@dataclass(eq=False)
class TaskReport:
    """What was seen at the start of one task, and done from then on until the next.

    Args:
        task: Number of the task, from 0.
        task_id: The name that the data module, the module or ``new_task`` gave the task.
        step: Optimizer steps taken before the task, over all fits.
        spectrum: Spectrum on the first batch of the matrix that the probe is named after; ``None`` if the probe failed.
        metrics: The diagnostics by name, each also relative to the initial weights on the same batch
            (``<name>_vs_initial``) and, of estimates, with what is known of their uncertainty
            (``<name>_standard_error``, ``<name>_resolved``), and the loss on the probe batch; empty if the probe
            failed.
        collapsed: Whether it was called a collapse.
        repairs: What the repairs did from the start of this task on to that of the next. What running remedies and
            regularizers do is logged instead.
        matrix: What the spectrum is of: ``"ggn"`` or ``"hessian"``.
        errors: What could not be done from the start of this task to that of the next, and why: the first error of
            ``"probe"``, ``"monitor"`` and ``"task_detector"``, of each intervention by its name and of each logger by
            the name of its class. What failed in another of several processes than the first begins with
            ``in process <rank>``.
    """

    task: int
    task_id: int | str | None
    step: int
    spectrum: Spectrum | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False
    repairs: list[RepairReport] = field(default_factory=list)
    matrix: Matrix = "ggn"
    errors: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python and tensors, for checkpoints."""
        return {
            "task": self.task,
            "task_id": self.task_id,
            "step": self.step,
            "spectrum": None if self.spectrum is None else self.spectrum.to_dict(),
            "metrics": dict(self.metrics),
            "collapsed": self.collapsed,
            "repairs": [repair.to_dict() for repair in self.repairs],
            "matrix": self.matrix,
            "errors": dict(self.errors),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TaskReport:
        """The inverse of :meth:`to_dict`."""
        spectrum = state["spectrum"]
        return cls(
            **{
                **state,
                "spectrum": None if spectrum is None else Spectrum.from_dict(spectrum),
                "repairs": [RepairReport.from_dict(repair) for repair in state["repairs"]],
            }
        )
