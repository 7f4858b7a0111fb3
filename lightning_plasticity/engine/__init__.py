"""Measure, decide and repair at the start of a task, on any torch module.

Everything here is written against :class:`~lightning_plasticity.context.ProbeContext` and does not depend on a Trainer.

* ``task_start``: all steps at the first batch of a task: probe, fit test, monitor, verdict, start of interventions
* ``measurements``, ``gathering``: what is measured, and the samples of several small batches
* ``live_comparison``, ``shadow_run``: the verdict of a live fit test, and its fresh network
* ``verdicts``, ``explanation``: the verdict of a task, what it rests on, and remarks
* ``repair_check``, ``fits_at_hand``: a network before and after its repairs
* ``initial_weights``: the initial weights, whose measurements are the reference
* ``monitoring``: hidden activations, at the start of a task and every few steps
* ``intervention_runner``: repairs at tasks and after steps, step interventions, regularizers
* ``regularizer_gradients``: penalties, added to the gradients before an optimizer step
* ``step_counter``: the number of backward passes and of optimizer steps that were not skipped
* ``error_log``: errors that do not end training
"""
