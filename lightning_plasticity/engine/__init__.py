"""Measure, decide and repair at the start of a task, on any torch module."""
