"""Connect the engine to the Trainer of Lightning.

* ``sandbox``: ``TrainerContext``, which makes isolated copies of a LightningModule for the engine
* ``loss``: the loss that ``training_step`` returns
* ``probe_batch``: the batch that a user gives to measure on
* ``schedulers``: learning rates and schedulers, restored after a copy has run
* ``checks``: errors and warnings before the first step, about the module, its loss, the Trainer and its strategy
"""
