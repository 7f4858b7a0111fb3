"""Connect the engine to the Trainer of Lightning.

* ``sandbox``: isolated copies of a LightningModule, as a context for the engine
* ``loss``: the loss that ``training_step`` returns
* ``schedulers``: learning rates and schedulers, restored after a copy has run
* ``checks``, ``strategies``: errors and warnings before the first step
"""
