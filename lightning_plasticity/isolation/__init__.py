"""Run a network without leaving a trace in it."""
