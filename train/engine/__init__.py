"""The training step, and what it works on, on one process or several."""
