"""The evidence for the verdict: streams of tasks, trained beside a fresh network, and the table of what predicts it."""
