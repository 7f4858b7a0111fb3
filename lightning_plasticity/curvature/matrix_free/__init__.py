"""Estimate spectra from matrix-vector products."""
