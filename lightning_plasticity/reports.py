"""Hold the measurements, repairs and errors of each task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from lightning_plasticity.curvature import Spectrum, TangentKernel
from lightning_plasticity.diagnostics import Matrix
from lightning_plasticity.interventions import RepairReport


@dataclass(eq=False, repr=False)
class TaskReport:
    """The measurements at the start of one task, and the repairs and errors until the next one.

    As long as the samples of the task are being gathered, because its first batch holds too few, ``metrics`` is empty.

    Args:
        task: Number of the task, from 0.
        task_id: The name that the data module, the module or ``new_task`` gave the task.
        step: Optimizer steps taken before the task, over all fits.
        spectrum: Spectrum of the main matrix of the probe; ``None`` if it was left out or the probe failed.
        metrics: The diagnostics by name, each also relative to the initial weights on the same batch
            (``<name>_vs_initial``) and, for estimates, with their uncertainty (``<name>_standard_error``,
            ``<name>_resolved``), the loss on the probe batch and its number of samples, ``probe_samples``; empty if the
            probe failed.
        collapsed: Whether the verdict was a collapse.
        repairs: The reports of the repairs from the start of this task to that of the next. Step interventions and
            regularizers are logged instead.
        matrix: The matrix of the spectrum: ``"ggn"`` or ``"hessian"``.
        outputs: Number of outputs of the network for one sample; ``None`` if the probe has not counted them.
        trained_parameters: A hash of the names and shapes of the parameters that were trained.
        remarks: What was left out or done otherwise than asked in the measurement, a sentence each.
        verdict: The verdict in a sentence, with the numbers that it rests on; empty if there is none.
        fresh: The diagnostics of the initial weights on the same samples, by name, as far as they are resolved.
        before: After the verdict of a live fit test: the results of a fit test on the batch at hand, before the
            repairs. Otherwise empty, since ``metrics`` holds them.
        after: The diagnostics after the repairs, on the same samples as before: those of the start of the task, or of
            the batch at hand. Empty without repairs.
        effect: What the repairs at the start of the task have changed, in a phrase; empty without repairs.
        fit_curve: The losses of the fit test before each step and after the last one; of a live one, those on the
            batches of the task before each step. Empty without a fit test.
        fresh_fit_curve: The same for the initial weights.
        limited: Whether more samples would have taken too long.
        coupled: Whether the loss of a sample depends on others of its batch, which was measured whole.
        errors: The errors that did not end training, from the start of this task to that of the next: the first one of
            ``"probe"``, ``"fit_test"``, ``"monitor"`` and ``"task_detector"``, of each intervention by its
            name and of each logger by the name of its class. Errors of other ranks than the first begin with
            ``on rank <rank>``.
        kernel: The tangent kernel on the same samples; ``None`` if it was not measured.
        expected_steps: Number of optimizer steps that the task was expected to take; ``None`` if it was not known.
        logged: The last values of what the module itself had logged when the task ended, on the first rank.

    Example:
        >>> TaskReport(task=3, task_id="cats", step=600, metrics={"learnable_fraction": 0.21}, collapsed=True)
        TaskReport(task=3, task_id='cats', step=600, learnable_fraction=0.21, collapsed)
    """

    task: int
    task_id: int | str | None
    step: int
    spectrum: Spectrum | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    collapsed: bool = False
    repairs: list[RepairReport] = field(default_factory=list)
    matrix: Matrix = "ggn"
    outputs: int | None = None
    trained_parameters: str = ""
    remarks: list[str] = field(default_factory=list)
    verdict: str = ""
    fresh: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    effect: str = ""
    fit_curve: tuple[float, ...] = ()
    fresh_fit_curve: tuple[float, ...] = ()
    limited: bool = False
    coupled: bool = False
    errors: dict[str, str] = field(default_factory=dict)
    kernel: TangentKernel | None = None
    expected_steps: int | None = None
    logged: dict[str, float] = field(default_factory=dict)

    @override
    def __repr__(self) -> str:
        parts = [f"task={self.task}"]
        parts += [] if self.task_id is None else [f"task_id={self.task_id!r}"]
        parts.append(f"step={self.step}")
        # The first metric is the first diagnostic of the main matrix.
        parts += [f"{name}={value:.3g}" for name, value in list(self.metrics.items())[:1]]
        parts += ["collapsed"] if self.collapsed else []
        parts += [f"repairs=[{', '.join(map(_summary, self.repairs))}]"] if self.repairs else []
        parts += [f"errors={sorted(self.errors)}"] if self.errors else []
        return f"TaskReport({', '.join(parts)})"

    def differences(self, other: TaskReport) -> list[str]:
        """Return why the numbers of an earlier task cannot be compared with those of this one; empty if they can.

        Args:
            other: The report of the earlier task.

        Example:
            >>> first = TaskReport(0, None, 0, metrics={"probe_samples": 64.0}, outputs=3)
            >>> TaskReport(1, None, 200, metrics={"probe_samples": 64.0}, outputs=5).differences(first)
            ['5 outputs of a sample instead of 3']
        """
        reasons = []
        samples, before = self.metrics.get("probe_samples"), other.metrics.get("probe_samples")
        if samples != before:
            reasons.append(f"{_count(samples)} samples instead of {_count(before)}")
        if self.outputs != other.outputs:
            reasons.append(f"{_count(self.outputs)} outputs of a sample instead of {_count(other.outputs)}")
        if self.trained_parameters != other.trained_parameters:
            reasons.append("other parameters that are trained")
        return reasons

    @property
    def _kernel_of_spectrum(self) -> TangentKernel | None:
        return None if self.spectrum is None else self.spectrum.kernel

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python objects and tensors, for checkpoints."""
        return {
            "task": self.task,
            "task_id": self.task_id,
            "step": self.step,
            "spectrum": None if self.spectrum is None else self.spectrum.to_dict(),
            "metrics": dict(self.metrics),
            "collapsed": self.collapsed,
            "repairs": [repair.to_dict() for repair in self.repairs],
            "matrix": self.matrix,
            "outputs": self.outputs,
            "trained_parameters": self.trained_parameters,
            "remarks": list(self.remarks),
            "verdict": self.verdict,
            "fresh": dict(self.fresh),
            "before": dict(self.before),
            "after": dict(self.after),
            "effect": self.effect,
            "fit_curve": self.fit_curve,
            "fresh_fit_curve": self.fresh_fit_curve,
            "limited": self.limited,
            "coupled": self.coupled,
            "errors": dict(self.errors),
            # The kernel of an exact spectrum is saved with it.
            "kernel": None if self.kernel is None or self._kernel_of_spectrum is not None else self.kernel.to_dict(),
            "expected_steps": self.expected_steps,
            "logged": dict(self.logged),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TaskReport:
        """Restore a report from the result of :meth:`to_dict`."""
        spectrum = None if state["spectrum"] is None else Spectrum.from_dict(state["spectrum"])
        kernel = None if state["kernel"] is None else TangentKernel.from_dict(state["kernel"])
        return cls(
            **{
                **state,
                "spectrum": spectrum,
                "kernel": spectrum.kernel if kernel is None and spectrum is not None else kernel,
                "repairs": [RepairReport.from_dict(repair) for repair in state["repairs"]],
            }
        )


def _count(number: float | None) -> str:
    return "an unknown number of" if number is None else f"{number:g}"


def _summary(repair: RepairReport) -> str:
    units = sum(len(units) for units in repair.units.values())
    changed = f"{units} units" if repair.units else f"{repair.num_parameters_changed} parameters"
    return f"{repair.name}: {changed}{', undone' if repair.undone else ''}"
