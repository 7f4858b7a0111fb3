"""Run a network without changing it, its batch or the global state of torch."""
