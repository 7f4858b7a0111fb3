"""Track the hidden activations of a network while it runs."""
