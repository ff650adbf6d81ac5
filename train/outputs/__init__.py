"""Where a training step gets the teacher's outputs."""
