"""Many runs: one after the other, in processes, or on a Ray cluster."""
