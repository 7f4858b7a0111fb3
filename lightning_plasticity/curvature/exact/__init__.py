"""Compute exact spectra of the Gauss-Newton matrix and the tangent kernel, without forming a Jacobian.

A batch passes the files in this order:

1. ``recorded_loss`` runs the model and the loss once. ``recording`` keeps all ``operations``, by their place in the
   autograd graph, and the calls of known layer and loss functions.
2. ``output_edges`` finds where the network ends: at the last operations that use parameters. ``outputs`` holds these
   results; its ``OutputRows`` multiply by ``Jᵀ``.
3. ``loss_derivatives`` differentiates the loss with respect to the outputs. ``loss_hessian`` represents its Hessian: by
   autograd for any loss, or by the closed forms of ``loss_rules``, with ``loss_calls`` and ``hessian_factors``.
   ``custom_losses`` lets users name the outputs.
4. ``layer_rules`` turns each call of a layer function into a ``layer_calls.LayerCall``, whose ``parameter_uses`` have
   the closed-form Jacobian with respect to each parameter. ``layer_recorder`` keeps these records, expands broadcast
   parameters in a call of their own, and follows what is computed from parameters alone: slices, normalised weights.
5. ``sample_blocks`` divides the batch into blocks of samples that do not interact.
6. ``jacobian`` computes ``J Jᵀ``: ``jacobian_closed_form`` from the closed forms, which it checks against autograd, and
   ``jacobian_rows`` with one backward pass per row for all other parameters.
7. ``gram`` runs these steps and returns ``J Jᵀ / n`` (the tangent kernel) and, where the Hessian ``S Sᵀ`` of the loss
   is positive semi-definite, ``Sᵀ J Jᵀ S``, whose non-zero eigenvalues are those of the Gauss-Newton matrix
   ``Jᵀ S Sᵀ J``.
"""
