"""Define SpectralCollapseCallback, which maps the hooks of a Trainer to the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_plasticity._compat import (
    gradient_scale,
    is_logging_step,
    is_model_parallel,
    is_restoring_for_finder,
    steps_after_batch,
    trains,
)
from lightning_plasticity._validation import check_positive_ints
from lightning_plasticity.collapse import Collapse
from lightning_plasticity.context import ProbeContext
from lightning_plasticity.distributed.agreement import local_error, raise_local_error
from lightning_plasticity.engine.error_log import ErrorLog, gather_errors
from lightning_plasticity.engine.gathering import Gathering
from lightning_plasticity.engine.intervention_runner import InterventionRunner
from lightning_plasticity.engine.monitoring import StepMonitor
from lightning_plasticity.engine.task_start import TaskStart
from lightning_plasticity.fit_test import FitTest
from lightning_plasticity.interventions import Intervention, RepairReport
from lightning_plasticity.isolation.training_state import TrainingState
from lightning_plasticity.messages import (
    MisconfigurationError,
    SkippedBatchError,
    constructor_call,
    rank_zero_warn,
)
from lightning_plasticity.metrics import PlasticityMonitor
from lightning_plasticity.probes import GGNProbe, Probe
from lightning_plasticity.reporting.history import STATE_VERSION, History
from lightning_plasticity.reporting.reporter import LogLevel, Reporter
from lightning_plasticity.reports import TaskReport
from lightning_plasticity.tasks import TaskDetector, TaskId, UnusableDetectorError
from lightning_plasticity.training.checks import (
    check_live,
    check_sharding,
    check_strategy,
    check_training_step,
    warn_of_lost_state,
    warn_of_weight_averages,
)
from lightning_plasticity.training.probe_batch import check_probe_batch, fixed_batch
from lightning_plasticity.training.sandbox import TrainerContext


@dataclass
class _FitState:
    """The state of one fit.

    Args:
        steps_before: Optimizer steps of earlier fits.
        tasks_before: Number of tasks of earlier fits.
        in_batch: Whether a batch has begun and not ended.
        warned_of_early_checkpoint: Whether the warning about a checkpoint saved too early was issued.
        skipped: Number of batches that a new task could not be measured on, because they have no loss.
        no_loss: The error of the last batch, if it was one of these.
    """

    steps_before: int = 0
    tasks_before: int = 0
    in_batch: bool = False
    warned_of_early_checkpoint: bool = False
    skipped: int = 0
    no_loss: SkippedBatchError | None = None


class SpectralCollapseCallback(Callback):
    """Measures at the start of every task whether the network can still learn it, and repairs it on request.

    On the first training batch of a task it probes a copy of the module: the spectra of its Gauss-Newton matrix and of
    its tangent kernel on that batch, with :class:`~lightning_plasticity.HessianProbe` also of its Hessian, and the same
    for its initial weights. Copies of both are trained for a few steps (:class:`~lightning_plasticity.FitTest`): by
    default a collapse means that the initial weights would learn the task better. On a collapse it issues one
    :class:`~lightning_plasticity.PlasticityWarning` and runs the interventions. As long as nothing is repaired,
    training is bit-identical to training without the callback.

    Everything is in :attr:`history`. A few lead numbers (handicap, learnable fraction, ε-rank, dormant fraction, alarms
    and repairs so far) go to every logger of the Trainer as ``plasticity/<name>`` (by the number of optimizer steps
    over all fits) and ``plasticity_by_task/<name>`` (by the number of the task). In TensorBoard the first group is
    called ``_plasticity``, so that it comes first; beside it are figures, the spectra under Histograms, alarms and
    repairs under Text, and charts of the network beside a fresh one under Custom Scalars. ``CSVLogger`` has the numbers
    of tasks in a file of their own, ``plasticity_tasks.csv``; W&B, MLflow and Comet get figures and a table of tasks,
    too. Other callbacks, such as ``EarlyStopping`` and ``ModelCheckpoint``, can monitor ``plasticity/<name>`` of the
    lead numbers, and of ``fit_loss_vs_initial``, ``learnable_fraction_vs_initial`` and ``collapsed``, as soon as they
    are measured.

    A probe takes 64 samples, and the Hessian's 256. Where the first batch of a task holds fewer, the first samples of
    the task are gathered over its first batches and then measured on the weights that the task began with; the report
    is filled in and repairs run at that moment, or with fewer samples when the task ends. Batches that cannot be
    joined, such as sequences of different lengths, are an exception: the first one is measured alone, which the
    ``remarks`` of the report say. ``probe_samples`` of each report is the number of samples. Below 16 a warning says
    so, below 8 there is no verdict, and a task is compared only with tasks of as many samples and outputs of which the
    same parameters were trained. ``probe_batch`` gives a fixed set of samples instead.

    A task starts, by the first rule that applies: after :meth:`new_task`; when ``task_id`` or ``current_task`` changes
    on the data module or the module; otherwise at every ``trainer.fit`` that does not resume from a checkpoint. Keep
    one instance for all tasks, also if each task has a new Trainer.

    The first probe must succeed: a model or a loss that cannot be probed is an error, and so is an intervention that
    cannot work, before any weight has changed. From then on errors are warned of and kept in ``errors`` of the
    :class:`~lightning_plasticity.TaskReport`, and training goes on.

    Args:
        probe: The measurement of curvature; by default :class:`~lightning_plasticity.GGNProbe`, which is exact.
            :class:`~lightning_plasticity.HessianProbe` sees negative curvature too. ``None`` leaves curvature out:
            only the fit test and the monitor measure, and ``collapse`` must watch one of their numbers.
        collapse: The rule for an alarm.
        fit_test: The test whether a copy of the network learns the samples of the task as fast as a copy of its initial
            weights. ``None`` leaves it out; ``collapse`` must then watch another number than its results. With
            ``FitTest(live=True)`` the verdict and the repairs come some batches after the start of the task; with its
            ``metric``, the default of ``collapse`` is ``Collapse("live_metric_gap")``.
        interventions: Interventions, one after the other: at a collapse, at the start of tasks, every so many steps, or
            all the time.
        undo_if_worse: Whether to undo the repairs at the start of a task, weights and optimizer state, if the number
            that ``collapse`` watches is worse after them, on the same samples. It is measured in any case. After the
            verdict of a live fit test it is the handicap in a fit test on the batch at hand, of 8 samples at least.
        monitor: Whether to measure dormant units, feature ranks and norms of the hidden layers at the start of every
            task, on the probe's samples; a :class:`~lightning_plasticity.PlasticityMonitor` selects what is measured.
        monitor_every_n_steps: Number of optimizer steps after which to measure them while training, too, on the
            training batch. Logged as ``plasticity_training/<name>``.
        task_detector: The rules by which tasks start.
        loss_fn: ``loss_fn(module, batch)`` returns the mean loss of the data with a graph; by default the loss that
            ``training_step`` returns. Needed with manual optimization, and where ``training_step`` adds other terms.
        probe_batch: ``probe_batch(trainer, module)`` returns the batch to measure on, or a ``DataLoader`` or list gives
            its first batches, at every task, instead of the batches of the task. It is transferred to the device as
            training batches are, and has no effect on random numbers. With several devices, that of rank 0 counts.
        log: What goes to the loggers: ``"lead"`` the lead numbers, ``"all"`` also all others, as
            ``plasticity_details/<name>`` and ``plasticity_layers/<name>/<layer>``, and ``False`` nothing.
        name: A name that distinguishes several callbacks of one Trainer, such as those of an actor and a critic, each
            with its own ``loss_fn``. It is a part of the checkpoint's key and of logged names:
            ``plasticity_<name>/<metric>``.

    Attributes:
        history: The reports of all tasks, a list that prints as a table and has ``to_rows``, ``to_csv``,
            ``to_json`` and ``to_pandas`` (:class:`~lightning_plasticity.reporting.history.History`).

    Raises:
        MisconfigurationException: At the start of a fit whose strategy is not supported (a single device, DDP, and
            ``fully_shard`` with ``ModelParallelStrategy`` are; of the interventions the last supports regularizers
            only), whose loss or batch is not known, or where ``collapse`` watches a metric that is not measured; at the
            first probe if the module cannot be probed.
        UnsupportedModelError: At the first probe if the curvature of the module or its loss is not known.
        ValueError: If an argument is out of range; at the first probe if there is nothing to measure on the batch, or
            an intervention cannot work on the module.
        TypeError: If an argument is of the wrong type.

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
        ...     max_steps=64,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(Model())
        >>> report = callback.history[0]
        >>> report.spectrum.num_parameters, report.metrics["probe_samples"], report.collapsed
        (66, 64.0, False)
    """

    def __init__(
        self,
        # A string, since jsonargparse would pass the arguments of a default probe to a probe of another class.
        probe: Probe | Literal["ggn"] | None = "ggn",
        *,
        collapse: Collapse = Collapse(),  # noqa: B008  (immutable)
        fit_test: FitTest | None = FitTest(),  # noqa: B008  (immutable)
        interventions: Sequence[Intervention] = (),
        undo_if_worse: bool = False,
        monitor: bool | PlasticityMonitor = True,
        monitor_every_n_steps: int | None = None,
        task_detector: TaskDetector | None = None,
        # No alias with a return type: jsonargparse would refuse functions without annotations.
        loss_fn: Callable[[LightningModule, Any], Any] | None = None,
        probe_batch: Callable[[Trainer, LightningModule], Any] | Iterable[Any] | None = None,
        log: LogLevel = "lead",
        name: str | None = None,
    ) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn={loss_fn!r} must be a function loss_fn(module, batch) -> mean loss")
        if isinstance(probe, str) and probe == "ggn":
            probe = GGNProbe()
        if probe is not None and not isinstance(probe, Probe):
            raise TypeError(
                f"probe={probe!r} must be an instance of Probe, such as GGNProbe() or HessianProbe(), or None"
            )
        if not isinstance(monitor, bool | PlasticityMonitor):
            raise TypeError(f"monitor={monitor!r} must be True, False or a PlasticityMonitor")
        if not isinstance(collapse, Collapse):
            raise TypeError(f"collapse={collapse!r} must be an instance of Collapse, such as Collapse(above=1.25)")
        if fit_test is not None and not isinstance(fit_test, FitTest):
            raise TypeError(f"fit_test={fit_test!r} must be an instance of FitTest, or None")
        if fit_test is not None and fit_test.metric is not None and collapse == Collapse():
            collapse = Collapse("live_metric_gap")
        if task_detector is not None and not isinstance(task_detector, TaskDetector):
            raise TypeError(f"task_detector={task_detector!r} must be an instance of TaskDetector, or None")
        check_positive_ints(optional=True, monitor_every_n_steps=monitor_every_n_steps)
        if log not in ("lead", "all", False):
            raise ValueError(f"log={log!r} must be 'lead', 'all' or False")
        if name is not None and not (isinstance(name, str) and name and "/" not in name):
            raise ValueError(f"name={name!r} must be a string without '/', such as 'actor', or None")
        if probe_batch is not None:
            check_probe_batch(probe_batch)
        if probe is None and fit_test is None and monitor is False:
            raise ValueError("probe=None with fit_test=None and monitor=False: nothing would be measured")
        if monitor is False and monitor_every_n_steps is not None:
            raise ValueError(f"monitor_every_n_steps={monitor_every_n_steps} with monitor=False: there is no monitor")
        self.history = History()
        self.name = name
        self._loss_fn = loss_fn
        self._probe_batch = probe_batch
        self._undo_if_worse = undo_if_worse
        self._errors = ErrorLog(name)
        self._tasks = task_detector if task_detector is not None else TaskDetector()
        chosen_monitor = PlasticityMonitor() if monitor is True else monitor or None
        self._step_monitor = StepMonitor(chosen_monitor, monitor_every_n_steps, self._errors)
        self._runner = InterventionRunner(interventions, self._errors)
        self._reporter = Reporter(name, log, collapse.metric, self.interventions, self._errors)
        self._task_start = TaskStart(
            probe,
            collapse,
            fit_test,
            chosen_monitor,
            # Errors of the default monitor are warnings, since the user did not pass a monitor.
            monitor_is_required=monitor is not True,
            runner=self._runner,
            errors=self._errors,
        )
        self._fit = _FitState()
        # Optimizer steps over all fits, up to the end of the last batch.
        self._steps = 0
        # Whether the next fit resumes from a checkpoint that was loaded.
        self._resumed = False
        # Whether the checkpoint being loaded must not replace the state.
        self._ignores_checkpoint = False

    @override
    def __repr__(self) -> str:
        """Return the constructor call, without arguments that have their default."""
        arguments: dict[str, object] = {
            "probe": None if self.probe == GGNProbe() else self.probe,
            "collapse": None if self.collapse == Collapse() else self.collapse,
            "fit_test": None if self.fit_test == FitTest() else self.fit_test,
            "interventions": [*self.interventions] or None,
            "undo_if_worse": self._undo_if_worse or None,
            "monitor": False if self.monitor is None else None,
            "monitor_every_n_steps": self._step_monitor.every_n_steps,
            "task_detector": None if repr(self._tasks) == repr(TaskDetector()) else self._tasks,
            "loss_fn": self._loss_fn,
            "probe_batch": self._probe_batch,
            "log": None if self._reporter.level == "lead" else self._reporter.level,
            "name": self.name,
        }
        return constructor_call(self, arguments)

    @property
    @override
    def state_key(self) -> str:
        kind = type(self).__qualname__
        return kind if self.name is None else f"{kind}[{self.name}]"

    @property
    def probe(self) -> Probe | None:
        """The measurement of curvature; ``None`` if there is none."""
        return self._task_start.measurements.probe

    @probe.setter
    def probe(self, probe: Probe | None) -> None:
        self._task_start.measurements.probe = probe

    @property
    def collapse(self) -> Collapse:
        """The rule for an alarm."""
        return self._task_start.verdicts.collapse

    @property
    def fit_test(self) -> FitTest | None:
        """The test whether copies of the network and of its initial weights learn equally fast, if there is one."""
        return self._task_start.measurements.fit_test

    @property
    def monitor(self) -> PlasticityMonitor | None:
        """The settings for measuring hidden activations."""
        return self._task_start.measurements.monitor

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The interventions, in the order in which they run."""
        return self._runner.interventions

    def new_task(self, task_id: TaskId = None) -> None:
        """Let the next training batch start a new task. Call it on every rank.

        A data set may call it too, right before it returns the first sample of the task: the batch that holds this
        sample starts it, although Lightning may fetch batches ahead. (After the last sample of an epoch would be too
        early, if the last batch is not full.) In a worker process (``num_workers``) it has no effect and warns; use
        ``TaskDetector(batch_label=...)`` there.

        Args:
            task_id: The name of the task, for the report.

        Raises:
            TypeError: If the name is neither an int nor a string.
        """
        self._tasks.announce(task_id)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        with _lightning_errors():
            check_strategy(trainer.strategy, self.interventions)
            if self._task_start.measurements.is_live:
                check_live(trainer)
            warn_of_lost_state(trainer)
            self._task_start.measurements.check_metric()
            check_training_step(pl_module, has_loss_fn=self._loss_fn is not None)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_model_parallel(trainer.strategy):
            with _lightning_errors():
                check_sharding(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tasks.begin_fit(trainer, resumed=self._resumed and bool(self.history), first=not self.history)
        self._resumed = False
        # Without a history, the run may have begun before the callback was added.
        if not self.history:
            self._steps = trainer.global_step
        self._fit = _FitState(steps_before=self._steps - trainer.global_step, tasks_before=len(self.history))
        self._task_start.begin_fit()
        self._reporter.begin_fit(trainer, self.history)
        with _lightning_errors():
            self._runner.begin_fit(trainer.optimizers, manual_backward=not pl_module.automatic_optimization)
        warn_of_weight_averages(trainer, self._runner)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not trains(trainer):
            return
        self._fit.in_batch = True
        # If the last batch was skipped, its monitor is still attached. It must not record the copy of the probe.
        self._step_monitor.cancel()
        self._runner.track(trainer.optimizers)
        starts_task = self._call_detector(lambda: self._tasks.new_task(trainer, pl_module, batch))
        if starts_task is None:
            starts_task = self._tasks.start_announced()
        starts_task = starts_task or not self.history
        if starts_task:
            self._share_errors()
        with _lightning_errors():
            if self._task_start.gathering is not None and not starts_task:
                self._gather(TrainerContext.of(trainer, pl_module, batch, 0, self._loss_fn))
            if self._task_start.live.is_running and not starts_task:
                self._train_shadow(TrainerContext.of(trainer, pl_module, batch, batch_idx, self._loss_fn))
            if starts_task or self._task_start.needs_start(trainer.optimizers):
                context = TrainerContext.of(trainer, pl_module, batch, batch_idx, self._loss_fn)
                self._start(context, starts_task=starts_task)
            self._step_monitor.begin(pl_module, self._steps, trainer.optimizers)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._fit.in_batch = False
        self._check_skipped(outputs)
        step_before, self._steps = self._steps, self._fit.steps_before + trainer.global_step
        if trains(trainer):
            self._reporter.report_training(trainer, self._step_monitor.end(), step_before)
            self._call_detector(lambda: self._tasks.on_batch_end(outputs))
        else:
            # Lightning ends the pass with an optimizer step, which step interventions follow, but no repair.
            step_before = self._steps
        if self.interventions and self.history:
            context = TrainerContext.of(trainer, pl_module, batch, batch_idx, self._loss_fn)
            with self._tasks.paused():
                repairs, numbers = self._runner.after_batch(context, step_before, self._steps)
            self.history[-1].repairs += repairs
            self._reporter.report_training(trainer, numbers, self._steps, self.history if repairs else ())
        self._flush_errors()

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
        accumulation = trainer.accumulate_grad_batches if pl_module.automatic_optimization else None
        scale = gradient_scale(trainer, optimizer)
        is_logged = is_logging_step(trainer)
        penalties = self._runner.before_step(
            pl_module, optimizer, accumulation=accumulation, scale=scale, with_values=is_logged
        )
        if penalties and is_logged:
            values = {name: penalty.item() for name, penalty in penalties.items()}
            self._reporter.report_training(trainer, values, self._steps)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_monitor.cancel()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._fit.in_batch = False
        self._step_monitor.cancel()
        self._tasks.end_fit()
        self._runner.end_fit()
        self._flush_errors()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_monitor.cancel()
        self._tasks.end_fit()
        self._runner.end_fit()
        self._measure_remaining(trainer, pl_module)
        if self._fit.skipped:
            rank_zero_warn("the last task could not be measured: training_step returned None for all of its batches")
        self._reporter.end_task(trainer, self.history)
        self._reporter.end_fit(trainer, self.history, new_tasks=len(self.history) - self._fit.tasks_before)
        self._share_errors()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed fit may have had nothing left to train, but samples to measure.
        self._resumed = False
        self._measure_remaining(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A checkpoint that was tested may have held no state of this callback.
        self._ignores_checkpoint = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        uncounted_steps = self._fit.steps_before + trainer.global_step - self._steps
        if self._fit.in_batch and uncounted_steps > 0 and not self._fit.warned_of_early_checkpoint:
            self._fit.warned_of_early_checkpoint = True
            rank_zero_warn(
                "a checkpoint was saved after an optimizer step and before SpectralCollapseCallback has seen the end "
                "of that batch: a run resumed from it is not the same. List the callback that saves it after "
                "SpectralCollapseCallback in Trainer(callbacks=[...])"
            )

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._resumed |= fitting and not is_restoring_for_finder(trainer)
        # Testing or validating a checkpoint must not roll back the history.
        self._ignores_checkpoint = not fitting

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "history": [report.to_dict() for report in self.history],
            "initial": self._task_start.initial_weights.state_dict(),
            "gathering": None if self._task_start.gathering is None else self._task_start.gathering.state_dict(),
            "shadow": self._task_start.live.state_dict(),
            "steps": self._steps,
            "monitored": self._step_monitor.last,
            "tasks": self._tasks.state_dict(),
            "interventions": self._runner.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._ignores_checkpoint:
            self._ignores_checkpoint = False
            return
        with _lightning_errors():
            self.history = History.from_state(state_dict)
        self._task_start.initial_weights.load_state_dict(state_dict["initial"])
        gathering = state_dict["gathering"]
        self._task_start.gathering = None if gathering is None else Gathering.from_state(gathering)
        self._task_start.live.load_state_dict(state_dict["shadow"])
        self._steps = state_dict["steps"]
        self._step_monitor.last = state_dict["monitored"]
        self._tasks.load_state_dict(state_dict["tasks"])
        self._runner.load_state_dict(state_dict["interventions"])

    def _start(self, context: TrainerContext, *, starts_task: bool) -> None:
        """Start a task: measure, run the repairs that are due and log. Or start only the running interventions.

        After an error in the first probe, or an interruption, the task starts at the next batch, maybe of another fit.
        So it does after a batch without a loss.
        """
        if starts_task:
            self._reporter.end_task(context.trainer, self.history)
        if starts_task and self._task_start.is_waiting:
            self._complete(context)
        report = None
        if starts_task:
            last = self._steps - self.history[-1].step if self.history else None
            steps = self._tasks.expected_steps(context.trainer, last or None)
            report = TaskReport(len(self.history), self._tasks.task_id, self._steps, expected_steps=steps)
        if report is not None and self._fit.skipped:
            report.remarks.append(
                f"the task begins with batch {self._fit.skipped}, counted from 0: training_step returned None for the "
                "batches before"
            )
        try:
            with self._tasks.paused():
                repair_context = self._task_start.measure_and_start(
                    context, self.history, report, self._fixed_batch_of(context), **_accumulation(context)
                )
            self._step_monitor.begin(context.model, self._steps, context.optimizers)
        except BaseException as error:
            if starts_task:
                self._task_start.gathering = None
                self._task_start.live.cancel()
            if not self.history:
                self._task_start.initial_weights.clear()
            if isinstance(error, SkippedBatchError):
                self._fit.skipped, self._fit.no_loss = self._fit.skipped + 1, error
                return
            raise
        if report is None:
            return
        self._fit.skipped = 0
        self.history.append(report)
        self._tasks.commit()
        if not self._task_start.is_waiting:
            self._repair_and_log(context.trainer, report, repair_context)

    def _check_skipped(self, outputs: Any) -> None:
        """Check that a batch without a loss in the first probe had none in training.

        Raises:
            MisconfigurationException: If it had one.
        """
        error, self._fit.no_loss = self._fit.no_loss, None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if error is not None and loss is not None and not self.history:
            raise MisconfigurationException(f"in evaluation mode, in which the probe runs, {error}") from error

    def _fixed_batch_of(self, context: TrainerContext) -> Callable[[int], Any] | None:
        """Return a function from a number of samples to the batch to measure on; ``None`` for that of the task."""
        if self._probe_batch is None:
            return None
        return partial(fixed_batch, self._probe_batch, context.trainer, context.model)

    def _gather(self, context: TrainerContext) -> None:
        """Add the batch to the samples of the task, and measure them if there are enough."""
        if self._task_start.gather(context, self.history[:-1]):
            self._measure_gathered(context)

    def _train_shadow(self, context: TrainerContext) -> None:
        """Let the fresh network train on the batch, and compare the networks if they have seen enough."""
        with self._tasks.paused():
            self._task_start.live.train(context, **_accumulation(context))
        if self._task_start.gathering is None and self._task_start.live.is_complete:
            self._compare(context)

    def _complete(self, context: TrainerContext, *, may_repair: bool = True) -> None:
        """Complete the report of a task that ends with what there is.

        Args:
            context: The module and any batch.
            may_repair: Whether there is training to come, without which a repair would only do harm.
        """
        if self._task_start.gathering is not None:
            self._measure_gathered(context, may_repair=may_repair)
        if self._task_start.live.is_running:
            self._compare(context, may_repair=may_repair)

    def _compare(self, context: TrainerContext, *, may_repair: bool = True) -> None:
        """Compare the network with the fresh one, run the repairs that are due and log."""
        report = self.history[-1]
        self._share_errors()
        self._task_start.live.compare(report, self.history[:-1])
        repair_context: ProbeContext = context
        if may_repair and self._runner.due_at_task_start(report.task, collapsed=report.collapsed):
            repair_context = context.gather(self._task_start.measurements.samples)
        self._finish(context.trainer, report, repair_context, may_repair=may_repair)

    def _measure_gathered(self, context: TrainerContext, *, may_repair: bool = True) -> None:
        """Measure the gathered samples on the weights that the task began with, run the repairs that are due and log.

        Args:
            context: The module and any batch.
            may_repair: Whether there is training to come, without which a repair would only do harm.
        """
        report = self.history[-1]
        self._share_errors()
        with self._tasks.paused():
            repair_context = self._task_start.measure_gathered(context, self.history[:-1], report)
        if not self._task_start.is_waiting:
            self._finish(context.trainer, report, repair_context, may_repair=may_repair)

    def _measure_remaining(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the report of a task that ends with the fit."""
        if self._task_start.is_waiting:
            with _lightning_errors():
                context = TrainerContext.of(trainer, pl_module, None, 0, self._loss_fn)
                self._complete(context, may_repair=False)

    def _finish(self, trainer: Trainer, report: TaskReport, context: ProbeContext | None, *, may_repair: bool) -> None:
        """Run the repairs that are due if there is training to come, and log the report."""
        if not may_repair and self._runner.due_at_task_start(report.task, collapsed=report.collapsed):
            report.remarks.append("the repairs that were due are left out, since the fit has ended")
            context = None
        self._repair_and_log(trainer, report, context)

    def _repair_and_log(self, trainer: Trainer, report: TaskReport, context: ProbeContext | None) -> None:
        """Run the repairs that are due at the start of a task, if there is a context for them, and log the report."""
        repairs = []
        if context is not None:
            if self.interventions:
                # Forward passes of repairs must not be monitored.
                self._step_monitor.postpone()
            with self._tasks.paused():
                repairs = self._repair(context, report)
        report.repairs += repairs
        self._reporter.report_task(trainer, self.history, repairs)

    def _repair(self, context: ProbeContext, report: TaskReport) -> list[RepairReport]:
        """Run the repairs that are due and measure the network again, and undo them if that is worse."""
        is_due = self._runner.due_at_task_start(report.task, collapsed=report.collapsed)
        if is_due:
            self._task_start.repair_check.measure_before(context, report)
        state = TrainingState(context.model, context.optimizers) if self._undo_if_worse and is_due else None
        repairs = self._runner.at_task_start(context, report.task, self._steps, collapsed=report.collapsed)
        if repairs:
            is_worse = self._task_start.repair_check.measure_after(context, report, [repair.name for repair in repairs])
            if is_worse and state is not None:
                state.restore()
                repairs = [replace(repair, undone=True) for repair in repairs]
        return repairs

    def _call_detector(self, call: Callable[[], bool | None]) -> bool | None:
        """Return the result of a call of the task detector; ``None`` if it fails after the first task."""
        try:
            return call()
        except Exception as error:
            if not self.history or isinstance(local_error(error), UnusableDetectorError):
                raise_local_error(error)
            self._errors.record("task_detector", "new tasks could not be detected", error)
            return None

    def _flush_errors(self) -> None:
        if self.history:
            self._errors.flush_into(self.history[-1].errors)

    def _share_errors(self) -> None:
        """Give the errors of each rank, such as that of a logger, to all of them."""
        self._flush_errors()
        if self.history:
            self.history[-1].errors = gather_errors(self.history[-1].errors)


def _accumulation(context: TrainerContext) -> dict[str, Any]:
    """Return over how many batches gradients are accumulated, and whether this one is the last of them."""
    if not context.model.automatic_optimization:
        return {}
    return {"window": context.trainer.accumulate_grad_batches, "ends_window": steps_after_batch(context.trainer)}


@contextlib.contextmanager
def _lightning_errors() -> Iterator[None]:
    """Raise each ``MisconfigurationError`` as Lightning's ``MisconfigurationException``, which its users catch."""
    try:
        yield
    except MisconfigurationError as error:
        raise MisconfigurationException(str(error)) from error.__cause__ or error
