"""Estimate spectra from matrix-vector products, for models and batches of any size.

* :mod:`.linear_operators`: the Hessian and the Gauss-Newton matrix as linear operators.
* :mod:`.output_jacobian`: products with the Jacobian of the outputs and its transpose.
* :mod:`.tangent_kernel`: the tangent kernel as a linear operator, and its measurement.
* :mod:`.micro_batches`: operators of a batch in micro-batches or over several processes.
* :mod:`.lanczos`: one Lanczos run.
* :mod:`.eigenpairs`: the largest eigenvalues with their eigenvectors, by Lanczos with restarts.
* :mod:`.stochastic_lanczos`: the spectrum from the runs of several start vectors.
"""
