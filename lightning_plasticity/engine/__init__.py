"""Measure, decide and repair at the start of a task, on any torch module.

Everything here is written against :class:`~lightning_plasticity.context.ProbeContext` and knows no Trainer.

* ``task_start``: the course of a task's first batch: probe, monitor, verdict, start of interventions
* ``initial_weights``: the weights that the network is compared with
* ``monitoring``: hidden activations, at the start of a task and every few steps
* ``intervention_runner``: repairs at tasks and after steps, step interventions, regularizers
* ``regularizer_gradients``: penalties, added to the gradients before an optimizer step
* ``step_counter``: backward passes and optimizer steps, as they are really taken
* ``error_log``: errors that do not end training
"""
