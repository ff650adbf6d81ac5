"""The networks by name, their taps, and the teacher's pass."""
