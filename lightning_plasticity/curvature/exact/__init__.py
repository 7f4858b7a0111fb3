"""Build the loss-weighted Gram matrix without forming a Jacobian."""
