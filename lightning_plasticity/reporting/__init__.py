"""Report results and errors to loggers, figures, progress bars and warnings."""
