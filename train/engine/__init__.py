"""The training step and its state, for one process or several."""
