"""Show what was measured: loggers, figures, progress bars and errors."""
