"""Compute exact spectra of the Gauss-Newton matrix and the tangent kernel, without forming a Jacobian.

A batch passes the files in this order:

1. ``recording`` runs the model and the loss once, and records the calls of known layer and loss functions.
2. ``loss_rules`` turns each call of a loss function into a ``loss_calls.LossCall``, which has the gradient and the
   Hessian of the loss with respect to the network outputs. ``custom_losses`` does the same for any convex loss, and
   ``hessian_factors`` represents the Hessian as ``S Sᵀ``.
3. ``layer_rules`` turns each call of a layer function into a ``layer_calls.LayerCall``, whose ``parameter_uses`` have
   the closed-form Jacobian with respect to each parameter. ``layer_recorder`` keeps these records, expands broadcast
   parameters in a call of their own, and follows what is computed from parameters alone: slices, normalised weights.
4. ``outputs`` collects the network outputs from the loss calls and checks that the loss depends on nothing else. Its
   ``OutputRows`` multiply by ``Jᵀ``.
5. ``sample_blocks`` divides the batch into blocks of samples that do not interact.
6. ``jacobian`` computes ``J Jᵀ``: ``jacobian_closed_form`` from the closed forms, which it checks against autograd, and
   ``jacobian_rows`` with one backward pass per row for all other parameters.
7. ``gram`` runs these steps and returns ``J Jᵀ / n`` (the tangent kernel) and ``Sᵀ J Jᵀ S``, whose non-zero
   eigenvalues are those of the Gauss-Newton matrix ``Jᵀ S Sᵀ J``.
"""
