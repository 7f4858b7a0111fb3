"""The conductor: asks each room in its turn, and holds the history. It computes nothing itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_plasticity._compat import (
    is_logging_step,
    is_model_parallel,
    is_restoring_for_finder,
    spawns_processes,
    takes_dataloader_iter,
)
from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.collapse import Collapse, PlasticityWarning
from lightning_plasticity.diagnostics import Source, diagnostics_of, measure, resolved_value, to_log_dict
from lightning_plasticity.distributed.agreement import all_or_none, format_error, local_error, raise_local_error
from lightning_plasticity.distributed.sharded_weights import check_sharding, check_strategy, gather_full_parameters
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.monitoring import StepMonitor, monitored_copy
from lightning_plasticity.interventions import Intervention
from lightning_plasticity.isolation.batches import slice_batch
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import GGNProbe, Probe, ProbeResult
from lightning_plasticity.reporting.errors import ErrorLog, gather_errors
from lightning_plasticity.reporting.loggers import log_step, log_summary, log_task
from lightning_plasticity.reporting.progress import shown_progress
from lightning_plasticity.reports import TaskReport
from lightning_plasticity.tasks import TaskDetector, TaskId, UnusableDetectorError
from lightning_plasticity.training.sandbox import LossFunction, ProbeContext, preserve_schedulers

_STATE_VERSION = 1


class SpectralCollapseCallback(Callback):
    """Tells at the start of every task whether the network can still learn it, and repairs it if asked to.

    On the first training batch of a task a copy of the module is probed: the spectra of its Gauss-Newton matrix and of
    its tangent kernel on that batch, and of its Hessian if asked for, and the same for its initial weights. The numbers
    go to every logger of the Trainer as ``plasticity/<name>`` (at the number of optimizer steps, over all fits) and
    ``plasticity_by_task/<name>`` (at the number of the task), the spectrum to TensorBoard's Histograms tab, and all of
    it to :attr:`history`. A collapse is announced by one :class:`~lightning_plasticity.collapse.PlasticityWarning` and
    followed by the interventions. As long as nothing is repaired, training is bit-identical to training without this
    callback.

    A task is, by the first of these that applies: what follows :meth:`new_task`; what follows a change of ``task_id``
    or ``current_task`` on the data module or the module; otherwise every ``trainer.fit`` that does not resume from a
    checkpoint. Keep one instance for all tasks, also if each task has a new Trainer.

    The first probe of a callback's life must succeed: a model or loss that cannot be probed is an error there, and so
    is an intervention that cannot work, before any weight has changed. From then on what fails is warned of, the reason
    is kept in ``errors`` of the :class:`~lightning_plasticity.reports.TaskReport`, and training goes on.

    Args:
        probe: How the curvature is measured: by default :class:`~lightning_plasticity.probes.GGNProbe`, exactly;
            :class:`~lightning_plasticity.probes.HessianProbe` sees negative curvature too.
        collapse: What is called a collapse.
        interventions: What is done about lost plasticity, one after the other: at a collapse, at the start of tasks,
            every so many steps, or all the time.
        task_detector: How new tasks are recognised.
        monitor: Whether dormant units, feature ranks and norms of the hidden layers are measured at the start of every
            task, on the probe's samples; or the :class:`~lightning_plasticity.PlasticityMonitor` that says which.
        monitor_every_n_steps: Measure them also while training, on the batch in flight, every so many optimizer steps.
            Logged as ``plasticity_training/<name>``.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of the data with a graph; by default the loss that
            ``training_step`` returns. Needed with manual optimization, and where ``training_step`` adds other terms.

    Raises:
        MisconfigurationException: At the start of a fit whose strategy is not supported (a single device, DDP, and
            ``fully_shard`` with ``ModelParallelStrategy`` are; of the interventions the last knows regularizers only),
            whose loss or batch is not known, or where ``collapse`` watches what ``probe`` does not measure; at the
            first probe if the module cannot be probed.
        UnsupportedModelError: At the first probe if the curvature of the module or its loss is not known.
        ValueError: If an argument is out of range; at the first probe if there is nothing to measure on the batch, or
            an intervention cannot work on the module.
        TypeError: If an argument is of another kind.

    References:
        "Spectral Collapse Drives Loss of Plasticity in Deep Continual Learning", arXiv 2509.22335.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Model(BoringModel):
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.mse_loss(self(batch), torch.ones(len(batch), 2))
        >>> callback = SpectralCollapseCallback()
        >>> trainer = Trainer(
        ...     callbacks=[callback],
        ...     max_steps=2,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(Model())
        >>> [(report.task, report.spectrum.num_parameters, report.collapsed) for report in callback.history]
        [(0, 66, False)]
    """

    def __init__(
        self,
        # None, since jsonargparse would hand the arguments of a default probe on to a probe of another kind.
        probe: Probe | None = None,
        collapse: Collapse = Collapse(),  # noqa: B008  (immutable)
        interventions: Sequence[Intervention] = (),
        task_detector: TaskDetector | None = None,
        # Not LossFunction, since jsonargparse would refuse functions that do not say that they return a Tensor.
        loss_fn: Callable[[LightningModule, Any], Any] | None = None,
        monitor: bool | PlasticityMonitor = True,
        monitor_every_n_steps: int | None = None,
    ) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r} must be a function loss_fn(module, batch) -> mean loss")
        if probe is not None and not isinstance(probe, Probe):
            raise TypeError(f"probe={probe!r} must be an instance of Probe, such as GGNProbe() or HessianProbe()")
        if not isinstance(monitor, bool | PlasticityMonitor):
            raise TypeError(f"monitor={monitor!r} must be True, False or a PlasticityMonitor")
        if not isinstance(collapse, Collapse):
            raise TypeError(f"collapse={collapse!r} must be an instance of Collapse, such as Collapse(below=0.8)")
        if task_detector is not None and not isinstance(task_detector, TaskDetector):
            raise TypeError(f"task_detector={task_detector!r} must be an instance of TaskDetector, or None")
        check_positive_ints(optional=True, monitor_every_n_steps=monitor_every_n_steps)
        if monitor is False and monitor_every_n_steps is not None:
            raise ValueError(f"monitor_every_n_steps={monitor_every_n_steps} with monitor=False: there is no monitor")
        self.monitor = PlasticityMonitor() if monitor is True else monitor or None
        self._monitor_is_wanted = monitor is not True  # what nobody asked for must not end a run
        self._errors = ErrorLog()
        self._step_monitor = StepMonitor(self.monitor, monitor_every_n_steps, self._errors)
        self.probe = probe if probe is not None else GGNProbe()
        self.collapse = collapse
        self._runner = InterventionRunner(interventions, self._errors)
        self.interventions = self._runner.interventions
        self.history: list[TaskReport] = []
        self._tasks = task_detector if task_detector is not None else TaskDetector()
        self._loss_fn = loss_fn
        self._initial: dict[str, Tensor] = {}
        self._steps_before_fit = self._tasks_before_fit = 0
        self._steps = 0
        self._resumed = False
        self._keep_state = False
        self._checked = False
        self._remedies_started = False
        self._warned_of_early_checkpoint = False
        self._in_batch = False

    def new_task(self, task_id: TaskId = None) -> None:
        """The next training batch is the first of a new task. To be called in every process of several.

        Args:
            task_id: The name of the task, for the report.

        Raises:
            TypeError: If it is no int and no string.
        """
        self._tasks.announce(task_id)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer.strategy, self.interventions)
        if spawns_processes(trainer.strategy):
            rank_zero_warn(
                "this strategy trains in processes that are started for each fit: history, and all that "
                "SpectralCollapseCallback remembers for the next fit, such as the initial weights, end with them (logs "
                "and checkpoints do not). Use strategy='ddp' to have them",
                category=PlasticityWarning,
            )
        if takes_dataloader_iter(pl_module.training_step):
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step(dataloader_iter) fetches its batches itself, so that there "
                "is none to probe on: write training_step(batch, batch_idx)"
            )
        sources: list[Source] = [*self.probe.matrices]
        measures = [] if self.monitor is None else self.monitor.measures
        available = [d.name for d in diagnostics_of(sources)] + measures
        if self.collapse.metric not in available:
            raise MisconfigurationException(
                f"Collapse(metric={self.collapse.metric!r}) watches what neither {self.probe} nor the monitor "
                f"measures: choose one of {available}, or another probe"
            )
        if self._loss_fn is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes manually, so its training_step cannot be asked for a loss "
                "without training it: pass SpectralCollapseCallback(loss_fn=...), loss_fn(module, batch) -> mean loss"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_model_parallel(trainer.strategy):
            check_sharding(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tasks.on_fit(resumed=self._resumed and bool(self.history), first=not self.history)
        self._resumed = self._checked = False
        if not self.history:  # a run that goes on from before this callback was there
            self._steps = trainer.global_step
        self._steps_before_fit = self._steps - trainer.global_step
        self._tasks_before_fit = len(self.history)
        self._runner.begin_fit(trainer)
        self._remedies_started = self._warned_of_early_checkpoint = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._in_batch = True
        self._step_monitor.cancel()  # of a batch that was skipped: the probe's copy must not be watched
        if self.interventions:
            self._runner.track(trainer.optimizers)
        is_new_task = self._detected(lambda: self._tasks.new_task(trainer, pl_module, batch))
        is_new_task = is_new_task or self._tasks.consume_announcement() or not self.history
        if is_new_task:
            self._share_errors()
        if is_new_task or not self._remedies_started or self._runner.needs_restart(trainer):
            at = ProbeContext(trainer, pl_module, batch, self._loss_fn, batch_idx)
            try:
                with self._tasks.paused():
                    seen = self._look(at, is_new_task=is_new_task)
                self._step_monitor.begin(pl_module, self._steps)
            except BaseException:  # an error before the first task, or an interruption: another fit may begin the task
                if is_new_task:
                    self._tasks.postpone()
                if not self.history:
                    self._initial = {}
                raise
            if seen is not None:
                if self.interventions:
                    self._step_monitor.postpone()  # what repairs run must not be watched
                with self._tasks.paused():
                    self._start_task(*seen)
        self._step_monitor.begin(pl_module, self._steps)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        log_step(trainer.loggers, self._step_monitor.end(), self._steps, self._errors)
        self._detected(lambda: self._tasks.on_batch_end(outputs))
        step_before, self._steps = self._steps, self._steps_before_fit + trainer.global_step
        if self.interventions:
            at = ProbeContext(trainer, pl_module, batch, self._loss_fn, batch_idx)
            with self._tasks.paused():
                repairs, numbers = self._runner.after_batch(at, step_before, self._steps)
            self.history[-1].repairs += repairs
            log_step(trainer.loggers, numbers, self._steps, self._errors)
        self._keep_errors()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._runner.before_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._runner.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        terms = self._runner.add_gradients(trainer, pl_module, optimizer)
        if terms and is_logging_step(trainer):
            values = {name: term.item() for name, term in terms.items()}
            log_step(trainer.loggers, values, self._steps, self._errors)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_monitor.cancel()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._in_batch = False
        self._step_monitor.cancel()
        self._runner.end_fit()
        self._keep_errors()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_monitor.cancel()
        self._runner.end_fit()
        if len(self.history) > self._tasks_before_fit:
            log_summary(trainer.loggers, self.history, self._errors)
        self._share_errors()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed = False  # a resumed fit that had nothing left to train

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._keep_state = False  # a checkpoint that was tested and held no state of ours

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        unseen = self._steps_before_fit + trainer.global_step - self._steps
        if self._in_batch and unseen > 0 and not self._warned_of_early_checkpoint:
            self._warned_of_early_checkpoint = True
            rank_zero_warn(
                "a checkpoint was saved after an optimizer step and before SpectralCollapseCallback has seen the end "
                "of that batch: a run resumed from it is not the same. List the callback that saves it after "
                "SpectralCollapseCallback in Trainer(callbacks=[...])",
                category=PlasticityWarning,
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._resumed |= fitting and not is_restoring_for_finder(trainer)
        self._keep_state = not fitting  # to test or validate a checkpoint must not roll back the history

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "history": [report.to_dict() for report in self.history],
            "initial": self._initial,
            "steps": self._steps,
            "monitored": self._step_monitor.last,
            "tasks": self._tasks.state_dict(),
            "interventions": self._runner.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._keep_state:
            self._keep_state = False
            return
        if state_dict.get("version") != _STATE_VERSION:
            raise MisconfigurationException(
                f"the checkpoint holds state of SpectralCollapseCallback in version {state_dict.get('version')!r}, "
                f"and this release reads version {_STATE_VERSION}: resume with the release that wrote it, or without "
                "the callback"
            )
        self.history = [TaskReport.from_dict(report) for report in state_dict["history"]]
        self._initial = dict(state_dict["initial"])
        self._steps = state_dict["steps"]
        self._step_monitor.last = state_dict["monitored"]
        self._tasks.load_state_dict(state_dict["tasks"])
        self._runner.load_state_dict(state_dict["interventions"])

    def _detected(self, ask: Callable[[], bool | None]) -> bool:
        """What the task detector says; nothing if it fails, after the first task."""
        try:
            return bool(ask())
        except Exception as error:
            if not self.history or isinstance(local_error(error), UnusableDetectorError):
                raise_local_error(error)
            self._errors.record("task_detector", "whether a task is new could not be told", error)
            return False

    def _look(self, at: ProbeContext, *, is_new_task: bool) -> tuple[ProbeContext, TaskReport] | None:
        """Takes a close look at the start of a task, or of a fit that goes on with one, and gets remedies ready.

        Nothing is repaired yet: what cannot work is an error while no weight has changed.

        Returns:
            Of a new task that could be looked at: the samples, and what was seen.
        """
        self._remedies_started = not self.interventions
        with contextlib.ExitStack() as looking:
            try:
                at = at.joined(self.probe.samples)
                looking.enter_context(gather_full_parameters(at.module))
            except Exception as error:
                missed, message = self._missed(error)
                if is_new_task:
                    rank_zero_warn(message, category=PlasticityWarning)
                    self.history.append(missed)
                    log_task(at.trainer.loggers, missed, self._errors)
                elif self.interventions:
                    self._errors.record("interventions", "interventions could not get ready and rest", error)
                return None  # the next batch gets them ready
            report = self._report(at) if is_new_task else None
            self._runner.start(at)
        self._remedies_started = True
        return None if report is None else (at, report)

    def _has_probed(self) -> bool:
        return any(report.spectrum is not None for report in self.history)

    def _missed(self, error: Exception) -> tuple[TaskReport, str]:
        """The report of a task at whose start nothing could be seen, and what to warn of.

        Raises:
            Exception: What has failed, if nothing has ever been seen.
        """
        if not self._has_probed():
            raise_local_error(error)
        report = TaskReport(len(self.history), self._tasks.task_id, self._steps)
        report.errors["probe"] = format_error(error)
        return report, (
            f"task {report.task}: plasticity could not be measured, training goes on: {report.errors['probe']}"
        )

    def _report(self, at: ProbeContext) -> TaskReport:
        """What is seen of the network at the start of a task."""
        report = TaskReport(len(self.history), self._tasks.task_id, self._steps)
        try:
            with all_or_none():
                is_initial = self._remember_initial(at.module)
                with preserve_schedulers(at.trainer):
                    message = self._probe_task(report, at, is_initial=is_initial)
                if not self._has_probed():
                    self._runner.dry_run(at)
        except Exception as error:
            report, message = self._missed(error)
        # What rank 0 saw counts for all: rounding may differ from device to device, decisions must not.
        state, message = at.trainer.strategy.broadcast((report.to_dict(), message))
        if message is not None:
            rank_zero_warn(message, category=PlasticityWarning)
        return TaskReport.from_dict(state)

    def _start_task(self, at: ProbeContext, report: TaskReport) -> None:
        self.history.append(report)
        report.repairs = self._runner.at_task(at, report.task, report.step, collapsed=report.collapsed)
        log_task(at.trainer.loggers, report, self._errors)

    def _keep_errors(self) -> None:
        if self.history:
            self._errors.flush_into(self.history[-1].errors)

    def _share_errors(self) -> None:
        """What has failed in one process alone, such as a logger, is known to all of them at the end of a task."""
        self._keep_errors()
        if self.history:
            self.history[-1].errors = gather_errors(self.history[-1].errors)

    def _remember_initial(self, pl_module: LightningModule) -> bool:
        """Keeps the first value of every parameter and buffer, and of those that appear or grow later.

        Returns:
            Whether the module has its initial weights, as before the first task.
        """
        is_initial = not self._initial
        for name, tensor in _named_tensors(pl_module):
            if is_lazy(tensor):
                raise MisconfigurationException(
                    f"{name!r} gets its shape in the first forward pass, and the probe comes before it: run "
                    f"{type(pl_module).__name__} on one batch before the fit, as in its __init__"
                )
            if name not in self._initial or self._initial[name].shape != tensor.shape:
                self._initial[name] = tensor.detach().cpu().clone()
        return is_initial

    def _probe_task(self, report: TaskReport, at: ProbeContext, *, is_initial: bool) -> str | None:
        """Fills the report; returns what to warn of."""
        if not self._checked:
            warning = self.probe.check(at.copy, at.batch, at.loss_on)
            if warning is not None:
                rank_zero_warn(warning, category=PlasticityWarning)
            self._checked = True
        now, features = self._seen(at.copy, at, "probing curvature")
        values = references = measure(now.spectra, features)
        if not is_initial:
            make_copy = partial(self._initial_copy, at)
            initial, initial_features = self._seen(
                make_copy, at, "probing curvature of the initial weights", monitored=bool(features)
            )
            references = measure(initial.spectra, initial_features)
        metric = self.collapse.metric
        verdict = self.collapse.evaluate(
            values[metric],
            earlier=[resolved_value(earlier.metrics, metric) for earlier in self.history],
            initial=references[metric],
        )
        report.matrix = self.probe.matrices[0]
        report.spectrum = now.spectra[report.matrix]
        by_layer = {name: value for name, value in features.items() if name not in values}
        report.metrics = {**to_log_dict(values, references), "probe_loss": now.loss, **by_layer}
        report.collapsed = verdict.collapsed
        return verdict.message if verdict.collapsed or verdict.inconclusive else None

    def _initial_copy(self, at: ProbeContext) -> LightningModule:
        """A copy of the module with its initial weights."""
        module = at.copy()
        shared = {id(tensor) for _, tensor in _named_tensors(at.module)}  # by a __deepcopy__ of the user's
        with torch.no_grad():
            for name, tensor in _named_tensors(module):
                if id(tensor) in shared:
                    continue
                try:
                    tensor.copy_(self._initial[name])
                except RuntimeError:  # a buffer may be expanded, so that nobody can write to it
                    if isinstance(tensor, nn.Parameter):
                        raise
                    tensor.data = self._initial[name].to(tensor, copy=True)
        return module

    def _seen(
        self, make_copy: Callable[[], LightningModule], at: ProbeContext, doing: str, *, monitored: bool = True
    ) -> tuple[ProbeResult, dict[str, float]]:
        """What the probe and the monitor see of a copy."""
        with shown_progress(at.trainer, doing) as progress:
            result = self.probe.measure(make_copy, at.batch, at.loss_on, progress)
        return result, self._monitored(make_copy, at.batch, at.loss_on) if monitored else {}

    def _monitored(
        self, make_copy: Callable[[], LightningModule], batch: Any, loss_fn: LossFunction
    ) -> dict[str, float]:
        """What the monitor sees of the probe's samples."""
        if self.monitor is None:
            return {}
        try:
            features = monitored_copy(self.monitor, make_copy(), slice_batch(batch, self.probe.samples), loss_fn)
            if not features and self.collapse.metric in self.monitor.measures:
                raise MisconfigurationException(
                    f"Collapse(metric={self.collapse.metric!r}) watches hidden layers, and the monitor has seen none: "
                    "name modules in PlasticityMonitor(layers=[...]), or choose another metric"
                )
            return features
        except Exception as error:
            if self._monitor_is_wanted or self.collapse.metric in self.monitor.measures:
                raise
            reason = f"{format_error(error)}; monitor=False stops trying"
            self._errors.record("monitor", "the activations could not be monitored", reason)
            return {}


def _named_tensors(module: LightningModule) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
