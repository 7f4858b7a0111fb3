"""Estimate spectra from matrix-vector products, for models and batches of any size.

* :mod:`.linear_operators`: the Hessian and the Gauss-Newton matrix as linear operators.
* :mod:`.micro_batches`: operators of a batch in micro-batches or over several processes.
* :mod:`.lanczos`: one Lanczos run.
* :mod:`.stochastic_lanczos`: the spectrum from the runs of several start vectors.
"""
