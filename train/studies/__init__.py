"""Studies of many runs: in sequence, in parallel processes, or on a Ray cluster."""
