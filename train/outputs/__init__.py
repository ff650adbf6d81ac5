"""Sources of the teacher's outputs for a training step."""
