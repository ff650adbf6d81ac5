"""Stage 2: train students from a cache of teacher outputs, and teachers without weights."""
