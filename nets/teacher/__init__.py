"""The teacher: its taps, its outputs and its identity."""
