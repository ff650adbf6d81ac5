"""The teacher's pass: its taps, its outputs, its identity."""
