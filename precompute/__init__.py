"""Stage 1: run the teacher once and fill a cache."""
